"""Straight-through updaters both ways, and what is read anew from the parameters at count 0."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_cases as cases

import jaxpruner


def visible_gradients(params, step):
    """Gradients that depend on the parameters the model runs with."""
    return jax.tree.map(lambda p, g: p + g, params, cases.gradients(params, step))


def paper_protocol(updater, inner, params, steps=cases.STEPS, compiled=cases.compiled):
    """Dense parameters; the loop runs the model with `pre_forward_update`."""
    tx = updater.wrap_optax(inner)
    state, update = tx.init(params), compiled(tx.update)
    for index in range(steps):
        shown = updater.pre_forward_update(params, state)
        updates, state = update(visible_gradients(shown, index), state, params)
        params = optax.apply_updates(params, updates)
        kept = updater.post_gradient_update(params, state)
        cases.assert_same_bits(kept, params)
        yield params, updater.pre_forward_update(params, state), state


def stock_trainer(updater, inner, params, steps=cases.STEPS, compiled=cases.compiled):
    """The loop of someone who knows nothing of pruning."""
    tx = jaxpruner.sparsify(inner, updater)
    state, update = tx.init(params), compiled(tx.update)
    for index in range(steps):
        updates, state = update(visible_gradients(params, index), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "packed"), [("sgd", True), ("adamw", False)])
@pytest.mark.parametrize("algorithm", cases.STRAIGHT_THROUGH)
def test_sparsify_is_the_paper_protocol(algorithm, optimizer, packed):
    inner = cases.OPTIMIZERS[optimizer]()
    updater = cases.make_updater(algorithm, packed=packed, update_freq=1)
    params = cases.tree("dict")
    both = zip(paper_protocol(updater, inner, params), stock_trainer(updater, inner, params), strict=True)
    for (dense, shown, _), (seen, state) in both:
        cases.assert_same_bits(seen, shown)
        masks = cases.mask_list(updater, state, seen)
        cases.check_zeros(seen, masks)
        hidden = cases.sparse_state(state).inner_state.weights
        cases.assert_same_bits(hidden["dense"]["kernel"], dense["dense"]["kernel"])
    cases.check_structure(masks[1], "unstructured")


def test_seen_and_hidden_weights_never_drift_apart():
    """XLA may round the update of seen and hidden weights differently; such differences must not add up."""
    updater = cases.make_updater("magnitude_ste", update_freq=1)
    *_, (params, state) = stock_trainer(updater, cases.OPTIMIZERS["sgd"](), cases.tree("dict"), 200, jax.jit)
    mask = cases.mask_list(updater, state, params)[1]
    seen, hidden = (
        np.asarray(tree["dense"]["kernel"])[mask] for tree in (params, cases.sparse_state(state).inner_state.weights)
    )
    # One rounding of weights below 4 is 2**-23; 200 of them would come to 2**-19.4.
    assert np.abs(seen).max() < 4
    np.testing.assert_allclose(seen, hidden, rtol=0, atol=2**-21)


def test_pruned_weights_come_back():
    updater = cases.make_updater("magnitude_ste", update_freq=1, update_start_step=0, update_end_step=40)
    masks = [
        cases.mask_list(updater, state, params)[1]
        for params, state in stock_trainer(updater, optax.sgd(0.3), cases.tree("dict"), 20)
    ]
    assert any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))


@pytest.mark.parametrize("algorithm", cases.STRAIGHT_THROUGH)
def test_weights_restored_after_init(algorithm):
    """A framework initialises with random parameters and then loads others."""
    params, other = cases.tree("dict"), cases.tree("dict", seed=5)
    updater = cases.make_updater(algorithm, update_start_step=0)
    tx = jaxpruner.sparsify(optax.sgd(0.125, momentum=0.5), updater)
    update = cases.compiled(tx.update)
    expected = cases.run(tx, params, 4, update=update)
    steps = cases.run(tx, params, 4, state=tx.init(other), update=update)
    for one, two in zip(steps, expected, strict=True):
        cases.assert_same_bits(one.new_params, two.new_params)
        cases.assert_same_bits(one.new_state, two.new_state)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_preserve_reads_the_restored_parameters(packed):
    dense = cases.tree("dict")
    zeros = np.random.default_rng(3).random((8, 16)) < 0.6
    restored = {"dense": dense["dense"] | {"kernel": jnp.where(zeros, 0, dense["dense"]["kernel"])}}
    updater = cases.make_updater("preserve", packed=packed)
    tx = jaxpruner.sparsify(optax.adamw(1e-2), updater)
    steps = cases.run(tx, restored, 4, state=tx.init(dense))
    for step in steps:
        kernel = np.asarray(step.new_params["dense"]["kernel"])
        np.testing.assert_array_equal(kernel == 0, zeros)
        np.testing.assert_array_equal(cases.mask_list(updater, step.new_state, restored)[1], ~zeros)


def test_preserve_leaves_zero_initialised_leaves_dense():
    params = {"head": jnp.zeros((4, 8)), "body": jnp.asarray([[0.0, 1.0], [2.0, 0.0]])}
    tx = jaxpruner.sparsify(optax.sgd(0.1), algorithm="preserve")
    new_params = cases.run(tx, params, 2)[-1].new_params
    assert np.all(np.asarray(new_params["head"]) != 0)
    np.testing.assert_array_equal(np.asarray(new_params["body"]) == 0, [[True, False], [False, True]])


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("algorithm", [a for a in cases.ALGORITHMS if a not in cases.STRAIGHT_THROUGH])
def test_the_paper_protocol_changes_nothing_more(algorithm, packed):
    """`post_gradient_update` and `pre_forward_update` after a wrapped optimizer's step are the identity."""
    params = cases.tree("dict", kernels=2 if algorithm in cases.GLOBAL else 1)
    updater = cases.make_updater(algorithm, packed=packed)
    tx = updater.wrap_optax(optax.adamw(1e-2))
    # One step is enough: counts need not reach the first mask update if masks are made at 0.
    updater.scheduler = jaxpruner.OneShotSchedule(0)
    updates, state = jax.jit(tx.update)(cases.gradients(params, 0), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    cases.assert_same_bits(updater.post_gradient_update(params, state), params)
    cases.assert_same_bits(updater.pre_forward_update(params, state), params)
