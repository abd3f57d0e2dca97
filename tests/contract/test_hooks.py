"""Hooks of an updater that users override one at a time, as the paper's scripts do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner
from jaxpruner import mask_calculator, sparsity_types

PARAMS = {"a": jnp.arange(1.0, 17.0).reshape(4, 4), "b": -jnp.arange(1.0, 17.0).reshape(4, 4)}
ONCE = jaxpruner.OneShotSchedule(0)
UNIFORM = functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=0.8)


def kept(mask):
    return np.flatnonzero(np.asarray(mask).ravel()).tolist()


def test_a_wrapper_of_calculate_scores_is_heard():
    updater = jaxpruner.MagnitudePruning(sparsity_distribution_fn=UNIFORM)
    original = updater.calculate_scores

    @functools.wraps(original)
    def smallest_first(*args, **kwargs):
        return jax.tree.map(jnp.negative, original(*args, **kwargs))

    updater.calculate_scores = smallest_first
    _, masks = updater.instant_sparsify(PARAMS)
    assert kept(masks["a"]) == [0, 1, 2]


@pytest.mark.parametrize("base", [jaxpruner.MagnitudePruning, jaxpruner.GlobalMagnitudePruning])
def test_an_overridden_create_masks_gets_arrays(base):
    class Above(base):
        def create_masks(self, scores, sparsities):
            return jax.tree.map(lambda s: s > jnp.quantile(s, 0.5), scores)

    _, masks = Above().instant_sparsify(PARAMS)
    assert kept(masks["b"]) == list(range(8, 16))


def test_a_users_structure_regrows_with_arrays():

    class Rows(sparsity_types.SparsityType):
        def mask(self, scores, sparsity):
            return jnp.broadcast_to(jnp.arange(scores.shape[0])[:, None] < 1, scores.shape)

        def regrow(self, mask, drop_scores, grow_scores, drop_fraction):
            return jnp.abs(drop_scores) + grow_scores * 0 > 12

    updater = jaxpruner.RigL(scheduler=ONCE, sparsity_type=Rows())
    tx = updater.wrap_optax(optax.sgd(0.1))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert kept(state.masks["a"]) == [12, 13, 14, 15]


@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "global_magnitude"])
def test_a_function_of_path_and_parameter_sees_the_shape(algorithm):
    def structure(path, param):
        assert param.shape == (4, 4)
        assert param.ndim == 2
        assert param.dtype == jnp.float32
        return sparsity_types.Unstructured()

    config = {"algorithm": algorithm, "sparsity": 0.5, "update_start_step": 0, "update_end_step": 0}
    tx = jaxpruner.sparsify(optax.sgd(0.1), config | {"sparsity_type": structure})
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert sum(int(mask.sum()) for mask in state.masks.values()) == 16


def test_update_state_may_return_none_for_unpruned_leaves():
    class First(jaxpruner.BaseUpdater):
        def update_state(self, sparse_state, params, grads, **kwargs):
            return sparse_state._replace(masks={"a": jnp.eye(4, dtype=bool), "bias": None})

    params = {"a": PARAMS["a"], "bias": jnp.ones(4)}
    tx = First(scheduler=ONCE).wrap_optax(optax.sgd(0.1))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert int(jnp.count_nonzero(optax.apply_updates(params, updates)["a"])) == 4


@pytest.mark.parametrize("algorithm", [jaxpruner.SET, jaxpruner.RigL])
def test_regrowing_needs_a_structure(algorithm):
    updater = algorithm(topk_fn=mask_calculator.get_topk_fn(sparsity_types.NByM(2, 4)))
    with pytest.raises(ValueError, match="topk_fn: cannot be used with"):
        updater.init_state(PARAMS)


def test_post_gradient_update_finds_its_state():
    updater = jaxpruner.MagnitudePruning(scheduler=ONCE, sparsity_distribution_fn=UNIFORM)
    tx = optax.chain(optax.clip(1.0), updater.wrap_optax(optax.sgd(0.1)))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    params = updater.post_gradient_update(PARAMS, state)
    assert int(jnp.count_nonzero(params["a"])) == 3


def test_statistics_of_parameters_named_like_statistics():
    params = {"k": jnp.ones((4, 4)), "mu": {"k": jnp.ones((4, 4))}}
    grads = jax.tree.map(lambda p: jnp.arange(16.0).reshape(4, 4) + 1, params)
    updater = jaxpruner.RigL(
        scheduler=jaxpruner.OneShotSchedule(1),
        sparsity_distribution_fn=functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=0.5),
        drop_fraction_fn=lambda _: 0.5,
    )
    tx = updater.wrap_optax(optax.adam(0.1))
    update = jax.jit(tx.update)
    state = before = tx.init(params)
    for _ in range(2):
        before = state
        _, state = update(grads, state, params)
    for tree in (state.inner_state[0].mu, state.inner_state[0].nu):
        for pick in (lambda t: t["k"], lambda t: t["mu"]["k"]):
            grown = pick(state.masks) & ~pick(before.masks)
            stayed = pick(state.masks) & pick(before.masks)
            assert grown.any()
            assert not pick(tree)[grown].any()
            assert pick(tree)[stayed].all()


def test_straight_through_without_optax():
    updater = jaxpruner.SteMagnitudePruning(sparsity_distribution_fn=UNIFORM)
    with pytest.raises(ValueError, match="init_projection"):
        jaxpruner.project(updater, PARAMS, PARAMS, PARAMS, updater.init_state(PARAMS))
    params, state = PARAMS, jaxpruner.init_projection(updater, PARAMS)
    tx = jaxpruner.sparsify(optax.sgd(0.125), updater)
    reference, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, opt_state = tx.update(reference, opt_state, reference)
        step = jaxpruner.begin_step(updater, params, params, state)
        proposed = jax.tree.map(lambda w, g: w - 0.125 * g, step.params, step.grads)
        params, state = jaxpruner.end_step(step, proposed)
        reference = optax.apply_updates(reference, updates)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, reference)
    assert int(jnp.count_nonzero(params["a"])) == 3


def test_a_not_finite_score_does_not_cost_its_leaf():
    scores = {"a": PARAMS["a"].at[0, 0].set(jnp.nan), "b": -PARAMS["b"]}
    masks = jaxpruner.GlobalMagnitudePruning().create_masks(scores, 0.5)
    assert not masks["a"][0, 0]
    assert 1 <= int(masks["a"].sum()) < 16


def test_leaves_of_the_custom_map_keep_their_own_with_one_sparsity_for_all():
    updater = jaxpruner.GlobalMagnitudePruning(sparsity=0.5, custom_sparsity_map={("b",): 0.25})
    masks = updater.create_masks(jax.tree.map(jnp.abs, PARAMS), 0.5)
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (8, 12)


def test_saliency_of_small_half_precision_numbers():
    w = {"w": jnp.full((2, 4), 1e-3, jnp.float16)}
    g = {"w": (jnp.arange(1.0, 9.0).reshape(2, 4) * 1e-6).astype(jnp.float16)}
    _, masks = jaxpruner.SaliencyPruning(sparsity_distribution_fn=UNIFORM).instant_sparsify(w, g)
    assert kept(masks["w"]) == [6, 7]
