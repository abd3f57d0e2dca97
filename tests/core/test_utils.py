"""Summaries of sparse trees and `apply_mask`, with and without jit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner
from jaxpruner.mask_storage import PackedStorage


class Pair(NamedTuple):
    first: object
    second: object


TREE = {
    "a": {"kernel": jnp.asarray([[0.0, 1.0], [-2.0, -0.0]]), "bias": jnp.zeros(3)},
    "b": [jnp.asarray([1.0, jnp.nan, jnp.inf]), jnp.asarray(0.0)],
}


SUMMARY = {
    "_total_sparsity": 6 / 11,
    "_nparams": 11,
    "_nparams_nnz": 5,
    "a/bias": 1.0,
    "a/kernel": 0.5,
    "b/0": 0.0,
    "b/1": 1.0,
}


def test_summarize_sparsity():
    assert jaxpruner.summarize_sparsity(TREE) == pytest.approx(SUMMARY)


def test_only_the_total():
    summary = jaxpruner.summarize_sparsity(TREE, only_total_sparsity=True)
    assert summary == pytest.approx({key: SUMMARY[key] for key in ("_total_sparsity", "_nparams", "_nparams_nnz")})


def test_it_can_be_logged_without_conversion():
    summary = jaxpruner.summarize_sparsity(TREE)
    assert {type(value) for value in summary.values()} == {float, int}


def test_masks_and_unpruned_leaves():
    masks = {
        "a": jnp.asarray([True, False]),
        "b": None,
        "c": optax.MaskedNode(),
        "d": np.asarray([1, 0, 0, 0], np.uint8),
    }
    expected = {"_total_sparsity": 2 / 3, "_nparams": 6, "_nparams_nnz": 2, "a": 0.5, "d": 0.75}
    assert jaxpruner.summarize_sparsity(masks) == pytest.approx(expected)


def test_empty_trees_and_leaves():
    assert jaxpruner.summarize_sparsity({}) == {"_total_sparsity": 0.0, "_nparams": 0, "_nparams_nnz": 0}
    assert jaxpruner.summarize_sparsity({"a": None})["_nparams"] == 0
    summary = jaxpruner.summarize_sparsity({"a": jnp.zeros((0, 3)), "b": jnp.zeros(2)})
    assert summary == {"_total_sparsity": 1.0, "_nparams": 2, "_nparams_nnz": 0, "a": 0.0, "b": 1.0}


def test_a_bare_array_and_a_named_tuple():
    assert jaxpruner.summarize_sparsity(jnp.asarray([0.0, 1.0]))["params"] == 0.5
    summary = jaxpruner.summarize_sparsity(Pair(jnp.zeros(1), {"x": jnp.ones(1)}))
    assert (summary["first"], summary["second/x"]) == (1.0, 0.0)


@pytest.mark.parametrize("only_total", [False, True])
def test_summarize_sparsity_under_jit(only_total):
    eager = jaxpruner.summarize_sparsity(TREE, only_total)
    jitted = jax.jit(jaxpruner.summarize_sparsity, static_argnums=1)(TREE, only_total)
    assert set(jitted) == set(eager)
    for key in eager:
        np.testing.assert_allclose(jitted[key], eager[key], rtol=1e-6, atol=1e-6, err_msg=key)


def test_sparsities_under_jit_are_between_zero_and_one():
    # XLA may divide by a constant through its reciprocal: 1 - 3 * (1 / 3) is below zero in float32.
    params = {str(n): jnp.ones(n) for n in (1, 3, 7, 41, 47, 49, 55, 61)}
    summary = jax.jit(jaxpruner.summarize_sparsity)(params)
    assert {key: float(value) for key, value in summary.items() if key in params} == dict.fromkeys(params, 0.0)
    assert summary["_total_sparsity"] == 0.0


@pytest.mark.slow
def test_totals_past_two_to_the_31_are_exact():
    # One array of 2**24 entries, seen through many leaves.
    mask = jnp.zeros(2**24, bool).at[:3].set(True)
    summary = jaxpruner.summarize_sparsity({f"leaf{i}": mask for i in range(130)}, only_total_sparsity=True)
    assert summary["_nparams"] == 130 * 2**24 > 2**31
    assert summary["_nparams_nnz"] == 390
    assert summary["_total_sparsity"] == pytest.approx(1 - 390 / (130 * 2**24), abs=1e-12)


def test_totals_past_two_to_the_31_under_jit():
    shapes = {
        "w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bool_),
        "v": jax.ShapeDtypeStruct((2**15, 2**16), jnp.bool_),
    }
    summary = jax.eval_shape(jaxpruner.summarize_sparsity, shapes)
    assert set(summary) == {"_total_sparsity", "_nparams", "_nparams_nnz", "w", "v"}


# Intersections


MASKS = {"a": jnp.asarray([True, True, False, False]), "b": jnp.asarray([[True, True]]), "c": None}
MASKS2 = {"a": jnp.asarray([True, False, True, False]), "b": jnp.asarray([[True, True]]), "c": None}


def test_summarize_intersection():
    expected = {"_total_intersection": 3 / 4, "a": 0.5, "b": 1.0}
    assert jaxpruner.summarize_intersection(MASKS, MASKS2) == expected
    jitted = jax.jit(jaxpruner.summarize_intersection)(MASKS, MASKS2)
    assert set(jitted) == set(expected)
    for key in expected:
        np.testing.assert_allclose(jitted[key], expected[key], rtol=1e-6)


def test_an_intersection_is_a_share_of_the_first():
    few, many = {"a": jnp.asarray([True, False, False])}, {"a": jnp.asarray([True, True, False])}
    assert jaxpruner.summarize_intersection(few, many)["a"] == 1.0
    assert jaxpruner.summarize_intersection(many, few)["a"] == 0.5


def test_an_intersection_with_nothing():
    nothing = {"a": jnp.zeros(3, bool)}
    assert jaxpruner.summarize_intersection(nothing, nothing) == {"_total_intersection": 0.0, "a": 0.0}
    assert float(jax.jit(jaxpruner.summarize_intersection)(nothing, nothing)["a"]) == 0.0


@pytest.mark.parametrize("unpruned", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_an_intersection_leaves_out_what_either_tree_does_not_prune(unpruned):
    partial = MASKS | {"a": unpruned}
    for trees in ((MASKS, partial), (partial, MASKS), (partial, partial)):
        assert jaxpruner.summarize_intersection(*trees) == {"_total_intersection": 1.0, "b": 1.0}


# apply_mask


def test_apply_mask():
    params = {"a": jnp.asarray([1.0, jnp.nan, -3.0, jnp.inf]), "b": jnp.ones((1, 2)), "c": jnp.ones(2)}
    masked = jaxpruner.apply_mask(params, MASKS | {"a": jnp.asarray([True, False, True, False])})
    np.testing.assert_array_equal(masked["a"], [1.0, 0.0, -3.0, 0.0])
    np.testing.assert_array_equal(masked["b"], [[1.0, 1.0]])
    assert masked["c"] is params["c"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_apply_mask_keeps_the_dtype(dtype):
    for mask in (jnp.asarray([True, False]), jnp.asarray([1, 0], jnp.uint8), jnp.asarray([1.0, 0.0])):
        masked = jaxpruner.apply_mask(jnp.ones(2, dtype), mask)
        assert masked.dtype == dtype
        np.testing.assert_array_equal(masked.astype(jnp.float32), [1.0, 0.0])


def test_apply_packed_masks():
    params = {"a": jnp.arange(1.0, 14.0), "b": jnp.ones(2)}
    mask = np.arange(13) % 3 == 0
    masks = {"a": PackedStorage().encode(jnp.asarray(mask)), "b": optax.MaskedNode()}
    for masked in (
        jaxpruner.apply_mask(params, masks, is_packed=True),
        jaxpruner.MagnitudePruning().apply_masks(params, masks, is_packed=True),
    ):
        np.testing.assert_array_equal(masked["a"], np.where(mask, np.arange(1.0, 14.0), 0))
        assert masked["b"] is params["b"]
