"""Scores that are elementwise functions; selection evaluates them while it reads the weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxpruner.selection.score_reading import Scores, is_magnitude

if TYPE_CHECKING:
    from jaxpruner.base_updater import BaseUpdater


def elementwise_scores(score: Callable[..., Any], needs_grads: bool = False) -> Callable[..., Any]:
    """A `calculate_scores` of an elementwise function of weights, or of weights and gradients.

    When called, it returns arrays like any other. Mask updates take its `unevaluated` scores instead.
    Selection evaluates these while it reads the weights, so they are never stored.

    Args:
      score: `score(w)`, or `score(w, g)`.
      needs_grads: whether it takes gradients.
    """

    def unevaluated(updater: BaseUpdater, params: Any, grads: Any) -> Any:
        if not needs_grads:
            return jax.tree.map(lambda w: Scores(score, (w,)), params)
        require_grads(updater, grads)
        finite = all_finite(grads)
        return jax.tree.map(lambda w, g: Scores(_OrOfOnes(score), (w, g, finite)), params, grads)

    def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
        del sparse_state, kwargs
        return jax.tree.map(Scores.evaluate, unevaluated(self, params, grads))

    calculate_scores.unevaluated = unevaluated  # type: ignore[attr-defined]
    calculate_scores.__doc__ = score.__doc__
    return calculate_scores


@dataclasses.dataclass(frozen=True)
class _OrOfOnes:
    """A score of weights and gradients; of weights and ones if a gradient is not finite. See `usable`."""

    score: Callable[..., Any]

    def __call__(self, w: Any, g: Any, finite: Any) -> Any:
        return self.score(w, jnp.where(finite, g, jnp.ones_like(g)))

    @property
    def is_magnitude(self) -> bool:
        return is_magnitude(self.score)


def all_finite(tree: Any) -> Any:
    """Whether there is no NaN and no infinity in any leaf."""
    return functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)], jnp.bool_(True))


def usable(grads: Any, otherwise: float = 1) -> Any:
    """The gradients to score with: all the same if one is not finite, since an overflow says nothing about weights."""
    finite = all_finite(grads)
    return jax.tree.map(lambda g: jnp.where(finite, g, jnp.full_like(g, otherwise)), grads)


def own_mark(method: Callable[..., Any], mark: str) -> Any:
    """A mark on a method of ours; `functools.wraps` copies marks to wrappers, which do not count."""
    return None if hasattr(method, "__wrapped__") else getattr(method, mark, None)


def require_grads(updater: BaseUpdater, grads: Any) -> None:
    """Raises a ValueError for an algorithm that scores with gradients and got none."""
    if grads is None:
        raise ValueError(
            f"grads: {type(updater).__name__} scores with gradients and got none; pass grads=, for "
            "example of the loss on one batch."
        )
