r"""The highest threshold that enough entries reach, found by counting.

.. math:: T = \max \{ t : |\{i : key_i \ge t\}| \ge k \}

A bracket holds ``T``; every read counts the entries at or above a few thresholds and narrows it. What
is searched need not be scores: ties are broken by the same search over flat indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxpruner import counts
from jaxpruner.counts import Count

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt

    # Ascending thresholds to the number of entries at or above each of them.
    Counter = Callable[[Int[Array, " t"]], Count]

# Thresholds of one read, in a search by splitting: evenly spaced ones.
_SPLITS = 3
# In a search by interpolation: the likely one, its successor, others some standard deviations around it, and
# evenly spaced ones, which bound the number of reads.
_DEVIATIONS = (-2.0, -0.7, 0.7, 2.0)
_EVEN = 2
# In its first read: so many standard deviations around the quantile of the sample.
_SAMPLE_DEVIATIONS = (-4.0, -1.0, 1.0, 4.0)


class Bracket(NamedTuple):
    """Where a threshold lies: in ``[lo, last]``, with ``at_least >= k > above``."""

    lo: Int[Array, ""]
    last: Int[Array, ""]
    at_least: Count  # entries at or above lo
    above: Count  # entries above last


def split(count: Counter, keep: Count, bracket: Bracket, max_width: int) -> Bracket:
    """Splits the bracket in four with every read, down to one threshold.

    The number of reads is static, half the bits of ``max_width``.
    """

    def read(_, bracket):
        thresholds = _even_thresholds(bracket, _SPLITS)
        return _narrow(bracket, thresholds, count(thresholds), keep)

    return lax.fori_loop(0, -(-max_width.bit_length() // 2), read, bracket)


def interpolate(count: Counter, keep: Count, bracket: Bracket, sample: Int[Array, " s"] | None = None) -> Bracket:
    """Narrows the bracket to one threshold, or to a ``lo`` that exactly ``keep`` entries reach.

    Args:
      count: counts entries.
      keep: the number of entries that the threshold is for.
      bracket: where to search.
      sample: a sorted sample of what is searched. Without one, it is taken to be spread evenly at first.

    Returns:
      The bracket, with ``lo`` as the threshold.
    """

    def is_open(state):
        bracket, _ = state
        return ~counts.equal(bracket.at_least, keep) & (bracket.lo != bracket.last)

    def read(state):
        bracket, thresholds = state
        bracket = _narrow(bracket, thresholds, count(thresholds), keep)
        return bracket, _interpolated_thresholds(bracket, keep, sample)

    if sample is None:
        first = _interpolated_thresholds(bracket, keep, None)
    else:
        first = _sampled_thresholds(bracket, keep, sample)
    return lax.while_loop(is_open, read, (bracket, first))[0]


def _narrow(bracket: Bracket, thresholds: Int[Array, " t"], found: Count, keep: Count) -> Bracket:
    """The part of the bracket between the last threshold with enough entries and the next one."""
    enough = jnp.sum(counts.less_equal(keep, found), dtype=jnp.int32)

    def below(old, new):
        return jnp.concatenate([old[None], new])[enough]

    def beyond(new, old):
        return jnp.concatenate([new, old[None]])[enough]

    return Bracket(
        lo=below(bracket.lo, thresholds),
        last=beyond(thresholds - 1, bracket.last),
        at_least=Count(*map(below, bracket.at_least, found)),
        above=Count(*map(beyond, found, bracket.above)),
    )


def _width(bracket: Bracket) -> UInt[Array, ""]:
    """``last - lo``, which may pass the range of a signed key."""
    return (bracket.last - bracket.lo).astype(f"uint{bracket.lo.dtype.itemsize * 8}")


def _even_thresholds(bracket: Bracket, number: int) -> Int[Array, " number"]:
    """Thresholds that split a bracket of width w into parts no wider than ``w // (number + 1)``."""
    width = _width(bracket)
    step = width // (number + 1) + 1
    offsets = jnp.minimum(step * jnp.arange(1, number + 1, dtype=width.dtype), width)
    return bracket.lo + offsets.astype(bracket.lo.dtype)


def _interpolated_thresholds(bracket: Bracket, keep: Count, sample: Int[Array, " s"] | None) -> Int[Array, " t"]:
    width = _width(bracket)
    inside = counts.to_float(counts.subtract(bracket.at_least, bracket.above))
    fraction = counts.to_float(counts.subtract(bracket.at_least, keep)) / inside
    # Of entries spread at random over the bracket, so far off is the one of that rank.
    deviation = jnp.sqrt(fraction * (1 - fraction) / inside) + 0.5 / inside
    fractions = jnp.clip(fraction + jnp.asarray((0.0, *_DEVIATIONS), jnp.float32) * deviation, 0, 1 - 2.0**-24)
    likely, *around = (fractions * width.astype(jnp.float32)).astype(width.dtype)
    if sample is not None:
        likely = _likely_in_sample(bracket, fraction, sample)
    # The likely one comes with its successor: one read then recognises a value that many entries share.
    offsets = jnp.clip(jnp.stack([likely, likely + 1, *around]), 1, width).astype(bracket.lo.dtype)
    return jnp.sort(jnp.concatenate([bracket.lo + offsets, _even_thresholds(bracket, _EVEN)]))


def _likely_in_sample(bracket: Bracket, fraction: Float[Array, ""], sample: Int[Array, " s"]) -> UInt[Array, ""]:
    """The offset from ``lo`` of the key at that fraction of the sample inside the bracket."""
    begin = jnp.searchsorted(sample, bracket.lo, side="right")
    end = jnp.searchsorted(sample, bracket.last, side="right")
    rank = begin + (fraction * (end - begin)).astype(begin.dtype)
    key = jnp.clip(sample[jnp.clip(rank, 0, sample.size - 1)], bracket.lo, bracket.last)
    return _width(bracket._replace(last=key))


def _sampled_thresholds(bracket: Bracket, keep: Count, sample: Int[Array, " s"]) -> Int[Array, " t"]:
    """Keys around a quantile of the sample, each with its successor to recognise a shared value."""
    density = counts.to_float(keep) / counts.to_float(bracket.at_least)
    deviation = jnp.sqrt(sample.size * density * (1 - density)) + 1
    ranks = sample.size * (1 - density) + jnp.asarray(_SAMPLE_DEVIATIONS, jnp.float32) * deviation
    keys = sample[jnp.clip(ranks.astype(jnp.int32), 0, sample.size - 1)]
    return jnp.sort(jnp.concatenate([keys, jnp.minimum(keys, bracket.last - 1) + 1]))
