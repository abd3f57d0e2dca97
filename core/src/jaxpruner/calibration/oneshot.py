"""Prunes a network that is trained already, with a few batches of data and no training."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxpruner import api, coupled_structures, sparsity_distributions, sparsity_types, trees
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.calibration import files, outliers, solvers, units
from jaxpruner.calibration.program import Leaf
from jaxpruner.calibration.running import Calibration, Layer
from jaxpruner.calibration.statistics import wide_dtype
from jaxpruner.calibration.task import Task
from jaxpruner.calibration.weights import Use, Weights
from jaxpruner.structure_strings import parse_sparsity_type

ALGORITHMS = ("magnitude", "wanda", "sparsegpt", "flap")
DISTRIBUTIONS = ("uniform", "erk", "owl", "global")
_SCORES = {"magnitude": solvers.magnitude, "wanda": solvers.wanda}


def prune_oneshot(
    forward: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    algorithm: Literal["magnitude", "wanda", "sparsegpt", "flap"] = "sparsegpt",
    sparsity: float | None = None,
    sparsity_type: Any = None,
    dist_type: Literal["uniform", "erk", "owl", "global"] = "uniform",
    filter_fn: sparsity_distributions.FilterFn = sparsity_distributions.NOT_DIM_ONE_FILTER_FN,
    custom_sparsity_map: sparsity_distributions.SparsityMap | None = None,
    damping: float = solvers.DAMPING,
    block_size: int = solvers.BLOCK,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> tuple[Any, Any]:
    r"""Prunes trained parameters by what the inputs of their layers are like in a few batches.

    One forward pass over all batches: at each product with a parameter, the statistics of what it is multiplied with
    are summed over all tokens, the parameter is pruned, and the pass goes on with what is left, so that each layer is
    calibrated on what the layers before it really give. Read from the jaxpr of `forward`, whatever framework it is
    written in; layers that are run through by `scan` are pruned one by one. With X the inputs of a layer, one token a
    column, and W its weights:

    =============  ==========================================================  ======================================
    `algorithm`    what goes                                                   what becomes of the others
    =============  ==========================================================  ======================================
    `magnitude`    lowest :math:`|w|`                                          stay
    `wanda`        lowest :math:`|w_{ij}| \, \|x_i\|_2`, for each output alike  stay (Sun et al., 2024)
    `sparsegpt`    lowest :math:`w_{ij}^2 / [(XX^T)^{-1}]_{ii}`                 least squares (Frantar & Alistarh, 2023)
    `flap`         units of lowest :math:`\mathrm{var}(x_i) \|w_i\|^2`          biases take up means (An et al., 2024)
    =============  ==========================================================  ======================================

    Afterwards `sparsify(tx, algorithm="preserve")` trains on with these zeros, and :func:`compact` removes units.

    Args:
      forward: `forward(params, batch)`, as in inference. What it returns does not matter.
      params: any pytree.
      batches: of calibration data, any pytrees of arrays of one structure and shape. Arrays that are sharded over their
        examples stay so; sums are added across devices.
      algorithm: see above; `flap` prunes units.
      sparsity: the share of zeros, in [0, 1); may be left out for n:m.
      sparsity_type: as for `sparsify`, by default `per_output` for `wanda` and `unstructured` for the others. n:m runs
        along the inputs of a layer, whatever its layout. With groups (:func:`find_groups`) whole units go, in one go
        at the end of a dense pass.
      dist_type: how sparsities are spread: `uniform`, `erk`, `owl` (blocks with more outliers stay denser, Yin et al.,
        2024); with groups also `global`, where units of all groups compete.
      filter_fn: `filter_fn(path, param)` takes the parameters to prune.
      custom_sparsity_map: path or pattern -> sparsity of its own.
      damping: of SparseGPT's Hessian, a share of its mean diagonal.
      block_size: inputs for which SparseGPT chooses masks together.
      checkpoint: a folder for finished layers; the same call goes on from there.
      progress: whether to draw a bar with the layer and the time left.

    Returns:
      The pruned parameters and their boolean masks, None where a parameter is not pruned.

    Raises:
      ValueError: if `forward` multiplies with none of the parameters, batches differ in structure or shape, the inputs
        of a layer are not finite, or a parameter cannot be pruned as asked.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpruner
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (8, 32)), "down": jax.random.normal(keys[1], (32, 8))}
      >>> batches = [jax.random.normal(keys[2], (64, 8))]
      >>> forward = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
      >>> pruned, masks = jaxpruner.prune_oneshot(forward, params, batches, sparsity_type="nm_2,4")
      >>> int(jnp.count_nonzero(pruned["up"])), int(masks["down"].sum())
      (128, 128)
    """
    _check_options(algorithm, dist_type, damping, block_size)
    updater = _updater(algorithm, sparsity, sparsity_type, dist_type, filter_fn, custom_sparsity_map)
    task = Task(forward, params, list(batches))
    if isinstance(updater.sparsity_type, coupled_structures.Coupled):
        return _prune_units(task, algorithm, updater, progress)
    if algorithm == "flap" or dist_type == "global":
        asked = "algorithm='flap'" if algorithm == "flap" else "dist_type='global'"
        raise ValueError(f"{asked} ranks units: give sparsity_type=jaxpruner.find_groups(forward, params, batch).")
    targets = _targets(task, updater)
    weights, calibration = task.calibration(set(targets))
    _tell_of_dense(task, weights)
    structures = _structures(task, weights, updater, algorithm, targets)
    sparsities = {use.leaf: targets[use.leaf.number] for use in weights.uses}
    if dist_type == "owl":
        own = set(_custom(task, custom_sparsity_map))
        dense = (layer for layer in _bar(calibration.run(task.name, False), weights, task, progress, "outliers"))
        outlying = (layer for layer in dense if layer.use.leaf.number not in own)
        sparsities |= outliers.sparsities(outlying, dict(enumerate(task.paths)), sparsity)
        weights, calibration = task.calibration(set(targets))
    description = {
        "algorithm": algorithm,
        "sparsities": {task.name(leaf): float(share) for leaf, share in sparsities.items()},
        "structures": {task.name(leaf): str(structure) for leaf, structure in structures.items()},
        "damping": damping,
        "block_size": block_size,
        "params": files.checksum(task.arrays),
        "batches": files.checksum(task.batches),
    }
    done = files.Finished(checkpoint, description)
    solve = _Solve(algorithm, sparsities, structures, damping, block_size, task.name)
    masks: dict[Leaf, Any] = {}
    if algorithm == "magnitude":
        layers = calibration.layers()
    else:
        layers = calibration.run(task.name, algorithm == "sparsegpt", lambda use: use.part in done)
    for layer in _bar(layers, weights, task, progress, algorithm):
        use = layer.use
        if use.part in done:
            matrices, kept = done.read(use.part)
        else:
            matrices, kept = solve(layer, weights)
            done.write(use.part, matrices, kept)
        _write(calibration, weights, masks, use, jnp.asarray(matrices), jnp.asarray(kept))
    return _assembled(task, calibration.leaves, masks)


def _check_options(algorithm: str, dist_type: str, damping: float, block_size: int) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: {algorithm!r} is not known; one-shot pruning has {', '.join(ALGORITHMS)}.")
    if dist_type not in DISTRIBUTIONS:
        raise ValueError(f"dist_type: {dist_type!r} is not known; use one of {', '.join(DISTRIBUTIONS)}.")
    if not damping > 0:
        raise ValueError(f"damping: {damping!r} is not above 0; it is a share of the Hessian's mean diagonal.")
    if block_size < 1:
        raise ValueError(f"block_size: {block_size!r} is not 1 or more.")


def _updater(
    algorithm: str, sparsity: float | None, sparsity_type: Any, dist_type: str, filter_fn: Any, custom: Any
) -> BaseUpdater:
    """What chooses parameters, sparsities and structures, as for a training."""
    structure = parse_sparsity_type(sparsity_type) if sparsity_type is not None else None
    if structure is None:
        structure = sparsity_types.PerOutput() if algorithm == "wanda" else sparsity_types.Unstructured()
    if sparsity is None:
        if not isinstance(structure, sparsity_types.NByM):
            raise ValueError("sparsity: missing; give the fraction of zeros, such as sparsity=0.5.")
        sparsity = 1 - structure.n / structure.m
    if isinstance(structure, coupled_structures.Coupled) and algorithm not in units.SCORES:
        raise ValueError(
            f"algorithm: {algorithm!r} chooses single weights and cannot rank units; use {', '.join(units.SCORES)}."
        )
    config = {
        "algorithm": "global_magnitude" if dist_type == "global" else "magnitude",
        "sparsity": sparsity,
        "sparsity_type": structure,
        "dist_type": "erk" if dist_type == "erk" else "uniform",
        "filter_fn": filter_fn,
        "custom_sparsity_map": custom,
    }
    return api.create_updater_from_config(config)


def _targets(task: Task, updater: BaseUpdater) -> dict[int, float]:
    """The sparsity of each parameter that is to be pruned, by number."""
    asked = dict(trees.named_leaves(updater.chosen_sparsities(trees.numbers_only(task.params))))
    targets = {i: float(asked[path]) for i, path in enumerate(task.paths) if asked.get(path)}
    if not targets:
        names = ", ".join(map(trees.leaf_name, task.paths[:5]))
        raise ValueError(
            f"filter_fn: selects none of the {len(task.paths)} parameters ({names}, ...), so nothing would be pruned; "
            "choose a filter_fn that takes some, and a sparsity above 0."
        )
    return targets


def _custom(task: Task, custom: sparsity_distributions.SparsityMap | None) -> list[int]:
    found = trees.resolve(custom, task.paths, "custom_sparsity_map")
    return [i for i, path in enumerate(task.paths) if path in found]


def _structures(
    task: Task, weights: Weights, updater: BaseUpdater, algorithm: str, targets: Mapping[int, float]
) -> dict[Leaf, sparsity_types.SparsityType]:
    """The structure of each leaf, checked."""
    found: dict[Leaf, sparsity_types.SparsityType] = {}
    for use in weights.uses:
        if use.leaf in found:
            continue
        shape = jax.ShapeDtypeStruct(weights.shape(use.leaf), jnp.float32)
        with trees.errors_at(task.paths[use.leaf.number]):
            structure = sparsity_types.for_leaf(updater.sparsity_type, task.paths[use.leaf.number], shape)
            _check_structure(structure, use, shape.shape, algorithm, targets[use.leaf.number])
        found[use.leaf] = structure
    return found


def _check_structure(structure: Any, use: Use, shape: tuple[int, ...], algorithm: str, sparsity: float) -> None:
    inputs = use.layout.shape[1]
    if isinstance(structure, sparsity_types.NByM):
        if not 0 < structure.n <= structure.m or inputs % structure.m:
            raise ValueError(
                f"{inputs} inputs are not a multiple of m={structure.m}, or n={structure.n} is not between 1 and m; "
                "exclude it with filter_fn, or choose another n:m."
            )
        given = 1 - structure.n / structure.m
        if abs(given - sparsity) > 1e-6:
            raise ValueError(
                f"a sparsity of {sparsity:g} is asked for, and {structure.n}:{structure.m} gives {given:g}; ask for "
                "that, or leave sparsity out."
            )
    elif not isinstance(structure, _OF_MATRICES):
        if algorithm == "sparsegpt":
            raise ValueError(
                f"algorithm: 'sparsegpt' has no masks of {structure}; use unstructured, per_output or n:m, or "
                "algorithm='wanda'."
            )
        structure.check_shape(shape)


# Structures that are of a layer's inputs and outputs, whatever the layout of the parameter.
_OF_MATRICES = (sparsity_types.Unstructured, sparsity_types.PerOutput, sparsity_types.NByM)


@dataclasses.dataclass(frozen=True)
class _Solve:
    """Prunes one layer."""

    algorithm: str
    sparsities: Mapping[Leaf, float]
    structures: Mapping[Leaf, sparsity_types.SparsityType]
    damping: float
    block_size: int
    name: Callable[[Leaf], str]

    def __call__(self, layer: Layer, weights: Weights) -> tuple[Any, Any]:
        """The matrices of a layer that is pruned, and which of their entries stay."""
        leaf, matrices = layer.use.leaf, layer.weights.astype(wide_dtype())
        sparsity, structure = self.sparsities[leaf], self.structures[leaf]
        if self.algorithm == "sparsegpt":
            solved = [
                solvers.sparsegpt(w, gram, structure, sparsity, self.name(leaf), self.damping, self.block_size)
                for w, gram in zip(matrices, layer.statistics.gram, strict=True)
            ]
            return tuple(map(jnp.stack, zip(*solved, strict=True)))
        score = _SCORES[self.algorithm]
        if isinstance(structure, _OF_MATRICES):
            return solvers.masked(matrices, layer.statistics, score, structure, sparsity)
        kept = self._mask(score(matrices, layer.statistics), structure, sparsity, layer.use, weights)
        return jnp.where(kept, matrices, 0.0), kept

    def _mask(self, scores: Any, structure: Any, sparsity: float, use: Use, weights: Weights) -> Any:
        """Of a structure that is of the parameter, in its own layout."""
        placed, where = weights.put_back(use, use.operand(scores))
        if not bool(where.all()):
            raise ValueError(
                f"{self.name(use.leaf)}: {structure} needs a parameter that is multiplied with as a whole."
            )
        mask = structure.mask(placed, sparsity)
        return use.layout.matrices(weights.value(use.weight, {use.leaf: mask.astype(scores.dtype)})) != 0


def _write(calibration: Calibration, weights: Weights, masks: dict[Leaf, Any], use: Use, matrices: Any, kept: Any):
    """Puts the matrices of a layer back into its leaf, and what stays into the mask of it."""
    operand, stays = use.operand(matrices), use.operand(kept.astype(matrices.dtype))
    if weights.is_scaled(use.weight):
        scale = weights.scale(use)
        operand = jnp.where(scale != 0, operand / jnp.where(scale == 0, 1, scale), 0)
        stays = jnp.where(scale != 0, stays, 0)  # what the function masks is pruned
    values, where = weights.put_back(use, operand)
    stays, _ = weights.put_back(use, stays)
    before = calibration.leaves[use.leaf]
    calibration.leaves[use.leaf] = jnp.where(where, values, before).astype(before.dtype)
    mask = masks.get(use.leaf, np.ones(before.shape, bool))
    masks[use.leaf] = jnp.where(where, stays > 0, mask)


def _assembled(task: Task, leaves: Mapping[Leaf, Any], masks: Mapping[Leaf, Any]) -> tuple[Any, Any]:
    """The parameters and masks of all leaves, stacks put together again."""
    arrays: list[Any] = list(task.arrays)
    kept: list[Any] = [None] * len(arrays)
    for leaf, mask in masks.items():
        if not leaf.index:
            arrays[leaf.number], kept[leaf.number] = leaves[leaf], mask
            continue
        if kept[leaf.number] is None:
            arrays[leaf.number] = np.array(arrays[leaf.number])
            kept[leaf.number] = np.ones(arrays[leaf.number].shape, bool)
        arrays[leaf.number][leaf.index] = leaves[leaf]
        kept[leaf.number][leaf.index] = mask
    placed = [_like(before, after) for before, after in zip(task.arrays, arrays, strict=True)]
    marks = [None if mask is None else jnp.asarray(mask) for mask in kept]
    return task.with_arrays(placed), task.with_arrays(marks, otherwise=None)


def _like(before: Any, after: Any) -> Any:
    """An array where the one that it replaces is."""
    if after is before:
        return before
    return jax.device_put(after, before.sharding) if isinstance(before, jax.Array) else np.asarray(after)


def _tell_of_dense(task: Task, weights: Weights) -> None:
    if weights.dense:
        lines = "; ".join(f"{task.name(leaf)} {reason}" for leaf, reason in list(weights.dense.items())[:8])
        more = f"; and {len(weights.dense) - 8} more" if len(weights.dense) > 8 else ""
        warnings.warn(f"prune_oneshot: {len(weights.dense)} parameters stay dense: {lines}{more}.", stacklevel=3)


def _bar(layers: Iterator[Layer], weights: Weights, task: Task, progress: bool, title: str) -> Iterator[Layer]:
    """The layers, with a bar that names the one at hand."""
    number = len({use.part for use in weights.uses})
    with tqdm(total=number, desc=title, unit="layer", disable=not progress) as bar:
        for layer in layers:
            bar.set_postfix_str(task.name(layer.use.leaf))
            yield layer
            bar.update()


def _prune_units(task: Task, algorithm: str, updater: BaseUpdater, progress: bool) -> tuple[Any, Any]:
    products = {i for i, array in enumerate(task.arrays) if array.ndim > 1 and trees.is_floating(array)}
    weights, calibration = task.calibration(products)
    layers = _bar(calibration.run(task.name, False), weights, task, progress, algorithm)
    return units.prune(algorithm, updater, task.params, task.paths, weights, layers)
