"""Small runs of the real T5X, shared by the tests of this folder.

Where T5X, airio or jestimator are absent, all of them skip here: one line of the closing summary.
"""

from __future__ import annotations

import importlib.util
import pathlib
import warnings
from typing import Any

import pytest

if missing := [name for name in ("t5x", "airio", "jestimator", "seqio") if importlib.util.find_spec(name) is None]:
    pytest.skip(
        f"{', '.join(missing)} not installed, nor the sources in ~/.cache/jaxpruner/frameworks", allow_module_level=True
    )

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jaxpruner_t5x  # noqa: F401
    from jaxpruner_t5x import launch, tasks

import numpy as np
import orbax.checkpoint as ocp
import seqio
import tensorflow as tf
from flax import traverse_util

# Those of the paper's library, and `movement`, whose state has all that a state may have: statistics and dense weights.
ALGORITHMS = [
    "magnitude", "random", "saliency", "magnitude_ste", "random_ste", "global_magnitude", "global_saliency",
    "static_sparse", "rigl", "set", "movement",
]  # fmt: skip
# Hosts warn of one another's old ways.
quiet = pytest.mark.filterwarnings("ignore")
PRETRAIN = "jaxpruner_t5x/configs/bible_pretrain.gin"
FINETUNE = "jaxpruner_t5x/configs/bible_finetune.gin"
SPARSE = "jaxpruner_t5x/configs/sparse.gin"
DENSE_STEPS = 4
T5 = "network.T5Config"
SIZES = {"num_encoder_layers": 1, "num_decoder_layers": 1, "emb_dim": 16, "head_dim": 8, "num_heads": 2, "mlp_dim": 32}
MODEL = {f"{T5}.{name}": size for name, size in SIZES.items()} | {"TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 32}}
SMALL = MODEL | {
    "BATCH_SIZE": 4,
    "EVAL_PERIOD": 0,
    "train/utils.DatasetConfig.shuffle": False,
}
MASKS = {"ALGORITHM": "magnitude", "UPDATE_START_STEP": 2, "UPDATE_END_STEP": 6, "UPDATE_FREQ": 2}


# The same examples in each batch, so that a run that is resumed sees what it would have seen.
ONE_VERSE = {"MIXTURE_OR_TASK_NAME": "one_verse", "train/utils.DatasetConfig.pack": False}
verse = {"inputs": ["In the beginning God created the heaven and the earth."], "targets": ["In the beginning"]}
seqio.TaskRegistry.add(
    "one_verse",
    source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(verse),
        splits=("train", "validation"),
        num_input_examples={"train": 1, "validation": 1},
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    output_features=tasks.features(),
)


def scanned() -> Any:
    """A scalable T5, for gin: which cannot know both networks in one process, since T5X's files call both `network`."""
    from t5x.examples.scalable_t5 import network

    config = network.T5Config(vocab_size=4224, dropout_rate=0.0, **SIZES | {"num_encoder_layers": 2})
    return network.Transformer(config=config)


def bind(**bindings: Any) -> list[str]:
    """`NAME = VALUE` for gin; a string that starts with @ or % is a reference."""
    return [
        f"{name} = {value if isinstance(value, str) and value[:1] in ('@', '%') else repr(value)}"
        for name, value in bindings.items()
    ]


def pretrain(folder: pathlib.Path, steps: int = DENSE_STEPS, **bindings: Any) -> Any:
    given = {"MODEL_DIR": str(folder), "TRAIN_STEPS": steps, "CHECKPOINT_PERIOD": steps}
    return launch.train([PRETRAIN], bind(**SMALL | given | bindings))


def finetune(folder: pathlib.Path, start: pathlib.Path | str, steps: int, sparse: bool = True, **bindings: Any) -> Any:
    """`steps` is the last step, those of the checkpoint included."""
    given = {
        "MODEL_DIR": str(folder), "INITIAL_CHECKPOINT_PATH": str(start), "TRAIN_STEPS": steps,
        "CHECKPOINT_PERIOD": steps - DENSE_STEPS or 1,
    }  # fmt: skip
    files = [FINETUNE, SPARSE] if sparse else [FINETUNE]
    return launch.train(files, bind(**SMALL | given | (MASKS if sparse else {}) | bindings))


def saved(checkpoint: pathlib.Path | str) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by their names."""
    tree = ocp.PyTreeCheckpointer().restore(pathlib.Path(checkpoint) / "state")
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def of(state: Any) -> dict[str, np.ndarray]:
    """The arrays of a train state by the names that checkpoints give them."""
    return {
        name: np.asarray(leaf)
        for name, leaf in traverse_util.flatten_dict(state.state_dict(), sep="/").items()
        if leaf is not None
    }


def assert_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        if name != "state/step":  # which T5X restores as a float
            assert found[name].dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
