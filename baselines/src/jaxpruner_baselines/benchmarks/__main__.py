"""`python -m jaxpruner_baselines.benchmarks`: the same as `jaxpruner-baselines bench`."""

from __future__ import annotations

import typer

from jaxpruner_baselines.benchmarks.command import bench

if __name__ == "__main__":
    typer.run(bench)
