"""The optax transformations: they step an inner optimizer and keep parameters on their masks.

Their functions are objects that compare by their optimizer and algorithm. So `jax.jit` takes a transformation that was
made again for the one from before.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from jaxpruner import layouts, mask_storage, trees
from jaxpruner.training import projection
from jaxpruner.training.optimizer_state import reset_moments
from jaxpruner.training.projection import StraightThroughState, apply_mask, begin_step

if TYPE_CHECKING:
    from jaxpruner.training.protocol import Algorithm


def mask_params(inner: optax.GradientTransformation, updater: Algorithm) -> optax.GradientTransformationExtraArgs:
    r"""Keeps parameters exactly on their masks.

    With :math:`u` the update of `inner`, the update is :math:`u` where the mask keeps a weight and
    :math:`-p` where it prunes it, so that `optax.apply_updates` gives 0 there and bitwise the
    inner optimizer's result elsewhere.
    """
    return optax.GradientTransformationExtraArgs(_Init(inner, updater), _MaskedUpdate(inner, updater))


def straight_through(inner: optax.GradientTransformation, updater: Algorithm) -> optax.GradientTransformationExtraArgs:
    """Shows the masked projection of dense weights that it keeps and steps in its state.

    The gradient at the projection moves the dense weights (Bengio et al., 2013), so pruned weights
    can come back. The dense weights are read from the parameters at count 0, since frameworks
    restore checkpoints after `init`.
    """
    return optax.GradientTransformationExtraArgs(_HiddenInit(inner, updater), _StraightThroughUpdate(inner, updater))


def track_masks(inner: optax.GradientTransformation, updater: Algorithm) -> optax.GradientTransformationExtraArgs:
    """Makes masks on schedule and steps the inner optimizer; enforces nothing."""
    return optax.GradientTransformationExtraArgs(_Init(inner, updater), _TrackedUpdate(inner, updater))


@dataclasses.dataclass(frozen=True)
class _Parts:
    inner: optax.GradientTransformation
    updater: Algorithm

    def __post_init__(self) -> None:
        if not (hasattr(self.inner, "init") and hasattr(self.inner, "update")):
            raise ValueError(
                f"inner: {self.inner!r} is no optax optimizer (it has no `init` and `update`); call it, such as "
                "sparsify(optax.sgd(0.1), ...)."
            )

    def masks(self, state: projection.SparseState, params: Any) -> Any:
        return mask_storage.decode_tree(self.updater.storage, state.masks, params)


class _Init(_Parts):
    def __call__(self, params: Any) -> projection.SparseState:
        params = trees.numbers_only(params)
        inner_state = self.inner.init(params)
        self.updater.check_inner_state(inner_state, params)
        return self.updater.init_state(params)._replace(inner_state=inner_state)


class _HiddenInit(_Init):
    def __call__(self, params: Any) -> projection.SparseState:
        params = trees.numbers_only(params)
        return projection.with_weights(super().__call__(params), params)


class _TrackedUpdate(_Parts):
    def __call__(self, updates: Any, state: projection.SparseState, params: Any = None, **extra_args: Any) -> Any:
        return self.stepped(updates, state, params, **extra_args)[:2]

    def stepped(self, updates: Any, state: projection.SparseState, params: Any = None, **extra_args: Any) -> Any:
        """The inner optimizer's updates, the new state, and the boolean masks that were in force before."""
        _require_params(params)
        step = begin_step(self.updater, params, updates, state, **extra_args)
        inner, updater = optax.with_extra_args_support(self.inner), self.updater
        inner_state = state.inner_state

        # Traced once for both branches of a mask update. (Anew in each step: an optimizer may read what has changed.)
        update = inner.update
        if updater.skip_gradients and not extra_args and isinstance(step.is_mask_update, jax.core.Tracer):
            update = jax.jit(lambda *arguments: inner.update(*arguments), inline=True)

        def take():
            return update(step.grads, inner_state, step.params, **extra_args)

        def renew():
            regrown = renewed(updater, step)
            return reset_moments(inner, inner_state, apply_mask(step.params, step.masks), regrown)

        def skip():
            kept = renew() if updater.regrows else inner_state
            if not isinstance(step.is_mask_update, jax.core.Tracer):
                return jax.tree.map(jnp.zeros_like, step.grads), kept
            # Both branches give the same dtypes. Some optimizers widen their statistics in the first step they take.
            update_shapes, state_shapes = jax.eval_shape(take)
            zeros = jax.tree.map(lambda s: layouts.laid_out_like(s, jnp.zeros(s.shape, s.dtype)), update_shapes)
            return zeros, jax.tree.map(
                lambda old, s: old if old.dtype == s.dtype else old.astype(s.dtype), kept, state_shapes
            )

        if updater.skip_gradients:
            updates, inner_state = projection.when(step.is_mask_update, skip, take)
        else:
            if updater.regrows:
                inner_state = projection.when(step.is_mask_update, renew, lambda: state.inner_state)
            updates, inner_state = take()
        state = step.state
        if step.remask is not None:
            state = step.remask(state, optax.apply_updates(step.params, updates))
        return updates, state._replace(inner_state=inner_state), step.previous_masks


def renewed(updater: Algorithm, step: projection.Step) -> Any:
    """Boolean masks of the weights whose optimizer statistics a mask update starts anew, None where it starts none."""
    if updater.renews_all:
        return jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), step.params)
    return trees.map_pruned(
        lambda now, mask, was: projection.is_new(mask, was), step.masks, step.masks, step.previous_masks
    )


class _MaskedUpdate(_TrackedUpdate):
    def __call__(self, updates: Any, state: projection.SparseState, params: Any = None, **extra_args: Any) -> Any:
        _require_params(params)
        params = trees.numbers_only(params)
        # Before the first step they are not those of the state, but those that parameters show, if asked for.
        updates, state, before = self.stepped(updates, state, params, **extra_args)
        enforce = functools.partial(_enforced, self.updater.storage, self.updater.regrows)
        return trees.map_pruned(enforce, updates, state.masks, before, params, otherwise=projection.same), state


class _StraightThroughUpdate(_TrackedUpdate):
    def __call__(self, updates: Any, state: projection.SparseState, params: Any = None, **extra_args: Any) -> Any:
        _require_params(params)
        params = trees.numbers_only(params)
        if not isinstance(state.inner_state, StraightThroughState):
            raise ValueError(
                f"opt_state: holds no dense weights, which {type(self.updater).__name__} trains; it is the state of "
                "another algorithm. Make one with tx.init(params), or go on with the algorithm that it was made by."
            )
        before = self.masks(state, params)
        weights = projection.dense_weights(params, state, before)
        updates, state = super().__call__(
            updates, state._replace(inner_state=state.inner_state.inner_state), weights, **extra_args
        )
        after = self.masks(state, params)
        stepped = optax.apply_updates(weights, updates)
        updates = trees.map_pruned(_shown, updates, after, before, stepped, params, otherwise=projection.same)
        hidden = StraightThroughState(projection.pruned_only(stepped, state.masks), state.inner_state)
        return updates, state._replace(inner_state=hidden)


# One program a leaf where they are called eagerly; inlined elsewhere.


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _enforced(storage: mask_storage.MaskStorage, regrows: bool, u: Any, now: Any, was: Any, p: Any) -> Any:
    now = storage.decode(now, jnp.shape(p))
    # A regrown weight steps from 0, wherever it was.
    kept = jnp.where(was, u, u - p) if regrows else u
    return jnp.where(now, kept, -p)


@functools.partial(jax.jit, inline=True)
def _shown(u: Any, now: Any, was: Any, w: Any, p: Any) -> Any:
    # A kept weight moves by its own update, which is exact; one that comes back was 0.
    return jnp.where(now, jnp.where(was, u, w), -p)


def _require_params(params: Any) -> None:
    if params is None:
        raise ValueError(
            "update: a sparse transformation needs the parameters, because it moves pruned ones to "
            "zero; call tx.update(updates, state, params)."
        )
