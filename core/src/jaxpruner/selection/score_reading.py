"""How a search for a threshold reads scores: as order-preserving integers, evaluated and counted on the fly.

Nothing here stores a value per entry. A leaf is a function and its operands, and every read fuses the
function, the order of its values, the comparisons and their sums into one pass over the operands.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from jaxpruner import layouts
from jaxpruner.selection.threshold_search import Column, index_floor

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, Num, UInt32

    Method = Literal["sample", "split"]

# A leaf whose reads take longer than their compilation.
_LARGE = 1 << 19
# For one read: the entries per row, if one of these divides the leaf's entries; else the number of rows.
_LONGEST_ROW, _SHORTEST_ROW, _ROWS = 2048, 512, 64


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one leaf that are evaluated while they are read, so that they are never stored.

    ``Scores(jnp.abs, (w,))`` ranks by magnitude without an array of magnitudes.

    Attributes:
      fn: an elementwise function of the operands. It is evaluated once per read and must give the same
        bits each time, as abs and products do (XLA rounds quotients and sums by what it fuses them with).
      operands: arrays of the leaf's shape, or scalars.
    """

    fn: Callable[..., Any]
    operands: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(operand.shape for operand in self.operands))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return _dtype(self.fn, tuple((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in self.operands))

    def evaluate(self) -> Num[Array, "*shape"]:
        """The scores as an array."""
        return jnp.broadcast_to(self.fn(*self.operands), self.shape)

    def filled(self, where: Bool[Array, "*shape"], value: float) -> Scores:
        """The same scores with `value` at some entries."""
        return Scores(_Filled(self.fn, value), (where, *self.operands))

    @classmethod
    def of(cls, scores: Num[Array, "*shape"] | Scores) -> Scores:
        """Scores from an array; scores as they are."""
        return scores if isinstance(scores, cls) else cls(_identity, (jnp.asarray(scores),))


@functools.lru_cache(maxsize=1024)
def _dtype(fn: Callable[..., Any], operands: tuple[tuple[Any, Any, bool], ...]) -> np.dtype:
    # Leaves are many, their kinds are few.
    kinds = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak_type) for shape, dtype, weak_type in operands]
    return jax.eval_shape(fn, *kinds).dtype


@dataclasses.dataclass(frozen=True)
class _Filled:
    """Equal for equal functions and values, unlike a closure, so that eager calls compile once."""

    fn: Callable[..., Any]
    value: float

    def __call__(self, where: Bool[Array, "*shape"], *operands: Any) -> Any:
        return jnp.where(where, self.value, self.fn(*operands))


@dataclasses.dataclass(frozen=True)
class Scaled:
    """The product of a score and a number, which is the first operand."""

    fn: Callable[..., Any]

    def __call__(self, factor: Any, *operands: Any) -> Any:
        return self.fn(*operands) * factor


def as_array(scores: Num[Array, "*shape"] | Scores) -> Num[Array, "*shape"]:
    """Scores as an array, evaluated if they are not."""
    return scores.evaluate() if isinstance(scores, Scores) else jnp.asarray(scores)


def at_least_float32(scores: Any) -> Num[Array, "*shape"]:
    """Scores as an array of 32 bits or more."""
    scores = as_array(scores)
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def where_finite(scores: Num[Array, "*s"], new: Bool[Array, "*s"], old: Bool[Array, "*s"]) -> Bool[Array, "*s"]:
    """`new` if all scores are finite, else `old`."""
    return jnp.where(jnp.all(jnp.isfinite(scores)), new, old)


def _identity(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    return x


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands", "one"],
    meta_fields=["fn", "shape", "rank_dtype", "method"],
)
@dataclasses.dataclass(frozen=True)
class Leaf:
    """The scores of a leaf as a search by this method reads them, ranked in ``rank_dtype``."""

    fn: Callable[..., Any]
    operands: tuple[Array, ...]
    shape: tuple[int, ...]
    rank_dtype: np.dtype
    method: Method
    one: UInt32[Array, ""]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def keys(self) -> Int[Array, "*shape"]:
        return order_preserving_keys(self.fn(*self.operands).astype(self.rank_dtype), is_magnitude(self.fn))

    def flat_index(self) -> UInt32[Array, "*shape"]:
        index = jnp.full(self.shape, self.one - self.one)
        for axis in range(len(self.shape)):
            stride = math.prod(self.shape[axis + 1 :])
            along = lax.broadcasted_iota(jnp.uint32, self.shape, axis)
            index += along if stride == 1 and len(self.shape) > 1 else along * (self.one * jnp.uint32(stride))
        whole = next((x for x in self.operands if x.shape == self.shape), index)
        return layouts.laid_out_like(whole, index)

    def pinned(self, to: Any) -> tuple[Leaf, Any]:
        """The same leaf and ``to``, which XLA takes to depend on each other.

        Every read starts here. Otherwise XLA finds that keys and indices are the same in every round of
        the search, and computes and stores them ahead of its loop.
        """
        operands, one, to = _pin((self.operands, self.one, to))
        return dataclasses.replace(self, operands=operands, one=one), to


def varying_axes(x: Any) -> Any:
    """The axes of a shard_map that an operand varies over, as its type names them; None where types do not tell."""
    kind = jax.typeof(x) if hasattr(jax, "typeof") else None
    return getattr(kind, "manual_axis_type", getattr(kind, "vma", None))  # its newer and its older name


def varying_zero(leaves: Sequence[Leaf | Scores]) -> Int[Array, ""]:
    """A zero that varies over the mesh axes any of the leaves does, as the state of a loop in shard_map must."""
    operands = [x for leaf in leaves for x in leaf.operands]
    kinds = {id(x) if varying_axes(x) is None else varying_axes(x): x for x in operands}  # one of each
    empty = [lax.slice_in_dim(x.reshape(x.shape or 1), 0, 0) for x in kinds.values()]
    total: Any = sum(jnp.sum(x).astype(jnp.int32) for x in empty)
    return total


@custom_vmap  # optimization_barrier itself has no batching rule in the oldest supported jax
def _pin(arrays: Any) -> Any:
    return lax.optimization_barrier(arrays)


@_pin.def_vmap
def _pin_batched(axis_size: int, in_batched: list[Any], arrays: Any) -> tuple[Any, Any]:
    return _pin(arrays), in_batched[0]


def prepare(scores: Scores, rank_dtype: np.dtype, method: Method) -> Leaf:
    """Lays a leaf out for the search."""
    shape, operands = scores.shape, scores.operands
    if method == "sample":
        # On a single device the reshape moves nothing.
        length = row_length(scores.size)
        shape = (scores.size // length, length)
        operands = tuple(lax.reshape(x, shape) if x.shape == scores.shape else x for x in operands)
    return Leaf(scores.fn, operands, shape, rank_dtype, method, jnp.uint32(1))


# Leaves of one shape share each of these programs: it is traced once, and its kernels are compiled once.


@functools.partial(jax.jit, static_argnums=3)
def count_leaf(
    leaf: Leaf, rows: Int[Array, "leaves n"], number: Int[Array, ""], skips: bool
) -> tuple[tuple[UInt32[Array, " part"], ...], Int[Array, ""]]:
    """The number of entries at or above each threshold of a row of a `threshold_search.Table`, in parts that follow.

    One read of the leaf; none if `skips` and the row says that it need not be read. The number of the leaf is handed
    on.
    """

    def read(leaf, rows, number, anything):
        del anything
        leaf, (rows, pinned) = leaf.pinned((rows, number))
        row = _row(rows, pinned)
        keys, floor = leaf.keys(), index_floor(row.dtype)
        # The same as `floor + size - index`.
        indices = jnp.asarray(floor + leaf.size, row.dtype) - leaf.flat_index().astype(row.dtype)
        indices = lax.select(keys == row[Column.KEY], indices, lax.full_like(keys, floor))
        found = count(lax.select(row[Column.IS_TIED] != 0, indices, keys), row[len(Column) :], leaf.method)
        return found, pinned if skips else row[Column.NUMBER].astype(jnp.int32)

    # Any numbers will do; these are at hand.
    words = rows[0, len(Column) :].astype(jnp.uint32)
    anything = tuple(_split(words, _parts(leaf.size, words.size, leaf.method)))
    if not skips:
        return read(leaf, rows, number, anything)
    is_read = _row(rows, number)[Column.IS_READ] != 0
    return lax.cond(
        is_read, read, lambda leaf, rows, number, anything: (anything, number), leaf, rows, number, anything
    )


@jax.jit
def mask_leaf(leaf: Leaf, rows: Int[Array, "leaves n"], number: Int[Array, ""]) -> Bool[Array, "*shape"]:
    """The mask of a leaf from what a search found (`threshold_search.Table`)."""
    leaf, (rows, number) = leaf.pinned((rows, number))
    row = _row(rows, number)
    keys, key = leaf.keys(), row[Column.KEY]
    return (keys > key) | ((keys == key) & (leaf.flat_index() < row[Column.END].astype(jnp.uint32)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def census(
    mask: Bool[Array, "*shape"], operands: tuple[Array, ...], fn: Callable[..., Any], method: Method
) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """The number of True entries of a mask, and of scores that are not finite, in one read that stores nothing."""
    strange = ~jnp.isfinite(Scores(fn, operands).evaluate())
    number, of_strange = totals((mask, jnp.broadcast_to(strange, mask.shape)), method)
    return number, of_strange


def totals(chosen: Sequence[Bool[Array, "*shape"]], method: Method) -> Sequence[UInt32[Array, ""]]:
    """The numbers of True entries of an even number of arrays; see `count` on the two ways."""
    numbers = [x.astype(jnp.uint32) for x in chosen]
    size = numbers[0].size
    if method == "split" or not size:
        return [jnp.sum(x, dtype=jnp.uint32) for x in numbers]
    rows = [x.reshape(-1, row_length(size)) for x in numbers]
    return sums(rows, (0, 1)) if size < _LARGE else sums(sums(rows, (1,)), (0,))


def _row(rows: Int[Array, "leaves n"], number: Int[Array, ""]) -> Int[Array, " n"]:
    # Unsigned, so that no program asks whether a number counts from the end.
    return lax.dynamic_index_in_dim(rows, number.astype(jnp.uint32), keepdims=False)


def samples(leaves: Sequence[Leaf], strides: Sequence[int]) -> list[tuple[list[int], Int[Array, "n s"]]]:
    """The keys of every ``stride``-th entry of leaves, in rows for those of one length: which ones, and their keys."""
    alike: dict[int, tuple[list[int], list[Array]]] = {}
    for i, (leaf, stride) in enumerate(zip(leaves, strides, strict=True)):
        keys = _sample(leaf, int(stride))
        members, of_members = alike.setdefault(keys.size, ([], []))
        members.append(i)
        of_members.append(keys)
    return [(members, jnp.concatenate(keys).reshape(len(members), -1)) for members, keys in alike.values()]


@functools.partial(jax.jit, static_argnums=1)
def _sample(leaf: Leaf, stride: int) -> Int[Array, " s"]:
    operands = tuple(x.reshape(-1)[::stride] if x.ndim else x for x in leaf.operands)
    return dataclasses.replace(leaf, operands=operands).keys()


def row_length(size: int) -> int:
    """The entries of one row of a leaf.

    Rows let one read run on several cores, and short ones stay in the cache while they are compared with one threshold
    after the other.
    """
    lengths = (length for length in range(_LONGEST_ROW, _SHORTEST_ROW, -1) if size % length == 0)
    return next(lengths, size // math.gcd(size, _ROWS))


def sums(operands: Sequence[UInt32[Array, "*shape"]], axes: Sequence[int]) -> tuple[UInt32[Array, "*rest"], ...]:
    """The sums of several operands over some axes, in one reduction."""
    zeros = (jnp.uint32(0),) * len(operands)
    return tuple(lax.reduce(tuple(operands), zeros, lambda a, b: tuple(map(jnp.add, a, b)), tuple(axes)))


def count(
    values: Int[Array, "*shape"], thresholds: Int[Array, " t"], method: Method
) -> tuple[UInt32[Array, " part"], ...]:
    """For each of an even number of thresholds, the number of values at or above it, in one read.

    In parts, which whoever asks joins for all leaves at once: XLA's CPU backend compiles each concatenation by itself,
    where other programs of one kind are compiled once.
    """
    parts = _parts(values.size, thresholds.size, method)
    if method == "sample":
        # On XLA's CPU backend a reduction of several operands is one fused loop. A reduction of one operand stores
        # the comparison and is done in stages. (Sharded, it is the other way round: only sums of one operand become
        # all-reduces.)
        shape = (*values.shape[:-1], parts[0], values.shape[-1])
        axis = values.ndim
        spread = lax.broadcast_in_dim(values, shape, (*range(axis - 1), axis))
        reached = [
            (spread >= lax.broadcast_in_dim(t, shape, (axis - 1,))).astype(jnp.uint32)
            for t in _split(thresholds, parts)
        ]
        if values.size < _LARGE:  # half as many programs, while leaves run beside each other
            return sums(reached, (*range(axis - 1), axis))
        return sums(sums(reached, (axis,)), tuple(range(axis - 1)))
    return tuple(jnp.sum((values >= t).astype(jnp.uint32), dtype=jnp.uint32).reshape(1) for t in thresholds)


def _split(values: Any, sizes: Sequence[int]) -> Sequence[Any]:
    if hasattr(lax, "split"):
        return lax.split(values, sizes)
    ends = list(itertools.accumulate(sizes))  # of an older JAX
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _parts(size: int, thresholds: int, method: Method) -> tuple[int, ...]:
    """How many thresholds each operand of a read counts for.

    An operand for each is the fastest; two that share them are half as much to compile, which counts for more in a
    small leaf.
    """
    operands = 2 if method == "sample" and size < _LARGE else thresholds
    return (thresholds // operands,) * operands


def common_rank_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The dtype leaves are ranked in together: their own if they share one."""
    first = np.dtype(dtypes[0])
    has_keys = first.itemsize > 1 or first in (jnp.bool_, jnp.int8, jnp.uint8)
    if len(set(dtypes)) == 1 and has_keys:
        return first
    return np.dtype(np.float64 if any(dtype.itemsize == 8 for dtype in dtypes) else np.float32)


def key_range(rank_dtype: np.dtype) -> tuple[int, int]:
    """The lowest and the highest key of a dtype."""
    info = np.iinfo(f"int{rank_dtype.itemsize * 8}")
    return int(info.min), int(info.max)


def key_dtype(rank_dtype: np.dtype) -> np.dtype:
    """int32, or int64 for the keys of 64-bit scores."""
    return np.dtype(np.int64 if rank_dtype.itemsize == 8 else np.int32)


def is_magnitude(fn: Callable[..., Any]) -> bool:
    """Whether a function of scores never sets a sign, by what is marked on it: a part of each key less to compute."""
    return fn is jnp.abs or getattr(fn, "is_magnitude", False)


def order_preserving_keys(x: Num[Array, "*shape"], never_negative: bool = False) -> Int[Array, "*shape"]:
    """Integers in the order of ``x``: all NaN lowest and equal, ``-0.0`` equal to ``0.0``, denormals in place.

    Compared as floats, denormals would be flushed to zero on some backends.
    """
    dtype = key_dtype(x.dtype)
    if x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.signedinteger):
        return x.astype(dtype)
    bits = f"int{x.dtype.itemsize * 8}"
    lowest = jnp.asarray(key_range(x.dtype)[0], dtype)
    raw = lax.bitcast_convert_type(x, bits).astype(dtype)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return raw ^ lowest
    # Negative floats are sign and magnitude: the lowest integer plus the magnitude.
    lowest = jnp.full_like(raw, lowest)
    signed = raw if never_negative else lax.select(raw < 0, lowest - raw, raw)
    return lax.select(lax.ne(x, x), lowest, signed)
