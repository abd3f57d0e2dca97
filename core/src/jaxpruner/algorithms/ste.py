"""Straight-through estimators: the model runs with masked weights, the dense ones are trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxpruner import scores
from jaxpruner.algorithms.pruners import random_scores
from jaxpruner.base_updater import BaseUpdater, elementwise_scores
from jaxpruner.training import projection, transformation


@dataclasses.dataclass(eq=False)
class _StraightThrough(BaseUpdater):
    """Gradients at the masked weights move the dense weights (Bengio et al., 2013).

    A mask is made in every step, from the weights as they are then, at the sparsity that the schedule has for that
    step: 0 before its first update; its period does not matter.

    With `wrap_optax` the parameters are the dense weights and the training loop runs the model with
    `pre_forward_update(params, opt_state)`. With `jaxpruner.sparsify` the dense weights live in the
    optimizer state and the parameters are their masked projection.
    """

    straight_through = True

    def sparsity_at(self, target, count):
        first = self.scheduler.start_step
        sparsity = super().sparsity_at(target, count)
        return jnp.where(count >= first, sparsity, 0.0) if first else sparsity

    def wrap_optax(self, inner):
        return transformation.track_masks(inner, self)

    def sparsify_optax(self, inner):
        return transformation.straight_through(inner, self)

    def pre_forward_update(self, params: Any, opt_state: Any) -> Any:
        """The masked parameters, for the forward pass."""
        state = projection.remasked(self, None, {}, projection.find_state(opt_state), params)
        return self.apply_masks(params, self.current_masks(state, params))

    def post_gradient_update(self, params: Any, sparse_state: Any) -> Any:
        """The parameters as they are: dense weights stay dense."""
        del sparse_state
        return params


@dataclasses.dataclass(eq=False)
class SteMagnitudePruning(_StraightThrough):
    """Masks the smallest `|w|` of the dense weights."""

    calculate_scores = elementwise_scores(scores.magnitude)


@dataclasses.dataclass(eq=False)
class SteRandomPruning(_StraightThrough):
    """Masks random weights, drawn anew in each step."""

    def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
        del grads, kwargs
        return random_scores(self, params, -1 if sparse_state is None else sparse_state.count)
