"""How a search for a threshold reads scores: as order-preserving integers, evaluated and counted on the fly.

Nothing here stores a value per entry. A leaf is a function and its operands, and every read fuses the
function, the order of its values, the comparisons and their sums into one pass over the operands.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from jaxpruner.selection.counts import Count

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, Num, UInt32

    Method = Literal["sample", "split"]

_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one leaf that are evaluated as they are read, so that they are never stored.

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
        return jax.eval_shape(self.fn, *self.operands).dtype

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


def _identity(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    return x


class Leaf(NamedTuple):
    """The scores of a leaf as the search reads them, ranked in ``rank_dtype``."""

    fn: Callable[..., Any]
    operands: tuple[Array, ...]
    shape: tuple[int, ...]
    rank_dtype: np.dtype
    one: UInt32[Array, ""]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def keys(self) -> Int[Array, "*shape"]:
        return order_preserving_keys(self.fn(*self.operands).astype(self.rank_dtype))

    def flat_index(self) -> UInt32[Array, "*shape"]:
        index = jnp.zeros(self.shape, jnp.uint32)
        for axis in range(len(self.shape)):
            stride = self.one * jnp.uint32(math.prod(self.shape[axis + 1 :]))
            index += lax.broadcasted_iota(jnp.uint32, self.shape, axis) * stride
        return index

    def pinned(self, to: Any) -> tuple[Leaf, Any]:
        """The same leaf and ``to``, which XLA takes to depend on each other.

        Every read starts here. Otherwise XLA finds that keys and indices are the same in every round of
        the search, and computes and stores them ahead of its loop.
        """
        operands, one, to = _pin((self.operands, self.one, to))
        return self._replace(operands=operands, one=one), to

    def sample(self, stride: int) -> Int[Array, " s"]:
        """The keys of every ``stride``-th entry."""
        operands = tuple(x.reshape(-1)[::stride] if x.ndim else x for x in self.operands)
        return self._replace(operands=operands).keys().reshape(-1)

    def zero(self) -> Int[Array, ""]:
        """A zero that varies over the mesh axes the scores do, as the state of a loop in shard_map must."""
        empty = [lax.slice_in_dim(x.reshape(x.shape or 1), 0, 0) for x in self.operands]
        return sum(jnp.sum(x).astype(jnp.int32) for x in empty)


@custom_vmap  # optimization_barrier itself has no batching rule in the oldest supported jax
def _pin(arrays: Any) -> Any:
    return lax.optimization_barrier(arrays)


@_pin.def_vmap
def _pin_batched(axis_size: int, in_batched: list[Any], arrays: Any) -> tuple[Any, Any]:
    return _pin(arrays), in_batched[0]


def prepare(scores: Scores, rank_dtype: np.dtype, method: Method) -> Leaf:
    """Lays a leaf out for the search."""
    shape, operands = scores.shape, scores.operands
    if method == "sample" and shape:
        # Rows let one read run on several cores; on a single device the reshape moves nothing.
        rows = math.gcd(scores.size, _ROWS)
        shape = (rows, scores.size // rows)
        operands = tuple(x.reshape(shape) if x.ndim else x for x in operands)
    return Leaf(scores.fn, operands, shape, rank_dtype, jnp.uint32(1))


def count(
    values: Callable[[Leaf], Int[Array, "*shape"]], leaf: Leaf, thresholds: Int[Array, " t"], method: Method
) -> Count:
    """For each threshold, the number of entries whose value is at or above it, in one read of the leaf."""
    leaf, thresholds = leaf.pinned(thresholds)
    read = values(leaf)
    flags = [(read >= t).astype(jnp.uint32) for t in thresholds]
    if method == "sample":
        # On XLA's CPU backend a reduction of several operands is one fused loop. A reduction of one operand stores
        # the comparison and is done in stages. (Sharded, it is the other way round: only sums of one operand become
        # all-reduces.)
        zeros = (jnp.uint32(0),) * len(flags)
        axes = tuple(range(1, len(leaf.shape)))
        rows = lax.reduce(tuple(flags), zeros, lambda a, b: tuple(map(jnp.add, a, b)), axes)
        found = jnp.sum(jnp.stack(rows).reshape(len(rows), -1), 1, dtype=jnp.uint32)
    else:
        found = jnp.stack([jnp.sum(flag, dtype=jnp.uint32) for flag in flags])
    return Count(jnp.zeros_like(found), found)


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


def order_preserving_keys(x: Num[Array, "*shape"]) -> Int[Array, "*shape"]:
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
    keys = jnp.where(raw < 0, lowest - raw, raw)
    infinity = jnp.asarray(np.array(np.inf, x.dtype).view(bits), dtype)
    return jnp.where(jnp.abs(keys) > infinity, lowest, keys)
