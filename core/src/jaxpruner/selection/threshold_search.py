r"""The searches for the thresholds of masks, by counting, all of them in one loop.

A search is for the places of one competition among leaves:

.. math:: T = \max \{ t : |\{i : key_i \ge t\}| \ge k \}

A bracket holds ``T``; every read counts the entries of each leaf at or above a few thresholds and
narrows the bracket. Where more entries than wanted share the value ``T``, the search reopens over
their flat indices, in the one leaf that keeps some of its ties and drops others. One loop for all
searches and both questions is one program to compile for each leaf, and one exchange of counts
between devices for each read.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpruner.selection import counts
from jaxpruner.selection.counts import Count

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, Num, UInt, UInt32

    # From what is asked the number of entries of each leaf at or above its thresholds (any, where IS_READ is 0),
    # and the numbers of the leaves again.
    Counter = Callable[["Table"], tuple[UInt32[Array, "leaves t"], tuple[Int[Array, ""], ...]]]

# Thresholds of one read, in a search by splitting: evenly spaced ones.
_SPLITS = 3
# In a search by interpolation: the likely one, its successor, one a standard deviation to each side, and evenly
# spaced ones, which bound the number of reads. (More of them cost more than the reads they save.)
_DEVIATIONS = (-1.0, 1.0)
_EVEN = 2
# In its first read: so many standard deviations around the quantile of a sample, each with its successor. That makes
# as many thresholds as in the later reads, which one loop carries: 2 * 3 = 2 + len(_DEVIATIONS) + _EVEN.
_SAMPLE_DEVIATIONS = (-2.0, 0.0, 2.0)


class Field(NamedTuple):
    """Who takes part, known when the program is traced.

    Attributes:
      sizes: the number of entries of each leaf.
      search: the search that each leaf belongs to, ascending.
      lowest: the lowest key.
      highest: the highest key.
    """

    sizes: tuple[int, ...]
    search: tuple[int, ...]
    lowest: int
    highest: int

    @property
    def membership(self) -> np.ndarray:
        """Whether a leaf belongs to a search, of shape (searches, leaves)."""
        return np.arange(self.search[-1] + 1)[:, None] == np.asarray(self.search)

    def per_leaf(self, values: Any) -> Any:
        """The values of each leaf's search, from an array or a count with those of all searches."""
        return counts.chosen(values, self.search)

    def total(self, number: UInt32[Array, "leaves ..."]) -> Count:
        """The sum over the leaves of each search."""
        return counts.sum_where(self.membership, self.as_count(number))

    def before(self, number: UInt32[Array, " leaves"]) -> Count:
        """The sum of those before each leaf in its search."""
        search = np.asarray(self.search)
        return counts.sum_where(np.tril(search[:, None] == search, -1), self.as_count(number))

    @property
    def is_narrow(self) -> bool:
        """Whether no search has ``2**32`` entries."""
        return max(self.membership @ np.asarray(self.sizes, np.uint64)) < 2**32

    def as_count(self, number: UInt32[Array, "*s"]) -> Count:
        """Numbers of entries as counts."""
        return Count(None if self.is_narrow else jnp.zeros_like(number), number)


class Searches(NamedTuple):
    """The state of all searches: ``T`` lies in ``[lo, last]``, with ``at_least >= wanted > above`` in total.

    Attributes:
      lo: the lowest value that the threshold can have.
      last: the highest.
      at_least: the entries of each leaf at or above ``lo``.
      above: the entries of each leaf above ``last``.
      wanted: how many entries to keep; of the ties, once they are searched.
      is_tied: whether the search is over indices now.
      key: the value that is tied, where it is.
      partial: the leaf that keeps some of its ties and drops others, where they are searched.
    """

    lo: Int[Array, " searches"]
    last: Int[Array, " searches"]
    at_least: UInt32[Array, " leaves"]
    above: UInt32[Array, " leaves"]
    wanted: Count
    is_tied: Bool[Array, " searches"]
    key: Int[Array, " searches"]
    partial: Int[Array, " searches"]


class Column(enum.IntEnum):
    """What a row of a table says of a leaf, before its thresholds.

    Attributes:
      IS_READ: whether it has to be read.
      IS_TIED: whether the thresholds are of indices (`index_floor`), of the entries with the key.
      KEY: the key above which all is kept.
      END: the flat index before which entries with the key are kept, a uint32 in the bits of a key.
      NUMBER: the number of the leaf among all; see `Table`.
    """

    IS_READ = 0
    IS_TIED = 1
    KEY = 2
    END = 3
    NUMBER = 4


class Table(NamedTuple):
    """What leaves are asked, and what was found of them.

    Attributes:
      rows: one a leaf, of the dtype of keys: in the order of `Column`, then thresholds.
      numbers: the number of each leaf, which XLA must not know when it compiles. It compiles programs that are the same
        once, and a row at a known place is a program for each leaf: of 200 leaves, 200 of some 25 ms. So the numbers
        are carried, and each read hands them on in a way that XLA does not see through.
    """

    rows: Int[Array, "leaves n"]
    numbers: tuple[Int[Array, ""], ...]


class _Reading(NamedTuple):
    """What a loop carries from read to read.

    Attributes:
      searches: what is known.
      thresholds: those of the next read.
      numbers: those of the leaves; see `Table`.
    """

    searches: Searches
    thresholds: Int[Array, "searches t"]
    numbers: tuple[Int[Array, ""], ...]


def start(field: Field, keep: Count, key_dtype: np.dtype) -> Searches:
    """Searches that know nothing yet."""
    shape = (field.search[-1] + 1,)
    sizes = jnp.asarray(field.sizes, jnp.uint32)
    return Searches(
        lo=jnp.full(shape, field.lowest, key_dtype),
        last=jnp.full(shape, field.highest, key_dtype),
        at_least=sizes,
        above=jnp.zeros_like(sizes),
        wanted=counts.narrow(keep) if field.is_narrow else counts.wide(keep),
        is_tied=jnp.zeros(shape, bool),
        key=jnp.full(shape, field.lowest, key_dtype),
        partial=jnp.zeros(shape, jnp.int32),
    )


def split(field: Field, count: Counter, count_needed: Counter, searches: Searches) -> Table:
    """Splits brackets in four with every read, down to one threshold.

    The number of reads is static, half the bits of a key, and half those of an index if there are ties.

    Returns:
      What was found for each leaf.
    """

    def choose(searches):
        return _even_thresholds(searches.lo, searches.last, _SPLITS)

    def reads(count, size):
        return lambda state: lax.fori_loop(
            0, _reads_of(size), lambda _, state: _read(field, count, choose, state), state
        )

    state = reads(count, field.highest - field.lowest)(_first(field, searches, choose(searches)))
    is_open_yet = jnp.any(is_open(field, state.searches))
    return _table(field, lax.cond(is_open_yet, reads(count_needed, max(field.sizes)), lambda state: state, state))


def interpolate(field: Field, count: Counter, searches: Searches, first: Int[Array, "searches t"]) -> Table:
    """Narrows brackets by interpolation between their exact counts, until each is closed.

    Args:
      field: who takes part.
      count: counts entries.
      searches: where to start.
      first: the thresholds of the first read.

    Returns:
      What was found for each leaf.
    """

    def choose(searches):
        at_least, above = field.total(searches.at_least), field.total(searches.above)
        return _interpolated_thresholds(searches.lo, searches.last, at_least, above, searches.wanted)

    found = lax.while_loop(
        lambda state: jnp.any(is_open(field, state.searches)),
        lambda state: _read(field, count, choose, state),
        _first(field, searches, first),
    )
    return _table(field, found)


def is_open(field: Field, searches: Searches) -> Bool[Array, " searches"]:
    """Whether a search continues: several thresholds are possible, and ``lo`` has not exactly the entries wanted."""
    return ~counts.equal(field.total(searches.at_least), searches.wanted) & (searches.lo != searches.last)


def sampled_thresholds(totals: Num[np.ndarray, " n"], wanted: Count, samples: Int[Array, "n s"]) -> Int[Array, "n t"]:
    """For the first read of n searches: keys around the quantiles of samples.

    Each comes with its successor, to recognise a value that many entries share.

    Args:
      totals: the number of entries of each search.
      wanted: how many of them to keep.
      samples: a sample of each.
    """
    size = samples.shape[1]
    density = counts.to_float(wanted) / totals.astype(np.float32)
    deviation = jnp.sqrt(size * density * (1 - density)) + 1
    ranks = (size * (1 - density))[:, None] + jnp.asarray(_SAMPLE_DEVIATIONS, jnp.float32)[None] * deviation[:, None]
    ranks = jnp.clip(ranks.astype(jnp.int32), 0, size - 1)
    keys = jnp.take_along_axis(jnp.sort(samples, 1), ranks, 1)
    highest = jnp.iinfo(keys.dtype).max
    return jnp.concatenate([keys, jnp.minimum(keys, highest - 1) + 1], 1)


def index_floor(key_dtype: np.dtype) -> int:
    """The value, in a search over indices, of entries that are not on the tied key: below all others."""
    return int(jnp.iinfo(key_dtype).min)


def _read(field: Field, count: Counter, choose: Callable[[Searches], Any], state: _Reading) -> _Reading:
    """One read of all leaves that are asked something."""
    found, numbers = count(_table(field, state))
    found = jnp.where(_is_read(field, state.searches)[:, None], found, 0)
    searches = _proceed(field, state.searches, state.thresholds, found)
    return _Reading(searches, choose(searches), numbers)


def _first(field: Field, searches: Searches, thresholds: Int[Array, "searches t"]) -> _Reading:
    # They vary over mesh axes as the searches do.
    zero = searches.partial[0] ^ searches.partial[0]
    return _Reading(searches, thresholds, tuple(zero | i for i in range(len(field.sizes))))


def _is_read(field: Field, searches: Searches) -> Bool[Array, " leaves"]:
    # Of a search among ties, only the leaf that keeps a part of its own is read.
    is_asked = ~field.per_leaf(searches.is_tied) | (field.per_leaf(searches.partial) == jnp.arange(len(field.sizes)))
    return field.per_leaf(is_open(field, searches)) & is_asked


def _table(field: Field, state: _Reading) -> Table:
    searches, leaf = state.searches, jnp.arange(len(field.sizes))
    sizes = jnp.asarray(field.sizes, jnp.uint32)
    is_tied, partial = field.per_leaf(searches.is_tied), field.per_leaf(searches.partial)
    keys = field.per_leaf(jnp.where(searches.is_tied, searches.key, searches.lo))
    found = field.per_leaf((searches.lo - index_floor(searches.lo.dtype)).astype(jnp.uint32))
    partial_end = jnp.where(field.per_leaf(searches.wanted.lo) == 0, 0, sizes - found + 1)
    tied_ends = jnp.where(leaf < partial, sizes, jnp.where(leaf == partial, partial_end, 0))
    columns = {
        Column.IS_READ: _is_read(field, searches),
        Column.IS_TIED: is_tied,
        Column.KEY: keys,
        Column.END: jnp.where(is_tied, tied_ends, sizes),
        Column.NUMBER: leaf,
    }
    table = jnp.stack([columns[column].astype(keys.dtype) for column in Column], 1)
    return Table(jnp.concatenate([table, field.per_leaf(state.thresholds)], 1), state.numbers)


def _reads_of(width: int) -> int:
    return -(-width.bit_length() // 2)


def _proceed(
    field: Field, searches: Searches, thresholds: Int[Array, "searches t"], found: UInt32[Array, "leaves t"]
) -> Searches:
    """The searches after one read."""
    was_open = is_open(field, searches)
    searches = _where(field, was_open, _narrow(field, searches, thresholds, found), searches)
    closed_on_ties = (
        ~searches.is_tied
        & (searches.lo == searches.last)
        & ~counts.equal(field.total(searches.at_least), searches.wanted)
    )
    return _where(field, closed_on_ties, _reopen(field, searches), searches)


def _narrow(
    field: Field, searches: Searches, thresholds: Int[Array, "searches t"], found: UInt32[Array, "leaves t"]
) -> Searches:
    """Between the highest threshold with enough entries and the lowest without."""
    enough = counts.less_equal(counts.take(searches.wanted, np.s_[:, None]), field.total(found))
    of_leaf = field.per_leaf(enough)
    # Numbers fall with thresholds. Maxima and minima need no order of them, and nothing is gathered.
    return searches._replace(
        lo=jnp.where(enough, thresholds, searches.lo[:, None]).max(1),
        last=jnp.where(enough, searches.last[:, None], thresholds - 1).min(1),
        at_least=jnp.where(of_leaf, found, searches.at_least[:, None]).min(1),
        above=jnp.where(of_leaf, searches.above[:, None], found).max(1),
    )


def _reopen(field: Field, searches: Searches) -> Searches:
    """The searches over the indices of the entries on ``lo``.

    An entry of index i is searched as ``index_floor + size - i``, so that counts fall with the threshold.
    """
    ties = searches.at_least - searches.above
    wanted = counts.subtract(searches.wanted, field.total(searches.above))
    before = field.before(ties)
    is_cut = counts.less(field.per_leaf(wanted), counts.add(before, field.as_count(ties)))
    partial = jnp.argmax(field.membership & is_cut[None], axis=1)
    is_partial = jnp.arange(len(field.sizes)) == field.per_leaf(partial)

    def of_partial(count):
        return counts.sum_where(field.membership, counts.where(is_partial, count, counts.subtract(count, count)))

    floor = index_floor(searches.lo.dtype)
    sizes = of_partial(field.as_count(jnp.asarray(field.sizes, jnp.uint32))).lo
    return Searches(
        lo=jnp.full_like(searches.lo, floor + 1),
        last=floor + sizes.astype(searches.lo.dtype),
        at_least=jnp.where(is_partial, ties, 0),
        above=jnp.zeros_like(ties),
        wanted=counts.subtract(wanted, of_partial(before)),
        is_tied=jnp.ones_like(searches.is_tied),
        key=searches.lo,
        partial=partial.astype(jnp.int32),
    )


def _where(field: Field, condition: Bool[Array, " searches"], new: Searches, old: Searches) -> Searches:
    """The state of each search from the one or the other."""
    of_leaf = field.per_leaf(condition)
    chosen = {
        name: jnp.where(condition, getattr(new, name), getattr(old, name))
        for name in ("lo", "last", "is_tied", "key", "partial")
    }
    return Searches(
        **chosen,
        wanted=counts.where(condition, new.wanted, old.wanted),
        at_least=jnp.where(of_leaf, new.at_least, old.at_least),
        above=jnp.where(of_leaf, new.above, old.above),
    )


# Both keep to two axes: XLA moves the reshape of a slice with one column through arithmetic by one operation at a time,
# for each of which it goes through its simplifications of the whole program again.


def _even_thresholds(lo: Int[Array, " n"], last: Int[Array, " n"], number: int) -> Int[Array, "n number"]:
    """Thresholds that split brackets of width w into parts no wider than ``w // (number + 1)``."""
    width = _width(lo, last)[:, None]
    step = width // (number + 1) + 1
    offsets = jnp.minimum(step * jnp.arange(1, number + 1, dtype=width.dtype)[None], width)
    return lo[:, None] + offsets.astype(lo.dtype)


def _interpolated_thresholds(
    lo: Int[Array, " n"], last: Int[Array, " n"], at_least: Count, above: Count, wanted: Count
) -> Int[Array, "n t"]:
    width = _width(lo, last)[:, None]
    inside = counts.to_float(counts.subtract(at_least, above))[:, None]
    fraction = counts.to_float(counts.subtract(at_least, wanted))[:, None] / inside
    # Of entries spread at random over the bracket, so far off is the one of that rank.
    deviation = jnp.sqrt(fraction * (1 - fraction) / inside) + 0.5 / inside
    fractions = jnp.clip(fraction + jnp.asarray((0.0, *_DEVIATIONS), jnp.float32)[None] * deviation, 0, 1 - 2.0**-24)
    offsets = (fractions * width.astype(jnp.float32)).astype(width.dtype)
    # The likely one comes with its successor: one read then recognises a value that many entries share.
    offsets = jnp.clip(jnp.concatenate([offsets, offsets[:, :1] + 1], 1), 1, width).astype(lo.dtype)
    return jnp.concatenate([lo[:, None] + offsets, _even_thresholds(lo, last, _EVEN)], 1)


def _width(lo: Int[Array, "*n"], last: Int[Array, "*n"]) -> UInt[Array, "*n"]:
    """``last - lo``, which may pass the range of a signed key."""
    return (last - lo).astype(f"uint{lo.dtype.itemsize * 8}")
