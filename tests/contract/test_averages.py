"""What is evaluated in place of the parameters is dense where a part of it was; `apply_state_masks` prunes it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_cases as cases
from optax import contrib

import jaxpruner

KINDS = [("magnitude", True), ("magnitude_ste", False), ("rigl", True)]


@functools.cache
def trajectory(algorithm: str, packed: bool) -> list[cases.Step]:
    tx = jaxpruner.sparsify(optax.sgd(0.1, momentum=0.9), cases.config(algorithm, packed=packed))
    return cases.run(tx, cases.tree("dict", kernels=2))


def kernels(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]


def check_projection(tree: Any, state: Any, updater: Any) -> None:
    """Dense before; afterwards zero where masks prune and the same bits where they keep, biases untouched."""
    sparse = jaxpruner.apply_state_masks(tree, state)
    masks = cases.mask_list(updater, state, tree)
    assert any(np.count_nonzero(leaf[~mask]) for leaf, mask in pruned(tree, masks)), "is sparse already"
    cases.assert_same_bits(sparse, cases.masked(tree, masks))
    jaxpruner.check_sparse(sparse, state)
    with pytest.raises(ValueError, match="apply_state_masks"):
        jaxpruner.check_sparse(tree, state)


def pruned(tree: Any, masks: list[np.ndarray | None]) -> list[tuple[np.ndarray, np.ndarray]]:
    leaves = zip(jax.tree.leaves(tree), masks, strict=True)
    return [(np.asarray(leaf), mask) for leaf, mask in leaves if mask is not None]


def exponential_average(steps: list[cases.Step]) -> Any:
    average = optax.ema(0.9)
    state, out = average.init(steps[0].params), None
    for step in steps:
        out, state = average.update(step.new_params, state)
    return out


def incremental_average(steps: list[cases.Step]) -> Any:
    average = steps[0].params
    for step in steps:
        average = optax.incremental_update(step.new_params, average, 0.1)
    return average


def mean(steps: list[cases.Step]) -> Any:
    """Polyak's average over all steps."""
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *[step.new_params for step in steps])


def of_two_checkpoints(steps: list[cases.Step]) -> Any:
    return jax.tree.map(lambda a, b: (a + b) / 2, steps[3].new_params, steps[-1].new_params)


AVERAGES = [exponential_average, incremental_average, mean, of_two_checkpoints]


@pytest.mark.slow
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(("algorithm", "packed"), [*KINDS, ("set", False), ("global_magnitude", True)])
def test_averages_over_steps(algorithm, packed, average):
    steps = trajectory(algorithm, packed)
    updater = cases.make_updater(algorithm, packed=packed)
    check_projection(average(steps), steps[-1].new_state, updater)


def test_under_jit_and_of_other_types():
    steps = trajectory("magnitude", True)
    average = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mean(steps))
    sparse = jax.jit(jaxpruner.apply_state_masks)(average, steps[-1].new_state)
    assert {leaf.dtype for leaf in jax.tree.leaves(sparse)} == {jnp.dtype("bfloat16")}
    cases.assert_same_bits(sparse, jaxpruner.apply_state_masks(average, steps[-1].new_state))


def test_what_does_not_fit_the_state():
    state = trajectory("magnitude", True)[-1].new_state
    with pytest.raises(ValueError, match="dense/kernel, which the tree does not have"):
        jaxpruner.apply_state_masks({"params": cases.tree("dict", kernels=2)}, state)
    with pytest.raises(ValueError, match="holds no sparse state"):
        jaxpruner.apply_state_masks(cases.tree("dict"), optax.adam(0.1).init(cases.tree("dict")))
    transposed = jax.tree.map(jnp.transpose, cases.tree("dict", kernels=2))
    with pytest.raises(ValueError, match=r"dense/kernel: .* does not fit"):
        jaxpruner.apply_state_masks(transposed, state)


@pytest.mark.parametrize(("algorithm", "packed"), KINDS)
def test_schedule_free_inside(algorithm, packed):
    updater = cases.make_updater(algorithm, packed=packed)
    tx = jaxpruner.sparsify(contrib.schedule_free_sgd(0.1), updater)
    last = cases.run(tx, cases.tree("dict", kernels=2))[-1]
    jaxpruner.check_sparse(last.new_params, last.new_state)
    inner = last.new_state.inner_state
    inner = inner.inner_state if isinstance(inner, jaxpruner.StraightThroughState) else inner
    check_projection(contrib.schedule_free_eval_params(inner, last.new_params), last.new_state, updater)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_slow_weights_of_lookahead(packed):
    updater = cases.make_updater("magnitude", packed=packed, update_start_step=1, update_end_step=1)
    tx = optax.lookahead(jaxpruner.sparsify(optax.sgd(0.1), updater), 2, 0.5)
    params = optax.LookaheadParams.init_synced(cases.tree("dict"))
    state = tx.init(params)
    for index in range(4):
        updates, state = tx.update(cases.gradients(params.fast, index), state, params)
        params = optax.apply_updates(params, updates)
    check_projection(params.slow, state, updater)


@pytest.mark.parametrize(("algorithm", "packed"), [("magnitude", True), ("magnitude_ste", False)])
def test_inside_multi_transform(algorithm, packed):
    """Each group has its own sparse state; what no group prunes stays as it is."""
    config = cases.config(algorithm, packed=packed, update_start_step=1, update_end_step=1)
    params = {name: cases.tree("dict", seed) for seed, name in enumerate(("more", "less", "dense"))}
    tx = optax.multi_transform(
        {
            "more": jaxpruner.sparsify(optax.sgd(0.1), config | {"sparsity": 0.9}),
            "less": jaxpruner.sparsify(optax.sgd(0.1), config | {"sparsity": 0.5}),
            "dense": optax.sgd(0.1),
        },
        {name: name for name in params},
    )
    steps = cases.run(tx, params, 3)
    average, state = mean(steps), steps[-1].new_state
    sparse = jaxpruner.apply_state_masks(average, state)
    kept = {name: np.count_nonzero(sparse[name]["dense"]["kernel"]) for name in params}
    assert kept == {"more": cases.kept_number(128, 0.9), "less": cases.kept_number(128, 0.5), "dense": 128}
    cases.assert_same_bits(sparse["dense"], average["dense"])
    jaxpruner.check_sparse(sparse, state)
    for name in ("more", "less"):
        on_masks = np.asarray(steps[-1].new_params[name]["dense"]["kernel"]) != 0
        assert np.array_equal(np.asarray(sparse[name]["dense"]["kernel"]) != 0, on_masks)
