"""Whole units of a pretrained network: which of them matter to the layers that read them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import sparsity_types, trees
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.calibration import solvers
from jaxpruner.calibration.running import Layer, Leaves
from jaxpruner.calibration.weights import Use, Weights

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
    values: Leaves,
    layers: Iterable[Layer],
) -> tuple[list[Any], list[Any | None]]:
    """Parameters without the units of the lowest scores, and their masks, in the order of their paths.

    Args:
      algorithm: a key of `SCORES`.
      updater: an algorithm with groups as its structure.
      params: arrays, any pytree of them.
      paths: their paths.
      weights: what happens to them on the way to products.
      values: of the leaves.
      layers: all of them, dense.

    Raises:
      ValueError: if no product scores the units of a group.
    """
    score, of_inputs = SCORES[algorithm]
    leaves, treedef = jax.tree.flatten(params)
    scores = [np.zeros(np.shape(leaf), np.float32) for leaf in leaves]
    inputs: dict[trees.KeyPath, set[int]] = {}
    shifts: list[_Shift] = []
    for layer in layers:
        use = layer.use
        here = scores[use.leaf.number]
        placed, where = _placed(weights, use, score(layer.weights, layer.statistics))
        here[use.leaf.index] = np.where(where, placed, here[use.leaf.index])
        along = _input_axes(weights, layer)
        inputs.setdefault(paths[use.leaf.number], set()).update(axis + len(use.leaf.index) for axis in along)
        if of_inputs:
            shifts.append(_Shift(use, layer.statistics.means, along))

    def is_scored(path: trees.KeyPath, axis: int) -> bool:
        return path in inputs and (not of_inputs or axis in inputs[path])

    targets = updater.get_target_sparsities(params)
    units = dataclasses.replace(updater, sparsity_type=sparsity_types.Unstructured())
    masks = updater.sparsity_type.masks(treedef.unflatten(map(jnp.asarray, scores)), targets, units, is_scored)
    pruned = jax.tree.leaves(updater.apply_masks(params, masks))
    of_leaf = dict(trees.named_leaves(masks))
    kept = [of_leaf.get(path) for path in paths]
    _compensate(pruned, shifts, kept, paths, weights, values)
    return pruned, kept


class _Shift(NamedTuple):
    """The mean of each input of a layer, and along which axes of the leaf its inputs are."""

    use: Use
    means: Any
    input_axes: tuple[int, ...]


def _compensate(
    pruned: list[Any],
    shifts: Sequence[_Shift],
    masks: Sequence[Any],
    paths: Sequence[trees.KeyPath],
    weights: Weights,
    values: Leaves,
) -> None:
    """Biases take up the mean of the inputs that left, where there is a bias (An et al., 2024)."""
    without = []
    for use, means, along in shifts:
        leaf, bias = use.leaf, weights.bias_of(use)
        if masks[leaf.number] is None:
            continue
        others = tuple(axis for axis in range(len(weights.shape(leaf))) if axis not in along)
        gone = ~np.asarray(masks[leaf.number][leaf.index]).any(others, keepdims=True)
        if not gone.any():
            continue
        matrices = use.of_leaf(weights.value(use.weight, values))
        shift, _ = _placed(weights, use, means[:, :, None] * matrices)
        lost = np.where(gone, shift, 0.0)
        if not lost.any():
            continue
        lost = lost.sum(along)
        if bias is None:
            without.append(trees.leaf_name(paths[leaf.number]))
            continue
        whole = jnp.asarray(pruned[bias.number])
        shifted = whole[bias.index] + lost.reshape(whole[bias.index].shape).astype(whole.dtype)
        if masks[bias.number] is not None:  # outputs that left have no bias
            shifted = jnp.where(masks[bias.number][bias.index], shifted, 0)
        pruned[bias.number] = whole.at[bias.index].set(shifted) if bias.index else shifted
    if without:
        names = list(dict.fromkeys(without))
        warnings.warn(
            f"flap: {len(names)} layers have no bias that could take up the mean of what left: "
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}.",
            stacklevel=2,
        )


def _placed(weights: Weights, use: Use, matrices: Any) -> tuple[np.ndarray, np.ndarray]:
    """Matrices in the places of their leaf, and which places these are."""
    placed, where = weights.put_back(use, use.operand(matrices))
    return np.asarray(placed), np.asarray(where)


def _input_axes(weights: Weights, layer: Layer) -> tuple[int, ...]:
    """The axes of a leaf along which the inputs of its layer are counted."""
    counted = jnp.arange(1.0, layer.weights.shape[1] + 1)[None, :, None]
    numbers, where = _placed(weights, layer.use, jnp.broadcast_to(counted, layer.weights.shape))
    numbers = np.where(where, numbers, np.nan)
    return tuple(axis for axis in range(numbers.ndim) if np.nanmax(np.abs(np.diff(numbers, axis=axis)), initial=0) > 0)
