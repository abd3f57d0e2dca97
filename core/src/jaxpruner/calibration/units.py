"""Whole units of a network that is trained already: which of them matter to the layers that read them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import sparsity_types, trees
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.calibration import solvers
from jaxpruner.calibration.program import Leaf
from jaxpruner.calibration.running import Layer
from jaxpruner.calibration.weights import Weights

# By name: the score of an entry, and whether it is a score of the inputs only, not of the outputs.
SCORES: dict[str, tuple[Callable[..., Any], bool]] = {
    "magnitude": (solvers.magnitude, False),
    "wanda": (solvers.wanda, False),
    "flap": (solvers.fluctuation, True),
}


def prune(
    algorithm: str,
    updater: BaseUpdater,
    params: Any,
    paths: Sequence[trees.KeyPath],
    weights: Weights,
    layers: Iterable[Layer],
) -> tuple[Any, Any]:
    """Parameters without the units of the lowest scores, and their masks.

    Args:
      algorithm: a key of `SCORES`.
      updater: an algorithm with groups as its structure.
      params: arrays, any pytree of them.
      paths: their paths.
      weights: what becomes of them on the way to products.
      layers: all of them, dense.
    """
    score, of_inputs = SCORES[algorithm]
    leaves, treedef = jax.tree.flatten(params)
    scores = [np.zeros(np.shape(leaf), np.float32) for leaf in leaves]
    inputs: dict[trees.KeyPath, set[int]] = {}
    shifts: list[_Shift] = []
    for layer in layers:
        use = layer.use
        here = scores[use.leaf.number]
        placed, where = _placed(weights, layer, score(layer.weights, layer.statistics))
        here[use.leaf.index] = np.where(where, placed, here[use.leaf.index])
        along = _input_axes(weights, layer)
        inputs.setdefault(paths[use.leaf.number], set()).update(axis + len(use.leaf.index) for axis in along)
        if of_inputs:
            means, _ = _placed(weights, layer, layer.statistics.means[:, :, None] * layer.weights)
            shifts.append(_Shift(use.leaf, weights.bias_of(use), means, along))

    def is_scored(path: trees.KeyPath, axis: int) -> bool:
        return not of_inputs or axis in inputs.get(path, ())

    targets = updater.get_target_sparsities(params)
    units = dataclasses.replace(updater, sparsity_type=sparsity_types.Unstructured())
    masks = updater.sparsity_type.masks(treedef.unflatten(map(jnp.asarray, scores)), targets, units, is_scored)
    pruned = jax.tree.leaves(updater.apply_masks(params, masks))
    of_leaf = dict(trees.named_leaves(masks))
    _compensate(pruned, shifts, {i: of_leaf[path] for i, path in enumerate(paths) if path in of_leaf}, paths)
    return treedef.unflatten(pruned), masks


class _Shift(NamedTuple):
    """What the inputs of a layer add to its outputs on average, entry by entry."""

    leaf: Leaf
    bias: Leaf | None
    means: Any
    input_axes: tuple[int, ...]


def _compensate(
    pruned: list[Any], shifts: Sequence[_Shift], masks: Mapping[int, Any], paths: Sequence[trees.KeyPath]
) -> None:
    """Biases take up the mean of the inputs that left, where there is a bias (An et al., 2024)."""
    without = []
    for leaf, bias, means, along in shifts:
        if leaf.number not in masks:
            continue
        others = tuple(axis for axis in range(means.ndim) if axis not in along)
        gone = ~np.asarray(masks[leaf.number][leaf.index]).any(others, keepdims=True) & (means != 0)
        lost = np.where(gone, means, 0.0).sum(along)
        if not gone.any():
            continue
        if bias is None:
            without.append(trees.leaf_name(paths[leaf.number]))
            continue
        whole = pruned[bias.number]
        shifted = whole[bias.index] + lost.reshape(whole[bias.index].shape).astype(whole.dtype)
        if bias.number in masks:  # outputs that left have no bias
            shifted = jnp.where(masks[bias.number][bias.index], shifted, 0)
        pruned[bias.number] = whole.at[bias.index].set(shifted) if bias.index else shifted
    if without:
        names = list(dict.fromkeys(without))
        warnings.warn(
            f"flap: {len(names)} layers have no bias that could take up the mean of what left: "
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}.",
            stacklevel=2,
        )


def _placed(weights: Weights, layer: Layer, matrices: Any) -> tuple[np.ndarray, np.ndarray]:
    """Matrices in the places of their leaf, and which places these are."""
    whole = jnp.broadcast_to(matrices, layer.weights.shape)
    placed, where = weights.put_back(layer.use, layer.use.operand(whole))
    return np.asarray(placed), np.asarray(where)


def _input_axes(weights: Weights, layer: Layer) -> tuple[int, ...]:
    """The axes of a leaf along which the inputs of its layer are counted."""
    numbers, where = _placed(weights, layer, jnp.arange(1.0, layer.weights.shape[1] + 1)[None, :, None])
    numbers = np.where(where, numbers, np.nan)
    return tuple(axis for axis in range(numbers.ndim) if np.nanmax(np.abs(np.diff(numbers, axis=axis)), initial=0) > 0)
