"""Sparse from the first step: a fixed random mask, or one that drops and grows weights."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpruner import layouts, mask_storage, scores, selection, sparsity_types, trees
from jaxpruner.algorithms.pruners import random_scores
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.choosing import map_choosing
from jaxpruner.elementwise import elementwise_scores, require_grads, usable
from jaxpruner.selection.score_reading import Scores
from jaxpruner.sparsity_schedules import CosineDecay
from jaxpruner.training import projection


@dataclasses.dataclass(eq=False)
class StaticRandomSparse(BaseUpdater):
    """A random mask at the final sparsity from the start, which never changes."""

    is_sparse_gradients: bool = True

    follows_schedule = False
    starts_dense = False
    # Whether masks always have as many weights as those that training starts with.
    keeps_count = True

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        return self.create_masks(random_scores(self, params), target_sparsities)

    def masks_from_params(self, params: Any, sparse_state: Any) -> Any:
        """Of the nonzero weights the largest, at the final sparsity; a leaf of zeros keeps the mask of the state."""
        pruned = trees.map_pruned(lambda p, _: p, params, sparse_state.masks)
        largest = self.create_masks(jax.tree.map(scores.magnitude, pruned), self._targets_at_hand(params, sparse_state))
        own = mask_storage.decode_tree(self.storage, sparse_state.masks, params)

        def read(p, mask, own):
            return jnp.where(jnp.any(p != 0), layouts.laid_out_like(p, mask) & (p != 0), own)

        return trees.map_pruned(read, pruned, largest, own)

    def update_state(self, sparse_state: Any, params: Any, grads: Any, **kwargs: Any) -> Any:
        del params, grads, kwargs
        return sparse_state

    def instant_sparsify(self, params: Any, grads: Any = None, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"instant_sparsify: {type(self).__name__} trains with a sparse mask from the start and "
            "has no scores to prune trained parameters with; use MagnitudePruning for that."
        )


@dataclasses.dataclass(eq=False)
class _DropAndGrow(StaticRandomSparse, abc.ABC):
    r"""Drops the smallest active weights and grows as many others.

    Of the :math:`k` active weights of a leaf, the :math:`\mathrm{round}(k (1 - f))` largest in
    :math:`|w|` survive, with :math:`f` = `drop_fraction_fn(count)`. The others are replaced by the
    weights with the highest grow scores among all that did not survive. :math:`k` never changes.
    Weights that newly enter the mask start at 0 with fresh optimizer statistics. A weight that is
    dropped and grows back at once keeps its value and its statistics.

    Attributes:
      drop_fraction_fn: count -> fraction of the active weights that is dropped.
    """

    skip_gradients: bool = True
    drop_fraction_fn: Callable[[Any], Any] = CosineDecay(0.1)

    regrows = True
    follows_schedule = True

    def get_target_sparsities(self, params: Any) -> Any:
        if self.custom_topk:
            raise ValueError(
                f"topk_fn: cannot be used with {type(self).__name__}. This is because masks regrow within a "
                "structure; give sparsity_type."
            )
        return super().get_target_sparsities(params)

    @abc.abstractmethod
    def grow_scores(self, params: Any, grads: Any, step: Any) -> Any:
        """A tree of scores; the highest of the inactive weights grow."""

    # Active weights are dropped by |w|.
    calculate_scores = elementwise_scores(scores.magnitude)

    def drop_scores(self, params: Any, grads: Any, sparse_state: Any, **kwargs: Any) -> Any:
        """A tree of scores; the lowest of the active weights are dropped. Those of `calculate_scores`, here `|w|`."""
        return self._scores(params, sparse_state, grads, **kwargs)

    def masks_to_regrow(self, sparse_state: Any, params: Any, targets: Any, drop_scores: Any) -> Any:
        """The masks of which weights are dropped and grown again, None where a leaf is not pruned."""
        del targets, drop_scores
        return self.current_masks(sparse_state, params)

    def regrown(
        self, structure: Any, mask: Any, drop: Any, grow: Any, fraction: Any, target: Any
    ) -> selection.Choosing[Any]:
        """The new mask of a leaf: of its structure, with as many weights; the old one if `grow` is not all finite."""
        del target
        return (yield from sparsity_types.regrowing(structure, mask, drop, grow, fraction))

    def update_state(self, sparse_state: Any, params: Any, grads: Any, **kwargs: Any) -> Any:
        targets = self._targets_at_hand(params, sparse_state)
        fraction = self.drop_fraction_fn(sparse_state.count)
        drop_scores = self.drop_scores(params, grads, sparse_state, **kwargs)
        masks = self.masks_to_regrow(sparse_state, params, targets, drop_scores)
        grow_scores = self.grow_scores(params, grads, sparse_state.count)

        def regrow(path, mask, drop, grow, target):
            if trees.is_unpruned(mask):
                return None
            with trees.errors_at(path):
                new = yield from self.regrown(self.structure(path, drop), mask, drop, grow, fraction, target)
            return layouts.laid_out_like(mask, new)

        masks = map_choosing(regrow, masks, drop_scores, grow_scores, targets)
        return sparse_state._replace(
            masks=mask_storage.encode_tree(self.storage, masks), target_sparsities=projection.as_state(targets)
        )


@dataclasses.dataclass(eq=False)
class SET(_DropAndGrow):
    """Sparse evolutionary training: grows at random (Mocanu et al., 2018)."""

    def grow_scores(self, params: Any, grads: Any, step: Any) -> Any:
        del grads
        return random_scores(self, params, step)


@dataclasses.dataclass(eq=False)
class MEST(SET):
    r"""SET that drops the smallest :math:`|w| + \lambda |g|` (Yuan et al., 2021): small weights that move stay.

    Attributes:
      gradient_weight: the :math:`\lambda` above; 0 is SET.

    Raises:
      ValueError: for a negative weight.
    """

    gradient_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.gradient_weight >= 0:
            raise ValueError(f"gradient_weight: {self.gradient_weight!r} is negative; give 0 (which is set) or more.")

    def drop_scores(self, params: Any, grads: Any, sparse_state: Any, **kwargs: Any) -> Any:
        """`|w| + gradient_weight * |g|`."""
        del sparse_state, kwargs
        require_grads(self, grads)
        grads = usable(grads, otherwise=0)
        return jax.tree.map(lambda w, g: jnp.abs(w) + self.gradient_weight * jnp.abs(g), params, grads)


@dataclasses.dataclass(eq=False)
class RigL(_DropAndGrow):
    """Grows where the dense gradient is largest (Evci et al., 2020).

    Attributes:
      is_debug: accepted for scripts of the paper's library; it has no effect.
    """

    is_debug: bool = False

    def grow_scores(self, params: Any, grads: Any, step: Any) -> Any:
        del params, step
        require_grads(self, grads)
        return jax.tree.map(lambda g: Scores(scores.magnitude, (g,)), grads)
