"""The optax transformations: they own the sparse state and keep parameters on their masks.

One step goes one way: masks (where the schedule asks) -> gradients -> inner optimizer -> masks
enforced -> count + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    return _with_weights(state, params) if updater.straight_through else state


def begin_step(updater: BaseUpdater, params: Any, grads: Any, state: SparseState, **extra_args) -> Step:
    """Makes masks if the schedule asks for them, and masks the gradients if the updater does."""
    if isinstance(state.inner_state, StraightThroughState):
        params = _dense_weights(params, state, mask_storage.decode_tree(updater.storage, state.masks, params))
    due = updater.scheduler.should_update_mask(state.count)
    stored = _when(
        due,
        lambda: trees.to_state(updater.update_state(state, params, grads, **extra_args).masks),
        lambda: state.masks,
    )
    masks = mask_storage.decode_tree(updater.storage, stored, params)
    previous_masks = mask_storage.decode_tree(updater.storage, state.masks, params)
    if updater.regrows:
        # Regrown weights start at 0. They are 0 already, except before the first step, when parameters are dense.
        params = trees.map_pruned(
            lambda p, now, was: jnp.where(now & ~was, 0, p), params, masks, previous_masks, otherwise=_same
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
        weights = _pruned_only(proposed, step.masks)
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
        proposed = _when(step.is_mask_update, lambda: step.params, lambda: proposed)
    return end_step(step, proposed)


def mask_params(inner: optax.GradientTransformation, updater: BaseUpdater) -> optax.GradientTransformationExtraArgs:
    r"""Keeps parameters exactly on their masks.

    With :math:`u` the update of `inner`, the update is :math:`u` where the mask keeps a weight and
    :math:`-p` where it prunes it, so that `optax.apply_updates` gives 0 there and bitwise the
    inner optimizer's result elsewhere.
    """
    tracked = track_masks(inner, updater)

    def update_fn(updates, state, params=None, **extra_args):
        _require_params(params)
        before = mask_storage.decode_tree(updater.storage, state.masks, params)
        updates, state = tracked.update(updates, state, params, **extra_args)
        masks = mask_storage.decode_tree(updater.storage, state.masks, params)

        def enforce(u, now, was, p):
            # A regrown weight steps from 0, wherever it was.
            kept = jnp.where(was, u, u - p) if updater.regrows else u
            return jnp.where(now, kept, -p)

        return trees.map_pruned(enforce, updates, masks, before, params, otherwise=_same), state

    return optax.GradientTransformationExtraArgs(tracked.init, update_fn)


def straight_through(
    inner: optax.GradientTransformation, updater: BaseUpdater
) -> optax.GradientTransformationExtraArgs:
    """Shows the masked projection of dense weights that it keeps and steps in its state.

    The gradient at the projection moves the dense weights (Bengio et al., 2013), so pruned weights
    can come back. The dense weights are read from the parameters at count 0, since frameworks
    restore checkpoints after `init`.
    """
    tracked = track_masks(inner, updater)

    def init_fn(params):
        return _with_weights(tracked.init(params), params)

    def update_fn(updates, state, params=None, **extra_args):
        _require_params(params)
        before = mask_storage.decode_tree(updater.storage, state.masks, params)
        weights = _dense_weights(params, state, before)
        updates, state = tracked.update(
            updates, state._replace(inner_state=state.inner_state.inner_state), weights, **extra_args
        )
        after = mask_storage.decode_tree(updater.storage, state.masks, params)
        stepped = optax.apply_updates(weights, updates)

        def show(u, now, was, w, p):
            # A kept weight moves by its own update, which is exact; one that comes back was 0.
            return jnp.where(now, jnp.where(was, u, w), -p)

        updates = trees.map_pruned(show, updates, after, before, stepped, params, otherwise=_same)
        hidden = StraightThroughState(_pruned_only(stepped, state.masks), state.inner_state)
        return updates, state._replace(inner_state=hidden)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def track_masks(inner: optax.GradientTransformation, updater: BaseUpdater) -> optax.GradientTransformationExtraArgs:
    """Makes masks on schedule and steps the inner optimizer; enforces nothing."""

    def init_fn(params):
        return updater.init_state(params)._replace(inner_state=inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        _require_params(params)
        step = begin_step(updater, params, updates, state, **extra_args)
        inner_state = state.inner_state

        def take():
            return inner.update(step.grads, inner_state, step.params)

        def renew():
            regrown = trees.map_pruned(lambda now, mask, was: mask & ~was, step.masks, step.masks, step.previous_masks)
            return reset_moments(inner, inner_state, apply_mask(params, step.masks), regrown)

        def skip():
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(take)[0])
            return zeros, renew() if updater.regrows else inner_state

        if updater.skip_gradients:
            updates, inner_state = _when(step.is_mask_update, skip, take)
        else:
            if updater.regrows:
                inner_state = _when(step.is_mask_update, renew, lambda: state.inner_state)
            updates, inner_state = take()
        return updates, step.state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def apply_mask(params: Any, masks: Any, is_packed: bool = False) -> Any:
    """`params` with zeros where `masks` prunes; a leaf whose mask is None is returned as it is.

    Args:
      params: a tree of arrays, or one array.
      masks: its masks, boolean or 0 and 1.
      is_packed: whether the masks are packed, one bit a weight.
    """
    storage = mask_storage.PackedStorage() if is_packed else mask_storage.DenseStorage()
    masks = mask_storage.decode_tree(storage, masks, params)
    return trees.map_pruned(lambda p, mask: jnp.where(mask, p, 0), params, masks, otherwise=_same)


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


def reset_moments(inner: optax.GradientTransformation, inner_state: Any, params: Any, regrown: Any) -> Any:
    """Gives regrown weights the optimizer statistics that a new weight would have.

    Factored statistics have none for a single weight and stay.

    Args:
      inner: the optimizer.
      inner_state: its state.
      params: the parameters, on their masks.
      regrown: boolean masks of the regrown weights, None where a leaf is not pruned.

    Returns:
      The state, with what `inner.init(params)` gives at the regrown weights.
    """
    grown = {trees.leaf_name(path): mask for path, mask in trees.named_leaves(regrown)}

    def reset(old, fresh, owner):
        mask = None if trees.is_unpruned(old) else grown.get(owner)
        return old if mask is None or jnp.shape(old) != mask.shape else jnp.where(mask, fresh, old)

    owners = _statistics_owners(inner, inner_state, params)
    return jax.tree.map(reset, inner_state, inner.init(params), owners, is_leaf=trees.is_unpruned)


def _statistics_owners(inner: optax.GradientTransformation, inner_state: Any, params: Any) -> Any:
    """A tree like the state: the name of the parameter that a leaf belongs to, or an empty string."""
    names = trees.map_named(lambda path, _: trees.leaf_name(path), params)
    try:
        return optax.tree_utils.tree_map_params(
            inner, lambda _, name: name, inner_state, names, transform_non_params=lambda _: ""
        )
    except Exception:
        # It runs `init` on placeholders, which fails in unforeseeable ways: multi_transform, muon, sm3 and lbfgs
        # are known. Their statistics are the leaves whose key path ends in the parameter's.
        known = set(jax.tree.leaves(names))

        def owner(path, _):
            return next((name for i in range(len(path)) if (name := trees.leaf_name(path[i:])) in known), "")

        return trees.map_named(owner, inner_state)


def _dense_weights(params: Any, state: SparseState, masks: Any) -> Any:
    # A kept weight is read from the parameters: XLA may have rounded the hidden one's update otherwise.
    return trees.map_pruned(
        lambda p, w, mask: jnp.where((state.count == 0) | mask, p, w),
        params,
        state.inner_state.weights,
        masks,
        otherwise=_same,
    )


def _with_weights(state: SparseState, params: Any) -> SparseState:
    # A copy, since hosts donate the parameters and the state together.
    weights = jax.tree.map(jnp.copy, _pruned_only(params, state.masks))
    return state._replace(inner_state=StraightThroughState(weights, state.inner_state))


def _pruned_only(params: Any, masks: Any) -> Any:
    return trees.to_state(trees.map_pruned(lambda p, _: p, params, masks))


def _require_params(params: Any) -> None:
    if params is None:
        raise ValueError(
            "update: a sparse transformation needs the parameters, because it moves pruned ones to "
            "zero; call tx.update(updates, state, params)."
        )


def _when(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`lax.cond`, decided at once where the schedule is static."""
    if isinstance(predicate, bool):
        return then() if predicate else otherwise()
    return jax.lax.cond(predicate, then, otherwise)


def _same(leaf: Any) -> Any:
    return leaf
