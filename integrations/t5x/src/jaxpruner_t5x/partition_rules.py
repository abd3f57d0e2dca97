"""How the states of sparse and factored optax transformations are spread over devices, for T5X's partitioner."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from t5x.optimizers import OptaxStatePartitionRules

from jaxpruner import RememberingState, SparseState, StraightThroughState, trees
from jaxpruner.training import optimizer_state
from jaxpruner.training.projection import with_statistics

# T5X asks for axes before it knows the mesh. The bytes of a packed mask are spread over devices if they divide over
# 2, 4, 8 or 16 of them, the usual numbers for a model's axes; otherwise the axis is whole on every device.
_DEALT = 16


def register_partition_rules() -> None:
    """Adds rules for JaxPruner's states and for `optax.FactoredState`, so that `OptaxWrapper` takes them too."""
    for state, rule in (
        (SparseState, sparse_state_axes),
        (RememberingState, sparse_state_axes),
        (StraightThroughState, straight_through_axes),
        (optax.FactoredState, factored_state_axes),
    ):
        OptaxStatePartitionRules._RULES.setdefault(state, rule)


def sparse_state_axes(state: SparseState, params_axes: Any) -> SparseState:
    """Masks and statistics take the axes of their parameters; counts and targets are everywhere."""
    axes = SparseState(
        masks=jax.tree.map(_mask_axes, params_axes, state.masks),
        inner_state=OptaxStatePartitionRules.derive_optax_logical_axes(state.inner_state, params_axes),
        # Not None, for which T5X casts what it restores to the dtype of parameters.
        target_sparsities=jax.tree.map(lambda _: PartitionSpec(), state.target_sparsities),
        count=PartitionSpec(),
    )
    return with_statistics(axes, _statistics_axes(state.statistics, params_axes))


def straight_through_axes(state: StraightThroughState, params_axes: Any) -> StraightThroughState:
    """The hidden dense weights take the axes of the parameters that show their projection."""
    return StraightThroughState(
        weights=OptaxStatePartitionRules.derive_params_axes(state.weights, params_axes),
        inner_state=OptaxStatePartitionRules.derive_optax_logical_axes(state.inner_state, params_axes),
    )


def factored_state_axes(state: optax.FactoredState, params_axes: Any) -> optax.FactoredState:
    """As in T5X's own Adafactor: row and column statistics are everywhere, unfactored ones like their parameters."""
    return optax.FactoredState(
        count=None,
        v_row=_everywhere(state.v_row),
        v_col=_everywhere(state.v_col),
        v=jax.tree.map(_unfactored_axes, params_axes, state.v),
    )


def _unfactored_axes(axes: PartitionSpec, statistics: Any) -> Any:
    if isinstance(statistics, optax.MaskedNode):
        return statistics
    return None if statistics.shape == (1,) else axes


def _mask_axes(axes: PartitionSpec, mask: Any) -> Any:
    if isinstance(mask, optax.MaskedNode):
        return mask
    if mask.dtype == jnp.bool_:
        return axes
    if len(mask.shape) != len(axes):  # of groups, a bit an entry of each axis
        return PartitionSpec(*(None for _ in mask.shape))
    return PartitionSpec(*(None if size % _DEALT else axis for axis, size in zip(axes, mask.shape, strict=True)))


def _statistics_axes(statistics: Any, params_axes: Any) -> Any:
    """The axes of the parameter whose path a leaf's own path ends with: statistics may be several trees."""
    axes = dict(trees.named_leaves(params_axes))

    def place(path: trees.KeyPath, leaf: Any) -> Any:
        return leaf if trees.is_unpruned(leaf) else axes.get(optimizer_state.owner_of(path, axes) or ())

    return None if statistics is None else trees.map_named(place, statistics)


def _everywhere(tree: Any) -> Any:
    return jax.tree.map(lambda _: None, tree)
