"""Finds T5X and the two packages that it imports and that no registry has."""

from __future__ import annotations

import importlib.util
import pathlib

# The commits that are tested.
COMMITS = {
    "google-research/t5x": "cc342d4",
    "google/airio": "69897df",
    "google-research/jestimator": "326824a",
}
INSTALL = "pip install --no-deps " + " ".join(
    f"'git+https://github.com/{repository}@{commit}'" for repository, commit in COMMITS.items()
)


def load() -> None:
    """Checks that T5X can be imported.

    Raises:
      ImportError: if T5X, airio or jestimator is missing, or jestimator is PyPI's release; it names the remedy.
    """
    for name in ("t5x", "airio", "jestimator"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"No module named {name!r}, which T5X needs and no package registry has. Install it from its "
                f"repository: {INSTALL}",
                name=name,
            )
    spec = importlib.util.find_spec("jestimator")
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    if any("jax.tree_map(" in source.read_text() for folder in folders for source in folder.glob("amos*.py")):
        raise ImportError(
            f"The package 'jestimator' in {folders[0]} is the release on PyPI, which fails on today's JAX. First: "
            f"pip uninstall jestimator. Then: {INSTALL}",
            name="jestimator",
        )
