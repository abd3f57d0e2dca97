"""The optax transformations: they step an inner optimizer and keep parameters on their masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from jaxpruner import mask_storage, trees
from jaxpruner.training import projection
from jaxpruner.training.optimizer_state import reset_moments
from jaxpruner.training.projection import StraightThroughState, apply_mask, begin_step

if TYPE_CHECKING:
    from jaxpruner.base_updater import BaseUpdater


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

        return trees.map_pruned(enforce, updates, masks, before, params, otherwise=projection.same), state

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
        return projection.with_weights(tracked.init(params), params)

    def update_fn(updates, state, params=None, **extra_args):
        _require_params(params)
        before = mask_storage.decode_tree(updater.storage, state.masks, params)
        weights = projection.dense_weights(params, state, before)
        updates, state = tracked.update(
            updates, state._replace(inner_state=state.inner_state.inner_state), weights, **extra_args
        )
        after = mask_storage.decode_tree(updater.storage, state.masks, params)
        stepped = optax.apply_updates(weights, updates)

        def show(u, now, was, w, p):
            # A kept weight moves by its own update, which is exact; one that comes back was 0.
            return jnp.where(now, jnp.where(was, u, w), -p)

        updates = trees.map_pruned(show, updates, after, before, stepped, params, otherwise=projection.same)
        hidden = StraightThroughState(projection.pruned_only(stepped, state.masks), state.inner_state)
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
            return reset_moments(inner, inner_state, apply_mask(step.params, step.masks), regrown)

        def skip():
            update_shapes, state_shapes = jax.eval_shape(take)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), update_shapes)
            # Some optimizers widen their statistics in the first step they take.
            kept = jax.tree.map(
                lambda old, s: old if old.dtype == s.dtype else old.astype(s.dtype),
                renew() if updater.regrows else inner_state,
                state_shapes,
            )
            return zeros, kept

        if updater.skip_gradients:
            updates, inner_state = projection.when(step.is_mask_update, skip, take)
        else:
            if updater.regrows:
                inner_state = projection.when(step.is_mask_update, renew, lambda: state.inner_state)
            updates, inner_state = take()
        return updates, step.state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_params(params: Any) -> None:
    if params is None:
        raise ValueError(
            "update: a sparse transformation needs the parameters, because it moves pruned ones to "
            "zero; call tx.update(updates, state, params)."
        )
