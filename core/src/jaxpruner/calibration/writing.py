"""What was pruned, put back where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner.calibration.program import Leaf
from jaxpruner.calibration.running import Leaves
from jaxpruner.calibration.statistics import wide_dtype
from jaxpruner.calibration.task import Task
from jaxpruner.calibration.weights import Use, Weights


def write(leaves: Leaves, weights: Weights, masks: dict[Leaf, Any], use: Use, changed: Any | None, kept: Any) -> None:
    """Puts the matrices of a layer back into its leaf, and what stays into the mask of it.

    Args:
      leaves: the values, which this changes.
      weights: what happens to them on the way to products.
      masks: of the leaves, which this changes.
      use: the product.
      changed: the matrices. None if no weight changed: what stays is as it was then, to the bit, whatever casts and
        scales there are on the way.
      kept: which of their entries stay.
    """
    stays = use.operand(jnp.asarray(kept, wide_dtype()))
    scale = weights.scale(use) if weights.is_scaled(use.weight) else None
    if scale is not None:
        stays = jnp.where(scale != 0, stays, 0)  # what the function masks is pruned
    stays, where = weights.put_back(use, stays)
    before = leaves[use.leaf]
    values = before
    if changed is not None:
        operand = use.operand(jnp.asarray(changed))
        if scale is not None:
            operand = jnp.where(scale != 0, operand / jnp.where(scale == 0, 1, scale), 0)
        values, _ = weights.put_back(use, operand)
    mask = jnp.where(where, stays > 0, masks.get(use.leaf, True))
    values = jnp.where(where, values, before)
    leaves[use.leaf] = jnp.where(mask, values, 0).astype(jax.dtypes.canonicalize_dtype(before.dtype))
    masks[use.leaf] = mask


def assembled(task: Task, leaves: Leaves, masks: Mapping[Leaf, Any]) -> tuple[Any, Any]:
    """The parameters and masks of all leaves, stacks put together again, which takes them out of `leaves`."""
    arrays: list[Any] = list(task.arrays)
    kept: list[Any] = [None] * len(arrays)
    for leaf, mask in masks.items():
        if not leaf.index:
            arrays[leaf.number], kept[leaf.number] = leaves.take(leaf), mask
            continue
        if kept[leaf.number] is None:
            arrays[leaf.number] = np.array(arrays[leaf.number])
            kept[leaf.number] = np.ones(arrays[leaf.number].shape, bool)
        arrays[leaf.number][leaf.index] = leaves.take(leaf)
        kept[leaf.number][leaf.index] = mask
    return as_given(task, arrays, kept)


def as_given(task: Task, arrays: Sequence[Any], kept: Sequence[Any | None]) -> tuple[Any, Any]:
    """The parameters and masks as trees, where the arrays are that they come from."""
    pairs = zip(task.arrays, arrays, strict=True)
    placed = [before if after is before else _like(before, after, before.dtype) for before, after in pairs]
    pairs = zip(task.arrays, kept, strict=True)
    marks = [None if mask is None else jnp.asarray(_like(before, mask, bool)) for before, mask in pairs]
    return task.with_arrays(placed), task.arrays_only(marks)


def _like(before: Any, after: Any, dtype: Any) -> Any:
    """An array where the one that it replaces is."""
    if not isinstance(before, jax.Array):
        return np.asarray(after, dtype)
    if before.committed:
        return jax.device_put(after, before.sharding)
    # Bound to no device, so that it goes with whatever the other goes with; sums over devices have bound it.
    return jnp.asarray(np.asarray(after) if getattr(after, "committed", False) else after)
