"""Straight-through estimators: the model runs with masked weights, the dense ones are trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from jaxpruner import scores, sparsity_types, trees
from jaxpruner.algorithms.pruners import random_scores
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.elementwise import elementwise_scores
from jaxpruner.training import projection, transformation


@dataclasses.dataclass(eq=False)
class StraightThrough(BaseUpdater):
    """Gradients at the masked weights move the dense weights (Bengio et al., 2013).

    A mask is made in every step, from the current weights, at the sparsity that the schedule has for that step. This is
    0 before the schedule's first update; its period has no effect.

    With `wrap_optax` the parameters are the dense weights and the training loop runs the model with
    `pre_forward_update(params, opt_state)`. With `jaxpruner.sparsify` the dense weights live in the
    optimizer state and the parameters are their masked projection.
    """

    straight_through = True

    def sparsity_at(self, target: Any, count: Any) -> Any:
        first = self.scheduler.start_step
        sparsity = super().sparsity_at(target, count)
        return jnp.where(count >= first, sparsity, 0.0) if first else sparsity

    def wrap_optax(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        return transformation.track_masks(inner, self)

    def sparsify_optax(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
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
class SteMagnitudePruning(StraightThrough):
    """Masks the smallest `|w|` of the dense weights."""

    calculate_scores = elementwise_scores(scores.magnitude)


@dataclasses.dataclass(eq=False)
class SteRandomPruning(StraightThrough):
    """Masks random weights, drawn anew in each step."""

    def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
        del grads, kwargs
        return random_scores(self, params, -1 if sparse_state is None else sparse_state.count)


@dataclasses.dataclass(eq=False)
class SrSte(SteMagnitudePruning):
    r"""Straight-through training with decay of masked weights (Zhou et al., 2021), made for n:m from scratch.

    .. math:: \tilde g = g + \lambda \, (1 - m) \odot w

    is the gradient that the inner optimizer steps the dense weights with. So masked weights shrink and masks settle.

    Attributes:
      decay: the :math:`\lambda` above, the paper's 2e-4 by default; 0 is `magnitude_ste`.

    Raises:
      ValueError: for a negative decay.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        _check_decay(self.decay)

    def step_gradients(self, params: Any, grads: Any, masks: Any, sparse_state: Any) -> Any:
        grads = super().step_gradients(params, grads, masks, sparse_state)

        def decayed(g, mask, w):
            return jnp.where(mask, g, g + (self.decay * w).astype(g.dtype))

        return trees.map_pruned(decayed, grads, masks, params, otherwise=projection.same)


@dataclasses.dataclass(eq=False)
class TopKast(SteMagnitudePruning):
    r"""The model runs with the top k of the dense weights, and a larger set of them trains (Jayakumar et al., 2020).

    With :math:`A` the weights on the mask, a share :math:`D` of the leaf, and :math:`B` the largest :math:`D + M`,

    .. math:: \tilde g = \mathbb 1_B \odot (g + \lambda \, w \odot c), \qquad c = 1 \text{ in } A, \; 1 / D
        \text{ in } B \setminus A

    is the gradient that the inner optimizer steps with. Weights outside :math:`B` stay as they are, and weights that
    train but are not in use shrink faster. Two masks are made in every step; the second one is not stored.

    Attributes:
      extra_density: the :math:`M` above, the share of a leaf that trains besides the weights in use, in (0, 1].
      decay: the :math:`\lambda` above.

    Raises:
      ValueError: for an `extra_density` that explores nothing, a negative decay, and n:m, whose number of weights is
        fixed.
    """

    extra_density: float = 0.1
    decay: float = 1e-4

    def __post_init__(self) -> None:
        _check_decay(self.decay)
        if not 0 < self.extra_density <= 1:
            raise ValueError(
                f"extra_density: {self.extra_density!r} is outside (0, 1]; it is the share of the weights that trains "
                "beside those in use (without any, weights never come back)."
            )

    def get_target_sparsities(self, params: Any) -> Any:
        targets = super().get_target_sparsities(params)
        pruned = trees.map_pruned(lambda p, _: p, params, targets)
        for path, param in trees.named_leaves(pruned):
            if isinstance(self.structure(path, param).of_layer, sparsity_types.NByM):
                raise ValueError(
                    f"{trees.leaf_name(path)}: cannot use TopKast with n:m. This is because n:m has no larger set to "
                    "train beside what is in use; use sr_ste or magnitude_ste."
                )
        return targets

    def step_gradients(self, params: Any, grads: Any, masks: Any, sparse_state: Any) -> Any:
        targets = self._targets_at_hand(params, sparse_state)
        sparsities = self._sparsities_at(targets, sparse_state.count)
        wider = trees.map_pruned(lambda s, _: jnp.maximum(s - self.extra_density, 0.0), sparsities, sparsities)
        explored = self.create_masks(self._scores(params, sparse_state, grads), wider)

        def step(g, mask, more, sparsity, w):
            penalty = self.decay * w / jnp.where(mask, 1.0, jnp.maximum(1.0 - sparsity, 1e-6))
            return jnp.where(mask | more, g + penalty.astype(g.dtype), 0)

        return trees.map_pruned(step, grads, masks, explored, sparsities, params, otherwise=projection.same)


def _check_decay(decay: float) -> None:
    if not decay >= 0:
        raise ValueError(f"decay: {decay!r} is negative, and weights would grow; give 0 or more.")
