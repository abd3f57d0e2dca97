"""Summaries of sparse trees, for logs. They work on concrete and on traced arrays."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpruner import trees


def summarize_sparsity(param_tree: Any, only_total_sparsity: bool = False) -> dict[str, Any]:
    """The fraction of zeros, in total and of each leaf.

    Args:
      param_tree: any pytree of parameters or of masks; anything else is left out (None, random keys, strings,
        functions, and integers next to floating numbers).
      only_total_sparsity: leave out the entries of the leaves.

    Returns:
      `_total_sparsity` in [0, 1], `_nparams` and `_nparams_nnz` (entries, and those that are not
      zero), and the sparsity of each leaf under its slash path. Floats and exact integers, or
      float32 arrays under `jit`.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> jaxpruner.summarize_sparsity({"up": jnp.asarray([0.0, 1.0]), "down": jnp.asarray([0.0, 0.0, 0.0, 2.0])})
      {'_total_sparsity': 0.6666666666666666, '_nparams': 6, '_nparams_nnz': 2, 'down': 0.75, 'up': 0.5}
    """
    leaves = [(path, leaf) for path, leaf in trees.named_leaves(param_tree) if trees.is_number(leaf)]
    if any(trees.is_floating(leaf) for _, leaf in leaves):
        leaves = [(path, leaf) for path, leaf in leaves if trees.is_floating(leaf) or _is_mask(leaf)]
    nonzero = [_count_nonzero(leaf) for _, leaf in leaves]
    sizes = [math.prod(jnp.shape(leaf)) for _, leaf in leaves]
    summary = {
        "_total_sparsity": _fraction_missing(sum(nonzero), sum(sizes)),
        "_nparams": _number(sum(sizes), nonzero),
        "_nparams_nnz": sum(nonzero),
    }
    if not only_total_sparsity:
        for (path, _), count, size in zip(leaves, nonzero, sizes, strict=True):
            summary[trees.leaf_name(path)] = _fraction_missing(count, size)
    return summary


def summarize_intersection(mask_tree: Any, mask_tree2: Any, only_total_intersection: bool = False) -> dict[str, Any]:
    """The share of the first tree's kept entries that the second keeps too: `|m1 & m2| / |m1|`.

    Args:
      mask_tree: a tree of masks; None leaves are left out.
      mask_tree2: a tree of the same structure.
      only_total_intersection: leave out the entries of the leaves.

    Returns:
      `_total_intersection` and one entry for each leaf under its slash path, in [0, 1].

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> before, now = ({"w": jnp.asarray(mask)} for mask in ([1, 1, 0, 0], [1, 0, 1, 0]))
      >>> jaxpruner.summarize_intersection(before, now)
      {'_total_intersection': 0.5, 'w': 0.5}
    """
    mask_tree = trees.map_pruned(lambda m, _: None if trees.is_unpruned(m) else m, mask_tree, mask_tree2)
    both = trees.map_pruned(lambda m2, m: (m != 0) & (m2 != 0), mask_tree2, mask_tree)
    first = trees.named_leaves(trees.map_pruned(lambda m, _: m, mask_tree, both))
    shared = [_count_nonzero(leaf) for leaf in jax.tree.leaves(both)]
    kept = [_count_nonzero(leaf) for _, leaf in first]
    summary = {"_total_intersection": _ratio(sum(shared), sum(kept))}
    for (path, _), s, k in zip(first, shared, kept, strict=True):
        if not only_total_intersection:
            summary[trees.leaf_name(path)] = _ratio(s, k)
    return summary


def _is_mask(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) == jnp.bool_


def _count_nonzero(leaf: Any) -> Any:
    """An exact Python integer, or float32 under `jit` (where an int32 sum would overflow)."""
    count = jnp.sum(jnp.asarray(leaf) != 0, dtype=jnp.uint32)
    return count.astype(jnp.float32) if isinstance(count, jax.core.Tracer) else int(count)


def _number(size: int, counts: list[Any]) -> Any:
    """A static size as the counts are given: an integer, or float32 under `jit`, where int32 is too small."""
    return jnp.float32(size) if any(isinstance(count, jax.core.Tracer) for count in counts) else size


def _fraction_missing(count: Any, size: int) -> Any:
    # The difference is exact, so a dense leaf has exactly 0 even where XLA divides by a reciprocal.
    return (_number(size, [count]) - count) / float(size) if size else 0.0


def _ratio(part: Any, whole: Any) -> Any:
    if isinstance(whole, jax.core.Tracer):
        return part / jnp.maximum(whole, 1)
    return part / max(whole, 1)
