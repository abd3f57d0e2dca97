"""Keeping the zeros of a sparse checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpruner import sparsity_distributions, trees
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.training.fit import FROM_PARAMS


@dataclasses.dataclass(eq=False)
class PreserveSparsity(BaseUpdater):
    """Keeps what is zero in the parameters at count 0 (frameworks restore them after `init`).

    A leaf that is zero throughout is taken for one that starts at zero (a zero-initialised output
    layer), and stays dense. If the parameters do not show their masks, as for a rewound lottery ticket, give `masks`.

    Attributes:
      filter_fn: `filter_fn(path, param)` selects the leaves whose zeros are kept.
      masks: a tree of boolean masks to keep, in place of those that the parameters show.
    """

    is_sparse_gradients: bool = True
    masks: Any = FROM_PARAMS
    filter_fn: sparsity_distributions.FilterFn = sparsity_distributions.NOT_DIM_ONE_FILTER_FN

    follows_schedule = False

    def get_target_sparsities(self, params: Any) -> Any:
        # The sparsity is that of the masks, which is known only at count 0.
        targets = sparsity_distributions.uniform(self.layers(params), 0.0, self.filter_fn)
        self._check_targets(params, targets)
        return targets

    def update_state(self, sparse_state: Any, params: Any, grads: Any, **kwargs: Any) -> Any:
        del params, grads, kwargs
        return sparse_state

    def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
        """1 where a weight is not zero, else 0."""
        del sparse_state, grads, kwargs
        return jax.tree.map(lambda p: (p != 0).astype(jnp.float32), params)

    def create_masks(self, scores: Any, sparsities: Any) -> Any:
        return trees.map_pruned(lambda s, _: (s > 0) | ~jnp.any(s > 0), scores, sparsities)
