"""Prunes a pretrained network with a few batches of data and no training."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxpruner import api, coupled_structures, sparsity_distributions, sparsity_types, trees
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.calibration import files, outliers, solvers, units, writing
from jaxpruner.calibration.program import Leaf
from jaxpruner.calibration.running import Calibration, Layer
from jaxpruner.calibration.statistics import wide_dtype
from jaxpruner.calibration.task import Task
from jaxpruner.calibration.weights import Use, Weights
from jaxpruner.selection import counts
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
    r"""Prunes trained parameters by statistics of their layers' inputs over a few batches.

    One forward pass goes over all batches. At each product with a parameter, it sums the statistics of the product's
    inputs over all tokens, prunes the parameter, and continues with the pruned one. So each layer is calibrated on the
    actual outputs of the layers before it. The pass is read from the jaxpr of `forward`, whatever framework it is
    written in. Layers under `scan` are pruned one by one. With X the inputs of a layer, one token per column, and W its
    weights:

    | `algorithm` | what goes | what becomes of the others |
    |---|---|---|
    | `magnitude` | lowest :math:`|w|` | stay |
    | `wanda` | lowest :math:`|w_{ij}| \, \|x_i\|_2`, for each output alike | stay (Sun et al., 2024) |
    | `sparsegpt` | lowest :math:`w_{ij}^2 / [(XX^T)^{-1}]_{ii}` | least squares (Frantar & Alistarh, 2023) |
    | `flap` | units of lowest :math:`\mathrm{var}(x_i) \|w_i\|^2` | biases take up means (An et al., 2024) |

    Afterwards `sparsify(tx, algorithm="preserve")` trains on with these zeros, and :func:`compact` removes units.

    Args:
      forward: `forward(params, batch)`, as in inference. Its result does not matter.
      params: any pytree.
      batches: calibration data, any pytrees of arrays of one structure and shape. Arrays that are sharded over their
        examples stay sharded; sums are added across devices.
      algorithm: see above; `flap` prunes units.
      sparsity: the share of zeros, in [0, 1); may be left out for n:m.
      sparsity_type: as for `sparsify`, by default `per_output` for `wanda` and `unstructured` for the others. n:m and
        `per_output` run along the inputs of a layer, whatever its layout and whatever axis they have. With groups
        (:func:`find_groups`), whole units are pruned, all at once at the end of a dense pass. They are scored by the
        products with them: what is looked up or added has no score.
      dist_type: how sparsities are spread: `uniform`, `erk`, `owl` (blocks with more outliers stay denser, Yin et al.,
        2024; neither for n:m nor for groups); with groups also `global`, where units of all groups compete.
      filter_fn: `filter_fn(path, param)` selects the parameters to prune. Of a stack of layers that `scan` runs
        through, it and distributions see the shape of one layer.
      custom_sparsity_map: path or pattern -> sparsity of its own.
      damping: damping of SparseGPT's Hessian, as a share of its mean diagonal.
      block_size: the number of inputs for which SparseGPT chooses masks together.
      checkpoint: a folder for finished layers; the same call continues from there. Not for groups.
      progress: whether to draw a bar with the layer and the time left.

    Returns:
      The pruned parameters, in their dtypes and on their devices, and their boolean masks, None where a parameter is
        not pruned.

    Raises:
      ValueError: if `forward` multiplies with none of the parameters, batches are empty or differ in structure or
        shape, the inputs of a layer are not finite, or a parameter cannot be pruned as asked.

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
        _check_options_of_units(dist_type, checkpoint)
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
        _check_owl({leaf: structure for leaf, structure in structures.items() if leaf.number not in own}, task)
        dense = (layer for layer in _bar(calibration.run(task.name, False), weights, task, progress, "outliers"))
        outlying = (layer for layer in dense if layer.use.leaf.number not in own)
        sparsities |= outliers.sparsities(outlying, outliers.blocks(task.paths, weights.turns), sparsity or 0.0)
        weights, calibration = task.calibration(set(targets))

    def describe() -> dict[str, Any]:
        return {
            "algorithm": algorithm,
            "sparsities": {task.name(leaf): float(share) for leaf, share in sparsities.items()},
            "structures": {task.name(leaf): str(structure) for leaf, structure in structures.items()},
            "damping": damping,
            "block_size": block_size,
            "forward": calibration.fingerprint(),
            "params": files.checksum(task.arrays),
            "batches": files.checksum(task.batches),
        }

    done = files.Finished(checkpoint, describe)
    solve = _Solve(algorithm, sparsities, structures, damping, block_size, task.name)
    masks: dict[Leaf, Any] = {}
    layers = _layers(calibration, task, algorithm, lambda use: use.part in done)
    for layer in _bar(layers, weights, task, progress, algorithm):
        use = layer.use
        if use.part in done:
            changed, kept = done.read(use.part)
        else:
            changed, kept = solve(layer, weights)
            done.write(use.part, changed, kept)
        writing.write(calibration.leaves, weights, masks, use, changed, kept)
    return writing.assembled(task, calibration.leaves, masks)


def _check_options(algorithm: str, dist_type: str, damping: float, block_size: int) -> None:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: {algorithm!r} is not known; one-shot pruning has {', '.join(ALGORITHMS)}.")
    if dist_type not in DISTRIBUTIONS:
        raise ValueError(f"dist_type: {dist_type!r} is not known; use one of {', '.join(DISTRIBUTIONS)}.")
    if not damping > 0:
        raise ValueError(f"damping: {damping!r} is not above 0; it is a share of the Hessian's mean diagonal.")
    if block_size < 1:
        raise ValueError(f"block_size: {block_size!r} is not 1 or more.")


def _check_options_of_units(dist_type: str, checkpoint: Any) -> None:
    if dist_type == "owl":
        raise ValueError(
            "dist_type: 'owl' spreads sparsities of weights over blocks, and groups are of units; use 'uniform', "
            "'erk', or 'global', where units of all groups compete."
        )
    if checkpoint is not None:
        raise ValueError(
            "checkpoint: units leave at the end of one dense pass, so that no layer is finished before; leave it out."
        )


def _check_owl(structures: Mapping[Leaf, sparsity_types.SparsityType], task: Task) -> None:
    for leaf, structure in structures.items():
        if isinstance(structure, sparsity_types.NByM):
            raise ValueError(
                f"{task.name(leaf)}: {structure.n}:{structure.m} has one sparsity, which dist_type='owl' cannot "
                "change; use 'uniform', or another sparsity_type."
            )


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
    asked = dict(trees.named_leaves(updater.chosen_sparsities(task.layers())))
    targets = {i: float(asked[path]) for i, path in enumerate(task.paths) if asked.get(path) and task.arrays[i].size}
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
    sparsity_types.check_patterns(updater.sparsity_type, [task.paths[number] for number in targets])
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

    def __call__(self, layer: Layer, weights: Weights) -> tuple[Any | None, Any]:
        """The matrices of a layer that is pruned, None if no weight changed, and which of their entries stay."""
        leaf, matrices = layer.use.leaf, layer.weights.astype(wide_dtype())
        sparsity, structure = self.sparsities[leaf], self.structures[leaf]
        keep = solvers.keep_count(structure, matrices.shape, sparsity)
        if self.algorithm == "sparsegpt":
            return self._least_squares(matrices, layer, structure, keep)
        score = _SCORES[self.algorithm]
        if isinstance(structure, _OF_MATRICES):
            number = counts.from_int(keep)
            kept = solvers.mask(matrices, layer.statistics, number, score=score, structure=structure)
        else:
            kept = self._mask(score(matrices, layer.statistics), structure, sparsity, layer.use, weights)
        return None, kept

    def _least_squares(self, matrices: Any, layer: Layer, structure: Any, keep: int) -> tuple[Any, Any]:
        number, name = len(matrices), self.name(layer.use.leaf)
        each = [keep] * number
        if isinstance(structure, sparsity_types.Unstructured):  # as even, and exact over all of them
            until = [round(keep * i / number) for i in range(number + 1)]
            each = [after - before for before, after in itertools.pairwise(until)]
        solved = [
            solvers.sparsegpt(w, gram, structure, own, name, self.damping, self.block_size)
            for w, gram, own in zip(matrices, layer.statistics.gram, each, strict=True)
        ]
        changed, kept = zip(*solved, strict=True)
        return jnp.stack(changed), jnp.stack(kept)

    def _mask(self, scores: Any, structure: Any, sparsity: float, use: Use, weights: Weights) -> Any:
        """Of a structure that is of the parameter, in its own layout."""
        placed, where = weights.put_back(use, use.operand(scores))
        if not bool(where.all()):
            raise ValueError(
                f"{self.name(use.leaf)}: {structure} needs a parameter that is multiplied with as a whole."
            )
        mask = structure.mask(placed, sparsity)
        return use.of_leaf(weights.moved(use, mask.astype(scores.dtype))) != 0


def _tell_of_dense(task: Task, weights: Weights) -> None:
    if lines := task.dense_lines(weights):
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        text = "; ".join(lines[:8]) + more
        warnings.warn(f"prune_oneshot: {len(lines)} parameters stay dense: {text}.", stacklevel=3)
    if weights.partial:
        names = ", ".join(map(task.name, weights.partial[:8])) + (", ..." if len(weights.partial) > 8 else "")
        warnings.warn(f"prune_oneshot: entries that no product takes stay dense in {names}.", stacklevel=3)


def _bar(layers: Iterator[Layer], weights: Weights, task: Task, progress: bool, title: str) -> Iterator[Layer]:
    """The layers, with a bar that names the current one."""
    number = len({use.part for use in weights.uses})
    with tqdm(total=number, desc=title, unit="layer", disable=not progress) as bar:
        for layer in layers:
            bar.set_postfix_str(task.name(layer.use.leaf))
            yield layer
            bar.update()


def _layers(
    calibration: Calibration, task: Task, algorithm: str, skips: Callable[[Use], bool] = lambda use: False
) -> Iterator[Layer]:
    if algorithm == "magnitude":
        return calibration.without_data()
    return calibration.run(task.name, algorithm == "sparsegpt", skips)


def _prune_units(task: Task, algorithm: str, updater: BaseUpdater, progress: bool) -> tuple[Any, Any]:
    products = {i for i, array in enumerate(task.arrays) if array.ndim > 1 and trees.is_floating(array)}
    weights, calibration = task.calibration(products)
    layers = _bar(_layers(calibration, task, algorithm), weights, task, progress, algorithm)
    params = task.arrays_only(task.arrays)
    pruned, masks = units.prune(algorithm, updater, params, task.paths, weights, calibration.leaves, layers)
    return writing.as_given(task, pruned, masks)
