r"""Exact top-k masks without a sort.

A mask needs the k-th highest score, not an order. The scores are read as order-preserving integers,
and the threshold is searched by counting,

.. math:: T = \max \{ t : |\{i : key_i \ge t\}| \ge k \},

where one read of the scores counts several candidate thresholds. The same search over flat indices
breaks the ties at ``T``; it runs only where ``T`` is tied. Two methods choose the candidates, and both
are exact:

- ``"sample"`` (one CPU device): a sorted strided sample brackets the threshold, interpolation on the
  exact counts closes in on it, and evenly spaced candidates among the interpolated ones bound the
  number of reads. It takes a handful of reads.
- ``"split"`` (accelerators and sharded arrays): every read splits the bracket in four, 16 reads for
  float32. Only elementwise operations and full sums touch the scores, in their own shape, so a
  sharded array stays where it is and nothing but counts is reduced over devices.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Callable, Literal, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpruner import counts
from jaxpruner.counts import Count

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num, UInt32

    Method = Literal["sample", "split"]
    # Several thresholds, ascending, to the number of entries at or above each of them.
    Counter = Callable[[Int[Array, "t"]], Count]

_SPLITS = 3  # candidates per read of "split"
# Candidates per read of "sample", as standard deviations around the interpolated rank, and evenly spaced ones.
_DEVIATIONS = (-2.5, -1.0, 0.0, 1.0, 2.5)
_EVEN = 2
_SAMPLE_DEVIATIONS = (-4.0, -1.0, 1.0, 4.0)
_MAX_SAMPLE = 16384
_ROWS = 64


class Scores(NamedTuple):
    """Scores of one leaf that are evaluated as they are read, so that they are never stored.

    ``Scores(jnp.abs, (w,))`` ranks by magnitude without an array of magnitudes.

    Attributes:
      fn: an elementwise function of the operands. It is evaluated once per read and must give the same
        bits each time, as negation, abs, products and quotients do.
      operands: arrays of the leaf's shape, or scalars.
    """

    fn: Callable[..., Any]
    operands: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(operand.shape for operand in self.operands))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return jax.eval_shape(self.fn, *self.operands).dtype

    def map_operands(self, fn: Callable[[Array], Array]) -> Scores:
        """The same scores of rearranged operands; scalars stay."""
        return self._replace(operands=tuple(fn(x) if x.ndim else x for x in self.operands))

    def keys(self, rank_dtype: np.dtype) -> Int[Array, "*shape"]:
        return _order_preserving_keys(self.fn(*self.operands).astype(rank_dtype))


class Bracket(NamedTuple):
    """Where a threshold lies: in ``[lo, last]``, with ``at_least >= k > above``."""

    lo: Int[Array, ""]
    last: Int[Array, ""]
    at_least: Count  # entries at or above lo
    above: Count  # entries above last


def top_k_mask(
    scores: Num[Array, "*shape"] | Scores, keep: Count, *, method: Method | None = None
) -> Bool[Array, "*shape"]:
    """The mask of the ``keep`` highest scores of one leaf; see :func:`top_k_masks`."""
    return top_k_masks([scores], keep, method=method)[0]


def top_k_masks(
    leaves: Sequence[Num[Array, "..."] | Scores],
    keep: Count,
    scales: Sequence[Float[Array, ""] | None] | None = None,
    *,
    method: Method | None = None,
) -> list[Bool[Array, "..."]]:
    """The masks of the ``keep`` highest scores over all leaves together.

    Exactly ``keep`` entries are True. Ties keep the earlier leaf, then the lower flat (C-order) index.
    NaN ranks below everything and ``-0.0`` ties with ``0.0``. The leaves are neither concatenated nor
    copied. Leaves of several dtypes are ranked as float32 (as float64 if one has 64 bits).

    Args:
      leaves: the scores, arrays or :class:`Scores`, of fewer than ``2**32`` entries each.
      keep: how many entries to keep, between 0 and the number of all entries; may be traced.
      scales: a divisor per leaf, or None; a leaf is ranked by ``leaf / scale``, evaluated as it is read.
      method: how thresholds are searched (see the module's docstring). None takes ``"sample"`` on a
        single CPU device and ``"split"`` elsewhere, decided when the function is traced.

    Returns:
      One mask per leaf, of its shape.

    Raises:
      ValueError: if a leaf has ``2**32`` entries or more.
    """
    scales = [None] * len(leaves) if scales is None else scales
    scores = [_as_scores(leaf, scale) for leaf, scale in zip(leaves, scales, strict=True)]
    for i, leaf in enumerate(scores):
        if leaf.size >= 2**32:
            raise ValueError(
                f"leaf {i}: {leaf.size} entries in shape {leaf.shape} are too many, top-k selection counts a leaf "
                "in 32 bits; split it into leaves of fewer than 2**32 entries."
            )
    full = [leaf for leaf in scores if leaf.size]
    masks = iter(_select(full, keep, method or _default_method()) if full else ())
    return [next(masks) if leaf.size else jnp.zeros(leaf.shape, bool) for leaf in scores]


def _default_method() -> Method:
    return "sample" if jax.default_backend() == "cpu" and jax.device_count() == 1 else "split"


def _as_scores(leaf: Num[Array, "*shape"] | Scores, scale: Float[Array, ""] | None) -> Scores:
    fn, operands = leaf if isinstance(leaf, Scores) else (lambda x: x, (leaf,))
    if scale is not None:
        fn, operands = (lambda scale, *xs, fn=fn: fn(*xs) / scale), (scale, *operands)
    return Scores(fn, tuple(lax.stop_gradient(jnp.asarray(x)) for x in operands))


def _select(leaves: list[Scores], keep: Count, method: Method) -> list[Bool[Array, "..."]]:
    shapes = [leaf.shape for leaf in leaves]
    if method == "sample":
        # Rows let one read run on several cores; on a single device the reshape moves nothing.
        leaves = [leaf.map_operands(lambda x: x.reshape(math.gcd(x.size, _ROWS), -1)) for leaf in leaves]
    rank_dtype = _rank_dtype([leaf.dtype for leaf in leaves])
    lowest, highest = _key_range(rank_dtype)
    total = sum(leaf.size for leaf in leaves)

    def count(thresholds):
        found = [_count(lambda t, leaf=leaf: leaf.keys(rank_dtype) >= t, thresholds, method) for leaf in leaves]
        return functools.reduce(counts.add, found)

    found = _search(
        count,
        keep,
        Bracket(jnp.asarray(lowest), jnp.asarray(highest), counts.from_int(total), counts.from_int(0)),
        method,
        width=int(highest) - int(lowest),
        first=_sampled_thresholds(leaves, rank_dtype, keep) if method == "sample" else None,
    )
    threshold = found.lo
    # Kept are the entries above the threshold, and those on it before the flat index `ends[leaf]`.
    ends = lax.cond(
        counts.equal(found.at_least, keep),
        lambda: jnp.asarray([leaf.size for leaf in leaves], jnp.uint32),
        lambda: _tie_ends(
            [lambda leaf=leaf: leaf.keys(rank_dtype) == threshold for leaf in leaves],
            [leaf.shape for leaf in leaves],
            counts.subtract(keep, found.above),
            method,
        ),
    )
    masks = []
    for i, leaf in enumerate(leaves):
        keys = leaf.keys(rank_dtype)
        mask = (keys > threshold) | ((keys == threshold) & (_flat_index(leaf.shape) < ends[i]))
        masks.append(mask.reshape(shapes[i]))
    return masks


def _tie_ends(
    ties: list[Callable[[], Bool[Array, "..."]]], shapes: list[tuple[int, ...]], wanted: Count, method: Method
) -> UInt32[Array, "leaves"]:
    """The flat index of every leaf before which ties are kept, so that the first ``wanted`` of all are."""
    sizes = [math.prod(shape) for shape in shapes]
    ends, partial, found_in_partial, wanted_in_partial = [], jnp.int32(0), jnp.uint32(0), jnp.uint32(0)
    for i, tied in enumerate(ties):
        found = jax.tree.map(lambda x: x[0], _count(lambda _, tied=tied: tied(), jnp.zeros(1), method))
        taken = counts.where(counts.less(wanted, found), wanted, found)
        wanted = counts.subtract(wanted, taken)
        # At most one leaf keeps some of its ties and drops others.
        is_partial = (taken.lo > 0) & (taken.lo < found.lo)
        partial = jnp.where(is_partial, i, partial)
        found_in_partial = jnp.where(is_partial, found.lo, found_in_partial)
        wanted_in_partial = jnp.where(is_partial, taken.lo, wanted_in_partial)
        ends.append(jnp.where(taken.lo < found.lo, 0, jnp.uint32(sizes[i])))
    ends = jnp.stack(ends)

    # Search the end as `size - t`, so that counts fall with t as they do for scores.
    def count_before_end(tied, shape, thresholds):
        return _count(lambda t: tied() & (_flat_index(shape) < math.prod(shape) - t), thresholds, method)

    branches = [functools.partial(count_before_end, tied, shape) for tied, shape in zip(ties, shapes)]
    size = jnp.asarray(sizes, jnp.uint32)[partial]
    found = _search(
        lambda thresholds: lax.switch(partial, branches, thresholds),
        Count(jnp.uint32(0), wanted_in_partial),
        Bracket(jnp.uint32(0), size, Count(jnp.uint32(0), found_in_partial), counts.from_int(0)),
        method,
        width=max(sizes),
    )
    return jnp.where(
        (jnp.arange(len(ends)) == partial) & (wanted_in_partial > 0), size - found.lo, ends
    )


def _search(
    count: Counter,
    keep: Count,
    bracket: Bracket,
    method: Method,
    width: int,
    first: Int[Array, "t"] | None = None,
) -> Bracket:
    """Narrows a bracket down to one threshold or, with ``"sample"``, to a count that equals ``keep``."""
    if method == "split":
        reads = -(-width.bit_length() // 2)
        return lax.fori_loop(
            0, reads, lambda _, b: _narrow(b, t := b.lo + _even_offsets(b, _SPLITS), count(t), keep), bracket
        )

    def is_open(state):
        bracket, _ = state
        return ~counts.equal(bracket.at_least, keep) & (bracket.lo != bracket.last)

    def read(state):
        bracket, thresholds = state
        bracket = _narrow(bracket, thresholds, count(thresholds), keep)
        return bracket, _interpolated_thresholds(bracket, keep)

    first = _interpolated_thresholds(bracket, keep) if first is None else first
    return lax.while_loop(is_open, read, (bracket, first))[0]


def _narrow(bracket: Bracket, thresholds: Int[Array, "t"], found: Count, keep: Count) -> Bracket:
    """The part of the bracket between the last threshold with enough entries and the next one."""
    enough = jnp.sum(counts.less_equal(keep, found), dtype=jnp.int32)

    def lower(old, new):
        return jnp.concatenate([old[None], new])[enough]

    def upper(new, old):
        return jnp.concatenate([new, old[None]])[enough]

    return Bracket(
        lo=lower(bracket.lo, thresholds),
        last=upper(thresholds - 1, bracket.last),
        at_least=jax.tree.map(lower, bracket.at_least, found),
        above=jax.tree.map(upper, found, bracket.above),
    )


def _width(bracket: Bracket) -> UInt[Array, ""]:
    """``last - lo``, which passes the range of a signed key."""
    return (bracket.last - bracket.lo).astype(f"uint{bracket.lo.dtype.itemsize * 8}")


def _even_offsets(bracket: Bracket, number: int) -> Int[Array, "number"]:
    width = _width(bracket)
    step = width // (number + 1) + 1
    return jnp.minimum(step * jnp.arange(1, number + 1, dtype=width.dtype), width).astype(bracket.lo.dtype)


def _interpolated_thresholds(bracket: Bracket, keep: Count) -> Int[Array, "t"]:
    width = _width(bracket)
    inside = counts.to_float(counts.subtract(bracket.at_least, bracket.above))
    fraction = counts.to_float(counts.subtract(bracket.at_least, keep)) / inside
    deviation = jnp.sqrt(fraction * (1 - fraction) / inside) + 0.5 / inside
    fractions = jnp.clip(fraction + jnp.asarray(_DEVIATIONS) * deviation, 0, 1 - 2.0**-24)
    offsets = (fractions * width.astype(jnp.float32)).astype(width.dtype)
    # lo + 1 tells whether lo itself holds many entries (zeros), which would mislead an interpolation.
    offsets = jnp.clip(jnp.append(offsets, 1), 1, width).astype(bracket.lo.dtype)
    return jnp.sort(bracket.lo + jnp.concatenate([offsets, _even_offsets(bracket, _EVEN)]))


def _sampled_thresholds(leaves: list[Scores], rank_dtype: np.dtype, keep: Count) -> Int[Array, "t"]:
    """Keys around the quantile of a strided sample, each with its successor to recognise a tie."""
    total = sum(leaf.size for leaf in leaves)
    stride = max(1, total // min(max(total // 256, 1024), _MAX_SAMPLE))
    sample = [leaf.map_operands(lambda x: x.reshape(-1)[::stride]).keys(rank_dtype) for leaf in leaves]
    sample = jnp.sort(jnp.concatenate([keys.reshape(-1) for keys in sample]))
    density = counts.to_float(keep) / total
    deviation = jnp.sqrt(sample.size * density * (1 - density)) + 1
    ranks = sample.size * (1 - density) + jnp.asarray(_SAMPLE_DEVIATIONS) * deviation
    keys = sample[jnp.clip(ranks.astype(jnp.int32), 0, sample.size - 1)]
    _, highest = _key_range(rank_dtype)
    return jnp.sort(jnp.concatenate([keys, jnp.minimum(keys, highest - 1) + 1]))


def _count(
    holds: Callable[[Int[Array, ""]], Bool[Array, "..."]], thresholds: Int[Array, "t"], method: Method
) -> Count:
    """For each threshold, how many entries it holds for."""
    flags = [holds(t).astype(jnp.uint32) for t in thresholds]
    if method == "split":
        found = [jnp.sum(flag) for flag in flags]
    else:
        # A reduction of several operands is one fused loop on XLA's CPU backend; one of a single operand (hence
        # two at least) stores the comparison and reduces it in stages.
        operands = tuple(flags) if len(flags) > 1 else (flags[0], flags[0])
        zeros = (jnp.uint32(0),) * len(operands)
        axes = tuple(range(1, flags[0].ndim))
        rows = lax.reduce(operands, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b)), axes)
        found = [jnp.sum(row) for row in rows[: len(flags)]]
    found = jnp.stack(found)
    return Count(jnp.zeros_like(found), found)


def _rank_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The dtype all leaves are ranked in: their own if they share one."""
    if len(set(dtypes)) == 1 and (dtypes[0].itemsize > 1 or dtypes[0] in (jnp.bool_, jnp.int8, jnp.uint8)):
        return np.dtype(dtypes[0])
    return np.dtype(np.float64 if any(dtype.itemsize == 8 for dtype in dtypes) else np.float32)


def _key_range(rank_dtype: np.dtype) -> tuple[np.signedinteger, np.signedinteger]:
    info = np.iinfo(f"int{rank_dtype.itemsize * 8}")
    key_type = _key_dtype(rank_dtype).type
    return key_type(info.min), key_type(info.max)


def _key_dtype(rank_dtype: np.dtype) -> np.dtype:
    return np.dtype(np.int64 if rank_dtype.itemsize == 8 else np.int32)


def _order_preserving_keys(x: Num[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Integers in the order of ``x``: all NaN lowest and equal, ``-0.0`` equal to ``0.0``, denormals in place.

    Compared as floats, denormals would be flushed to zero on some backends.
    """
    key_dtype = _key_dtype(x.dtype)
    if x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.signedinteger):
        return x.astype(key_dtype)
    bits = f"int{x.dtype.itemsize * 8}"
    smallest = jnp.asarray(jnp.iinfo(bits).min, key_dtype)
    raw = lax.bitcast_convert_type(x, bits).astype(key_dtype)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return raw ^ smallest
    # Negative floats are sign and magnitude: smallest + magnitude.
    keys = jnp.where(raw < 0, smallest - raw, raw)
    infinity = jnp.asarray(np.array(np.inf, x.dtype).view(bits), key_dtype)
    return jnp.where(jnp.abs(keys) > infinity, smallest, keys)


def _flat_index(shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    iotas = [lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(s) for axis, s in enumerate(strides)]
    return functools.reduce(jnp.add, iotas, jnp.zeros(shape, jnp.uint32))
