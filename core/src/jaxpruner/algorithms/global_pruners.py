"""Global pruners: one threshold over all leaves decides how sparse each becomes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpruner import scores, selection, sparsity_distributions, sparsity_types, trees
from jaxpruner.algorithms.pruners import MagnitudePruning, SaliencyPruning
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.selection import counts
from jaxpruner.selection.score_reading import as_array
from jaxpruner.training import fit


@dataclasses.dataclass(eq=False)
class GlobalPruning(BaseUpdater):
    r"""Keeps the highest normalised scores of all selected leaves together.

    The scores of a leaf are divided by :math:`\lVert s \rVert_2 + \epsilon`, so that no layer wins
    by its scale alone. Of N entries, `max(1, round_half_even(N * (1 - sparsity)))` are kept. A
    leaf may lose all of its weights.

    Attributes:
      sparsity: fraction of zeros over all selected leaves.
      filter_fn: `filter_fn(path, param)` takes the leaves to prune.
      custom_sparsity_map: path or pattern -> sparsity of leaves that compete on their own.
      use_normalization: whether scores are divided by their norm.
      normalization_eps: the epsilon above.
    """

    sparsity: float = 0.0
    filter_fn: sparsity_distributions.FilterFn = sparsity_distributions.NOT_DIM_ONE_FILTER_FN
    custom_sparsity_map: sparsity_distributions.SparsityMap | None = None
    use_normalization: bool = True
    normalization_eps: float = 1e-8

    is_global = True

    def chosen_sparsities(self, params: Any) -> Any:
        return sparsity_distributions.uniform(
            self.layers(params), self.sparsity, self.filter_fn, self.custom_sparsity_map
        )

    def get_target_sparsities(self, params: Any) -> Any:
        targets = self.chosen_sparsities(params)
        if self._is_coupled:
            targets = fit.reached(self, targets, params)
            self._check_targets(params, targets)
            return targets
        self._check_targets(params, targets)
        shared = trees.map_named(
            lambda path, p, t: None if t is None or self._competes_alone(path) else p, params, targets
        )
        for path, param in trees.named_leaves(shared):
            self._check_unstructured(path, param)
        return targets

    def create_masks(self, scores: Any, target_sparsity: Any) -> Any:
        """Masks from one threshold.

        Args:
          scores: a tree of scores.
          target_sparsity: the sparsity of all selected leaves together, or a tree with that of each
            leaf, in which the leaves of the custom map may differ.
        """
        if self._is_coupled:
            return super().create_masks(scores, target_sparsity)
        if jax.tree_util.treedef_is_leaf(jax.tree.structure(target_sparsity)):
            target_sparsity = self._spread(scores, target_sparsity)
        shared = trees.map_named(
            lambda path, _, target: None if self._competes_alone(path) else target, scores, target_sparsity
        )
        alone = trees.map_named(
            lambda path, _, target: target if self._competes_alone(path) else None, scores, target_sparsity
        )
        masks = super().create_masks(scores, alone)
        leaves = jax.tree.leaves(trees.map_pruned(lambda score, _: score, scores, shared))
        if not leaves:
            return masks
        chosen = iter(self._select(leaves, jax.tree.leaves(trees.from_state(shared))[0]))
        return jax.tree.map(
            lambda target, mask: mask if trees.is_unpruned(target) else next(chosen),
            shared,
            masks,
            is_leaf=trees.is_unpruned,
        )

    create_masks.reads_unevaluated = True  # type: ignore[attr-defined]

    def _spread(self, scores: Any, sparsity: Any) -> Any:
        """The sparsity of each selected leaf: its own, or the common one (which may be traced)."""
        own = trees.resolve(
            self.custom_sparsity_map,
            [path for path, score in trees.named_leaves(self.layers(scores)) if self.filter_fn(path, score)],
            "custom_sparsity_map",
        )
        return trees.map_named(
            lambda path, score: own.get(path, sparsity) if self.filter_fn(path, score) else None, self.layers(scores)
        )

    def _select(self, leaves: list[Any], sparsity: Any) -> list[Any]:
        keep = counts.Share(sum(leaf.size for leaf in leaves), sparsity)
        scales = [self._scale(leaf) for leaf in leaves] if self.use_normalization else None
        return selection.top_k_masks(leaves, keep, scales)

    def _scale(self, score: Any) -> Any:
        wide = as_array(score).astype(jnp.promote_types(score.dtype, jnp.float32))
        norm = jnp.sqrt(jnp.sum(wide * wide)) + self.normalization_eps
        # One NaN or infinity must not take its whole leaf along: such a leaf competes with its raw scores.
        return jnp.where(jnp.isfinite(norm), norm, 1)

    def _as_float32(self, params: Any, targets: Any) -> Any:
        if self._is_coupled:
            return super()._as_float32(params, targets)
        shared = trees.map_named(
            lambda path, p, target: None if target is None or self._competes_alone(path) else p, params, targets
        )
        total = sum(math.prod(jnp.shape(p)) for p in jax.tree.leaves(shared))
        common = counts.float32_sparsity(total, self.sparsity)
        own = super()._as_float32(params, targets)
        return trees.map_pruned(lambda _, p: common, own, shared, otherwise=lambda own: own)

    def _competes_alone(self, path: trees.KeyPath) -> bool:
        return any(trees.matches(pattern, path) for pattern in self.custom_sparsity_map or {})

    def _check_unstructured(self, path: trees.KeyPath, param: Any) -> None:
        structure = sparsity_types.for_leaf(self.sparsity_type, path, param)
        if not isinstance(structure, sparsity_types.Unstructured):
            raise ValueError(
                f"{trees.leaf_name(path)}: cannot use {type(self).__name__} with {structure}. This is "
                "because one threshold over all leaves ranks single weights; use the algorithm that "
                "ranks each leaf, or give the leaf a sparsity of its own in custom_sparsity_map."
            )


@dataclasses.dataclass(eq=False)
class GlobalMagnitudePruning(GlobalPruning, MagnitudePruning):
    """Global pruning by `|w|`."""


@dataclasses.dataclass(eq=False)
class LampPruning(GlobalPruning):
    r"""Global pruning by the layer-adaptive magnitude score (Lee et al., 2021).

    .. math:: s_i = w_i^2 / \sum_{j : |w_j| \ge |w_i|} w_j^2

    over the weights of a leaf, or of a layer in a stack. The largest weight of each leaf scores 1, so no leaf vanishes
    before all are down to one weight. With groups, a unit's score is the sum of the scores of its weights. Each mask
    update sorts each leaf, and gathers sharded leaves.

    Raises:
      ValueError: for `use_normalization=True`: the scores are already normalised.
    """

    use_normalization: bool = False

    def __post_init__(self) -> None:
        if self.use_normalization:
            raise ValueError("use_normalization: lamp's scores are normalised by what they are; leave it out.")

    def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
        """The share of each weight among those of its layer that are not smaller."""
        del sparse_state, grads, kwargs

        def score(path, p):
            axis = None if trees.is_unpruned(p) else self.stack_axis(path, p)
            if axis is None:
                return p if trees.is_unpruned(p) else scores.lamp(p)
            return jax.vmap(scores.lamp, axis, axis)(p)

        return trees.map_named(score, params)


@dataclasses.dataclass(eq=False)
class GlobalSaliencyPruning(GlobalPruning, SaliencyPruning):
    """Global pruning by `|w * g|`."""
