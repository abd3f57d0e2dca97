"""Exact counts without 64-bit integers.

JAX runs with 32-bit integers unless ``jax_enable_x64`` is set, but the entries of a large model pass
``2**32`` once they are summed over leaves. A :class:`Count` holds such a number in two uint32 words,
and :func:`keep_count` turns a size and a sparsity into the number of entries to keep without ever
rounding it through a float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, UInt32

_LIMB_BITS = 16
_LIMB_MASK = 0xFFFF
_FRACTION_LIMBS = 3  # 48-bit fixed point: every float32 of [2**-24, 1] is a multiple of 2**-48


class Count(NamedTuple):
    """A number of entries, ``hi * 2**32 + lo``.

    ``hi`` is None where no number can reach ``2**32``, which halves the arithmetic. Both operands of an operation are
    of one kind.
    """

    hi: Any  # UInt32[Array, "*shape"] or None
    lo: UInt32[Array, "*shape"]


class Share(NamedTuple):
    """What a sparsity keeps of a number of entries: :func:`keep_count` of the two, not yet evaluated."""

    size: int | Count
    sparsity: float | Float[Array, ""]


def from_int(value: int) -> Count:
    """The count of a static Python integer in ``[0, 2**64)``."""
    if not 0 <= value < 2**64:
        raise ValueError(f"A count must lie in [0, 2**64), got {value}.")
    return Count(jnp.uint32(value >> 32), jnp.uint32(value & 0xFFFFFFFF))


def narrow(count: Count) -> Count:
    """The same numbers, all below ``2**32``, in one word."""
    return Count(None, count.lo)


def wide(count: Count) -> Count:
    """The same numbers in two words."""
    return Count(jnp.zeros_like(count.lo), count.lo) if count.hi is None else count


def to_int(count: Count) -> int:
    """The Python integer of a concrete count."""
    return (0 if count.hi is None else int(count.hi) << 32) + int(count.lo)


def to_float(count: Count, dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """The count as a float, rounded to float32: for estimates, never for decisions."""
    low = count.lo.astype(dtype)
    return low if count.hi is None else count.hi.astype(dtype) * 2.0**32 + low


def add(a: Count, b: Count) -> Count:
    """``a + b``."""
    lo = a.lo + b.lo
    return Count(None if a.hi is None else a.hi + b.hi + (lo < a.lo).astype(jnp.uint32), lo)


def subtract(a: Count, b: Count) -> Count:
    """``a - b``, for ``b <= a``."""
    return Count(None if a.hi is None else a.hi - b.hi - (a.lo < b.lo).astype(jnp.uint32), a.lo - b.lo)


def shared(number: Any, times: int, among: Any, most: int) -> Any:
    """``min(most, number * times // among)`` of int32 below ``2**29``, exact even if the product has more bits.

    Args:
      number: at most `most`.
      times: a static Python integer.
      among: 1 or more.
      most: a static Python integer.
    """
    if most * times < 2**31:
        return jnp.minimum(most, number * times // among)
    # Multiplied bit by bit, and divided on the way.
    quotient = rest = jnp.zeros_like(number)
    for bit in f"{times:b}":
        rest = 2 * rest + (number if bit == "1" else 0)
        quotient = jnp.minimum(most, 2 * quotient + rest // among)
        rest = rest % among
    return quotient


def equal(a: Count, b: Count) -> Bool[Array, "*shape"]:
    """``a == b``."""
    return a.lo == b.lo if a.hi is None else (a.hi == b.hi) & (a.lo == b.lo)


def less(a: Count, b: Count) -> Bool[Array, "*shape"]:
    """``a < b``."""
    return a.lo < b.lo if a.hi is None else (a.hi < b.hi) | ((a.hi == b.hi) & (a.lo < b.lo))


def less_equal(a: Count, b: Count) -> Bool[Array, "*shape"]:
    """``a <= b``."""
    return a.lo <= b.lo if a.hi is None else ~less(b, a)


def where(condition: Bool[Array, "*shape"], a: Count, b: Count) -> Count:
    """``a`` where ``condition`` holds, ``b`` elsewhere."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def take(count: Count, index: Any) -> Count:
    """``count[index]``."""
    return jax.tree.map(lambda words: words[index], count)


def chosen(values: Any, index: Sequence[int] | np.ndarray) -> Any:
    """``values[index]`` of an array or a count, for a static index.

    It is a gather only if it has to be, because XLA takes many rounds to simplify a gather.
    """
    places = np.asarray(index)

    def choose(words):
        if len(words) == len(places) and (places == np.arange(len(places))).all():
            return words
        return jnp.broadcast_to(words, (len(places), *words.shape[1:])) if len(words) == 1 else words[places]

    return jax.tree.map(choose, values)


def sum_where(members: Bool[np.ndarray, "n m"], count: Count) -> Count:
    """For each row of `members`, the sum of the counts it names; counts of shape (m, ...) to (n, ...)."""
    if members.shape[0] == members.shape[1] and (members == np.eye(len(members), dtype=bool)).all():
        return count

    def add_up(words):
        shape = (*members.shape, *[1] * (words.ndim - 1))
        return jnp.sum(jnp.where(members.reshape(shape), words[None], 0), axis=1, dtype=jnp.uint32)

    if count.hi is None:
        return Count(None, add_up(count.lo))
    # Halves of 16 bits, up to 2**16 of which add up without passing 32.
    low, high = add_up(count.lo & _LIMB_MASK), add_up(count.lo >> _LIMB_BITS)
    high += low >> _LIMB_BITS
    return Count(add_up(count.hi) + (high >> _LIMB_BITS), high << _LIMB_BITS | low & _LIMB_MASK)


def keep_count(size: int | Count, sparsity: float | Float[Array, ""]) -> Count:
    r"""The number of entries that a sparsity keeps.

    .. math:: k = \max(1, \mathrm{round\_half\_even}(n (1 - s)))

    and 0 for an empty leaf; ``s`` is clamped to ``[0, 1]``, so that a sparsity of 0 keeps all. A
    Python float (or a NumPy float64 scalar) with a static size is computed on the host in float64. A traced
    float32, bfloat16 or float16 sparsity is taken as the exact number it stands for: the result is
    the rounded exact product for ``n <= 2**40`` and ``s >= 2**-24`` (for smaller ``s``, ``s`` is
    first cut to a multiple of ``2**-48``). A float64 array (x64 on) follows the host formula.

    Args:
      size: ``n``, a Python integer or a traced count.
      sparsity: ``s``, a Python float, a NumPy scalar or a traced scalar.

    Returns:
      ``k`` as a :class:`Count`.
    """
    if not isinstance(size, Count) and _is_on_host(size, sparsity):
        return from_int(_host_keep_count(size, float(sparsity)))
    return _traced_keep_count(size if isinstance(size, Count) else from_int(size), jnp.asarray(sparsity))


def stacked(members: Sequence[Count | Share]) -> Count:
    """Counts as one of shape (n,). The shares among them are counted together, and equal ones once."""
    distinct: dict[Any, tuple[int, Count | Share]] = {}
    index = [distinct.setdefault(_identity(member), (len(distinct), member))[0] for member in members]
    words: list[Any] = [None] * len(distinct)
    together: list[tuple[int, Share]] = []
    for i, member in distinct.values():
        if isinstance(member, Count):
            words[i] = member
        elif _is_on_host(*member) or jnp.result_type(member.sparsity) == jnp.float64:
            words[i] = keep_count(*member)
        else:
            together.append((i, member))
    if together:
        sizes = _stack([s.size if isinstance(s.size, Count) else from_int(s.size) for _, s in together])
        kept = _traced_keep_count(sizes, jnp.stack([jnp.asarray(s.sparsity, jnp.float32) for _, s in together]))
        if len(together) == len(distinct):
            return chosen(kept, index)
        for j, (i, _) in enumerate(together):
            words[i] = take(kept, j)
    return chosen(_stack(words), index)


def _stack(members: Sequence[Count]) -> Count:
    return Count(*(jnp.stack(words) for words in zip(*map(wide, members), strict=True)))


def _identity(member: tuple[Any, ...]) -> Any:
    return tuple(
        part if isinstance(part, (int, float)) else _identity(part) if isinstance(part, tuple) else id(part)
        for part in member
    )


def _is_on_host(size: int | Count, sparsity: Any) -> bool:
    is_host_float = isinstance(sparsity, (int, float)) or (
        isinstance(sparsity, np.ndarray) and sparsity.dtype == np.float64
    )
    return is_host_float and not isinstance(size, Count)


@functools.partial(jax.jit, inline=True)  # eager calls are one program instead of some fifty
def _traced_keep_count(size: Count, sparsity: Float[Array, ""]) -> Count:
    if sparsity.dtype == jnp.float64:
        kept = _float64_product(size, sparsity)
    else:
        kept = _fixed_point_product(size, sparsity.astype(jnp.float32))
    # Where the high word is not 0, the low one stays.
    return kept._replace(lo=jnp.where(_is_zero(size), 0, jnp.where(_is_zero(kept), 1, kept.lo)))


def _is_zero(count: Count) -> Bool[Array, "*shape"]:
    return count.lo == 0 if count.hi is None else count.hi | count.lo == 0


def float32_sparsity(size: int, sparsity: float) -> np.float32:
    """The float32 that stands for a float64 sparsity of a leaf of ``size`` entries.

    Optimizer state holds sparsities as float32, whose exact value may keep another number of entries
    than the float64 formula: 25 entries keep 2 at 0.9, but 3 at float32(0.9).

    Args:
      size: the number of entries of the leaf.
      sparsity: its sparsity as a Python float.

    Returns:
      The float32 nearest to ``sparsity`` for which a traced :func:`keep_count` agrees with the float64
      one. If float32 cannot resolve one entry (past ``2**24`` entries) and none is found, it is plain
      ``float32(sparsity)``. 0 stays 0 and a positive sparsity stays positive.
    """
    if sparsity <= 0:
        return np.float32(0)
    # The smallest normal number: XLA may flush smaller ones to 0.
    tiny = np.finfo(np.float32).tiny
    nearest = np.maximum(np.float32(sparsity), tiny)
    wanted = _host_keep_count(size, sparsity)
    up, down = np.nextafter(nearest, np.float32(1)), np.maximum(np.nextafter(nearest, np.float32(0)), tiny)
    neighbours = sorted((up, down), key=lambda s: abs(float(s) - sparsity))
    fallback = np.maximum(np.float32(1 - wanted / max(size, 1)), tiny)
    for candidate in (nearest, *neighbours, fallback):
        if _exact_keep_count(size, candidate) == wanted:
            return candidate
    return nearest


def _host_keep_count(size: int, sparsity: float) -> int:
    return max(1, round(size * (1 - min(max(sparsity, 0.0), 1.0)))) if size else 0


def _exact_keep_count(size: int, sparsity: np.float32) -> int:
    """What the traced :func:`keep_count` gives, on the host."""
    return max(1, round(size * (1 - Fraction(float(sparsity))))) if size else 0


def _float64_product(size: Count, sparsity: Float[Array, ""]) -> Count:
    kept = jnp.round(to_float(size, jnp.float64) * (1 - jnp.clip(sparsity, 0, 1)))
    if size.hi is None:
        return Count(None, kept.astype(jnp.uint32))
    hi = jnp.floor(kept / 2.0**32)
    return Count(hi.astype(jnp.uint32), (kept - hi * 2.0**32).astype(jnp.uint32))


def _fixed_point_product(size: Count, sparsity: Float[Array, ""]) -> Count:
    """``round_half_even(size * (1 - sparsity))`` by a schoolbook product of 16-bit limbs."""
    density = _density_limbs(sparsity)
    words = [size.lo] if size.hi is None else [size.lo, size.hi]
    entries = [word >> shift & _LIMB_MASK for word in words for shift in (0, _LIMB_BITS)]
    columns = [jnp.uint32(0)] * (len(density) + len(entries))
    for i, d in enumerate(density):
        for j, n in enumerate(entries):
            columns[i + j] += d * n & _LIMB_MASK
            columns[i + j + 1] += d * n >> _LIMB_BITS
    product = _carry(columns)
    *lower, highest = product[:_FRACTION_LIMBS]
    whole = product[_FRACTION_LIMBS:]
    half = 1 << _LIMB_BITS - 1
    # Past one half, or exactly one half below an odd number.
    beyond_half = sum(lower) + (whole[0] & 1) > 0
    round_up = (highest > half) | ((highest == half) & beyond_half)
    low, *high = [whole[i] | whole[i + 1] << _LIMB_BITS for i in range(0, len(whole), 2)]
    up = Count(None, round_up.astype(jnp.uint32))
    return add(Count(high[0], low), wide(up)) if high else add(Count(None, low), up)


def _density_limbs(sparsity: Float[Array, ""]) -> list[UInt32[Array, ""]]:
    """``(1 - sparsity) * 2**48`` as limbs, the lowest first; the highest is ``2**16`` for a sparsity of 0."""
    rest = jnp.where(sparsity > 0, jnp.minimum(sparsity, 1), 0)
    limbs: list[Array] = []
    for _ in range(_FRACTION_LIMBS):  # every step is exact: a power of two, then the integer part removed
        rest = rest * (1 << _LIMB_BITS)
        limb = jnp.floor(rest)
        rest = rest - limb
        limbs.insert(0, limb.astype(jnp.int32))
    # 2**48 - s limb by limb; the arithmetic shift of a negative limb is its borrow.
    density, borrow = [], jnp.int32(0)
    for limb in limbs[:-1]:
        difference = borrow - limb
        density.append((difference & _LIMB_MASK).astype(jnp.uint32))
        borrow = difference >> _LIMB_BITS
    return [*density, ((1 << _LIMB_BITS) - limbs[-1] + borrow).astype(jnp.uint32)]


def _carry(columns: list[UInt32[Array, ""]]) -> list[UInt32[Array, ""]]:
    limbs, carry = [], jnp.uint32(0)
    for column in columns:
        total = column + carry
        limbs.append(total & _LIMB_MASK)
        carry = total >> _LIMB_BITS
    return limbs
