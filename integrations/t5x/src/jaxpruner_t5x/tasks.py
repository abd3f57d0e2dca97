"""seqio tasks on text that needs no download; importing this module registers them.

`web_span_corruption`: T5's denoising of the World English Bible by chapters, a small stand-in for C4.
`kjv_to_web`: a verse of 1611's English to modern English, with BLEU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sacrebleu
import seqio
import tensorflow as tf
from t5.data import preprocessors

from jaxpruner_t5x import bible

EXTRA_IDS = 100


def vocabulary() -> seqio.SentencePieceVocabulary:
    """The vocabulary of the tasks, with T5's 100 sentinels; trained on the first use and kept."""
    return seqio.SentencePieceVocabulary(bible.vocabulary_file(), extra_ids=EXTRA_IDS)


def chapters(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"text": bible.chapters(split)})


def pairs(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    inputs, targets = zip(*bible.pairs(split), strict=True)
    return tf.data.Dataset.from_tensor_slices({"inputs": list(inputs), "targets": list(targets)})


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU of sacrebleu (Papineni et al., 2002; Post, 2018), 0 to 100."""
    return {"bleu": sacrebleu.corpus_bleu(list(predictions), [list(targets)]).score}


def _sizes(count: Any) -> dict[str, int]:
    return {split: len(count(split)) for split in bible.SPLITS}


def features() -> dict[str, seqio.Feature]:
    """Inputs and targets in the vocabulary of the tasks."""
    feature = seqio.Feature(vocabulary=vocabulary(), add_eos=True)
    return {"inputs": feature, "targets": feature}


def register() -> None:
    """Registers both tasks; does nothing the second time."""
    if "kjv_to_web" in seqio.TaskRegistry.names():
        return
    seqio.TaskRegistry.add(
        "web_span_corruption",
        source=seqio.FunctionDataSource(chapters, splits=bible.SPLITS, num_input_examples=_sizes(bible.chapters)),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"}),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            preprocessors.span_corruption,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features(),
        metric_fns=[],
    )
    seqio.TaskRegistry.add(
        "kjv_to_web",
        source=seqio.FunctionDataSource(pairs, splits=bible.SPLITS, num_input_examples=_sizes(bible.pairs)),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features(),
        metric_fns=[bleu],
    )


register()
