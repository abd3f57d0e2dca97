"""Distributions: uniform, Erdős-Rényi, filters and custom maps."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpruner.sparsity_distributions import (
    KERNEL_FILTER_FN,
    NOT_DIM_ONE_FILTER_FN,
    erk,
    get_sparsities_erdos_renyi,
    uniform,
)

PROPERTY = settings(max_examples=150, deadline=None)

PARAMS = {
    "encoder": {"kernel": jnp.zeros((20, 30)), "bias": jnp.zeros(30)},
    "decoder": {"kernel": jnp.zeros((30, 50)), "scale": jnp.zeros((1, 50))},
    "step": jnp.zeros(()),
}


def layer_ratio(shape, include_kernel=True):
    axes = shape if include_kernel else shape[-2:]
    return sum(axes) / math.prod(axes) if axes else 1.0


def density_by_bisection(shapes, sparsity, ratios):
    """The water-filling form of the same problem: density min(1, eps * ratio), eps by bisection."""
    sizes = np.asarray([math.prod(shape) for shape in shapes], float)
    budget = sum(math.prod(shape) - math.floor(sparsity * math.prod(shape)) for shape in shapes)
    low, high = 0.0, 1.0 / min(ratios)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * ratios) @ sizes < budget else (low, middle)
    return np.minimum(1, high * ratios)


# Uniform


def test_uniform():
    assert uniform(PARAMS, 0.8) == {
        "encoder": {"kernel": 0.8, "bias": None},
        "decoder": {"kernel": 0.8, "scale": 0.8},
        "step": None,
    }


def test_uniform_with_a_filter_and_a_custom_map():
    sparsities = uniform(PARAMS, 0.8, KERNEL_FILTER_FN, {("decoder", "kernel"): 0.3})
    assert sparsities["encoder"]["kernel"] == 0.8
    assert sparsities["decoder"] == {"kernel": 0.3, "scale": None}


@pytest.mark.parametrize(
    "key", [("decoder", "kernel"), "decoder/kernel", "decoder/k*", "dec*/kernel", "d?coder/[k]ernel"], ids=str
)
@pytest.mark.parametrize("distribution", [uniform, erk])
def test_keys_of_a_custom_map(distribution, key):
    custom = {key: 0.25, ("encoder", "kernel"): 0.5}
    sparsities = distribution(PARAMS, 0.8, KERNEL_FILTER_FN, custom)
    assert sparsities["decoder"]["kernel"] == 0.25
    assert sparsities["encoder"]["kernel"] == 0.5


def test_of_two_keys_the_earlier_wins():
    assert uniform(PARAMS, 0.8, KERNEL_FILTER_FN, {"decoder/*": 0.1, "*": 0.2}) == {
        "encoder": {"kernel": 0.2, "bias": None},
        "decoder": {"kernel": 0.1, "scale": None},
        "step": None,
    }


def test_uniform_of_other_pytrees():
    class Layer(NamedTuple):
        kernel: object
        bias: object

    kernel, bias = jnp.zeros((2, 3)), jnp.zeros(3)
    assert uniform([kernel, (bias, kernel)], 0.5) == [0.5, (None, 0.5)]
    assert uniform(Layer(kernel, bias), 0.5, KERNEL_FILTER_FN) == Layer(0.5, None)
    assert uniform([kernel, kernel], 0.5, custom_sparsity_map={"1": 0.1}) == [0.5, 0.1]
    assert uniform(kernel, 0.5) == 0.5
    assert uniform(bias, 0.5) is None


def test_uniform_of_abstract_parameters():
    params = jax.eval_shape(lambda: PARAMS)
    assert uniform(params, 0.8) == uniform(PARAMS, 0.8)
    assert erk(params, 0.8) == erk(PARAMS, 0.8)


def test_filters():
    assert NOT_DIM_ONE_FILTER_FN(("a", "bias"), jnp.zeros((2, 2)))
    assert not NOT_DIM_ONE_FILTER_FN(("a", "kernel"), jnp.zeros(2))
    assert KERNEL_FILTER_FN(("a", "kernel"), jnp.zeros(2))
    assert not KERNEL_FILTER_FN(("kernel", "scale"), jnp.zeros((2, 2)))
    assert not KERNEL_FILTER_FN((), jnp.zeros((2, 2)))


def test_filters_get_paths_of_strings():
    seen = []
    uniform([{"a": jnp.zeros((2, 2))}, jnp.zeros(2)], 0.5, lambda path, param: seen.append((path, param.ndim)) or True)
    assert seen == [(("0", "a"), 2), (("1",), 1)]


# Erdős-Rényi


SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 64), st.integers(1, 64)),
    ),
    min_size=1,
    max_size=6,
)


@PROPERTY
@given(
    shapes=SHAPES, sparsity=st.floats(0, 0.999), include_kernel=st.booleans(), scale=st.sampled_from([0.0, 0.5, 1.0])
)
def test_erdos_renyi_against_bisection(shapes, sparsity, include_kernel, scale):
    named = {(str(i), "kernel"): shape for i, shape in enumerate(shapes)}
    found = get_sparsities_erdos_renyi(named, sparsity, include_kernel=include_kernel, erk_power_scale=scale)
    ratios = np.asarray([layer_ratio(shape, include_kernel) ** scale for shape in shapes])
    assert list(found) == list(named)
    np.testing.assert_allclose(
        [1 - found[key] for key in named], density_by_bisection(shapes, sparsity, ratios), rtol=1e-9, atol=1e-9
    )
    assert all(0 <= value < 1 for value in found.values())


@PROPERTY
@given(shapes=SHAPES, sparsity=st.floats(0, 0.999))
def test_erdos_renyi_meets_the_budget_of_floored_zeros(shapes, sparsity):
    named = {(str(i),): shape for i, shape in enumerate(shapes)}
    found = get_sparsities_erdos_renyi(named, sparsity)
    zeros = sum(math.floor(sparsity * math.prod(shape)) for shape in shapes)
    spent = sum(found[key] * math.prod(shape) for key, shape in named.items())
    assert spent == pytest.approx(zeros, rel=1e-9, abs=1e-6)


def test_erdos_renyi_by_hand():
    shapes = {("a",): (10, 10), ("b",): (100, 100)}
    # Densities eps * 20/100 and eps * 200/10000, of which 20 eps + 200 eps entries are kept: 10 + 1000.
    epsilon = 1010 / 220
    assert get_sparsities_erdos_renyi(shapes, 0.9) == pytest.approx(
        {("a",): 1 - 0.2 * epsilon, ("b",): 1 - 0.02 * epsilon}
    )


def test_leaves_that_would_pass_density_one_become_dense_and_others_pay():
    shapes = {("a",): (2, 2), ("b",): (100, 100)}
    found = get_sparsities_erdos_renyi(shapes, 0.5)
    assert found == pytest.approx({("a",): 0.0, ("b",): 5002 / 10_000})


def test_a_custom_map_stays_outside_the_budget():
    shapes = {("a", "kernel"): (10, 10), ("b", "kernel"): (50, 50), ("c", "kernel"): (100, 100)}
    rest = {key: shapes[key] for key in list(shapes)[1:]}
    for key in (("a", "kernel"), "a/kernel", "a/*"):
        found = get_sparsities_erdos_renyi(shapes, 0.9, {key: 0.123})
        assert found == {("a", "kernel"): 0.123} | get_sparsities_erdos_renyi(rest, 0.9)


def test_without_the_kernel_only_the_last_two_axes_count():
    shapes = {("conv",): (3, 3, 16, 32), ("dense",): (64, 64)}
    with_kernel = get_sparsities_erdos_renyi(shapes, 0.9)
    without = get_sparsities_erdos_renyi(shapes, 0.9, include_kernel=False)
    densities = {key: 1 - value for key, value in without.items()}
    assert densities[("conv",)] / densities[("dense",)] == pytest.approx((48 / (16 * 32)) / (128 / (64 * 64)))
    assert with_kernel != without


def test_a_power_scale_of_zero_is_uniform():
    shapes = {("a",): (10, 10), ("b",): (100, 100)}
    assert get_sparsities_erdos_renyi(shapes, 0.9, erk_power_scale=0.0) == pytest.approx({("a",): 0.9, ("b",): 0.9})


def test_a_sparsity_of_zero_is_dense():
    assert get_sparsities_erdos_renyi({("a",): (3, 4), ("b",): (5, 6)}, 0.0) == pytest.approx({("a",): 0, ("b",): 0})


def test_empty_leaves_have_no_share():
    found = get_sparsities_erdos_renyi({("a",): (0, 4), ("b",): (50, 60), ("c",): ()}, 0.9)
    assert found[("a",)] == 0.0
    assert found[("b",)] == pytest.approx(2700 / 3000)


def test_erk_of_a_tree():
    sparsities = erk(PARAMS, 0.9, KERNEL_FILTER_FN)
    expected = get_sparsities_erdos_renyi({("encoder", "kernel"): (20, 30), ("decoder", "kernel"): (30, 50)}, 0.9)
    assert sparsities["encoder"] == {"kernel": expected["encoder", "kernel"], "bias": None}
    assert sparsities["decoder"] == {"kernel": expected["decoder", "kernel"], "scale": None}
    assert sparsities["step"] is None


def test_erk_of_a_list():
    first, second = erk([jnp.zeros((20, 30)), jnp.zeros((30, 50))], 0.9)
    assert 0 < first < second < 1


def test_erk_of_a_bare_array():
    with pytest.raises(ValueError, match="Single parameter is provided"):
        erk(jnp.zeros((4, 4)), 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
def test_sparsities_out_of_range(sparsity):
    for distribution in (uniform, erk):
        with pytest.raises(ValueError, match="Default sparsity"):
            distribution(PARAMS, sparsity)
    with pytest.raises(ValueError, match="Default sparsity"):
        get_sparsities_erdos_renyi({("a",): (2, 2)}, sparsity)
    with pytest.raises(ValueError, match=r"encoder/kernel: sparsity .* is outside \[0, 1\)"):
        uniform(PARAMS, 0.5, custom_sparsity_map={"encoder/kernel": sparsity})
