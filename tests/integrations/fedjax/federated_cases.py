"""Small federated trainings on real digits, shared by the tests of this folder.

Where FedJAX is not installed, all of them skip here: one line of the closing summary.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

fedjax = pytest.importorskip("fedjax", reason="FedJAX is not installed; `make setup` installs it")

import haiku as hk  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import jaxpruner_fedjax  # noqa: E402

# Those of the paper's library, and `movement`, whose state has all that a state may have: statistics and dense weights.
ALGORITHMS = (
    "no_prune", "magnitude", "random", "saliency", "magnitude_ste", "random_ste", "global_magnitude", "global_saliency",
    "static_sparse", "rigl", "set", "preserve", "movement",
)  # fmt: skip
GLOBAL = ("global_magnitude", "global_saliency")
ROUNDS = 3
BATCHES = fedjax.ShuffleRepeatBatchHParams(batch_size=16, num_steps=2, seed=0)


@functools.cache
def digits(clients: int = 4) -> Any:
    """20 digits a client, as federated EMNIST has them: every second client is of its other domain.

    Three of four clients are of both; `agnostic_fed_avg` divides by the examples of each domain.
    """
    loaded = load_digits()
    pixels = np.pad(np.kron(loaded.images / 16, np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    split = {
        b"f%04d_00" % (i + 2100 * (i % 2)): {
            "pixels": 1 - pixels[20 * i : 20 * i + 20],
            "label": loaded.target[20 * i : 20 * i + 20].astype(np.int32),
        }
        for i in range(clients)
    }
    return fedjax.datasets.emnist.preprocess_split(fedjax.InMemoryFederatedData(split))


@functools.cache
def model() -> Any:
    """Two kernels and two biases: (784, 6) and (6, 10)."""

    def forward(batch):
        return hk.Sequential([hk.Flatten(), hk.Linear(6), jax.nn.relu, hk.Linear(10)])(batch["x"])

    return fedjax.create_model_from_haiku(
        hk.transform(forward),
        {"x": np.zeros((1, 28, 28, 1), np.float32)},
        lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits),
        {"loss": fedjax.metrics.CrossEntropyLoss(), "accuracy": fedjax.metrics.Accuracy()},
    )


@functools.cache
def params() -> Any:
    return model().init(jax.random.PRNGKey(0))


def task() -> Any:
    """For the trainer's `--task federated_cases:task`."""
    return digits(), digits(), model()


def pair() -> Any:
    """No task."""
    return 1, 2


def is_large(path: tuple[str, ...], param: Any) -> bool:
    """Half of the kernels, so that tests compile in half of the time."""
    return param.size > 1000


def config(algorithm: str, packed: bool = False, **more: Any) -> dict[str, Any]:
    """80 % of the large kernel (of both, for those that distribute by themselves) in three rounds."""
    if algorithm not in (*GLOBAL, "no_prune"):
        more.setdefault("filter_fn", is_large)
    if algorithm in ("rigl", "set"):
        more.setdefault("update_freq", 2)  # they train in the other rounds only
    return {
        "algorithm": algorithm,
        "sparsity": 0.8,
        "update_start_step": 0,
        "update_end_step": 2,
        "use_packed_masks": packed,
        **more,
    }


@functools.cache  # one compilation for all tests of a process
def server(algorithm: str, packed: bool = False, **more: Any) -> jaxpruner_fedjax.SparseOptimizer:
    return jaxpruner_fedjax.server_optimizer(optax.adam(0.01), config(algorithm, packed, **more))


def clients(round_num: int = 0, count: int = 3) -> list[Any]:
    return jaxpruner_fedjax.sample_clients(digits(), count, seed=0, round_num=round_num)


@functools.cache
def fed_avg(optimizer: Any, client_optimizer: Any = None) -> Any:
    """FedJAX's own."""
    return fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model()), client_optimizer or fedjax.optimizers.sgd(0.1), optimizer, BATCHES
    )


@functools.cache
def masked(optimizer: Any, client_optimizer: Any = None, **updates: Any) -> Any:
    return jaxpruner_fedjax.federated_averaging(
        fedjax.model_grad(model()),
        client_optimizer or fedjax.optimizers.sgd(0.1),
        optimizer,
        BATCHES,
        jaxpruner_fedjax.ClientUpdates(**updates) if updates else jaxpruner_fedjax.ClientUpdates(masked=True),
    )


def run(algorithm: Any, state: Any = None, rounds: int = ROUNDS) -> list[Any]:
    """The server's states, the first one included."""
    states = [algorithm.init(params()) if state is None else state]
    for round_num in range(rounds):
        states.append(algorithm.apply(states[-1], clients(round_num))[0])
    return states


def pruned(optimizer: Any, state: Any, tree: Any = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(leaf, mask) of each leaf that is pruned: of the parameters, or of another tree like them."""
    leaves = jax.tree.leaves(state.params if tree is None else tree)
    masks = jax.tree.leaves(optimizer.masks(state), is_leaf=lambda mask: mask is None)
    pairs = zip(leaves, masks, strict=True)
    return [(np.asarray(leaf), np.asarray(mask)) for leaf, mask in pairs if mask is not None]


def assert_on_masks(optimizer: Any, state: Any) -> None:
    for param, mask in pruned(optimizer, state):
        assert not param[~mask].any()


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
