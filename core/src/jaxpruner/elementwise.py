"""Scores that are elementwise functions; selection evaluates them while it reads the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from jaxpruner.selection.score_reading import Scores

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
        return jax.tree.map(lambda w, g: Scores(score, (w, g)), params, grads)

    def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
        del sparse_state, kwargs
        return jax.tree.map(Scores.evaluate, unevaluated(self, params, grads))

    calculate_scores.unevaluated = unevaluated  # type: ignore[attr-defined]
    calculate_scores.__doc__ = score.__doc__
    return calculate_scores


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
