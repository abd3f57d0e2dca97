"""Exact top-k masks without a sort.

A mask needs the k-th highest score, not an order. Scores are read as order-preserving integers and the
threshold is searched by counting: one read of the scores counts several thresholds at once and stores
nothing. The same search over flat indices breaks ties, and runs only where the threshold is tied.
Two methods choose the thresholds, and both are exact:

- ``"sample"`` (one CPU device): a sorted strided sample brackets the threshold, interpolation on the
  exact counts closes in on it, and evenly spaced thresholds bound the number of reads. It takes a
  handful of reads, and wins at every size that the benchmark's rows "thresholds by sample" try.
- ``"split"`` (accelerators, sharded arrays): every read splits the bracket in four, so
  float32 takes 16. Only elementwise operations and full sums touch the scores, in their own shape: a
  sharded array stays where it is, and nothing but counts is reduced over devices.

The leaves of a tree are searched together: see :func:`select` and :func:`together`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpruner import layouts
from jaxpruner.selection import counts, score_reading, threshold_search
from jaxpruner.selection.counts import Count, Share
from jaxpruner.selection.score_reading import Leaf, Scores, order_preserving_keys
from jaxpruner.selection.threshold_search import Field

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num, UInt32

    from jaxpruner.selection.score_reading import Method
    from jaxpruner.selection.threshold_search import Table

__all__ = [
    "Competition",
    "Regrowth",
    "Scores",
    "count_true",
    "is_one_cpu",
    "order_preserving_keys",
    "select",
    "together",
    "top_k_mask",
    "top_k_masks",
]

# A sample of about one entry in 256, within these limits.
_SAMPLED_SHARE, _MIN_SAMPLE, _MAX_SAMPLE = 256, 1024, 16384
# All samples of a selection have no more entries than its largest search divided by this, or their minimum each.
_ALL_SAMPLES = 16

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Competition:
    """Leaves whose entries compete for ``keep`` places.

    Attributes:
      leaves: the scores, arrays or :class:`Scores`, of fewer than ``2**32`` entries each.
      keep: how many entries to keep, between 0 and the number of all entries, or a `Share` that gives it; may be
        traced.
      scales: a divisor per leaf, or None; a leaf is ranked by ``leaf * (1 / scale)``, evaluated as it is read.

    Raises:
      ValueError: if a leaf has ``2**32`` entries or more.
    """

    leaves: Sequence[Num[Array, "*shape"] | Scores]
    keep: Count | Share
    scales: Sequence[Float[Array, ""] | None] | None = None

    def __post_init__(self) -> None:
        for i, leaf in enumerate(self.leaves):
            if leaf.size >= 2**32:
                raise ValueError(
                    f"leaf {i} of shape {leaf.shape}: {leaf.size} entries are too many, the entries of a leaf are "
                    "counted in 32 bits; split it into leaves of fewer than 2**32 entries."
                )


@dataclasses.dataclass(frozen=True)
class Regrowth:
    """A mask whose entries compete to stay in it; all others then compete for the free places.

    Attributes:
      mask: the mask.
      drop: scores; the highest within the mask stay.
      grow: scores; the highest of all others join them, until there are as many as before. If some are not finite, they
        do not say where to grow, and the mask stays as it is.
      fraction: the share of the mask's entries that do not stay; may be traced.
    """

    mask: Bool[Array, "*shape"]
    drop: Num[Array, "*shape"] | Scores
    grow: Num[Array, "*shape"] | Scores
    fraction: float | Float[Array, ""]


# A generator that asks for masks and returns a result.
Choosing = Generator["Competition | Regrowth", "list[Bool[Array, '...']]", T]


def top_k_mask(
    scores: Num[Array, "*shape"] | Scores, keep: Count | Share, *, method: Method | None = None
) -> Bool[Array, "*shape"]:
    """The mask of the ``keep`` highest scores of one leaf; see :func:`top_k_masks`."""
    return top_k_masks([scores], keep, method=method)[0]


def top_k_masks(
    leaves: Sequence[Num[Array, "*shape"] | Scores],
    keep: Count | Share,
    scales: Sequence[Float[Array, ""] | None] | None = None,
    *,
    method: Method | None = None,
) -> list[Bool[Array, "*shape"]]:
    """The masks of the ``keep`` highest scores over all leaves together; see :func:`select`."""
    return select([Competition(leaves, keep, scales)], method=method)[0]


def together(choosing: Sequence[Choosing[T]]) -> list[T]:
    """Runs generators that ask for masks, with their searches made together, and returns their results.

    Each generator yields a :class:`Competition` or a :class:`Regrowth`, is sent its masks, and returns a result. Leaves
    that are chosen in the same way take part in the same few searches.
    """
    results: dict[int, T] = {}
    asked: dict[int, Competition | Regrowth] = {}

    def proceed(i, masks):
        try:
            asked[i] = choosing[i].send(masks)
        except StopIteration as stop:
            results[i] = stop.value

    for i in range(len(choosing)):
        proceed(i, None)
    while asked:
        waiting, contests = zip(*asked.items(), strict=True)
        asked.clear()
        for i, masks in zip(waiting, select(contests), strict=True):
            proceed(i, masks)
    return [results[i] for i in range(len(choosing))]


def select(contests: Sequence[Competition | Regrowth], *, method: Method | None = None) -> list[list[Bool[Array, ...]]]:
    r"""The masks of the highest scores of each competition.

    .. math:: mask_i = key_i > T \lor (key_i = T \land i < end)

    with the threshold ``T`` of the competition and the flat index ``end`` of the leaf such that exactly
    ``keep`` entries are True. Ties keep the earlier leaf, then the lower flat (C-order) index. NaN ranks
    below everything and ``-0.0`` ties with ``0.0``. The leaves are neither concatenated nor copied. Leaves
    of several dtypes that compete are ranked as float32 (as float64 if one has 64 bits).

    Args:
      contests: one per threshold, or two for a :class:`Regrowth`. All of one kind and dtype are searched in one loop.
      method: ``"sample"`` or ``"split"`` (see the module's docstring). None takes ``"sample"`` on a
        single CPU device and ``"split"`` elsewhere, decided when the function is traced.

    Returns:
      For each contest, one mask per leaf, of its shape.
    """
    method = method or _default_method(*jax.tree.leaves([_operands(contest) for contest in contests]))
    masks: dict[int, list[Any]] = {}
    kinds: Any = ((Competition, _compete), (Regrowth, _regrow))
    for kind, choose in kinds:
        members = [i for i, contest in enumerate(contests) if isinstance(contest, kind)]
        masks.update(zip(members, choose([contests[i] for i in members], method), strict=True))
    return [masks[i] for i in range(len(contests))]


def _compete(competitions: Sequence[Competition], method: Method) -> list[list[Bool[Array, ...]]]:
    masks: list[list[Any]] = [[] for _ in competitions]
    # Competitions that are ranked alike, in the same place, share a search. Empty leaves take no part.
    alike: dict[Any, list[tuple[int, list[int], list[Scores]]]] = {}
    for i, competition in enumerate(competitions):
        scores = _scaled(competition)
        masks[i] = [None if leaf.size else jnp.zeros(leaf.shape, bool) for leaf in scores]
        places = [j for j, leaf in enumerate(scores) if leaf.size]
        if places:
            scores = [scores[j] for j in places]
            rank_dtype = score_reading.common_rank_dtype([leaf.dtype for leaf in scores])
            alike.setdefault((rank_dtype, _place(scores)), []).append((i, places, scores))
    for (rank_dtype, _), members in alike.items():
        found = _select(
            tuple(tuple(leaf.fn for leaf in scores) for _, _, scores in members),
            [[leaf.operands for leaf in scores] for _, _, scores in members],
            counts.stacked([competitions[i].keep for i, _, _ in members]),
            rank_dtype,
            method,
        )
        for (i, places, _), of_leaves in zip(members, found, strict=True):
            for j, mask in zip(places, of_leaves, strict=True):
                masks[i][j] = mask
    return masks


def _regrow(regrowths: Sequence[Regrowth], method: Method) -> list[list[Bool[Array, ...]]]:
    masks: list[list[Any]] = [[regrowth.mask] for regrowth in regrowths]
    alike: dict[Any, list[tuple[int, Scores]]] = {}
    for i, regrowth in enumerate(regrowths):
        if regrowth.mask.size:
            drop, grow = _as_scores(regrowth.drop), _as_scores(regrowth.grow)
            turns = Scores(_Turns(drop.fn, grow.fn, len(drop.operands)), (*drop.operands, *grow.operands))
            rank_dtype = score_reading.common_rank_dtype([drop.dtype, grow.dtype])
            alike.setdefault((rank_dtype, _place([turns])), []).append((i, turns))
    for (rank_dtype, _), members in alike.items():
        chosen = [regrowths[i] for i, _ in members]
        fractions = [regrowth.fraction for regrowth in chosen]
        fractions = fractions[:1] if len(set(map(id, fractions))) == 1 else fractions
        found = _select_in_turns(
            tuple(turns.fn for _, turns in members),
            [turns.operands for _, turns in members],
            [regrowth.mask for regrowth in chosen],
            jnp.stack([jnp.asarray(fraction) for fraction in fractions]),
            rank_dtype,
            method,
        )
        for (i, _), mask in zip(members, found, strict=True):
            masks[i] = [mask]
    return masks


@dataclasses.dataclass(frozen=True)
class _Turns:
    """Scores of a turn: first those to stay, where the mask has an entry; then those to grow, where it has none."""

    drop: Callable[..., Any]
    grow: Callable[..., Any]
    of_drop: int  # of the operands

    def __call__(self, grows: Bool[Array, ""], mask: Bool[Array, "*shape"], *operands: Any) -> Any:
        of_drop, of_grow = operands[: self.of_drop], operands[self.of_drop :]
        if self.drop is self.grow:
            scores = self.drop(*(jnp.where(grows, g, d) for d, g in zip(of_drop, of_grow, strict=True)))
        else:
            scores = jnp.where(grows, self.grow(*of_grow), self.drop(*of_drop))
        # The entries of the first turn that are not in the mask rank lowest, those of the second that are highest.
        return jnp.where(mask != grows, scores, jnp.where(grows, jnp.inf, jnp.nan))

    @property
    def is_magnitude(self) -> bool:
        return score_reading.is_magnitude(self.drop) and score_reading.is_magnitude(self.grow)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _select_in_turns(
    fns: tuple[_Turns, ...],
    operands: list[tuple[Array, ...]],
    masks: list[Bool[Array, ...]],
    fractions: Float[Array, " n"],
    rank_dtype: Any,
    method: Method,
) -> list[Bool[Array, ...]]:
    """Both turns are one program, the body of a loop, which is less to compile than a search for each and as fast.

    Also tried to compile faster, without gain: leaves as branches of a switch in one loop (copies of what it carries),
    programs that are called and not inlined (XLA's CPU backend inlines them), sums of padded counts in place of
    concatenations.
    """
    each = [
        score_reading.census(mask, own[fn.of_drop :], fn.grow, method)
        for fn, own, mask in zip(fns, operands, masks, strict=True)
    ]
    number, strange = (jnp.stack(numbers) for numbers in zip(*each, strict=True))
    keep = Count(None, number)
    stay = counts.keep_count(keep, fractions)

    def turn(i, masks):
        grows = i == 1
        found = _select(
            tuple((fn,) for fn in fns),
            [[(grows, mask, *own)] for mask, own in zip(masks, operands, strict=True)],
            counts.where(grows, keep, stay),
            rank_dtype,
            method,
        )
        # In the first turn NaN is kept outside of the mask too, if it has no other entry to keep.
        return [(mask | grows) & new for mask, (new,) in zip(masks, found, strict=True)]

    varies = score_reading.varying_zero([Scores(fn, own) for fn, own in zip(fns, operands, strict=True)]) != 0
    chosen = lax.fori_loop(0, 2, turn, [mask ^ varies for mask in masks])
    # Scores that are not finite do not say where to grow.
    return [jnp.where(strange[i] == 0, new, mask) for i, (new, mask) in enumerate(zip(chosen, masks, strict=True))]


def count_true(mask: Bool[Array, "*shape"]) -> Count:
    """The number of True entries of a mask of fewer than ``2**32`` entries, in one read that stores nothing."""
    mask = jnp.asarray(mask)
    return Count(None, _count_true(mask, _default_method(mask)))


@functools.partial(jax.jit, static_argnums=1)
def _count_true(mask: Bool[Array, "*shape"], method: Method) -> UInt32[Array, ""]:
    # Counted twice, and both used: see `score_reading.count` on reductions of one operand.
    return jnp.minimum(*score_reading.totals((mask, mask), method))


def is_one_cpu(*arrays: Any) -> bool:
    """Whether there is one device, and it is a CPU: rows and blocks of arrays can then be read in place.

    Even there, an array whose type has a layout cannot be cut into rows and blocks freely.
    """
    has_layout = any(layouts.explicit_layout(array) is not None for array in arrays)
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and not has_layout


def _default_method(*arrays: Any) -> Method:
    return "sample" if is_one_cpu(*arrays) else "split"


def _operands(contest: Competition | Regrowth) -> Any:
    if isinstance(contest, Competition):
        return [_as_scores(leaf).operands for leaf in contest.leaves]
    return contest.mask, _as_scores(contest.drop).operands, _as_scores(contest.grow).operands


def _scaled(competition: Competition) -> list[Scores]:
    scales = [None] * len(competition.leaves) if competition.scales is None else competition.scales
    return [_as_scores(leaf, scale) for leaf, scale in zip(competition.leaves, scales, strict=True)]


def _place(scores: list[Scores]) -> Any:
    """What keeps leaves out of one program or loop: other devices, or other axes of a shard_map that they vary over."""
    operands = [x for leaf in scores for x in leaf.operands]
    devices = [
        x.sharding.device_set for x in operands if not isinstance(x, jax.core.Tracer) and getattr(x, "committed", False)
    ]
    return frozenset(map(score_reading.varying_axes, operands)), frozenset().union(*devices)


def _as_scores(leaf: Num[Array, "*shape"] | Scores, scale: Float[Array, ""] | None = None) -> Scores:
    leaf = Scores.of(leaf)
    fn, operands = leaf.fn, leaf.operands
    if scale is not None:
        # XLA may round a division one way in one read and another way in the next; a product rounds one way only.
        fn, operands = score_reading.Scaled(fn), (1 / scale, *operands)
    return Scores(fn, tuple(lax.stop_gradient(jnp.asarray(x)) for x in operands))


# Jitted, so that eager calls with arrays compile once for all trees of one shape.
@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _select(
    fns: tuple[tuple[Callable[..., Any], ...], ...],
    operands: list[list[tuple[Array, ...]]],
    keep: Count,
    rank_dtype: Any,
    method: Method,
) -> list[list[Bool[Array, ...]]]:
    scores = [Scores(fn, xs) for members in zip(fns, operands, strict=True) for fn, xs in zip(*members, strict=True)]
    leaves = [score_reading.prepare(leaf, rank_dtype, method) for leaf in scores]
    field = Field(
        sizes=tuple(leaf.size for leaf in leaves),
        search=tuple(i for i, members in enumerate(fns) for _ in members),
        lowest=score_reading.key_range(rank_dtype)[0],
        highest=score_reading.key_range(rank_dtype)[1],
    )
    found = _search(field, leaves, keep, method)
    masks: list[list[Any]] = [[] for _ in fns]
    for search, leaf, number, of_scores in zip(field.search, leaves, found.numbers, scores, strict=True):
        masks[search].append(score_reading.mask_leaf(leaf, found.rows, number).reshape(of_scores.shape))
    return masks


def _search(field: Field, leaves: list[Leaf], keep: Count, method: Method) -> Table:
    searches = threshold_search.start(field, keep, score_reading.key_dtype(leaves[0].rank_dtype))
    # All searches vary over the mesh axes that any leaf does: they share a loop.
    zero = score_reading.varying_zero(leaves)
    searches = jax.tree.map(lambda x: x ^ zero.astype(x.dtype), searches)

    def count(table, skips):
        read = functools.partial(score_reading.count_leaf, skips=skips)
        each = [read(leaf, table.rows, number) for leaf, number in zip(leaves, table.numbers, strict=True)]
        found, numbers = zip(*each, strict=True)
        if len({len(parts) for parts in found}) == 1:
            joined = [jnp.concatenate(parts).reshape(len(leaves), -1) for parts in zip(*found, strict=True)]
            return jnp.concatenate(joined, 1), numbers
        return jnp.stack([jnp.concatenate(parts) for parts in found]), numbers

    every, needed = functools.partial(count, skips=False), functools.partial(count, skips=True)
    if method == "split":
        # On accelerators a branch costs more than a read that was not needed. XLA's CPU backend stores the comparisons
        # of a sharded leaf, in one buffer for all leaves only if each has a branch of its own.
        is_cpu = jax.default_backend() == "cpu"
        return threshold_search.split(field, needed if is_cpu else every, needed, searches)
    return threshold_search.interpolate(field, needed, searches, _first_thresholds(field, leaves, keep))


def _first_thresholds(field: Field, leaves: list[Leaf], keep: Count) -> Int[Array, "searches t"]:
    """Those around the quantiles of samples."""
    number = field.search[-1] + 1
    totals = np.bincount(field.search, weights=field.sizes)
    # All samples together are no more than a part of the largest search, however many there are.
    most = np.clip(totals.max() / (_ALL_SAMPLES * number), _MIN_SAMPLE, _MAX_SAMPLE)
    strides = np.maximum(1, totals // np.clip(totals / _SAMPLED_SHARE, _MIN_SAMPLE, most)).astype(int)
    groups = [np.flatnonzero(np.asarray(field.search) == search) for search in range(number)]
    alone = [group[0] for group in groups if len(group) == 1]

    def sample(group):
        return score_reading.samples([leaves[i] for i in group], [strides[field.search[i]] for i in group])

    rows = [([field.search[alone[i]] for i in members], keys) for members, keys in sample(alone)]
    for search, group in enumerate(groups):
        if len(group) > 1:
            rows.append(([search], jnp.concatenate([keys.reshape(1, -1) for _, keys in sample(group)], axis=1)))
    first = [
        threshold_search.sampled_thresholds(totals[searches], counts.chosen(keep, searches), keys)
        for searches, keys in rows
    ]
    order = np.argsort(np.concatenate([searches for searches, _ in rows]))
    return counts.chosen(jnp.concatenate(first), order)
