"""Counts past 32 bits and the number of entries a sparsity keeps, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpruner.selection import counts

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
SIZES = st.one_of(st.integers(0, 1000), st.integers(0, 2**40))
SPARSITIES = st.one_of(
    st.floats(2.0**-24, 1.0, width=32),
    st.integers(0, 64).map(lambda i: i / 64),  # exact halves
    st.integers(1, 2**24).map(lambda i: float(np.float32(i / 2**24))),
)
BIG = st.integers(0, 2**63 - 1)

traced_keep_count = jax.jit(counts.keep_count)
static_size_keep_count = jax.jit(counts.keep_count, static_argnums=0)


def exact_keep_count(size: int, sparsity: float) -> int:
    return max(1, round(size * (1 - Fraction(sparsity)))) if size else 0


@given(a=BIG, b=BIG)
@settings(deadline=None)
def test_arithmetic_equals_that_of_integers(a, b):
    big, small = counts.from_int(max(a, b)), counts.from_int(min(a, b))
    x, y = counts.from_int(a), counts.from_int(b)
    assert counts.to_int(x) == a
    assert counts.to_int(counts.add(x, y)) == a + b
    assert counts.to_int(counts.subtract(big, small)) == abs(a - b)
    assert bool(counts.less(x, y)) == (a < b)
    assert bool(counts.less_equal(x, y)) == (a <= b)
    assert bool(counts.equal(x, y)) == (a == b)
    assert counts.to_int(counts.where(counts.less(x, y), x, y)) == min(a, b)
    assert counts.to_float(x) == pytest.approx(a, rel=1e-6)


@given(data=st.data(), most=st.integers(1, 2**29 - 1), times=st.integers(1, 2**29 - 1))
@settings(deadline=None)
def test_numbers_are_shared_exactly(data, most, times):
    number = data.draw(st.integers(0, most))
    among = data.draw(st.one_of(st.integers(1, times), st.integers(max(1, times - 9), times)))
    got = counts.shared(jnp.int32(number), times, jnp.int32(among), most)
    assert (int(got), got.dtype) == (min(most, number * times // among), jnp.int32)


@pytest.mark.parametrize("value", [-1, 2**64])
def test_a_count_out_of_range_is_told(value):
    with pytest.raises(ValueError, match="must lie in"):
        counts.from_int(value)


@given(size=SIZES, sparsity=SPARSITIES)
@settings(deadline=None, max_examples=400)
def test_a_traced_float32_sparsity_keeps_the_exactly_rounded_product(size, sparsity):
    kept = traced_keep_count(counts.from_int(size), jnp.float32(sparsity))
    assert counts.to_int(kept) == exact_keep_count(size, sparsity)


@given(size=SIZES, sparsity=st.floats(0.0, 1.0))
@settings(deadline=None)
def test_a_python_sparsity_follows_the_float64_formula(size, sparsity):
    expected = max(1, round(size * (1 - sparsity))) if size else 0
    for value in (sparsity, np.float64(sparsity), np.asarray(sparsity)):
        assert counts.to_int(counts.keep_count(size, value)) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("size", [0, 1, 25, 1000, 2**32 + 7, 2**40])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_low_precision_sparsities_stand_for_their_exact_value(dtype, size, sparsity):
    value = jnp.asarray(sparsity, dtype)
    kept = counts.to_int(traced_keep_count(counts.from_int(size), value))
    assert kept == exact_keep_count(size, float(value))
    if sparsity == 0:
        assert kept == size


def test_a_float64_sparsity_follows_the_float64_formula():
    with enable_x64(True):
        for size, sparsity in [(25, 0.9), (2**40 + 1, 0.3), (7, 0.0), (0, 0.5), (3, 1.0)]:
            kept = jax.jit(counts.keep_count)(counts.from_int(size), jnp.float64(sparsity))
            expected = max(1, round(size * (1 - sparsity))) if size else 0
            assert counts.to_int(kept) == expected


@pytest.mark.parametrize("sparsity", [-0.5, 1.5, float("nan")])
def test_sparsities_out_of_range_are_clamped(sparsity):
    expected = {-0.5: 100, 1.5: 1}.get(sparsity, 100)
    assert counts.to_int(traced_keep_count(counts.from_int(100), jnp.float32(sparsity))) == expected


def test_keep_count_can_be_batched():
    sparsities = jnp.asarray([0.0, 0.25, 0.9], jnp.float32)
    kept = jax.vmap(lambda s: counts.keep_count(10, s))(sparsities)
    np.testing.assert_array_equal(kept.lo, [10, 8, 1])


@given(size=st.integers(1, 2**24), sparsity=st.floats(0.0, 1.0, exclude_max=True))
@settings(deadline=None, max_examples=300)
def test_a_float32_sparsity_keeps_what_the_float64_one_does(size, sparsity):
    single = counts.float32_sparsity(size, sparsity)
    assert single.dtype == np.float32
    assert (single > 0) == (sparsity > 0)
    assert abs(single - sparsity) <= max(2.0**-23 * sparsity, 1 / size, np.finfo(np.float32).tiny)
    kept = counts.to_int(traced_keep_count(counts.from_int(size), single))
    assert kept == counts.to_int(counts.keep_count(size, sparsity))


def test_a_float32_sparsity_is_moved_only_where_it_must():
    assert counts.float32_sparsity(25, 0.9) == np.nextafter(np.float32(0.9), np.float32(1))
    assert counts.float32_sparsity(26, 0.9) == np.float32(0.9)
    assert counts.float32_sparsity(2**33 + 1, 0.9) == np.float32(0.9)
    assert counts.float32_sparsity(0, 0.9) == np.float32(0.9)
    assert counts.float32_sparsity(10, 0.0) == 0
    assert counts.float32_sparsity(10, 1e-60) == np.finfo(np.float32).tiny
