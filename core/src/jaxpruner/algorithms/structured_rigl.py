"""RigL with the same number of inputs for each output."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpruner import selection, sparsity_types, trees
from jaxpruner.algorithms.sparse_trainers import RigL
from jaxpruner.selection import counts
from jaxpruner.selection.score_reading import as_array, where_finite


@dataclasses.dataclass(eq=False)
class SRigL(RigL):
    r"""RigL with a constant fan-in that removes idle neurons (Lasby et al., 2024).

    Let :math:`c_o` be the number of inputs that RigL would give an output :math:`o` of the layer, and :math:`k` its
    number now. Outputs with :math:`c_o < \gamma k` lose all inputs for good (but one output always stays). Each of the
    :math:`n` remaining outputs has

    .. math:: k' = \min(\mathrm{inputs}, \lfloor k_0 \, \mathrm{outputs} / n \rfloor)

    inputs, with :math:`k_0` their number at the start: first those that RigL keeps, then those with the largest `|g|`.
    Because of rounding, the leaf may have up to :math:`n - 1` weights fewer than at the start.

    Attributes:
      sparsity_type: `PerOutput`, for all leaves, or one for each.
      min_share: the :math:`\gamma` above, the paper's 0.3 by default; 0 keeps all neurons.

    Raises:
      ValueError: for another structure, and a share outside [0, 1].
    """

    sparsity_type: Any = sparsity_types.PerOutput()
    min_share: float = 0.3

    keeps_count = False  # a removed neuron's inputs may find no place in the others

    def __post_init__(self) -> None:
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share: {self.min_share!r} is outside [0, 1]; it is a share of a neuron's inputs.")

    def get_target_sparsities(self, params: Any) -> Any:
        targets = super().get_target_sparsities(params)
        for path, param in trees.named_leaves(trees.map_pruned(lambda p, _: p, params, targets)):
            structure = self.structure(path, param).of_layer
            if not isinstance(structure, sparsity_types.PerOutput):
                raise ValueError(
                    f"{trees.leaf_name(path)}: cannot use SRigL with {structure}. This is because it gives each output "
                    "the same number of inputs; leave sparsity_type out, give 'per_output', or use rigl."
                )
        return targets

    def regrown(
        self, structure: Any, mask: Any, drop: Any, grow: Any, fraction: Any, target: Any
    ) -> selection.Choosing:
        """The new mask of a leaf: RigL's, then evened out over the neurons that are not idle."""
        is_stack = isinstance(structure, sparsity_types.Stacked)
        free: Any = sparsity_types.Unstructured()
        free = sparsity_types.Stacked(free, structure.axis) if is_stack else free
        chosen = yield from sparsity_types.regrowing(free, mask, drop, grow, fraction)
        even = functools.partial(_evened, structure.of_layer, target=target, min_share=self.min_share)
        if is_stack:
            even = jax.vmap(even, structure.axis, structure.axis)
        return where_finite(as_array(grow), even(mask, chosen, as_array(grow)), mask)


def _evened(
    structure: sparsity_types.PerOutput, mask: Any, chosen: Any, grow: Any, *, target: Any, min_share: float
) -> Any:
    axes = sparsity_types.as_axes(structure.axis, mask.shape)
    front = tuple(range(len(axes)))
    first = jnp.moveaxis(mask, axes, front).shape
    inputs = math.prod(first[: len(axes)])

    def rows(x):
        return jnp.moveaxis(x, axes, front).reshape(inputs, -1)

    active, chosen = rows(mask), rows(chosen)
    was, found = active.any(0), chosen.sum(0, dtype=jnp.int32)
    found = jnp.where(was, found, -1)
    stays = was & ((found >= min_share * active.sum(0, dtype=jnp.int32).max()) | (found == found.max()))
    at_start = counts.keep_count(inputs, target).lo.astype(jnp.int32)
    number = counts.shared(at_start, active.shape[1], jnp.maximum(stays.sum(dtype=jnp.int32), 1), most=inputs)
    ranked = jnp.where(active & chosen, jnp.inf, rows(grow))
    new = selection.highest_of_each(ranked, number) & stays[None]
    return jnp.moveaxis(new.reshape(first), front, axes)
