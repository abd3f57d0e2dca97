"""What an algorithm remembers: where it is, what becomes of it, and that others pay nothing for it."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import jaxpruner

PARAMS = {"a": jnp.arange(1.0, 33.0).reshape(4, 8), "bias": jnp.ones(8), "b": -jnp.arange(1.0, 17.0).reshape(2, 8)}


@dataclasses.dataclass(eq=False)
class LongAndShort(jaxpruner.BaseUpdater):
    """Two trees: the sum of the gradients, and the last ones, of the other sign."""

    def init_statistics(self, params):
        return {"sum": jax.tree.map(jnp.zeros_like, params), "last": jax.tree.map(jnp.zeros_like, params)}

    def update_statistics(self, params, grads, statistics):
        return {
            "sum": jax.tree.map(jnp.add, statistics["sum"], grads),
            "last": jax.tree.map(lambda g: -g.astype(jnp.float32), grads),
        }

    def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
        return jaxpruner.trees.from_state(self.known_statistics(params, sparse_state, grads)["sum"])


def updater(cls=LongAndShort, **fields):
    return cls(
        scheduler=jaxpruner.PeriodicSchedule(2, 2, 6),
        sparsity_distribution_fn=lambda params: jaxpruner.sparsity_distributions.uniform(params, 0.5),
        **fields,
    )


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def run(update, params, state, steps):
    for step in steps:
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_step_is_remembered_and_scores_read_it():
    tx = jaxpruner.sparsify(optax.sgd(0.1), updater())
    state = tx.init(PARAMS)
    assert isinstance(state, jaxpruner.SparseState)
    assert state.statistics["sum"]["bias"] == optax.MaskedNode()
    params, update, total = PARAMS, jax.jit(tx.update), np.zeros((4, 8), np.float32)
    for step in range(5):
        params, state = run(update, params, state, [step])
        total = total + np.asarray(gradients(step)["a"])  # dense, although half of the weights are pruned from 2
        np.testing.assert_allclose(state.statistics["sum"]["a"], total, rtol=1e-6)
        np.testing.assert_array_equal(state.statistics["last"]["a"], -gradients(step)["a"])
    np.testing.assert_array_equal(state.masks["a"], total >= np.sort(total.ravel())[16])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pickle", "flax", "orbax"])
def test_resumed_bit_for_bit(way, tmp_path):
    tx = jaxpruner.sparsify(optax.adam(0.1), updater(use_packed_masks=True))
    update = jax.jit(tx.update)
    middle = run(update, PARAMS, tx.init(PARAMS), range(3))
    template = jax.tree.map(jnp.zeros_like, middle)
    if way == "pickle":
        restored = pickle.loads(pickle.dumps(middle))
    elif way == "flax":
        restored = serialization.from_bytes(template, serialization.to_bytes(middle))
    else:
        ocp = pytest.importorskip("orbax.checkpoint")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "x", middle)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "x", template)
    same_bits(restored, middle)
    same_bits(run(update, *restored, range(3, 7)), run(update, *middle, range(3, 7)))


class BeforeStatistics(NamedTuple):
    """The state as it was when there were no statistics."""

    masks: Any
    inner_state: Any = None
    target_sparsities: Any = None
    count: Any = None


def test_a_state_is_donated_whose_statistics_began_as_the_same_array():
    class Twice(LongAndShort):
        def init_statistics(self, params):
            zeros = jax.tree.map(jnp.zeros_like, params)
            return {"sum": zeros, "last": zeros}

    tx = jaxpruner.sparsify(optax.sgd(0.1), updater(Twice))
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(gradients(0), tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(state.statistics["last"]["a"], -state.statistics["sum"]["a"])


def test_checkpoints_of_before_restore(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = jaxpruner.sparsify(optax.adam(0.1), updater(jaxpruner.MagnitudePruning))
    _, state = run(tx.update, PARAMS, tx.init(PARAMS), range(3))
    assert type(state) is jaxpruner.SparseState
    assert state.statistics is None
    before = BeforeStatistics(*state)
    template = jax.tree.map(jnp.zeros_like, state)
    same_bits(serialization.from_bytes(template, serialization.to_bytes(before)), state)
    assert serialization.to_state_dict(state).keys() == serialization.to_state_dict(before).keys()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", before)
        checkpointer.wait_until_finished()
        same_bits(checkpointer.restore(tmp_path / "x", template), state)


@pytest.mark.parametrize(
    ("made_by", "now", "message"),
    [
        (LongAndShort, jaxpruner.MagnitudePruning, "holds statistics, and MagnitudePruning, .* remembers nothing"),
        (jaxpruner.MagnitudePruning, LongAndShort, "holds no statistics, and LongAndShort, .* remembers some"),
    ],
)
def test_a_state_of_another_algorithm_is_told(made_by, now, message):
    state = jaxpruner.sparsify(optax.sgd(0.1), updater(made_by)).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        jaxpruner.sparsify(optax.sgd(0.1), updater(now)).update(PARAMS, state, PARAMS)


def test_another_tree_is_told():
    class Forgetful(LongAndShort):
        def update_statistics(self, params, grads, statistics):
            return statistics["sum"]

    tx = jaxpruner.sparsify(optax.sgd(0.1), updater(Forgetful))
    with pytest.raises(ValueError, match="statistics: update_statistics of Forgetful gives"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_mapping_of_the_fields_is_the_state():
    """As checkpoints give it that are restored without a template."""
    state = jaxpruner.sparsify(optax.sgd(0.1), updater()).init(PARAMS)
    same_bits(jaxpruner.training.projection.find_state({"opt": state._asdict()}), state)


def test_the_projection_without_optax_remembers():
    chosen = updater()
    state = jaxpruner.init_projection(chosen, PARAMS)
    _, state = jaxpruner.project(chosen, PARAMS, PARAMS, gradients(0), state)
    np.testing.assert_array_equal(state.statistics["sum"]["b"], gradients(0)["b"])
