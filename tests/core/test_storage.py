"""Masks as one byte or one bit a weight: round trips, sizes, the packed axis."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpruner import mask_storage
from jaxpruner.mask_storage import AxisStorage, DenseStorage, PackedStorage

PROPERTY = settings(max_examples=15, deadline=None)
STORAGES = [DenseStorage(), PackedStorage()]

SHAPES = st.lists(st.integers(0, 18), max_size=4).map(tuple)


@st.composite
def masks(draw):
    shape = draw(SHAPES)
    return np.random.default_rng(draw(st.integers(0, 99))).random(shape) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))


@PROPERTY
@given(sizes=st.lists(st.integers(1, 18), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_masks_of_whole_slices_take_one_bit_an_entry_of_each_axis(sizes, seed):
    draws = np.random.default_rng(seed)
    mask = np.ones((), bool)
    for axis, size in enumerate(sizes):
        along = draws.random(size) < 0.6
        along[draws.integers(size)] = True  # a mask of nothing does not tell its slices
        mask = mask & np.expand_dims(along, [a for a in range(len(sizes)) if a != axis])
    storage = AxisStorage()
    stored = storage.encode(jnp.asarray(mask))
    assert stored.shape == storage.shape(mask.shape) == (-(-sum(sizes) // 8),)
    np.testing.assert_array_equal(storage.decode(stored, mask.shape), mask)
    np.testing.assert_array_equal(mask_storage.storage_of(stored, mask.shape).decode(stored, mask.shape), mask)


@PROPERTY
@given(mask=masks())
def test_round_trip(mask):
    for storage in STORAGES:
        decoded = storage.decode(storage.encode(jnp.asarray(mask)), mask.shape)
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)


@PROPERTY
@given(mask=masks())
def test_packed_bits_against_numpy(mask):
    stored = np.asarray(PackedStorage().encode(jnp.asarray(mask)))
    axis = mask_storage.packed_axis(mask.shape or (1,))
    expected = np.packbits(np.atleast_1d(mask), axis=axis, bitorder="little")
    np.testing.assert_array_equal(stored, expected, strict=True)


@pytest.mark.parametrize("shape", [(), (1,), (8,), (0,), (13,), (5, 3), (0, 4), (3, 16), (7, 1, 9)], ids=str)
def test_round_trip_under_jit(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    storage = PackedStorage()
    trip = jax.jit(lambda m: storage.decode(storage.encode(m), shape))
    np.testing.assert_array_equal(trip(mask), mask, strict=True)


@settings(deadline=None)
@given(shape=SHAPES)
def test_one_bit_a_weight_and_padding_of_one_axis(shape):
    stored = jax.eval_shape(PackedStorage().encode, jax.ShapeDtypeStruct(shape, jnp.bool_))
    assert stored.dtype == jnp.uint8
    shape = shape or (1,)
    axis = mask_storage.packed_axis(shape)
    assert stored.shape == (*shape[:axis], -(-shape[axis] // 8), *shape[axis + 1 :])


@pytest.mark.parametrize("shape", [(512, 512), (3, 3, 64, 128), (1024,), (30_522, 768), (7, 8), (8, 7)], ids=str)
def test_exactly_one_bit_a_weight_where_an_axis_is_a_multiple_of_eight(shape):
    stored = jax.eval_shape(PackedStorage().encode, jax.ShapeDtypeStruct(shape, jnp.bool_))
    assert math.prod(stored.shape) * 8 == math.prod(shape)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((8, 8), 0), ((3, 8), 1), ((6, 4), 1), ((3, 5), 0), ((3, 3, 64, 128), 3), ((16, 48), 0), ((9,), 0)],
)
def test_the_packed_axis_has_the_most_factors_of_two(shape, axis):
    assert mask_storage.packed_axis(shape) == axis


def test_masks_of_zeros_and_ones():
    for storage in STORAGES:
        for dtype in (jnp.uint8, jnp.float32):
            stored = storage.encode(jnp.asarray([0, 1, 1], dtype))
            np.testing.assert_array_equal(storage.decode(stored, (3,)), [False, True, True])


@pytest.mark.parametrize("storage", STORAGES, ids=lambda storage: type(storage).__name__)
def test_trees(storage):
    params = {"a": jnp.zeros((3, 5)), "b": [jnp.zeros(4), jnp.zeros(())]}
    mask = np.arange(15).reshape(3, 5) % 2 == 0
    stored = mask_storage.encode_tree(storage, {"a": jnp.asarray(mask), "b": [None, jnp.asarray(True)]})
    assert stored["b"][0] == optax.MaskedNode()
    decoded = mask_storage.decode_tree(storage, stored, params)
    np.testing.assert_array_equal(decoded["a"], mask)
    assert decoded["b"][0] is None
    assert decoded["b"][1].shape == ()
    assert bool(decoded["b"][1])


def test_a_packed_mask_of_more_than_two_to_the_31_entries():
    shape = (2**16, 2**16 + 8)
    stored = jax.eval_shape(PackedStorage().encode, jax.ShapeDtypeStruct(shape, jnp.bool_))
    assert stored.shape == (2**13, 2**16 + 8)
    back = jax.eval_shape(lambda s: PackedStorage().decode(s, shape), stored)
    assert back.shape == shape
