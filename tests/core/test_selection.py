"""Top-k masks against a stable NumPy argsort, by both methods."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxpruner import selection
from jaxpruner.selection import counts

METHODS = ["sample", "split"]
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
NAN, INF = float("nan"), float("inf")
AVAILABLE = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def jitted(method):
    return jax.jit(functools.partial(selection.top_k_masks, method=method))


def masks_by_argsort(leaves, keep):
    """Highest first, NaN last, ties in order of leaf and flat index."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        flat = np.concatenate([np.asarray(leaf).astype(np.float64).ravel() for leaf in leaves])
    order = np.lexsort((np.where(np.isnan(flat), 0, -flat), np.isnan(flat)))
    mask = np.zeros(flat.size, bool)
    mask[order[:keep]] = True
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    return [m.reshape(np.shape(leaf)) for m, leaf in zip(np.split(mask, ends), leaves, strict=True)]


def check(leaves, keep, method, **kwargs):
    masks = jitted(method)(leaves, counts.from_int(keep), **kwargs)
    for mask, expected in zip(masks, masks_by_argsort(leaves, keep), strict=True):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)


def keeps_of(size):
    return sorted({0, 1, size // 3, size // 2, size - 1, size} & set(range(size + 1)))


# Fixed shapes, so that the compiled functions are shared by the examples.
SPECIAL = st.sampled_from([0.0, -0.0, NAN, -NAN, INF, -INF, 1.0, -1.0, 1e-45, -1e-45, 1e-39, 1.5e-38, 3e38])
VALUES = st.one_of(SPECIAL, st.floats(width=32), st.integers(-3, 3).map(float))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_masks_equal_those_of_a_stable_argsort(method, data):
    shape = data.draw(st.sampled_from([(1,), (7,), (4, 3), (128,)]))
    scores = data.draw(hnp.arrays(np.float32, shape, elements=VALUES))
    check([scores], data.draw(st.integers(0, scores.size)), method)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_leaves_are_ranked_together(method, data):
    shapes = [(3, 4), (1,), (2, 2, 2)]
    leaves = [data.draw(hnp.arrays(np.float32, shape, elements=VALUES)) for shape in shapes]
    check(leaves, data.draw(st.integers(0, 21)), method)


def normal(size, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=size).astype(dtype)


def pruned(size, density):
    scores = np.abs(normal(size))
    scores[np.random.default_rng(1).uniform(size=size) >= density] = 0
    return scores


LARGE = 40_000
DISTRIBUTIONS = {
    "normal": normal(LARGE),
    "magnitudes": np.abs(normal(LARGE)),
    "lognormal": np.exp(5 * normal(LARGE)),
    "uniform": np.random.default_rng(0).uniform(size=LARGE).astype(np.float32),
    "sorted": np.sort(normal(LARGE)),
    "reversed": np.sort(normal(LARGE))[::-1].copy(),
    "pruned": pruned(LARGE, 0.2),
    "zeros_first": np.where(np.arange(LARGE) < 0.8 * LARGE, 0, np.abs(normal(LARGE))).astype(np.float32),
    "quantized": np.round(normal(LARGE), 1),
    "constant": np.ones(LARGE, np.float32),
    "denormal": (normal(LARGE).astype(np.float64) * 1e-41).astype(np.float32),
    "all_nan": np.full(LARGE, NAN, np.float32),
    "every_exponent": np.random.default_rng(0).integers(0, 2**32, LARGE, dtype=np.uint32).view(np.float32),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_and_count(name, method):
    scores = DISTRIBUTIONS[name]
    nonzero = int(np.count_nonzero(scores))
    for keep in {*keeps_of(LARGE), LARGE // 10, nonzero, nonzero // 2, max(nonzero - 3, 0), min(nonzero + 3, LARGE)}:
        check([scores], keep, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 1013, 65_536])
def test_sizes_that_rows_do_not_divide(size, method):
    for keep in keeps_of(size):
        check([np.round(normal(size), 2)], keep, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, np.int8, np.uint16, np.bool_])
def test_dtypes(dtype, method):
    scores = 40 * normal((30, 20))
    if jnp.issubdtype(dtype, jnp.floating):
        scores[:3] = np.asarray([[0.0], [-0.0], [NAN]])
        scores[3, :] = 1e-7
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        scores = np.abs(scores)
    scores = scores > 0 if dtype == np.bool_ else scores.astype(dtype)
    for keep in keeps_of(600):
        check([scores], keep, method)


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_of_integer_ranges(method):
    for dtype in (np.int32, np.uint32):
        info = np.iinfo(dtype)
        scores = np.asarray([info.max, info.min, info.max, 5, info.min, info.max - 1], dtype)
        for keep in range(7):
            check([scores], keep, method)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_denormals_keep_their_order_among_float32_leaves(method):
    leaves = [jnp.asarray([1e-40, 3e-40, 0.0], jnp.bfloat16), jnp.asarray([2e-40, -1e-40], jnp.float32)]
    for keep in range(6):
        check(leaves, keep, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_float64(method):
    with enable_x64(True):
        fine = 1 + np.arange(50) * 1e-15  # equal as float32
        leaves = [fine[::-1].copy(), np.asarray([NAN, -0.0, 0.0, -INF, 5e-324]), normal(7)]
        for keep in keeps_of(62):
            check(leaves, keep, method)
        for keep in range(4):
            check([np.asarray([2**62 + 1, -(2**63), 2**62], np.int64)[:3]], min(keep, 3), method)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_dtypes_scalars_and_empty_leaves(method):
    leaves = [
        normal((5, 4)).astype(jnp.bfloat16),
        np.zeros((0, 3), np.float32),
        np.float32(0.5),
        normal(9, np.float16),
        np.arange(-2, 3, dtype=np.int32),
        np.ones((2, 1, 2), np.float32),
    ]
    for keep in keeps_of(39):
        check(leaves, keep, method)


def test_nothing_to_select_from():
    assert selection.top_k_masks([], counts.from_int(0)) == []
    assert selection.top_k_mask(jnp.zeros((0, 2)), counts.from_int(0)).shape == (0, 2)


@pytest.mark.parametrize("method", METHODS)
def test_scales_rank_by_the_quotient(method):
    leaves = [np.round(normal((20, 5)), 1), 1e3 * normal(31), np.zeros(4, np.float32)]
    scales = [np.float32(np.linalg.norm(leaf) + 1e-8) for leaf in leaves]
    quotients = [leaf / scale for leaf, scale in zip(leaves, scales, strict=True)]
    for keep in keeps_of(135):
        masks = jitted(method)(leaves, counts.from_int(keep), scales)
        for mask, expected in zip(masks, masks_by_argsort(quotients, keep), strict=True):
            np.testing.assert_array_equal(mask, expected)
    masks = jitted(method)(leaves, counts.from_int(50), [None, scales[1], None])
    expected = masks_by_argsort([leaves[0], quotients[1], leaves[2]], 50)
    for mask, one in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask, one)


@pytest.mark.parametrize("method", METHODS)
def test_scores_can_be_functions_of_their_operands(method):
    w, g = normal((40, 50)), normal((40, 50), seed=1)

    @jax.jit
    def select(w, g, scale):
        leaves = [selection.Scores(jnp.abs, (w,)), selection.Scores(lambda w, g: jnp.abs(w * g), (w, g))]
        return selection.top_k_masks(leaves, counts.from_int(700), [None, scale], method=method)

    expected = masks_by_argsort([np.abs(w), np.abs(w * g) / np.float32(0.5)], 700)
    for mask, one in zip(select(w, g, jnp.float32(0.5)), expected, strict=True):
        np.testing.assert_array_equal(mask, one)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_transformations(method):
    scores = np.round(normal((6, 200)), 1)
    keeps = jnp.asarray([0, 1, 50, 100, 199, 200], jnp.uint32)
    expected = np.stack([masks_by_argsort([row], int(keep))[0] for row, keep in zip(scores, keeps, strict=True)])

    def select(row, keep):
        return selection.top_k_mask(row, counts.Count(jnp.zeros_like(keep), keep), method=method)

    @jax.jit
    def transformed(scores, keeps):
        row, keep = scores[2], keeps[2]
        return (
            jax.vmap(select)(scores, keeps),
            jax.lax.scan(lambda carry, x: (carry, select(*x)), 0, (scores, keeps))[1],
            jax.lax.cond(keep > 0, select, lambda row, _: row > 0, row, keep),
            jax.grad(lambda row: jnp.sum(row * select(row, keep)))(row),
        )

    batched, scanned, chosen, gradient = transformed(scores, keeps)
    np.testing.assert_array_equal(batched, expected)
    np.testing.assert_array_equal(scanned, expected)
    np.testing.assert_array_equal(chosen, expected[2])
    np.testing.assert_array_equal(gradient, expected[2])
    np.testing.assert_array_equal(jax.pmap(select)(scores[2:3], keeps[2:3]), expected[2:3])
    np.testing.assert_array_equal(select(scores[2], keeps[2]), expected[2])  # and without jit


@pytest.mark.parametrize("method", METHODS)
def test_counts_of_huge_leaves_are_exact_in_the_program(method):
    huge = jax.ShapeDtypeStruct((2**16 - 1, 2**16 + 1), jnp.float32)  # 2**32 - 1 entries
    keep = jax.eval_shape(lambda: counts.from_int(0))
    lowered = jax.jit(functools.partial(selection.top_k_masks, method=method)).lower([huge, huge], keep)
    assert [mask.shape for mask in jax.tree.leaves(lowered.out_info)] == [huge.shape] * 2


@pytest.mark.slow
@pytest.mark.skipif(AVAILABLE < 10e9, reason="needs 10 GB of memory")
def test_entries_past_32_bits_are_counted_exactly():
    # Two leaves of more than 2**31 entries each, more than 2**32 together (one array: they are only read). All
    # scores tie, so that the last place kept is found by its index, past 2**31, in the second leaf.
    size, beyond = 2**31 + 1000, 2**31 + 5
    leaf = jnp.zeros(size, jnp.uint8)
    masks = selection.top_k_masks([leaf, leaf], counts.from_int(size + beyond), method="sample")
    whole, cut = map(np.asarray, masks)
    assert np.count_nonzero(whole) == size
    assert np.count_nonzero(cut) == beyond
    assert cut[beyond - 2 : beyond + 2].tolist() == [True, True, False, False]


def test_a_leaf_past_32_bits_is_told():
    huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    with pytest.raises(ValueError, match=r"leaf 0 of shape \(65536, 65536\).*split it"):
        jax.eval_shape(lambda x: selection.top_k_mask(x, counts.from_int(1)), huge)


def test_a_mask_update_stores_nothing_per_entry():
    size = 1_000_000
    w, g = (jax.ShapeDtypeStruct((1000, 1000), jnp.float32),) * 2
    keep = jax.eval_shape(lambda: counts.from_int(0))

    def select(w, g, scale, keep):
        leaves = [selection.Scores(jnp.abs, (w,)), selection.Scores(lambda w, g: jnp.abs(w * g), (w, g))]
        return selection.top_k_masks(leaves, keep, [scale, scale], method="sample")

    compiled = jax.jit(select).lower(w, g, jax.ShapeDtypeStruct((), jnp.float32), keep).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.3 * 4 * size


SHARDED = """
    import functools, re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from jaxpruner import selection
    from jaxpruner.selection import counts

    try:
        from jax import shard_map
    except ImportError:
        from jax.experimental.shard_map import shard_map as old_shard_map

        shard_map = functools.partial(old_shard_map, check_rep=False)

    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("x", "y"))
    rng = np.random.default_rng(0)
    leaves = [np.round(rng.normal(size=shape), 1).astype(np.float32) for shape in [(64, 32), (16, 8, 6), (24,)]]
    specs = [P("x", "y"), P(None, "x"), P("y")]
    sharded = [jax.device_put(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, specs)]
    select = jax.jit(selection.top_k_masks)
    hlo = select.lower(sharded, counts.from_int(0)).compile().as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", hlo)
    assert "all-reduce" in hlo
    for keep in (0, 1, 700, 1500, 2840):
        masks = select(sharded, counts.from_int(keep))
        order = np.argsort(-np.concatenate([leaf.ravel() for leaf in leaves]), kind="stable")
        expected = np.zeros(2840, bool)
        expected[order[:keep]] = True
        np.testing.assert_array_equal(np.concatenate([np.asarray(m).ravel() for m in masks]), expected)
    assert masks[0].sharding.is_equivalent_to(sharded[0].sharding, 2)

    # Inside shard_map and pmap every device selects among its own.
    local = functools.partial(selection.top_k_mask, keep=counts.from_int(10))
    for masks in (
        jax.jit(shard_map(local, mesh=mesh, in_specs=P(("x", "y")), out_specs=P(("x", "y"))))(leaves[0]),
        jax.pmap(local)(leaves[0].reshape(8, 8, 32)),
    ):
        np.testing.assert_array_equal(np.asarray(masks).reshape(8, -1).sum(1), [10] * 8)

    # A leaf that is the same everywhere keeps a mask that is, whatever is searched beside it.
    def each(leaves):
        competitions = [selection.Competition([leaf], counts.from_int(9)) for leaf in leaves]
        return [masks[0] for masks in selection.select(competitions)]

    specs = [P("x"), P()]
    one, whole = jax.jit(shard_map(each, mesh=mesh, in_specs=(specs,), out_specs=specs))([leaves[0], leaves[1]])
    assert (one.sum(), whole.sum()) == (4 * 9, 9)

    # Called eagerly, leaves may lie on different devices.
    apart = [jax.device_put(leaf, device) for leaf, device in zip(leaves, jax.devices())]
    assert [mask.sum() for mask in each(apart)] == [9] * 3
    assert [mask.devices() for mask in each(apart)] == [leaf.devices() for leaf in apart]
"""


@pytest.mark.slow
def test_sharded_scores_are_not_gathered():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(SHARDED)], env=env, check=True, timeout=300)
