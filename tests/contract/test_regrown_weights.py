"""Weights that SET and RigL grow start at zero, with the optimizer statistics of a new weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_cases as cases

import jaxpruner


def muon():
    if not hasattr(optax.contrib, "muon"):
        pytest.skip("this optax has no muon")
    return optax.contrib.muon(1e-2)


def partitioned():
    labels = lambda params: jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)  # noqa: E731
    return optax.multi_transform({"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2)}, labels)


INNER = {
    "adam": lambda: optax.adam(1e-2),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.adamw(1e-2)),
    "multi_transform": partitioned,
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "muon": muon,
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("algorithm", cases.DROP_AND_GROW)
def test_regrown_weights_are_new(algorithm, inner):
    params = cases.tree("dict")
    updater = cases.make_updater(algorithm)
    steps = cases.run(jaxpruner.sparsify(INNER[inner](), updater), params, cases.FIRST + 1)
    step = steps[-1]
    was, now = (cases.mask_list(updater, state, params)[1] for state in (step.state, step.new_state))
    grown = now & ~was
    assert grown.any()

    np.testing.assert_array_equal(np.asarray(step.new_params["dense"]["kernel"])[grown], 0)
    before = jax.tree_util.tree_leaves_with_path(cases.sparse_state(step.state).inner_state)
    after = jax.tree.leaves(cases.sparse_state(step.new_state).inner_state)
    statistics = 0
    for (path, old), new in zip(before, after, strict=True):
        old, new, name = np.asarray(old), np.asarray(new), jax.tree_util.keystr(path)
        if old.shape == grown.shape:
            statistics += 1
            assert np.any(old != 0), name
            np.testing.assert_array_equal(new[grown], 0, name)
            np.testing.assert_array_equal(new[~grown], old[~grown], name)
        else:
            # Counts, hyperparameters, the bias, and the factored statistics that no single weight owns.
            np.testing.assert_array_equal(new, old, name)
    assert statistics == {"adam": 2, "chain": 2, "multi_transform": 2, "inject_hyperparams": 2}.get(inner, 1)


@pytest.mark.parametrize("algorithm", cases.DROP_AND_GROW)
def test_weights_grown_at_the_first_step_start_at_zero(algorithm):
    """Parameters are still dense when masks change at count 0."""
    params = cases.tree("dict")
    updater = cases.make_updater(algorithm, update_start_step=0)
    step = cases.run(jaxpruner.sparsify(optax.adam(1e-2), updater), params, 1)[0]
    was, now = (cases.mask_list(updater, state, params)[1] for state in (step.state, step.new_state))
    assert (now & ~was).any()
    kernel = np.asarray(step.new_params["dense"]["kernel"])
    np.testing.assert_array_equal(kernel[now & ~was], 0)
    np.testing.assert_array_equal(kernel[now & was], np.asarray(params["dense"]["kernel"])[now & was])


def test_set_grows_at_random_and_rigl_where_the_gradient_is_large():
    params = cases.tree("dict")
    for algorithm in cases.DROP_AND_GROW:
        updater = cases.make_updater(algorithm)
        step = cases.run(jaxpruner.sparsify(optax.sgd(0.1), updater), params, cases.FIRST + 1)[-1]
        was, now = (cases.mask_list(updater, state, params)[1] for state in (step.state, step.new_state))
        weight, gradient = (np.abs(np.asarray(x["dense"]["kernel"])) for x in (step.params, step.grads))
        # The largest active weights survive.
        dropped = was & ~now
        assert weight[dropped].max() <= np.sort(weight[was])[dropped.sum() :].max()
        by_gradient = gradient[now & ~was].min() >= gradient[~now & ~was].max()
        assert by_gradient == (algorithm == "rigl")


@pytest.mark.parametrize("algorithm", cases.DROP_AND_GROW)
def test_without_skipping_gradients(algorithm):
    """The inner optimizer steps on every step; a regrown weight takes its first one from zero."""
    params = cases.tree("dict")
    updater = cases.make_updater(algorithm, skip_gradients=False)
    steps = cases.run(jaxpruner.sparsify(optax.sgd(0.125, momentum=0.5), updater), params, cases.FIRST + 1)
    step = steps[-1]
    was, now = (cases.mask_list(updater, state, params)[1] for state in (step.state, step.new_state))
    grown = now & ~was
    assert grown.any()
    kernel, gradient = (np.asarray(x["dense"]["kernel"]) for x in (step.new_params, step.grads))
    np.testing.assert_array_equal(kernel[grown], -0.125 * gradient[grown])
    cases.check_zeros(step.new_params, cases.mask_list(updater, step.new_state, params))


@pytest.mark.parametrize("algorithm", ["magnitude", "saliency", "random"])
def test_pruners_may_skip_gradients(algorithm):
    params = cases.tree("dict")
    updater = cases.make_updater(algorithm, skip_gradients=True)
    steps = cases.run(jaxpruner.sparsify(optax.sgd(0.1), updater), params, cases.FIRST + 2)
    made, following = steps[-2:]
    masks = cases.mask_list(updater, made.new_state, params)
    cases.assert_same_bits(made.new_params, cases.masked(made.params, masks))
    assert np.any(np.asarray(following.updates["dense"]["bias"]) != 0)
    assert jnp.all(made.updates["dense"]["bias"] == 0)
