"""Small trainings with the real Scenic, shared by the tests of this folder.

Where Scenic is absent, all of them skip here: one line of the closing summary.
"""

from __future__ import annotations

import importlib.util
import pathlib
import warnings
from typing import Any

import pytest

if importlib.util.find_spec("scenic") is None or importlib.util.find_spec("clu") is None:
    pytest.skip(
        "Scenic is not installed, nor its sources in ~/.cache/jaxpruner/frameworks/scenic", allow_module_level=True
    )

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jaxpruner_scenic
    from jaxpruner_scenic import main

import jax
import ml_collections
import numpy as np
from clu import metric_writers
from flax.training import checkpoints
from scenic.dataset_lib import dataset_utils, datasets

import jaxpruner
from jaxpruner.training.projection import SparseState

# Those of the paper's library, and `movement`, whose state has all that a state may have: statistics and dense weights.
ALGORITHMS = [
    "magnitude", "random", "saliency", "magnitude_ste", "random_ste", "global_magnitude", "global_saliency",
    "static_sparse", "rigl", "set", "movement",
]  # fmt: skip
# Hosts warn of one another's old ways. What a test is about is never a warning here.
quiet = pytest.mark.filterwarnings("ignore")
STEPS = 20


@datasets.add_dataset("one_batch")
def one_batch(*, batch_size: int, eval_batch_size: int, num_shards: int, **_: Any) -> dataset_utils.Dataset:
    """The same 32 digits in each step, so that a run that is resumed sees what it would have seen."""
    from jaxpruner_scenic.datasets import digits

    (images, labels), _ = digits(False)
    batch = {
        "inputs": images[:batch_size], "label": np.eye(10, dtype=np.float32)[labels[:batch_size]],
        "batch_mask": np.ones(batch_size, np.float32),
    }  # fmt: skip
    sharded = dataset_utils.shard(batch, num_shards)

    def batches():
        while True:
            yield dict(sharded)

    meta_data = {
        "num_classes": 10, "input_shape": (-1, 8, 8, 1), "num_train_examples": batch_size,
        "num_eval_examples": batch_size, "input_dtype": np.float32, "target_is_onehot": True,
    }  # fmt: skip
    return dataset_utils.Dataset(batches(), batches(), None, meta_data)


def config(algorithm: str | None = "magnitude", **more: Any) -> ml_collections.ConfigDict:
    """A network of two hidden layers on digits, 20 steps; `sparsity_` keys go to the sparsity."""
    c = ml_collections.ConfigDict(
        {
            "dataset_name": "one_batch",
            "data_dtype_str": "float32",
            "dataset_configs": {},
            "model_name": "fully_connected_classification",
            "model_dtype_str": "float32",
            "hid_sizes": [32, 16],
            "trainer_name": "classification_trainer",
            "batch_size": 32,
            "eval_batch_size": 32,
            "num_training_steps": STEPS,
            "log_eval_steps": STEPS,
            "log_summary_steps": 5,
            "rng_seed": 0,
            "l2_decay_factor": None,
            "max_grad_norm": None,
            "label_smoothing": None,
            "init_head_bias": 0.0,
            "optimizer": "adam",
            "optimizer_configs": {},
            "lr_configs": {
                "learning_rate_schedule": "compound",
                "factors": "constant",
                "base_learning_rate": 1e-3,
            },
            "write_summary": True,
            "xprof": False,
            "checkpoint": False,
            "debug_train": False,
            "debug_eval": False,
        }
    )
    if algorithm is not None:
        c.sparsity_config = {
            "algorithm": algorithm,
            "sparsity": 0.8,
            "dist_type": "erk",
            "update_start_step": 4,
            "update_end_step": 12,
            "update_freq": 4,
        }
    for name, value in more.items():
        if name.startswith("sparsity_"):
            c.sparsity_config[name.removeprefix("sparsity_")] = value
        else:
            c[name] = value
    return c


def vit(algorithm: str | None = "magnitude", **more: Any) -> ml_collections.ConfigDict:
    """A ViT with a class token and learned positions: one layer of 16."""
    model = {
        "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1, "patches": {"size": [4, 4]},
        "representation_size": 16, "classifier": "token", "attention_dropout_rate": 0.0, "dropout_rate": 0.0,
    }  # fmt: skip
    return config(algorithm, **({"model_name": "vit_multilabel_classification", "model": model} | more))


class Writer(metric_writers.MetricWriter):
    """Keeps the scalars."""

    def __init__(self):
        self.scalars: dict[str, list[tuple[int, float]]] = {}

    def write_scalars(self, step: int, scalars: Any) -> None:
        for name, value in scalars.items():
            self.scalars.setdefault(name, []).append((step, float(value)))

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    write_images = write_audios = write_texts = write_histograms = write_hparams = write_videos = _ignore
    write_summaries = write_pointcloud = flush = close = _ignore


def run(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> tuple[Any, Writer]:
    """The state of one device after a training, and what was logged."""
    writer = Writer()
    state, _, _ = main.train(jax.random.PRNGKey(c.rng_seed), c, str(workdir), writer)
    return jax.device_get(jax.tree.map(lambda x: x[0], state)), writer


def sparse_states(state: Any) -> list[SparseState]:
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda node: isinstance(node, SparseState))
    return [node for node in nodes if isinstance(node, SparseState)]


def sparsities(params: Any) -> dict[str, float]:
    summary = jaxpruner.summarize_sparsity(params)
    return {name: value for name, value in summary.items() if not name.startswith("_")}


def assert_exactly_sparse(state: Any, packed: bool = False, sparsity: float = 0.8) -> None:
    """Kernels lie on the masks, which have the entries that the targets say; all else is dense."""
    (sparse,) = sparse_states(state)
    storage = jaxpruner.MagnitudePruning(use_packed_masks=packed)
    masks = storage.current_masks(sparse, state.params)
    kept = total = leaves = 0
    for path, mask in jax.tree_util.tree_leaves_with_path(masks):
        param = state.params
        for key in path:
            param = param[key.key]
        assert path[-1].key == "kernel"
        assert not np.any(np.asarray(param)[~np.asarray(mask)])
        kept, total, leaves = kept + int(mask.sum()), total + mask.size, leaves + 1
    assert 1 - kept / total == pytest.approx(sparsity, abs=leaves / total)  # ERK rounds each leaf


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


__all__ = ["checkpoints", "jaxpruner_scenic", "main"]
