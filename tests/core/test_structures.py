"""Structures against slow oracles: which units a mask keeps, and how it drops and regrows them."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpruner
from jaxpruner.mask_calculator import get_topk_fn
from jaxpruner.sparsity_types import Block, Channel, NByM, PerOutput, Unstructured

PROPERTY = settings(max_examples=40, deadline=None)
TINY = 1e-45  # the smallest float32 denormal
SPECIALS = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, TINY, -TINY, 3e-39, 1e-7, 65504.0]
SPARSITIES = [0.0, 1e-6, 0.25, 0.5, 0.8, 0.9, 0.95, 0.999999]


# Oracles


def kept_units(number: int, sparsity: float) -> int:
    """max(1, round_half_even(n * (1 - s))) in exact arithmetic; 0 of nothing."""
    return max(1, round(number * (1 - Fraction(float(sparsity))))) if number else 0


def rank(score: float) -> tuple[bool, float]:
    """Orders scores as Python floats do, with NaN below everything."""
    score = float(score)
    return (False, 0.0) if np.isnan(score) else (True, score)


def highest(scores: np.ndarray, keep: int) -> np.ndarray:
    """The mask of the `keep` highest scores; ties keep the lower flat index."""
    flat = scores.ravel()
    # A stable sort in descending order keeps the order of equal scores.
    order = sorted(range(flat.size), key=lambda i: rank(flat[i]), reverse=True)
    mask = np.zeros(flat.size, bool)
    mask[order[:keep]] = True
    return mask.reshape(scores.shape)


def blocks_of(shape: tuple[int, ...], h: int, w: int) -> list[tuple[slice, ...]]:
    """The blocks of a leaf in the order of their tiles."""
    if len(shape) < 2:
        return [(slice(j, min(j + w, shape[0])),) for j in range(0, shape[0], w)]
    return [
        (slice(i, min(i + h, shape[0])), slice(j, min(j + w, shape[1])))
        for i in range(0, shape[0], h)
        for j in range(0, shape[1], w)
    ]


def units_of(structure, shape: tuple[int, ...]) -> list[tuple]:
    """Indices of the units of a leaf."""
    match structure:
        case Unstructured():
            return list(np.ndindex(shape))
        case Block(block_shape=(h, w)):
            return blocks_of(shape, h, w)
        case Channel(axis=axis):
            axis %= len(shape)
            return [tuple(i if a == axis else slice(None) for a in range(len(shape))) for i in range(shape[axis])]
    raise ValueError(structure)


def unit_scores(structure, scores: np.ndarray) -> np.ndarray:
    pool = np.ravel if isinstance(structure, Unstructured) else np.mean
    if isinstance(structure, Channel):
        pool = np.sum
    elif isinstance(structure, Block) and not structure.use_avg_pooling:
        pool = np.max
    wide = scores.astype(np.float64)
    return np.asarray([np.float32(pool(wide[unit]).item()) for unit in units_of(structure, scores.shape)])


def fill(structure, shape: tuple[int, ...], chosen: np.ndarray) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for unit, is_kept in zip(units_of(structure, shape), chosen, strict=True):
        mask[unit] = is_kept
    return mask


def oracle(structure, scores: np.ndarray, sparsity: float) -> np.ndarray:
    if isinstance(structure, NByM):
        return n_by_m(structure, scores) if sparsity else np.ones(scores.shape, bool)
    units = unit_scores(structure, scores)
    return fill(structure, scores.shape, highest(units, kept_units(units.size, sparsity)))


def n_by_m(structure: NByM, scores: np.ndarray) -> np.ndarray:
    """n of every m along the axis; ties keep the later position."""
    lines = np.moveaxis(scores, structure.axis, -1)
    mask = np.zeros(lines.shape, bool)
    for line in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], structure.m):
            group = lines[line][start : start + structure.m]
            order = sorted(range(structure.m), key=lambda i: (rank(group[i]), i), reverse=True)
            mask[line][[start + i for i in order[: structure.n]]] = True
    return np.moveaxis(mask, -1, structure.axis)


@functools.cache
def compiled(structure):
    """One compilation a structure, shape and dtype: the sparsity is traced."""
    return jax.jit(get_topk_fn(structure))


def kept(structure, scores, sparsity: float) -> np.ndarray:
    return np.asarray(compiled(structure)(jnp.asarray(scores), np.float32(sparsity)))


def check(structure, scores, sparsity: float) -> np.ndarray:
    sparsity = np.float32(sparsity)
    mask = kept(structure, scores, sparsity)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, oracle(structure, np.asarray(scores), sparsity), strict=True)
    return mask


ANY_FLOAT = st.one_of(st.sampled_from(SPECIALS), st.floats(width=32), st.integers(-3, 3).map(float))


def scores_like(shape: tuple[int, ...], values: st.SearchStrategy[float] = ANY_FLOAT) -> st.SearchStrategy[np.ndarray]:
    size = int(np.prod(shape))
    return st.lists(values, min_size=size, max_size=size).map(lambda v: np.asarray(v, np.float32).reshape(shape))


# Sums of these are exact in float32, so that pooled scores have one right value.
small_integers = st.integers(-4, 4).map(float)


# Unstructured


@PROPERTY
@given(scores=scores_like((4, 6)), sparsity=st.sampled_from(SPARSITIES))
def test_unstructured(scores, sparsity):
    mask = check(Unstructured(), scores, sparsity)
    assert mask.sum() == kept_units(24, np.float32(sparsity))
    above, below = scores[mask], scores[~mask]
    if np.isnan(above).any():
        assert np.isnan(below).all()
    elif (below := below[~np.isnan(below)]).size:
        assert above.min() >= below.max()


@PROPERTY
@given(
    scores=scores_like((2, 3, 4), st.sampled_from([0.0, -0.0, 1.0, np.nan])), sparsity=st.floats(0, 0.984375, width=32)
)
def test_unstructured_ties_keep_the_lower_flat_index(scores, sparsity):
    check(Unstructured(), scores, sparsity)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@settings(max_examples=20, deadline=None)
@given(scores=scores_like((24,)), sparsity=st.sampled_from(SPARSITIES))
def test_unstructured_narrow_dtypes(dtype, scores, sparsity):
    with np.errstate(over="ignore"):
        scores = jnp.asarray(scores.astype(jnp.dtype(dtype)))
    check(Unstructured(), scores, sparsity)


def test_the_class_itself_is_a_structure():
    np.testing.assert_array_equal(kept(Unstructured, [3.0, 1.0, 2.0, 0.0], 0.5), [True, False, True, False])


def test_special_values():
    scores = np.asarray([np.nan, -np.inf, -1.0, -TINY, -0.0, 0.0, TINY, 1.0, np.inf], np.float32)
    order = [8, 7, 6, 4, 5, 3, 2, 1, 0]  # from the highest; -0.0 ties with 0.0
    for keep in range(1, 10):
        mask = check(Unstructured(), scores, 1 - keep / 9)
        assert set(np.flatnonzero(mask)) == set(order[:keep])


def test_scores_that_are_all_nan_keep_the_first_ones():
    mask = check(Unstructured(), np.full(8, np.nan, np.float32), 0.5)
    np.testing.assert_array_equal(mask, np.arange(8) < 4)


def test_numpy_and_integer_scores():
    mask = get_topk_fn(Unstructured())(np.asarray([2, -(2**31), 2**31 - 1, 2], np.int32), 0.5)
    np.testing.assert_array_equal(mask, [True, False, True, False])


@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_a_leaf_of_one_entry_keeps_it(shape):
    for sparsity in (0.0, 0.999):
        assert kept(Unstructured(), jnp.zeros(shape), sparsity).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (4, 4, 0)])
@pytest.mark.parametrize(
    "structure", [Unstructured(), Block((2, 2)), Block((2, 2), use_avg_pooling=False), Channel(0)], ids=str
)
def test_empty_leaves(structure, shape):
    mask = jax.eval_shape(get_topk_fn(structure), jax.ShapeDtypeStruct(shape, jnp.float32), 0.5)
    assert mask.shape == shape
    assert mask.dtype == bool


@pytest.mark.parametrize(
    ("structure", "sparsity"),
    [(Unstructured(), 0.0), (Unstructured(), 0.9), (NByM(2, 4), 0.0), (NByM(2, 4), 0.9), (Block((2, 3)), 0.9)],
    ids=str,
)
def test_traced_sparsity_equals_static_sparsity(structure, sparsity):
    sparsity = float(np.float32(sparsity))
    scores = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    static = jax.jit(get_topk_fn(structure), static_argnums=1)(scores, sparsity)
    np.testing.assert_array_equal(static, kept(structure, scores, sparsity))


def test_the_count_rounds_half_to_even():
    counts = [int(kept(Unstructured(), np.zeros(8, np.float32), 1 - (k + 0.5) / 8).sum()) for k in range(8)]
    assert counts == [1, 2, 2, 4, 4, 6, 6, 8]


@pytest.mark.slow
def test_float64():
    program = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jaxpruner.mask_calculator import get_topk_fn
from jaxpruner.sparsity_types import *
jax.config.update("jax_enable_x64", True)
close = 1 + np.arange(8) * 2.0**-50  # one number in float32
scores = jnp.asarray([*close, np.nan, 5e-324, 0.0, -0.0])
assert scores.dtype == jnp.float64
topk = jax.jit(get_topk_fn(Unstructured()))
out = [np.flatnonzero(topk(scores, 1 - k / 12)).tolist() for k in range(1, 13)]
pairs = np.flatnonzero(get_topk_fn(NByM(1, 2))(scores, 0.5)).tolist()
blocks = np.flatnonzero(jax.jit(get_topk_fn(Block((1, 2))))(scores[:8], 0.5)).tolist()
print(json.dumps([out, pairs, blocks]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unstructured, pairs, blocks = json.loads(done.stdout)
    order = [7, 6, 5, 4, 3, 2, 1, 0, 9, 10, 11, 8]
    assert unstructured == [sorted(order[:k]) for k in range(1, 13)]
    assert pairs == [1, 3, 5, 7, 9, 11]
    assert blocks == [4, 5, 6, 7]


# N:M


@pytest.mark.parametrize("structure", [NByM(2, 4), NByM(1, 3, axis=0)], ids=str)
@settings(max_examples=20, deadline=None)
@given(scores=scores_like((6, 8)), sparsity=st.sampled_from([0.0, 1e-6, 0.5, 0.9]))
def test_n_by_m(structure, scores, sparsity):
    check(structure, scores, sparsity)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_n_by_m_over_every_pattern_of_a_group(dtype):
    values = [0.0, -0.0, TINY, 1.0, np.nan, -np.inf]
    groups = np.asarray(list(itertools.product(values, repeat=3)), np.float32).astype(jnp.dtype(dtype))
    for n in (1, 2, 3):
        check(NByM(n, 3), groups, 0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize(
    ("n", "m", "axis"), [(2, 4, -1), (3, 7, -1), (8, 16, -1), (9, 20, -1), (5, 12, 0), (16, 32, 0), (1, 96, 0)]
)
@pytest.mark.parametrize("values", [3, 1000], ids=["many ties", "few ties"])
def test_n_by_m_of_any_size(n, m, axis, dtype, values):
    shape = (2 * m, 128) if axis == 0 else (3, 4, 2 * m)
    scores = np.random.default_rng(m).integers(-values, values, shape).astype(jnp.dtype(dtype))
    mask = check(NByM(n, m, axis), scores, 0.5)
    np.testing.assert_array_equal(np.moveaxis(mask, axis, -1).reshape(-1, m).sum(1), n)


def test_n_by_m_ties_keep_the_later_position():
    mask = kept(NByM(2, 4), np.zeros((1, 8), np.float32), 0.5)
    np.testing.assert_array_equal(mask, [[False, False, True, True] * 2])


def test_n_by_m_ignores_the_sparsity_unless_it_is_zero():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    topk = compiled(NByM(1, 4))
    assert np.asarray(topk(scores, 0.0)).all()
    for sparsity in (1e-6, 0.1, 0.99):
        np.testing.assert_array_equal(topk(scores, sparsity), topk(scores, 0.75))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_n_by_m_along_any_axis(axis):
    scores = np.random.default_rng(2).normal(size=(4, 8, 4)).astype(np.float32)
    mask = check(NByM(2, 4, axis), scores, 0.5)
    groups = np.moveaxis(mask, axis, -1).reshape(-1, 4)
    np.testing.assert_array_equal(groups.sum(1), 2)


@pytest.mark.parametrize("structure", [NByM(2, 4), NByM(8, 16), NByM(2, 4, axis=1)], ids=str)
def test_n_by_m_in_a_stack(structure):
    """Under `vmap`, here of two axes, as each alone."""
    scores = np.random.default_rng(3).integers(-20, 20, (2, 3, 16, 32)).astype(np.float32)
    axis = structure.axis % 2 if structure.axis < 0 else structure.axis
    one = NByM(structure.n, structure.m, axis)
    masks = jax.vmap(jax.vmap(lambda x: one.mask(x, 0.5), in_axes=-1, out_axes=-1))(np.moveaxis(scores, 1, -1))
    for i, j in itertools.product(range(2), range(3)):
        np.testing.assert_array_equal(masks[i, ..., j], one.mask(scores[i, j], 0.5))


@pytest.mark.parametrize("structure", [NByM(2, 4, 1), NByM(2, 4, 0), NByM(16, 32, -1), PerOutput(0)], ids=str)
def test_empty_leaves_of_groups(structure):
    shape = (8, 0) if structure.axis == 0 else (0, 32)
    assert structure.mask(jnp.zeros(shape), 0.5).shape == shape


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="this JAX has no explicit axes")
@pytest.mark.parametrize("structure", [Unstructured(), NByM(2, 4), NByM(8, 16, 0), Channel()], ids=str)
@pytest.mark.parametrize("algorithm", ["magnitude", "static_sparse"])
def test_a_mesh_of_one_device_whose_axes_are_explicit(algorithm, structure):
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    config = {"algorithm": algorithm, "sparsity": 0.5, "sparsity_type": structure, "dist_type": "uniform"}
    schedule = {"update_start_step": 0, "update_end_step": 0} if algorithm == "magnitude" else {}
    tx = jaxpruner.sparsify(optax.sgd(0.1), **config, **schedule)
    params = {"w": np.random.default_rng(4).normal(size=(16, 32)).astype(np.float32)}
    expected = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)[1].masks
    laid_out = jax.device_put(params, jax.NamedSharding(mesh, jax.P(None, "a")))
    masks = jax.jit(tx.update)(laid_out, jax.jit(tx.init)(laid_out), laid_out)[1].masks
    np.testing.assert_array_equal(masks["w"], expected["w"])


# Blocks


@pytest.mark.parametrize("use_avg_pooling", [True, False])
@settings(max_examples=15, deadline=None)
@given(scores=scores_like((5, 7), small_integers), sparsity=st.sampled_from(SPARSITIES))
def test_blocks_with_ragged_edges(use_avg_pooling, scores, sparsity):
    check(Block((2, 3), use_avg_pooling), scores, sparsity)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "use_avg_pooling"),
    [((7,), True), ((8,), False), ((5, 1), True), ((4, 5, 3), False), ((4, 5, 3), True), ((3, 3, 2, 4), True)],
    ids=str,
)
def test_blocks_of_any_rank(shape, use_avg_pooling):
    scores = np.random.default_rng(3).integers(-50, 50, shape).astype(np.float32)
    for sparsity in (0.0, 0.5, 0.9):
        check(Block((2, 3), use_avg_pooling), scores, sparsity)


@pytest.mark.parametrize("use_avg_pooling", [True, False])
def test_block_scores_at_ragged_edges_leave_out_the_padding(use_avg_pooling):
    # The last block has one entry: zeros around it must neither dilute it nor win over it.
    structure = Block((1, 3), use_avg_pooling)
    scores = np.asarray([2.0, 2.0, 2.0, 3.0], np.float32)
    np.testing.assert_array_equal(kept(structure, scores, 0.5), [False, False, False, True])
    np.testing.assert_array_equal(kept(structure, -scores, 0.5), [True, True, True, False])


@pytest.mark.parametrize("use_avg_pooling", [True, False])
def test_block_ties_keep_the_lower_tile_and_nan_ranks_lowest(use_avg_pooling):
    structure = Block((1, 2), use_avg_pooling)
    scores = np.asarray([np.nan, 9.0, -1.0, -1.0], np.float32)
    np.testing.assert_array_equal(kept(structure, np.zeros(4, np.float32), 0.5), [True, True, False, False])
    np.testing.assert_array_equal(kept(structure, scores, 0.5), [False, False, True, True])


def test_blocks_of_narrow_floats_are_averaged_without_loss():
    # In bfloat16 256 + 1 is 256: summed there, both blocks would tie.
    mask = kept(Block((1, 2)), jnp.asarray([256.0, 0.0, 256.0, 1.0], jnp.bfloat16), 0.5)
    np.testing.assert_array_equal(mask, [False, False, True, True])


def test_a_block_larger_than_the_leaf_is_one_unit():
    assert kept(Block((8, 8)), np.zeros((3, 3), np.float32), 0.999).all()


# Channels


@settings(max_examples=20, deadline=None)
@given(scores=scores_like((4, 6), small_integers), sparsity=st.sampled_from(SPARSITIES))
def test_channels(scores, sparsity):
    check(Channel(), scores, sparsity)


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_channels_of_any_axis(axis):
    scores = np.random.default_rng(4).integers(-50, 50, (4, 3, 5, 6)).astype(np.float32)
    check(Channel(axis), scores, 0.6)


def test_channels_of_a_vector_are_its_entries():
    np.testing.assert_array_equal(kept(Channel(), jnp.arange(4.0), 0.5), [False, False, True, True])


# Dropping and regrowing


def regrow_oracle(structure, mask, drop, grow, fraction):
    if isinstance(structure, NByM):
        keep = kept_units(int(mask.sum()), fraction)
        survivors = highest(np.where(mask, drop, np.nan), keep) & mask
        return n_by_m(structure, np.where(survivors, np.inf, grow))
    units = units_of(structure, mask.shape)
    active = np.asarray([mask[unit].any() for unit in units])
    drop, grow = unit_scores(structure, drop), unit_scores(structure, grow)
    keep = kept_units(int(active.sum()), fraction)
    survivors = highest(np.where(active, drop, np.nan), keep) & active
    grown = highest(np.where(survivors, -np.inf, grow), int(active.sum() - survivors.sum()))
    return fill(structure, mask.shape, survivors | grown)


REGROWING = [Unstructured(), NByM(2, 4), Block((2, 3)), Channel()]


@functools.cache
def regrowing(structure):
    return jax.jit(structure.regrow)


@pytest.mark.parametrize("structure", REGROWING, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    start=scores_like((5, 8), small_integers),
    drop=scores_like((5, 8), small_integers),
    grow=scores_like((5, 8), small_integers),
    sparsity=st.sampled_from([0.2, 0.5, 0.9]),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 0.75, 1.0]),
)
def test_regrow_drops_the_smallest_and_grows_the_highest(structure, start, drop, grow, sparsity, fraction):
    mask = oracle(structure, start, sparsity)
    fraction = np.float32(fraction)
    regrown = np.asarray(regrowing(structure)(jnp.asarray(mask), drop, grow, fraction))
    np.testing.assert_array_equal(regrown, regrow_oracle(structure, mask, drop, grow, fraction))
    if isinstance(structure, NByM):
        np.testing.assert_array_equal(regrown.reshape(-1, structure.m).sum(1), structure.n)
    else:
        units = units_of(structure, mask.shape)
        assert sum(regrown[unit].any() for unit in units) == sum(mask[unit].any() for unit in units)


@pytest.mark.parametrize("structure", REGROWING, ids=str)
def test_regrow_keeps_the_count_whatever_the_scores(structure):
    rng = np.random.default_rng(5)
    mask = oracle(structure, rng.normal(size=(5, 8)).astype(np.float32), 0.5)
    for drop, grow in itertools.product([np.nan, 0.0, np.inf, -np.inf], repeat=2):
        scores = [np.full((5, 8), value, np.float32) for value in (drop, grow)]
        regrown = np.asarray(regrowing(structure)(jnp.asarray(mask), *scores, np.float32(0.5)))
        if isinstance(structure, NByM):
            np.testing.assert_array_equal(regrown.reshape(-1, 4).sum(1), 2)
        elif not isinstance(structure, Block):
            assert regrown.sum() == mask.sum()
        else:
            units = units_of(structure, mask.shape)
            assert sum(regrown[unit].all() for unit in units) == sum(mask[unit].all() for unit in units)


@pytest.mark.parametrize("structure", REGROWING, ids=str)
def test_a_dense_leaf_stays_dense(structure):
    scores = jnp.zeros((5, 8))
    assert np.asarray(regrowing(structure)(jnp.ones((5, 8), bool), scores, scores, np.float32(0.3))).all()


@pytest.mark.parametrize("structure", REGROWING, ids=str)
def test_a_drop_fraction_of_zero_changes_nothing(structure):
    rng = np.random.default_rng(6)
    mask = oracle(structure, rng.normal(size=(5, 8)).astype(np.float32), 0.5)
    drop, grow = rng.normal(size=(2, 5, 8)).astype(np.float32)
    np.testing.assert_array_equal(regrowing(structure)(jnp.asarray(mask), drop, grow, np.float32(0)), mask)


class TransposedBlock(Block):
    """Of a user: pools what is an array, as the signature says."""

    def pool(self, scores):
        return super().pool(scores.T.reshape(scores.shape[::-1])).T


def test_structures_of_users_pool_arrays():
    params = {"kernel": jnp.arange(1.0, 65.0).reshape(8, 8)}
    updater = jaxpruner.MagnitudePruning(
        sparsity_type=TransposedBlock((2, 2)),
        sparsity_distribution_fn=functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=0.5),
    )
    _, masks = updater.instant_sparsify(params)
    np.testing.assert_array_equal(masks["kernel"].sum(1), [0] * 4 + [8] * 4)
