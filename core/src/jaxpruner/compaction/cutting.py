"""Which parameter a leaf of another tree belongs to, and which axes of the parameter the leaf has."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpruner import trees


def owner(path: trees.KeyPath, front: trees.KeyPath, shapes: Mapping[trees.KeyPath, Any]) -> trees.KeyPath | None:
    """The parameter whose path, behind the front, ends this one."""
    return next((owner for start in range(len(path)) if (owner := (*front, *path[start:])) in shapes), None)


def front(paths: Sequence[trees.KeyPath], shapes: Mapping[trees.KeyPath, Any]) -> trees.KeyPath:
    """The prefix of the parameters' paths that a tree lacks, such as the `params` of Flax; usually empty.

    Raises:
      ValueError: if the tree may be one of several parts of the parameters.
    """

    def owned(front: trees.KeyPath) -> int:
        return sum(owner(path, front, shapes) is not None for path in paths)

    if owned(()) == len(paths):
        return ()
    numbers_owned = {front: owned(front) for front in sorted({p[:k] for p in shapes for k in range(len(p))}, key=len)}
    best = max(numbers_owned.values(), default=0)
    fitting = [front for front, number in numbers_owned.items() if number == best]
    if best and len(fitting) > 1 and fitting[0]:
        raise ValueError(
            f"cut: the tree may be of {' or '.join(map(trees.leaf_name, fitting[:2]))}; give that of all parameters."
        )
    return fitting[0] if fitting else ()


def matching(leaf: Any, shape: tuple[int, ...], masks: Sequence[Any], path: trees.KeyPath) -> list[Any]:
    """Which axes of a parameter a leaf of it has."""
    if jnp.shape(leaf) == shape:
        return list(masks)
    if np.size(leaf) == 1 or all(mask is None for mask in masks):
        return []
    fitting = [
        kept
        for kept in itertools.combinations(range(len(shape)), np.ndim(leaf))
        if tuple(shape[axis] for axis in kept) == jnp.shape(leaf)
    ]
    ways = {tuple(id(masks[axis]) for axis in kept): kept for kept in fitting}
    if len(ways) != 1:
        raise ValueError(
            f"{trees.leaf_name(path)}: of shape {jnp.shape(leaf)}, which does not tell the axes of a parameter of "
            f"shape {shape}; start its statistics anew with tx.init(small.params)."
        )
    return [masks[axis] for axis in next(iter(ways.values()))]
