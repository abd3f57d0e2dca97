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
    from jaxtyping import Array, Bool, Float, Int


# Of larger groups XLA's CPU backend stores the keys rather than compute them for each comparison: of so many scores at
# a time, they stay in its cache.
_LARGE_GROUP, _BLOCK = 8, 1 << 18


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def n_of_m(scores: Float[Array, "*s"], n: int, m: int, axes: tuple[int, ...]) -> Bool[Array, "*s"]:
    """Elementwise comparisons within groups of m: no sort, no gather, m of them for each score."""
    axis = min(axes)
    together = tuple(range(axis, axis + len(axes)))
    moved = jnp.moveaxis(scores, axes, together)
    after = moved.shape[axis + len(axes) :]
    if m > _LARGE_GROUP and moved.size and is_one_cpu():
        groups = moved.reshape(-1, m, *([math.prod(after)] if math.prod(after) > 1 else []))
        blocks = math.gcd(len(groups), max(1, moved.size // _BLOCK))
        each = functools.partial(highest, n=n, axis=1)
        kept = jax.lax.map(each, groups.reshape(blocks, -1, *groups.shape[1:]))
    else:
        kept = highest(moved.reshape(*moved.shape[:axis], -1, m, *after), n, axis + 1)
    return jnp.moveaxis(kept.reshape(moved.shape), together, axes)


def highest(scores: Float[Array, "*s"], n: int, axis: int) -> Bool[Array, "*s"]:
    """The n highest along an axis, of equal ones the later."""
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
    """The `keep` highest of the n scores of each row, of equal ones the first; may be traced.

    The threshold of each row is searched by halving the range of keys: so many reads as a key has bits, whatever n is.
    """
    keys = order_preserving_keys(scores)
    low, high = (jnp.full(keys.shape[1:], end, keys.dtype) for end in key_range(scores.dtype))
    keep = jnp.asarray(keep, jnp.int32)

    def halve(_, ends):
        low, high = ends  # at least `keep` keys are no lower than `low`, fewer are higher than `high`
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        is_enough = (keys >= middle).sum(0, dtype=jnp.int32) >= keep
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, jnp.maximum(middle - 1, low))

    threshold, _ = jax.lax.fori_loop(0, jnp.iinfo(keys.dtype).bits, halve, (low, high))
    above, ties = keys > threshold, keys == threshold
    left = keep - above.sum(0, dtype=jnp.int32)
    return above | (ties & (jnp.cumsum(ties, 0, dtype=jnp.int32) <= left))
