"""Every algorithm, with every structure it supports, dense and packed masks, trees and optimizers.

The cases cover all of algorithm x structure x storage; optimizers and kinds of trees rotate through
them so that every algorithm also meets each of those.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_cases as cases

import jaxpruner
from jaxpruner.training.optimizer_state import reset_moments


def covering_design():
    for row, algorithm in enumerate(cases.ALGORITHMS):
        structures = cases.STRUCTURES if algorithm in cases.STRUCTURED else ("unstructured",)
        pairs = list(itertools.product(structures, (False, True)))
        # Eight cases, so that all six optimizers and all four trees come by.
        for i, (structure, packed) in enumerate(itertools.islice(itertools.cycle(pairs), 8)):
            optimizer = list(cases.OPTIMIZERS)[(i + row) % len(cases.OPTIMIZERS)]
            kind = cases.TREES[(i + i // 4 + row) % len(cases.TREES)]
            yield algorithm, structure, packed, optimizer, kind
    for algorithm, case in cases.MORE.items():
        yield algorithm, *case


def name_of(case):
    algorithm, structure, packed, optimizer, kind = case
    return "-".join((algorithm, structure, "packed" if packed else "dense", optimizer, kind))


@functools.cache
def bare_update(optimizer: str):
    return cases.compiled(cases.OPTIMIZERS[optimizer]().update)


@functools.cache
def step_gradients(updater):
    return cases.compiled(updater.step_gradients)


def initial_params(algorithm: str, kind: str):
    params = cases.tree(kind, kernels=2 if algorithm in cases.ALL_GLOBAL else 1)
    if algorithm != "preserve":
        return params
    return jax.tree.map(lambda p: jnp.where(p < 0.5, 0, p) if p.ndim > 1 else p, params)


def is_due(algorithm: str, count: int) -> bool:
    if algorithm in ("no_prune", "static_sparse"):
        return False
    if algorithm in cases.AT_FIRST_STEP:
        return count == 0
    if algorithm in cases.ALL_STRAIGHT_THROUGH:  # for the next step, at the sparsity it has then
        return count + 1 >= cases.FIRST
    return cases.FIRST <= count <= cases.LAST and count % cases.FREQ == 0


@pytest.mark.parametrize(
    ("algorithm", "structure", "packed", "optimizer", "kind"),
    [pytest.param(*case, id=name_of(case)) for case in covering_design()],
)
def test_contract(algorithm, structure, packed, optimizer, kind):
    params = initial_params(algorithm, kind)
    updater = cases.make_updater(algorithm, structure, packed)
    tx = cases.around(optimizer, jaxpruner.sparsify(cases.OPTIMIZERS[optimizer](), updater))
    every = 2 if optimizer == "multi_steps" else 1
    steps = cases.run(tx, params, (cases.LAST + 1) * every)

    for step in steps:
        masks = cases.mask_list(updater, step.new_state, step.new_params)
        assert [m is not None for m in masks] == [
            algorithm != "no_prune" and p.ndim > 1 for p in jax.tree.leaves(params)
        ]
        if step.index + 1 >= every:
            cases.check_zeros(step.new_params, masks)
        assert cases.signature(step.new_params) == cases.signature(params)
        assert cases.signature(step.new_state) == cases.signature(step.state)
        if every == 1:
            check_against_the_bare_optimizer(step, updater, algorithm, optimizer)

    check_masks(steps, updater, algorithm, structure, params)
    check_storage(cases.sparse_state(steps[-1].new_state), params, packed)
    if every > 1 and algorithm not in (*cases.ALL_SPARSE_FROM_START, "preserve"):
        dense = cases.FIRST - (algorithm in cases.ALL_STRAIGHT_THROUGH)  # which make the mask of the next step
        check_dense_phase(steps[: dense * every], cases.around(optimizer, cases.OPTIMIZERS[optimizer]()))


def check_against_the_bare_optimizer(step, updater, algorithm, optimizer):
    """Kept entries move, bit for bit, as the inner optimizer alone moves them from the same point."""
    before, after = cases.sparse_state(step.state), cases.sparse_state(step.new_state)
    masks = cases.mask_list(updater, after, step.params)
    in_force = cases.mask_list(updater, before, step.params) if algorithm in cases.ALL_STRAIGHT_THROUGH else masks
    inner, new_inner, params = before.inner_state, after.inner_state, step.params
    if algorithm in cases.ALL_STRAIGHT_THROUGH:
        if step.index:
            params = merge(inner.weights, params)
        inner, new_inner = inner.inner_state, new_inner.inner_state
    grads = cases.masked(step.grads, in_force) if algorithm in cases.ALL_SPARSE_GRADIENTS else step.grads
    if algorithm in ("sr_ste", "top_kast"):  # with decay, see tests/core/test_methods.py
        current = updater.current_masks(before, params)
        grads = step_gradients(updater)(params, grads, current, before._replace(inner_state=None))
    if algorithm == "acdc" and is_due(algorithm, step.index):
        everywhere = jax.tree.map(lambda p: jnp.ones_like(p, bool), params)
        inner = reset_moments(cases.OPTIMIZERS[optimizer](), inner, params, everywhere)
    if algorithm in cases.ALL_DROP_AND_GROW and is_due(algorithm, step.index):
        expected = jax.tree.map(jnp.zeros_like, params)
    else:
        expected, expected_inner = bare_update(optimizer)(grads, inner, params)
        cases.assert_same_bits(new_inner, expected_inner)
    if algorithm in cases.ALL_STRAIGHT_THROUGH:
        # Dense weights step; what is seen is their masked projection.
        stepped = optax.apply_updates(params, expected)
        cases.assert_same_bits(merge(after.inner_state.weights, step.new_params), stepped)
        cases.assert_same_bits(step.new_params, cases.masked(stepped, masks))
    else:
        cases.assert_same_bits(cases.masked(step.updates, masks), cases.masked(expected, masks))
        if algorithm not in cases.ALL_DROP_AND_GROW:
            projected = cases.masked(optax.apply_updates(step.params, expected), masks)
            cases.assert_same_bits(step.new_params, projected)


def merge(weights, params):
    """Dense weights where there are any, parameters elsewhere."""
    return jax.tree.map(
        lambda w, p: p if isinstance(w, optax.MaskedNode) else w,
        weights,
        params,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )


def check_masks(steps, updater, algorithm, structure, params):
    history = [cases.mask_list(updater, step.new_state, params) for step in steps]
    final = [mask for mask in history[-1] if mask is not None]
    first = [mask for mask in cases.mask_list(updater, steps[0].state, params) if mask is not None]
    if algorithm == "no_prune":
        assert not final
    elif algorithm == "preserve":
        for mask, p in zip(final, [p for p in jax.tree.leaves(params) if p.ndim > 1], strict=True):
            np.testing.assert_array_equal(mask, np.asarray(p) != 0)
    elif algorithm in cases.ALL_GLOBAL:
        total = sum(math.prod(shape) for shape in cases.SHAPES.values())
        assert sum(mask.sum() for mask in final) == cases.kept_number(total)
    else:
        for mask in final:
            cases.check_structure(mask, structure)
    if algorithm in cases.ALL_SPARSE_FROM_START:
        for masks in history:
            # The number of units never changes: it is that of the final sparsity all along.
            for mask in (mask for mask in masks if mask is not None):
                cases.check_structure(mask, structure)
    else:
        assert all(mask.all() for mask in first)
    if algorithm == "acdc":  # dense between its sparse phases
        assert [all(mask.all() for mask in history[count] if mask is not None) for count in (2, 4, 6)] == [0, 1, 0]
    if algorithm == "random":
        # What was pruned stays pruned.
        for earlier, later in itertools.pairwise(history):
            assert not any((now & ~was).any() for was, now in zip(earlier, later, strict=True) if now is not None)
    changed = {
        int(cases.sparse_state(step.state).count)
        for step, masks, previous in zip(steps[1:], history[1:], history, strict=False)
        if any(not np.array_equal(a, b) for a, b in zip(masks, previous, strict=True) if a is not None)
    }
    assert all(is_due(algorithm, count) for count in changed)
    if algorithm not in ("no_prune", "static_sparse", *cases.AT_FIRST_STEP):
        assert changed


def check_storage(state, params, packed):
    stored = jax.tree.leaves(state.masks)
    sizes = [p.size for p in jax.tree.leaves(params) if p.ndim > 1] if stored else []
    assert [leaf.nbytes for leaf in stored] == [size // 8 if packed else size for size in sizes]
    assert {leaf.dtype for leaf in stored} <= {jnp.dtype("uint8" if packed else "bool")}


def check_dense_phase(steps, bare):
    """While masks are all ones, a whole run is that of the bare optimizer."""
    expected = cases.run(bare, steps[0].params, len(steps))
    for step, reference in zip(steps, expected, strict=True):
        cases.assert_same_bits(step.new_params, reference.new_params)


@pytest.mark.parametrize("algorithm", cases.GLOBAL)
def test_global_counts_are_exact(algorithm):
    """At every sparsity, with the program XLA makes by default and with one that rounds every operation."""
    updater = cases.make_updater(algorithm)
    scores = jax.tree.map(jnp.abs, cases.tree("dict", kernels=2))
    total = sum(math.prod(shape) for shape in cases.SHAPES.values())
    for compiled in (jax.jit, cases.compiled):
        create = compiled(updater.create_masks)
        for keep in range(1, total, 5):
            masks = create(scores, jnp.float32(1 - keep / total))
            assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) == keep
