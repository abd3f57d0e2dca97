"""Exact top-k masks without a sort.

A mask needs the k-th highest score, not an order. Scores are read as order-preserving integers and the
threshold is searched by counting: one read of the scores counts several thresholds at once and stores
nothing. The same search over flat indices breaks ties, and runs only where the threshold is tied.
Two methods choose the thresholds, and both are exact:

- ``"sample"`` (one CPU device): a sorted strided sample brackets the threshold, interpolation on the
  exact counts closes in on it, and evenly spaced thresholds bound the number of reads. It takes a
  handful of reads.
- ``"split"`` (accelerators, sharded arrays, small leaves): every read splits the bracket in four, so
  float32 takes 16. Only elementwise operations and full sums touch the scores, in their own shape: a
  sharded array stays where it is, and nothing but counts is reduced over devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpruner import counts, score_reading, threshold_search
from jaxpruner.counts import Count
from jaxpruner.score_reading import Leaf, Scores, order_preserving_keys
from jaxpruner.threshold_search import Bracket

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num, UInt32

    from jaxpruner.score_reading import Method
    from jaxpruner.threshold_search import Counter

__all__ = ["Scores", "count_true", "order_preserving_keys", "top_k_mask", "top_k_masks"]

# A sample of about one entry in 256, within these limits.
_SAMPLED_SHARE, _MIN_SAMPLE, _MAX_SAMPLE = 256, 1024, 16384


def top_k_mask(
    scores: Num[Array, "*shape"] | Scores, keep: Count, *, method: Method | None = None
) -> Bool[Array, "*shape"]:
    """The mask of the ``keep`` highest scores of one leaf; see :func:`top_k_masks`."""
    return top_k_masks([scores], keep, method=method)[0]


def top_k_masks(
    leaves: Sequence[Num[Array, "*shape"] | Scores],
    keep: Count,
    scales: Sequence[Float[Array, ""] | None] | None = None,
    *,
    method: Method | None = None,
) -> list[Bool[Array, "*shape"]]:
    r"""The masks of the ``keep`` highest scores over all leaves together.

    .. math:: mask_i = key_i > T \lor (key_i = T \land i < end)

    with the threshold ``T`` and the flat index ``end`` such that exactly ``keep`` entries are True. Ties
    keep the earlier leaf, then the lower flat (C-order) index. NaN ranks below everything and ``-0.0``
    ties with ``0.0``. The leaves are neither concatenated nor copied. Leaves of several dtypes are
    ranked as float32 (as float64 if one has 64 bits).

    Args:
      leaves: the scores, arrays or :class:`Scores`, of fewer than ``2**32`` entries each.
      keep: how many entries to keep, between 0 and the number of all entries; may be traced.
      scales: a divisor per leaf, or None; a leaf is ranked by ``leaf * (1 / scale)``, evaluated as it is read.
      method: ``"sample"`` or ``"split"`` (see the module's docstring). None takes ``"sample"`` for large
        leaves on a single CPU device and ``"split"`` elsewhere, decided when the function is traced.

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
                f"leaf {i} of shape {leaf.shape}: {leaf.size} entries are too many, the entries of a leaf are "
                "counted in 32 bits; split it into leaves of fewer than 2**32 entries."
            )
    full = [leaf for leaf in scores if leaf.size]
    method = method or _default_method(full)
    masks = iter(_select(tuple(s.fn for s in full), [s.operands for s in full], keep, method) if full else ())
    return [next(masks) if leaf.size else jnp.zeros(leaf.shape, bool) for leaf in scores]


def count_true(mask: Bool[Array, "*shape"]) -> Count:
    """The number of True entries of a mask of fewer than ``2**32`` entries, in one read that stores nothing."""
    scores = Scores.of(mask)
    if not scores.size:
        return counts.from_int(0)
    method = _default_method([scores])
    leaf = score_reading.prepare(scores, score_reading.common_rank_dtype([scores.dtype]), method)
    return score_reading.count_equal(leaf, jnp.int32(True), method)


def _default_method(leaves: list[Scores]) -> Method:
    is_single_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    is_large = sum(leaf.size for leaf in leaves) > _MAX_SAMPLE
    return "sample" if is_single_cpu and is_large else "split"


def _as_scores(leaf: Num[Array, "*shape"] | Scores, scale: Float[Array, ""] | None) -> Scores:
    leaf = Scores.of(leaf)
    fn, operands = leaf.fn, leaf.operands
    if scale is not None:
        # XLA may round a division one way in one read and another way in the next; a product rounds one way only.
        fn, operands = (lambda inverse, *xs, fn=fn: fn(*xs) * inverse), (1 / scale, *operands)
    return Scores(fn, tuple(lax.stop_gradient(jnp.asarray(x)) for x in operands))


@functools.partial(jax.jit, static_argnums=(0, 3))  # called eagerly, leaves of one shape share a compilation
def _select(
    fns: tuple[Callable[..., Any], ...], operands: list[tuple[Array, ...]], keep: Count, method: Method
) -> list[Bool[Array, ...]]:
    scores = [Scores(fn, xs) for fn, xs in zip(fns, operands, strict=True)]
    rank_dtype = score_reading.common_rank_dtype([s.dtype for s in scores])
    leaves = [score_reading.prepare(s, rank_dtype, method) for s in scores]
    zero = sum(leaf.zero() for leaf in leaves)
    sizes = jnp.asarray([leaf.size for leaf in leaves], jnp.uint32) + zero.astype(jnp.uint32)

    found = _search_keys(leaves, keep, zero, method)
    untied = counts.equal(found.at_least, keep)
    ends = lax.cond(untied, lambda: sizes, lambda: _search_ends(leaves, sizes, keep, found, method))
    masks = []
    for s, leaf, end in zip(scores, leaves, ends, strict=True):
        leaf, (threshold, end) = leaf.pinned((found.lo, end))
        keys = leaf.keys()
        mask = (keys > threshold) | ((keys == threshold) & (leaf.flat_index() < end))
        masks.append(mask.reshape(s.shape))
    return masks


def _search_keys(leaves: list[Leaf], keep: Count, zero: Int[Array, ""], method: Method) -> Bracket:
    rank_dtype = leaves[0].rank_dtype
    lowest, highest = score_reading.key_range(rank_dtype)
    total = sum(leaf.size for leaf in leaves)

    def count(thresholds):
        found = [score_reading.count(lambda leaf, t: leaf.keys() >= t, leaf, thresholds, method) for leaf in leaves]
        return functools.reduce(counts.add, found)

    key_type = score_reading.key_dtype(rank_dtype)
    bracket = Bracket(
        jnp.asarray(lowest, key_type), jnp.asarray(highest, key_type), counts.from_int(total), counts.from_int(0)
    )
    bracket = jax.tree.map(lambda x: x + zero.astype(x.dtype), bracket)
    sample = None
    if method == "sample":
        stride = max(1, total // min(max(total // _SAMPLED_SHARE, _MIN_SAMPLE), _MAX_SAMPLE))
        sample = jnp.sort(jnp.concatenate([leaf.sample(stride) for leaf in leaves]))
    return _search(count, keep, bracket, method, highest - lowest, sample)


def _search_ends(
    leaves: list[Leaf], sizes: UInt32[Array, " leaves"], keep: Count, found: Bracket, method: Method
) -> UInt32[Array, " leaves"]:
    """The flat index of every leaf before which the entries on the threshold are kept, the first ones of all."""
    threshold = found.lo
    wanted, left = counts.subtract(keep, found.above), counts.subtract(found.at_least, found.above)
    ends, partial = [], jnp.int32(0)
    partial_ties = partial_wanted = counts.from_int(0)
    for i, leaf in enumerate(leaves):
        is_last = i + 1 == len(leaves)
        ties = left if is_last else score_reading.count_equal(leaf, threshold, method)
        taken = counts.where(counts.less(wanted, ties), wanted, ties)
        wanted, left = counts.subtract(wanted, taken), counts.subtract(left, ties)
        # At most one leaf keeps some of its ties and drops others.
        is_partial = (taken.lo > 0) & counts.less(taken, ties)
        partial = jnp.where(is_partial, i, partial)
        partial_ties = counts.where(is_partial, ties, partial_ties)
        partial_wanted = counts.where(is_partial, taken, partial_wanted)
        ends.append(jnp.where(counts.equal(taken, ties), sizes[i], 0))

    # An end is searched as `size - t`, so that counts fall with t as those of scores do.
    def count_before(leaf, thresholds):
        size = jnp.uint32(leaf.size)

        def holds(leaf, end):
            return jnp.where(leaf.keys() == threshold, leaf.flat_index(), size) < end

        return score_reading.count(holds, leaf, size - thresholds, method)

    branches = [functools.partial(count_before, leaf) for leaf in leaves]
    size = sizes[partial]
    none = counts.subtract(partial_ties, partial_ties)
    found = _search(
        lambda thresholds: lax.switch(partial, branches, thresholds),
        partial_wanted,
        Bracket(size - size, size, partial_ties, none),
        method,
        max(leaf.size for leaf in leaves),
    )
    is_partial = (jnp.arange(len(leaves)) == partial) & (partial_wanted.lo > 0)
    return jnp.where(is_partial, size - found.lo, jnp.stack(ends))


def _search(
    count: Counter,
    keep: Count,
    bracket: Bracket,
    method: Method,
    max_width: int,
    sample: Int[Array, " s"] | None = None,
) -> Bracket:
    if method == "split":
        return threshold_search.split(count, keep, bracket, max_width)
    return threshold_search.interpolate(count, keep, bracket, sample)
