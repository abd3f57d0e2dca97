"""`python -m jaxpruner_baselines`: the same as the command `jaxpruner-baselines`."""

from __future__ import annotations

from jaxpruner_baselines.cli import main

if __name__ == "__main__":
    main()
