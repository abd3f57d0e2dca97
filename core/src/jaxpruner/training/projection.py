"""One sparse step without any optimizer library, and the states that sparse training keeps.

One step goes one way: masks (where the schedule asks) -> gradients -> inner optimizer -> masks
enforced -> count + 1. `begin_step` and `end_step` are what comes before and after the inner optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpruner import mask_storage, trees

if TYPE_CHECKING:
    from jaxpruner.base_updater import BaseUpdater


class SparseState(NamedTuple):
    """State of a sparse transformation.

    Attributes:
      masks: a tree like the parameters: a mask, or MaskedNode where the leaf is not pruned.
      inner_state: the state of the wrapped optimizer.
      target_sparsities: the final sparsity of each leaf, float32 scalars.
      count: the number of updates seen, int32.
    """

    masks: Any
    inner_state: Any = None
    target_sparsities: Any = None
    count: Any = None


class StraightThroughState(NamedTuple):
    """Inner state of a straight-through transformation that shows sparse parameters.

    Attributes:
      weights: the dense weights of the pruned leaves, MaskedNode elsewhere.
      inner_state: the state of the wrapped optimizer.
    """

    weights: Any
    inner_state: Any = None


class Step(NamedTuple):
    """One step between the making of its masks and their enforcement.

    Attributes:
      params: the parameters that the inner optimizer steps from (dense weights if straight-through).
      grads: the gradients that it steps with.
      masks: boolean masks in force from now on, None where a leaf is not pruned.
      previous_masks: those in force before.
      is_mask_update: whether masks were made in this step.
      state: the sparse state with the new masks and count, its inner state as it was.
    """

    params: Any
    grads: Any
    masks: Any
    previous_masks: Any
    is_mask_update: Any
    state: SparseState


def init_projection(updater: BaseUpdater, params: Any) -> SparseState:
    """The state for `project`, or for `begin_step` and `end_step`, at count 0."""
    state = updater.init_state(params)
    return with_weights(state, params) if updater.straight_through else state


def begin_step(updater: BaseUpdater, params: Any, grads: Any, state: SparseState, **extra_args) -> Step:
    """Makes masks if the schedule asks for them, and masks the gradients if the updater does."""
    if isinstance(state.inner_state, StraightThroughState):
        params = dense_weights(params, state, mask_storage.decode_tree(updater.storage, state.masks, params))
    due = updater.scheduler.should_update_mask(state.count)
    stored = when(
        due,
        lambda: _laid_out_as(
            state.masks, trees.to_state(updater.update_state(state, params, grads, **extra_args).masks)
        ),
        lambda: state.masks,
    )
    masks = mask_storage.decode_tree(updater.storage, stored, params)
    previous_masks = mask_storage.decode_tree(updater.storage, state.masks, params)
    if updater.regrows:
        # Regrown weights start at 0. They are 0 already, except before the first step, when parameters are dense.
        params = trees.map_pruned(
            lambda p, now, was: jnp.where(now & ~was, 0, p), params, masks, previous_masks, otherwise=same
        )
    return Step(
        params=params,
        grads=apply_mask(grads, masks) if updater.is_sparse_gradients else grads,
        masks=masks,
        previous_masks=previous_masks,
        is_mask_update=due,
        state=state._replace(masks=stored, count=state.count + 1),
    )


def end_step(step: Step, proposed: Any) -> tuple[Any, SparseState]:
    """The masked projection of the parameters that an inner optimizer proposes, and the state."""
    state = step.state
    if isinstance(state.inner_state, StraightThroughState):
        weights = pruned_only(proposed, step.masks)
        state = state._replace(inner_state=state.inner_state._replace(weights=weights))
    return apply_mask(proposed, step.masks), state


def project(
    updater: BaseUpdater, params: Any, proposed: Any, grads: Any, state: SparseState, **extra_args
) -> tuple[Any, SparseState]:
    """One sparse step for optimizers that are not optax transformations.

    `proposed` is what any optimizer makes of `params`; the result lies on the masks. An optimizer
    that should see masked gradients, or step from straight-through weights, is called between
    `begin_step` and `end_step` instead.

    Args:
      updater: the algorithm.
      params: parameters before the step.
      proposed: parameters that the optimizer proposes.
      grads: gradients at `params`, for the algorithms that score with them.
      state: from `init_projection(updater, params)`.
      **extra_args: handed to `calculate_scores`.

    Returns:
      The new parameters and the new state.
    """
    if updater.straight_through and not isinstance(state.inner_state, StraightThroughState):
        raise ValueError(
            f"state: holds no dense weights, which {type(updater).__name__} trains; make it with "
            "jaxpruner.init_projection(updater, params)."
        )
    step = begin_step(updater, params, grads, state, **extra_args)
    if updater.skip_gradients:
        proposed = when(step.is_mask_update, lambda: step.params, lambda: proposed)
    return end_step(step, proposed)


def apply_mask(params: Any, masks: Any, is_packed: bool = False) -> Any:
    """`params` with zeros where `masks` prunes; a leaf whose mask is None is returned as it is.

    Args:
      params: a tree of arrays, or one array.
      masks: its masks, boolean or 0 and 1.
      is_packed: whether the masks are packed, one bit a weight.
    """
    storage = mask_storage.PackedStorage() if is_packed else mask_storage.DenseStorage()
    masks = mask_storage.decode_tree(storage, masks, params)
    return trees.map_pruned(lambda p, mask: jnp.where(mask, p, 0), params, masks, otherwise=same)


def find_state(opt_state: Any) -> SparseState:
    """The one `SparseState` inside an optimizer state, however it is wrapped.

    Raises:
      ValueError: if there is none, or more than one.
    """
    found = [
        node
        for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, SparseState))
        if isinstance(node, SparseState)
    ]
    if len(found) != 1:
        raise ValueError(f"opt_state: holds {len(found)} sparse states; pass the state of one sparse transformation.")
    return found[0]


def with_weights(state: SparseState, params: Any) -> SparseState:
    """The state at count 0 of a straight-through method that shows sparse parameters."""
    # A copy, since hosts donate the parameters and the state together.
    weights = jax.tree.map(jnp.copy, pruned_only(params, state.masks))
    return state._replace(inner_state=StraightThroughState(weights, state.inner_state))


def dense_weights(params: Any, state: SparseState, masks: Any) -> Any:
    """The dense parameters behind the masked ones, of a straight-through state."""
    # A kept weight is read from the parameters: XLA may have rounded the hidden one's update otherwise.
    return trees.map_pruned(
        lambda p, w, mask: jnp.where((state.count == 0) | mask, p, w),
        params,
        state.inner_state.weights,
        masks,
        otherwise=same,
    )


def pruned_only(params: Any, masks: Any) -> Any:
    """The parameters that are pruned, MaskedNode elsewhere."""
    return trees.to_state(trees.map_pruned(lambda p, _: p, params, masks))


def when(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`lax.cond`, decided at once where the schedule is static."""
    if isinstance(predicate, bool):
        return then() if predicate else otherwise()
    return jax.lax.cond(predicate, then, otherwise)


def _laid_out_as(old: Any, new: Any) -> Any:
    """The new masks in the layout of the old ones, where layouts are part of their types."""

    def move(x, y):
        layout = trees.explicit_layout(x)
        return y if layout is None or layout == trees.explicit_layout(y) else jax.sharding.reshard(y, layout)

    # Hooks may return trees of another shape, for others to complain about.
    return jax.tree.map(move, old, new) if jax.tree.structure(old) == jax.tree.structure(new) else new


def same(leaf: Any) -> Any:
    """What happens to a leaf that is not pruned."""
    return leaf
