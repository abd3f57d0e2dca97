"""BaseUpdater: the few hooks that an algorithm overrides."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpruner import (
    mask_storage,
    selection,
    sparsity_distributions,
    sparsity_types,
    trees,
)
from jaxpruner.selection import counts
from jaxpruner.selection.score_reading import Scores, as_array
from jaxpruner.sparsity_schedules import NoUpdateSchedule, Schedule
from jaxpruner.training import projection, transformation
from jaxpruner.training.projection import SparseState, apply_mask

__all__ = ["BaseUpdater", "SparseState", "apply_mask"]


def elementwise_scores(score: Callable[..., Any], needs_grads: bool = False) -> Callable[..., Any]:
    """A `calculate_scores` of an elementwise function of weights, or of weights and gradients.

    Called, it returns arrays like any other. Mask updates take its `unevaluated` scores instead,
    which selection evaluates while it reads the weights, so that they are never stored.

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

    calculate_scores.unevaluated = unevaluated
    calculate_scores.__doc__ = score.__doc__
    return calculate_scores


def map_choosing(choose: Callable[..., selection.Choosing], tree: Any, *rest: Any) -> Any:
    """`trees.map_named` of a generator function, the selections of all leaves made together."""
    choosing: list[selection.Choosing] = []

    def place(*arguments):
        choosing.append(choose(*arguments))
        return len(choosing) - 1

    places = trees.map_named(place, tree, *rest)
    chosen = selection.together(choosing)
    return jax.tree.map(lambda i: chosen[i], places)


def _own_mark(method: Callable[..., Any], mark: str) -> Any:
    """A mark on a method of ours; `functools.wraps` copies marks to wrappers, which do not count."""
    return None if hasattr(method, "__wrapped__") else getattr(method, mark, None)


def require_grads(updater: BaseUpdater, grads: Any) -> None:
    """Raises a ValueError for an algorithm that scores with gradients and got none."""
    if grads is None:
        raise ValueError(
            f"grads: {type(updater).__name__} scores with gradients and got none; pass grads=, for "
            "example of the loss on one batch."
        )


@dataclasses.dataclass(eq=False)
class BaseUpdater:
    """An algorithm that decides which weights to keep, as an optax transformation.

    A new algorithm overrides `calculate_scores` alone: the weights of the highest scores are kept.
    Every hook is looked up when it is called, so instances may be changed after they were made.
    Subclasses that are dataclasses say `eq=False`, which keeps them hashable.

    Attributes:
      scheduler: when masks are made and how sparse they are then.
      skip_gradients: whether a step that makes masks takes no inner step.
      is_sparse_gradients: whether the inner optimizer sees gradients of kept weights only.
      sparsity_type: the structure of masks: one for all leaves; a function of (path, parameter) to a
        structure; or path patterns -> structure (a mapping or pairs), unstructured elsewhere.
      sparsity_distribution_fn: parameters -> tree of final sparsities, None where not pruned.
      rng_seed: an integer or a `jax.random` key.
      use_packed_masks: whether the state keeps one bit a weight rather than one byte.
      topk_fn: `fn(scores, sparsity) -> mask` in place of `sparsity_type`.
    """

    scheduler: Schedule = NoUpdateSchedule()
    skip_gradients: bool = False
    is_sparse_gradients: bool = False
    sparsity_type: Any = sparsity_types.Unstructured()
    sparsity_distribution_fn: Callable[[Any], Any] = functools.partial(sparsity_distributions.uniform, sparsity=0.8)
    rng_seed: Any = 8
    use_packed_masks: bool = False
    topk_fn: Callable[..., Any] | None = None

    # Whether a mask update can revive weights, whose optimizer statistics must then start anew.
    regrows: ClassVar[bool] = False
    # Whether dense weights are trained behind the masked ones.
    straight_through: ClassVar[bool] = False

    def wrap_optax(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """The inner optimizer, made sparse. It must come last in a chain.

        Extra keyword arguments of its `update` reach `calculate_scores`, not the inner optimizer.
        """
        return transformation.mask_params(inner, self)

    def sparsify_optax(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """The inner optimizer, made such that a stock trainer sees sparse parameters only."""
        return self.wrap_optax(inner)

    def calculate_scores(
        self, params: Any, sparse_state: SparseState | None = None, grads: Any = None, **kwargs
    ) -> Any:
        """A tree of scores shaped like `params`; the highest are kept.

        Args:
          params: the parameters.
          sparse_state: the state before this update; None in `instant_sparsify`.
          grads: the gradients, where the caller has them.
          **kwargs: extra arguments given to the transformation's `update`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override calculate_scores.")

    def init_state(self, params: Any) -> SparseState:
        """The state at count 0.

        Raises:
          ValueError: if nothing would be pruned, or a leaf cannot be pruned as asked.
        """
        targets = self.get_target_sparsities(params)
        masks = self.get_initial_masks(params, targets)
        return SparseState(
            masks=mask_storage.encode_tree(self.storage, masks),
            target_sparsities=trees.to_state(self._as_float32(params, targets)),
            count=jnp.zeros((), jnp.int32),
        )

    def get_target_sparsities(self, params: Any) -> Any:
        """The checked final sparsity of each leaf, None where it is not pruned."""
        targets = self.sparsity_distribution_fn(params)
        self._check_targets(params, targets)
        return targets

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        """The masks at count 0: all ones, None where a leaf is not pruned."""
        return trees.map_pruned(lambda p, _: jnp.ones_like(p, dtype=bool), params, target_sparsities)

    def update_state(self, sparse_state: SparseState, params: Any, grads: Any, **kwargs) -> SparseState:
        """The state with masks made anew, as of `sparse_state.count`."""
        sparsities = trees.map_pruned(
            lambda target, _: self.scheduler.get_sparsity_at_step(target, sparse_state.count),
            sparse_state.target_sparsities,
            sparse_state.target_sparsities,
        )
        scores = self._scores(params, sparse_state, grads, **kwargs)
        masks = self.create_masks(scores, sparsities)
        return sparse_state._replace(masks=mask_storage.encode_tree(self.storage, masks))

    def create_masks(self, scores: Any, sparsities: Any) -> Any:
        """Boolean masks that keep the highest scores of each leaf, None where sparsity is None."""

        def create(path, score, sparsity):
            if trees.is_unpruned(sparsity):
                return None
            with trees.errors_at(path):
                if self.topk_fn is not None:
                    return self.topk_fn(as_array(score), sparsity)
                return (yield from sparsity_types.masking(self.structure(path, score), score, sparsity))

        return map_choosing(create, scores, sparsities)

    create_masks.reads_unevaluated = True

    def apply_masks(self, params: Any, masks: Any, is_packed: bool = False) -> Any:
        """`params` with zeros where `masks` prunes."""
        return apply_mask(params, masks, is_packed)

    def instant_sparsify(self, params: Any, grads: Any = None, **kwargs) -> tuple[Any, Any]:
        """Prunes at once to the final sparsity.

        Returns:
          The pruned parameters and their boolean masks, None where a leaf is not pruned.
        """
        targets = self.get_target_sparsities(params)
        scores = self._scores(params, None, grads, **kwargs)
        masks = self.create_masks(scores, targets)
        return self.apply_masks(params, masks), masks

    def pre_forward_update(self, params: Any, opt_state: Any) -> Any:
        """The parameters to run the model with. Masks are enforced already, so these are they."""
        del opt_state
        return params

    def post_gradient_update(self, params: Any, sparse_state: SparseState) -> Any:
        """The parameters to go on with; on their masks already after a wrapped optimizer's step."""
        masks = projection.find_state(sparse_state).masks
        return self.apply_masks(params, masks, is_packed=self.use_packed_masks)

    @property
    def storage(self) -> mask_storage.MaskStorage:
        """How the state keeps masks."""
        return mask_storage.PackedStorage() if self.use_packed_masks else mask_storage.DenseStorage()

    def current_masks(self, sparse_state: SparseState, params: Any) -> Any:
        """The boolean masks of a state, None where a leaf is not pruned."""
        return mask_storage.decode_tree(self.storage, sparse_state.masks, params)

    def structure(self, path: trees.KeyPath, leaf: Any) -> sparsity_types.SparsityType:
        """The structure of the leaf at this path; functions of (path, parameter) see its shape and dtype."""
        return sparsity_types.for_leaf(self.sparsity_type, path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))

    def random_keys(self, tree: Any, step: Any = -1) -> Any:
        """A tree of keys: one a leaf and mask update; -1 stands for the initial masks."""
        seed = self.rng_seed
        key = jax.random.key(seed) if isinstance(seed, int | np.integer) else seed
        key = jax.random.fold_in(key, jnp.asarray(step, jnp.int32) + 1)
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten([jax.random.fold_in(key, i) for i in range(len(leaves))])

    def _scores(self, params: Any, sparse_state: SparseState | None, grads: Any, **kwargs) -> Any:
        """What `calculate_scores` gives, unevaluated unless someone overrode it or what reads it."""
        unevaluated = _own_mark(self.calculate_scores, "unevaluated")
        if unevaluated and _own_mark(self.create_masks, "reads_unevaluated"):
            return unevaluated(self, params, grads)
        return self.calculate_scores(params, sparse_state=sparse_state, grads=grads, **kwargs)

    def _as_float32(self, params: Any, targets: Any) -> Any:
        """Targets as the state keeps them: the float32 that keeps exactly as many weights."""

        def convert(path, param, target):
            if trees.is_unpruned(target):
                return None
            units = self.structure(path, param).num_units(jnp.shape(param))
            return jnp.asarray(counts.float32_sparsity(units, target), jnp.float32)

        return trees.map_named(convert, params, targets)

    def _check_targets(self, params: Any, targets: Any) -> None:
        marked = trees.map_pruned(lambda p, _: p, params, targets)
        pruned = dict(trees.named_leaves(marked))
        paths = [path for path, _ in trees.named_leaves(params)]
        if paths and not pruned:
            names = ", ".join(trees.leaf_name(path) for path in paths[:5])
            raise ValueError(
                f"filter_fn: selects none of the {len(paths)} parameters ({names}, ...), so nothing "
                "would be pruned; choose a filter_fn that takes some, or algorithm='no_prune'."
            )
        sparsity_types.check_patterns(self.sparsity_type, list(pruned))
        for path, target in trees.named_leaves(targets):
            with trees.errors_at(path):
                sparsity_distributions.check_sparsity("sparsity", target)
                _check_dtype(pruned[path])
                if self.topk_fn is None:
                    self.structure(path, pruned[path]).check_shape(jnp.shape(pruned[path]))


def _check_dtype(param: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(param), jnp.floating):
        raise ValueError(f"dtype {jnp.result_type(param)} cannot be pruned; exclude it with filter_fn.")
