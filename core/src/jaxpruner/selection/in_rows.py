"""The highest scores of each of many rows or small groups, all of the same size."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxpruner.selection.score_reading import key_range, order_preserving_keys
from jaxpruner.selection.top_k import is_one_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Array, Bool, Float, Int


# On XLA's CPU backend, larger groups are chosen from in blocks of scores, whose keys then stay in the cache. Groups of
# float32 scores are sorted by a network where that was faster. For more than 64 it takes seconds to compile.
_SMALL_GROUP = 8
_SORTED_ALONG_LAST, _SORTED_ALONG_OTHERS = (*range(3, 9), *range(17, 65)), range(9, 65)
_BLOCK, _LANES = 1 << 18, 128


def n_of_m(scores: Float[Array, "*s"], n: int, m: int, axes: tuple[int, ...]) -> Bool[Array, "*s"]:
    """The n highest of each group of m, without XLA's sort; of equal scores, the later one."""

    # Under `vmap` both branches of a condition would run. A stack of leaves is a larger leaf.
    @jax.custom_batching.custom_vmap
    def choose(scores):
        return _n_of_m(scores, n, m, axes)

    @choose.def_vmap
    def choose_in_stack(axis_size, in_batched, scores):
        del axis_size
        return n_of_m(scores, n, m, tuple(axis + 1 for axis in axes)), in_batched[0]

    return choose(scores)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _n_of_m(scores: Float[Array, "*s"], n: int, m: int, axes: tuple[int, ...]) -> Bool[Array, "*s"]:
    if not scores.size:
        return jnp.ones(scores.shape, bool)
    axis = min(axes)
    together = tuple(range(axis, axis + len(axes)))
    moved = jnp.moveaxis(scores, axes, together)
    after = moved.shape[axis + len(axes) :]
    lanes = math.prod(after)
    sizes = _SORTED_ALONG_LAST if lanes == 1 else _SORTED_ALONG_OTHERS
    sorts = scores.dtype.itemsize == 4 and m in sizes  # of shorter ones many are equal
    if (m > _SMALL_GROUP or sorts) and 0 < n < m and is_one_cpu(scores):
        choose = functools.partial(_highest_by_network if sorts else highest, n=n)
        kept = _in_blocks(choose, moved.reshape(-1, m, lanes))
    else:
        kept = highest(moved.reshape(*moved.shape[:axis], -1, m, *after), n, axis + 1)
    return jnp.moveaxis(kept.reshape(moved.shape), together, axes)


def _in_blocks(choose: Callable[..., Array], groups: Float[Array, "g m lanes"]) -> Bool[Array, "g m lanes"]:
    count, m, lanes = groups.shape
    blocks = math.gcd(count, max(1, groups.size // _BLOCK))
    if lanes == 1:
        return jax.lax.map(functools.partial(choose, axis=1), groups.reshape(blocks, -1, m))
    # Rows that are a power of two of bytes apart would share few lines of the cache: they are read in tiles.
    width = _LANES if lanes % _LANES == 0 else lanes
    return jax.lax.map(
        lambda block: choose(block.swapaxes(1, 2), axis=2).swapaxes(1, 2),
        groups.reshape(blocks, -1, m, lanes // width, width),
    )


def _highest_by_network(scores: Float[Array, "*s"], n: int, axis: int) -> Bool[Array, "*s"]:
    """As `highest`: sorts the groups and compares each with its n-th highest, where that settles all of them."""
    keys = order_preserving_keys(scores)
    m = keys.shape[axis]
    in_order = [jax.lax.slice_in_dim(keys, i, i + 1, axis=axis) for i in range(m)]
    for i, j in _sorting_network(m):
        low, high = in_order[i], in_order[j]
        in_order[i], in_order[j] = jnp.minimum(low, high), jnp.maximum(low, high)
    below, threshold = in_order[m - n - 1], in_order[m - n]
    # Counting what is kept instead reads all keys once more, and took three times as long as the network.
    return jax.lax.cond((below < threshold).all(), lambda: keys >= threshold, lambda: highest(scores, n, axis))


def _sorting_network(size: int) -> Iterator[tuple[int, int]]:
    """Comparators of Batcher's merge exchange (Knuth, The Art of Computer Programming 3, algorithm 5.2.2M)."""
    first = 1 << max(size - 1, 0).bit_length() >> 1
    part = first
    while part:
        distance, reach, offset = part, first, 0
        while True:
            yield from ((i, i + distance) for i in range(size - distance) if i & part == offset)
            if reach == part:
                break
            distance, reach, offset = reach - part, reach >> 1, part
        part >>= 1


def highest(scores: Float[Array, "*s"], n: int, axis: int) -> Bool[Array, "*s"]:
    """The n highest along an axis, by comparing each score with all others; of equal scores, the later one."""
    keys = order_preserving_keys(scores)
    position = jax.lax.broadcasted_iota(keys.dtype, keys.shape, axis)
    better = jnp.zeros(keys.shape, jnp.int32)
    for i in range(keys.shape[axis]):
        other = jax.lax.slice_in_dim(keys, i, i + 1, axis=axis)
        if jnp.issubdtype(scores.dtype, jnp.floating):
            # In one comparison, `>` for the earlier ones and itself, `>=` for the later: no float has the highest key.
            wins = other >= keys + (position >= i)
        else:
            wins = (other > keys) | ((other == keys) & (position < i))
        better += wins.astype(jnp.int32)
    return better < n


def highest_of_each(scores: Float[Array, "n rows"], keep: int | Int[Array, ""]) -> Bool[Array, "n rows"]:
    """The `keep` highest of the n scores of each row, of equal scores the first; `keep` may be traced.

    The threshold of each row is searched by halving the range of keys. This takes as many reads as a key has bits,
    whatever n is.
    """
    keys = order_preserving_keys(scores)
    low, high = (jnp.full(keys.shape[1:], end, keys.dtype) for end in key_range(scores.dtype))
    keep = jnp.asarray(keep, jnp.int32)

    def halve(_, ends):
        low, high = ends  # at least `keep` keys are no lower than `low`, fewer are higher than `high`
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        is_enough = (keys >= middle[None]).sum(0, dtype=jnp.int32) >= keep
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, jnp.maximum(middle - 1, low))

    threshold, _ = jax.lax.fori_loop(0, jnp.iinfo(keys.dtype).bits, halve, (low, high))
    above, ties = keys > threshold[None], keys == threshold[None]
    left = keep - above.sum(0, dtype=jnp.int32)
    return above | (ties & (jnp.cumsum(ties, 0, dtype=jnp.int32) <= left[None]))
