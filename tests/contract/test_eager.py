"""Outside of jit: after the first of its kind a call compiles nothing."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_cases as cases

import jaxpruner


@contextlib.contextmanager
def compiles_nothing():
    compiled = []
    # Anew each time: other libraries take all listeners away.
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    yield
    assert not compiled


def test_the_counter_counts():
    with pytest.raises(AssertionError), compiles_nothing():
        jax.jit(lambda x: x + 1)(jnp.ones(7))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_steps(algorithm, packed):
    """Also by a transformation that was made anew, from the same configuration."""
    inner = optax.sgd(0.1, momentum=0.9)
    first = params = cases.tree("dict", kernels=2)
    config = cases.config(algorithm, packed=packed)
    trajectories = []
    for attempt in range(2):
        tx = jaxpruner.sparsify(inner, config)
        with compiles_nothing() if attempt else contextlib.nullcontext():
            params, state = first, tx.init(first)
            for step in range(4):  # with masks made at 2, and for straight-through methods in each
                updates, state = tx.update(cases.gradients(params, step), state, params)
                params = optax.apply_updates(params, updates)
        trajectories.append((params, state))
    cases.assert_same_bits(*trajectories)
    cases.check_zeros(params, cases.mask_list(tx.init.updater, state, params))


@pytest.mark.parametrize("structure", cases.STRUCTURES)
def test_structures(structure):
    first = params = cases.tree("dict")
    tx = jaxpruner.sparsify(optax.sgd(0.1), cases.config("rigl", structure))
    for attempt in range(2):
        with compiles_nothing() if attempt else contextlib.nullcontext():
            params, state = first, tx.init(first)
            for _ in range(3):
                updates, state = tx.update(first, state, params)
                params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("algorithm", ["magnitude", "saliency", "random", "global_magnitude"])
def test_instant_sparsify_and_summaries(algorithm):
    updater, params = cases.make_updater(algorithm), cases.tree("dict", kernels=2)
    for attempt in range(2):
        with compiles_nothing() if attempt else contextlib.nullcontext():
            pruned, masks = updater.instant_sparsify(params, grads=params)
            jaxpruner.summarize_sparsity(pruned)
            jaxpruner.summarize_intersection(masks, masks)


def test_hooks_of_ones_own_run_call_by_call():
    """They may look at values, and at what is not a field."""
    seen = []

    class Watched(jaxpruner.MagnitudePruning):
        def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
            seen.append(float(params["dense"]["kernel"].sum()))
            return jax.tree.map(jnp.abs, params)

    updater = Watched(
        scheduler=jaxpruner.PeriodicSchedule(1),
        sparsity_distribution_fn=lambda params: jaxpruner.sparsity_distributions.uniform(params, 0.5),
    )
    params = cases.tree("dict")
    tx = jaxpruner.sparsify(optax.sgd(0.0), updater)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    np.testing.assert_allclose(seen, [float(params["dense"]["kernel"].sum())] * 2)


def test_an_optimizer_that_is_made_anew_is_not_traced_anew():
    inner, traces = optax.adam(1e-3), []

    @jax.jit
    def step(tx, params, state):
        traces.append(tx)
        return tx.update(params, state, params)

    step = jax.jit(step.__wrapped__, static_argnums=0)
    params = cases.tree("dict")
    for _ in range(3):
        tx = jaxpruner.sparsify(inner, cases.make_updater("rigl"))
        step(tx, params, tx.init(params))
    assert len(traces) == 1
