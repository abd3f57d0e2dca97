"""Pruners: dense at first, sparser with each mask update."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpruner import layouts, scores, trees
from jaxpruner.base_updater import BaseUpdater, NoPruning
from jaxpruner.elementwise import elementwise_scores


@dataclasses.dataclass(eq=False)
class MagnitudePruning(BaseUpdater):
    """Keeps the largest `|w|` of each leaf (Zhu & Gupta, 2017)."""

    calculate_scores = elementwise_scores(scores.magnitude)


@dataclasses.dataclass(eq=False)
class SaliencyPruning(BaseUpdater):
    """Keeps the largest `|w * g|` of each leaf (Molchanov et al., 2016).

    In a step whose gradients are not all finite it ranks by `|w|`.
    """

    calculate_scores = elementwise_scores(scores.saliency, needs_grads=True)


@dataclasses.dataclass(eq=False)
class RandomPruning(BaseUpdater):
    """Keeps random weights of each leaf; pruned weights stay pruned."""

    def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
        del grads, kwargs
        if sparse_state is None:
            return random_scores(self, params)
        masks = self.current_masks(sparse_state, params)
        return random_scores(self, params, step=sparse_state.count, among=masks)


def random_scores(updater: BaseUpdater, params: Any, step: Any = -1, among: Any = None) -> Any:
    """Uniform scores of each leaf, of the draw of this step; those outside `among` come last."""
    if among is None:
        among = jax.tree.map(lambda _: None, params)

    def draw(_, p, key, mask):
        if trees.is_unpruned(p):
            return p
        return scores.uniform_random(key, jnp.shape(p), mask, layouts.explicit_layout(p))

    return trees.map_named(draw, params, _in_buffers(updater.random_keys(params, step), params), among)


def _in_buffers(keys: Any, params: Any) -> Any:
    """The same keys, of which XLA does not see that they are known places of one array.

    It compiles programs that are the same once. Were the places known, the draws of each leaf would be a program of
    their own, of some 50 ms.
    """
    traced = (p for p in jax.tree.leaves(params) if isinstance(p, jax.core.Tracer) and p.size)
    unknown = next(traced, None)
    # An entry of a sharded array would have to be fetched.
    if unknown is None or jax.device_count() > 1 or layouts.explicit_layout(unknown) is not None:
        return keys
    of_leaves, treedef = jax.tree.flatten(keys)
    stacked = jnp.stack(of_leaves)

    def apart():
        return [stacked[i] for i in range(len(of_leaves))]

    return treedef.unflatten(jax.lax.cond(unknown.reshape(-1)[0] == 0, apart, apart))


__all__ = ["MagnitudePruning", "NoPruning", "RandomPruning", "SaliencyPruning"]
