"""What the logical axes of a T5X model say about its layers: which are stacked, and what an attention kernel is."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxpruner
from jaxpruner import trees
from jaxpruner.coupled_structures import Coupled
from jaxpruner.sparsity_distributions import Layers

# Axes along which parameters are stacked, those of scanned layers first: the ones that T5X's Adafactor takes for it.
STACKS = ("layers", "stack")
# The outputs of an attention kernel, which some of T5X's models keep as one axis, `joined_kv`.
JOINED = ("heads", "kv")

Names = tuple[tuple[trees.KeyPath, tuple[str | None, ...]], ...]


def informed(updater: jaxpruner.BaseUpdater, param_logical_axes: Any) -> jaxpruner.BaseUpdater:
    """The algorithm for a model with these logical axes.

    Scanned layers count as separate layers (unless the updater has its own `stack_axes`), and distributions see
    attention kernels as matrices. So T5 gets the same sparsities from all its implementations in T5X.
    """
    names: Names = tuple((path, tuple(axes)) for path, axes in trees.named_leaves(param_logical_axes))
    known = {axis for _, axes in names for axis in axes}
    updater = copy.copy(updater)
    # Groups are read off the model, where layers that are scanned have their axis.
    if updater.stack_axes is None and known & {*STACKS} and not isinstance(updater.sparsity_type, Coupled):
        updater.stack_axes = functools.partial(stack_axis, names)
    if known >= {*JOINED}:
        updater.sparsity_distribution_fn = functools.partial(of_matrices, names, updater.sparsity_distribution_fn)
    return updater


def stack_axis(names: Names, path: trees.KeyPath, leaf: Any = None) -> int | None:
    """Which axis of a parameter is a stack; if it is fused and scanned, it is the axis of the scanned layers."""
    del leaf
    axes = dict(names).get(path, ())
    return next((axes.index(stacked) for stacked in STACKS if stacked in axes), None)


def of_matrices(names: Names, distribution: Callable[[Any], Any], params: Any) -> Any:
    """The sparsities that a distribution gives if heads and their width are one axis."""
    all_axes = dict(names)

    def joined(path: trees.KeyPath, leaf: Any) -> Any:
        axes = all_axes.get(path, ())
        if isinstance(leaf, Layers):
            stacked = stack_axis(names, path)
            axes = tuple(axis for i, axis in enumerate(axes) if i != stacked)
        found = [i for i in range(len(axes)) if axes[i : i + 2] == JOINED]
        return _join(leaf, found[0]) if found and len(axes) == len(leaf.shape) else leaf

    return distribution(trees.map_named(joined, params))


def _join(leaf: Any, axis: int) -> Any:
    before, (heads, width), after = leaf.shape[:axis], leaf.shape[axis : axis + 2], leaf.shape[axis + 2 :]
    shape = (*before, heads * width, *after)
    if isinstance(leaf, Layers):
        return dataclasses.replace(leaf, shape=shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    return jnp.reshape(leaf, shape)
