"""The seqio task `texts_span_corruption`: T5's denoising of `documents`; importing this module registers it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from t5.data import preprocessors

from jaxpruner_baselines.corpus import documents
from jaxpruner_t5x import bible

NAME = "texts_span_corruption"
PIECES, EXTRA_IDS = 4000, 100


def vocabulary() -> seqio.SentencePieceVocabulary:
    """The vocabulary of the task, with T5's 100 sentinels; trained on the first use and kept, by its texts."""
    return seqio.SentencePieceVocabulary(_vocabulary_file(), extra_ids=EXTRA_IDS)


@functools.cache
def _vocabulary_file() -> str:
    found = documents.documents("train")
    digest = hashlib.sha256("\0".join(found).encode()).hexdigest()[:8]
    return bible.kept_vocabulary(f"texts-{digest}", lambda: found, PIECES)


def texts(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    """The documents of a split: to train, in an order drawn by the seed, so that batches mix what they are of."""
    found = documents.documents(split)
    if shuffle_files:
        np.random.default_rng(seed).shuffle(found)
    return tf.data.Dataset.from_tensor_slices({"text": found})


def sequences(split: str, lengths: Mapping[str, int], count: int, converter: Any) -> dict[str, np.ndarray]:
    """Sequences of a split at equal distances through its documents, the same ones each time.

    Args:
      split: the split.
      lengths: of inputs and targets.
      count: how many.
      converter: seqio's converter to what a model takes.

    Returns:
      What the model takes, each of shape (count, ...).

    Raises:
      ValueError: if the split has fewer.
    """
    dataset = seqio.get_dataset(
        NAME, dict(lengths), dataset_split=split, shuffle=False, seed=0, feature_converter=converter
    )
    found = list(dataset.as_numpy_iterator())
    if count > len(found):
        raise ValueError(f"{count} sequences asked for, the {split} documents have {len(found)}. Ask for fewer.")
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]
    return {name: np.stack([sequence[name] for sequence in chosen]) for name in chosen[0]}


def register() -> None:
    """Registers the task; does nothing the second time."""
    if NAME in seqio.TaskRegistry.names():
        return
    feature = seqio.Feature(vocabulary=vocabulary(), add_eos=True)
    seqio.TaskRegistry.add(
        NAME,
        source=seqio.FunctionDataSource(texts, splits=documents.SPLITS),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"}),
            seqio.preprocessors.tokenize,
            preprocessors.span_corruption,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
        metric_fns=[],
    )


register()
