"""BaseUpdater has the few hooks that an algorithm overrides. NoPruning prunes nothing."""

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
    coupled_structures,
    equality,
    mask_storage,
    sparsity_distributions,
    sparsity_schedules,
    sparsity_types,
    trees,
)
from jaxpruner.choosing import map_choosing
from jaxpruner.elementwise import own_mark, require_grads
from jaxpruner.inspection import checks
from jaxpruner.selection import counts
from jaxpruner.selection.score_reading import Scores, as_array
from jaxpruner.sparsity_schedules import NoUpdateSchedule, Schedule
from jaxpruner.training import fit, projection, transformation
from jaxpruner.training.projection import SparseState, apply_mask

__all__ = ["BaseUpdater", "NoPruning", "SparseState", "apply_mask"]


class _TopK:
    """The field `topk_fn`: what was given, or else the function of the structure as it is now."""

    def __get__(self, updater: BaseUpdater | None, owner: type) -> Any:
        if updater is None:
            return None  # the default of the field
        return vars(updater)["topk_fn"] or functools.partial(_structured_topk, updater)

    def __set__(self, updater: BaseUpdater, value: Any) -> None:
        # `dataclasses.replace` hands back what it read.
        is_derived = isinstance(value, functools.partial) and value.func is _structured_topk
        vars(updater)["topk_fn"] = None if is_derived else value


def _structured_topk(updater: BaseUpdater, scores: Any, sparsity: Any) -> Any:
    return sparsity_types.for_leaf(updater.sparsity_type, (), jnp.asarray(scores)).mask(jnp.asarray(scores), sparsity)


@dataclasses.dataclass(eq=False)
class BaseUpdater:
    """An algorithm that decides which weights to keep, as an optax transformation.

    A new algorithm overrides only `calculate_scores`: the weights with the highest scores are kept.
    Hooks are looked up when they are called, so you may change an instance after you made it.
    Two instances are equal if they have the same class and equal fields. Subclasses that are dataclasses must say
    `eq=False`, which keeps this equality and the hash.

    Attributes:
      scheduler: when masks are made and how sparse they are then.
      skip_gradients: whether a step that makes masks takes no inner step.
      is_sparse_gradients: whether the inner optimizer sees only the gradients of kept weights.
      sparsity_type: the structure of masks: one for all leaves; a function from (path, parameter) to a
        structure; or path patterns -> structure (a mapping or pairs), unstructured elsewhere.
      sparsity_distribution_fn: parameters -> tree of final sparsities, None where not pruned.
      rng_seed: an integer or a `jax.random` key.
      use_packed_masks: whether the state keeps one bit per weight rather than one byte.
      topk_fn: `fn(scores, sparsity) -> mask` in place of `sparsity_type`.
      stack_axes: which axis of a leaf is a stack of layers, as path patterns -> axis (a mapping or pairs) or a function
        from (path, parameter) to an axis or None. Each layer keeps its own exact share and its own structure; filters
        and distributions see one layer's shape.
      masks: the masks that training starts from: a tree of boolean masks, None where a leaf starts dense; or
        `"from_params"`, which keeps what is zero in the parameters at count 0. What they prune stays pruned, unless
        the algorithm regrows weights. From parameters, one that starts sparse, such as RigL, takes the largest at the
        final sparsity, or the nonzero ones where these are fewer, without filling up to that sparsity.

    Examples:
      >>> class SmallestFirst(BaseUpdater):
      ...     def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
      ...         return jax.tree.map(lambda w: -jnp.abs(w), params)
      >>> half = functools.partial(sparsity_distributions.uniform, sparsity=0.5)
      >>> updater = SmallestFirst(sparsity_distribution_fn=half)
      >>> pruned, _ = updater.instant_sparsify({"w": jnp.asarray([[1.0, -3.0], [2.0, 0.5]])})
      >>> pruned["w"].tolist()
      [[1.0, 0.0], [0.0, 0.5]]
    """

    scheduler: Schedule = NoUpdateSchedule()
    skip_gradients: bool = False
    is_sparse_gradients: bool = False
    sparsity_type: Any = sparsity_types.Unstructured()
    sparsity_distribution_fn: Callable[[Any], Any] = functools.partial(sparsity_distributions.uniform, sparsity=0.0)
    rng_seed: Any = 8
    use_packed_masks: bool = False
    topk_fn: Any = _TopK()
    stack_axes: Any = None
    masks: Any = None

    # Whether a mask update can revive weights, whose optimizer statistics must then start anew.
    regrows: ClassVar[bool] = False
    # Whether dense weights are trained behind the masked ones.
    straight_through: ClassVar[bool] = False
    # Whether one threshold holds for all leaves.
    is_global: ClassVar[bool] = False
    # Whether masks are made when the schedule says so; else they are what training starts with.
    follows_schedule: ClassVar[bool] = True
    # Whether the masks that it starts with are to have the final sparsity once the first step is done.
    reaches_sparsity: ClassVar[bool] = False
    # Whether training starts dense; else with a mask of the final sparsity.
    starts_dense: ClassVar[bool] = True
    # The schedule that a configuration with a start and an end gives.
    gradual_schedule: ClassVar[type[Schedule]] = sparsity_schedules.PolynomialSchedule
    # Whether a mask update that regrows starts the optimizer statistics of all weights anew, not of those alone.
    renews_all: ClassVar[bool] = False
    # Whether scores read the state of the inner optimizer, in `sparse_state.inner_state`.
    reads_optimizer: ClassVar[bool] = False

    def wrap_optax(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """Makes the inner optimizer sparse. The result must come last in a chain.

        Extra keyword arguments of its `update` reach `calculate_scores` and the inner optimizer.
        """
        return transformation.mask_params(inner, self)

    def sparsify_optax(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """Makes the inner optimizer sparse, such that a stock trainer sees only sparse parameters."""
        return self.wrap_optax(inner)

    def calculate_scores(
        self, params: Any, sparse_state: SparseState | None = None, grads: Any = None, **kwargs: Any
    ) -> Any:
        """A tree of scores shaped like `params`; the highest are kept.

        Args:
          params: the parameters.
          sparse_state: the state before this update; None in `instant_sparsify`.
          grads: the gradients, if the caller has them.
          **kwargs: extra arguments given to the transformation's `update`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override calculate_scores.")

    def init_statistics(self, params: Any) -> Any:
        """What the algorithm remembers at count 0. The default is None: it remembers nothing.

        The statistics are in `sparse_state.statistics`, and everywhere that masks are: checkpoints, shardings, loops.

        Args:
          params: the parameters that are pruned, and MaskedNode elsewhere, which `jax.tree.map` skips. Use only their
            shapes, because hosts restore parameters after `init`.

        Returns:
          A tree like `params`, or a dict or tuple of such trees, with leaves of the parameters' shapes.
        """
        del params
        return None

    def update_statistics(self, params: Any, grads: Any, statistics: Any) -> Any:
        """The statistics after one more step. This is called in every step, before masks are made.

        Args:
          params: the parameters of the pruned leaves before the step (dense weights if straight-through).
          grads: their gradients, not masked.
          statistics: the statistics before the step. The result takes their dtypes, and an entry that is no longer
            finite, because a gradient was not, keeps its value.
        """
        del params, grads
        return statistics

    def known_statistics(self, params: Any, sparse_state: SparseState | None, grads: Any) -> Any:
        """The statistics to score with; without a state, those of a single step with these gradients."""
        if sparse_state is not None:
            return sparse_state.statistics
        require_grads(self, grads)
        return self.update_statistics(params, grads, self.init_statistics(params))

    def step_gradients(self, params: Any, grads: Any, masks: Any, sparse_state: SparseState) -> Any:
        """The gradients that the inner optimizer steps with.

        Args:
          params: the parameters that it steps from (dense weights if straight-through).
          grads: the unmasked gradients.
          masks: the boolean masks in force, None where a leaf is not pruned.
          sparse_state: the state, with these masks, at the count of this step.
        """
        del params, sparse_state
        return apply_mask(grads, masks) if self.is_sparse_gradients else grads

    def check_inner_state(self, inner_state: Any, params: Any) -> None:
        """Raises a ValueError if the inner optimizer lacks what the algorithm reads from it; called by `init`."""

    def init_state(self, params: Any) -> SparseState:
        """The state at count 0.

        Raises:
          ValueError: if nothing would be pruned, or a leaf cannot be pruned as asked.
        """
        targets = self.get_target_sparsities(params)
        self._tell_of_structures(params, targets)
        masks = self.get_initial_masks(params, targets)
        if self.masks is not None and not self._reads_params:
            masks = fit.given_masks(self.masks, params, targets)
        state = SparseState(
            masks=mask_storage.encode_tree(self.storage, masks),
            target_sparsities=projection.as_state(self._as_float32(params, targets)),
            count=jnp.zeros((), jnp.int32),
        )
        statistics = self.init_statistics(projection.pruned_only(params, state.masks))
        return projection.with_statistics(state, projection.own_buffers(statistics))

    def get_target_sparsities(self, params: Any) -> Any:
        """The checked final sparsity of each leaf, None where it is not pruned."""
        targets = fit.reached(self, self.chosen_sparsities(params), params)
        self._check_targets(params, targets)
        return targets

    def chosen_sparsities(self, params: Any) -> Any:
        """The final sparsities as they are distributed, None where a leaf was not chosen to be pruned.

        Masks of groups reach other leaves too; `get_target_sparsities` includes these.
        """
        return self.sparsity_distribution_fn(self.layers(params))

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        """The masks at count 0: all ones, None where a leaf is not pruned."""
        return trees.map_pruned(lambda p, _: jnp.ones_like(p, dtype=bool), params, target_sparsities)

    def update_state(self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any) -> SparseState:
        """The state with new masks, as of `sparse_state.count`.

        They approach the sparsities of this configuration, whatever the state was made with.
        """
        targets = self._targets_at_hand(params, sparse_state)
        sparsities = self._sparsities_at(targets, sparse_state.count)
        scores = self._scores(params, sparse_state, grads, **kwargs)
        if self.masks is not None:
            before = self.current_masks(sparse_state, params)
            scores = trees.map_named(self._pruned_last, scores, before)
            masks = trees.map_pruned(lambda mask, was: mask & was, self.create_masks(scores, sparsities), before)
        else:
            masks = self.create_masks(scores, sparsities)
        return sparse_state._replace(
            masks=mask_storage.encode_tree(self.storage, masks), target_sparsities=projection.as_state(targets)
        )

    def _sparsities_at(self, targets: Any, count: Any) -> Any:
        """The sparsities of the masks in force at a count, None where a leaf is not pruned."""
        now: dict[Any, Any] = {}  # equal targets, such as those of leaves of one shape, share the arithmetic

        def sparsity(target, _):
            key = float(target) if isinstance(target, np.floating) else id(target)
            if key not in now:
                now[key] = self.sparsity_at(target, count)
            return now[key]

        return trees.map_pruned(sparsity, targets, targets)

    def sparsity_at(self, target: Any, count: Any) -> Any:
        """The sparsity of a leaf, of the masks in force at a count."""
        return self.scheduler.get_sparsity_at_step(target, count)

    def starting_masks(self, params: Any, sparse_state: SparseState) -> Any:
        """The masks of the state, as they are stored; at count 0 those read from the parameters, if asked for."""
        if not self._reads_params:
            return sparse_state.masks

        def read():
            return mask_storage.encode_tree(self.storage, self.masks_from_params(params, sparse_state))

        return projection.when(sparse_state.count == 0, read, lambda: sparse_state.masks)

    def masks_from_params(self, params: Any, sparse_state: SparseState) -> Any:
        """The boolean masks that parameters show at count 0, None where a leaf is not pruned."""
        return trees.map_pruned(lambda p, _: fit.nonzero(p), params, sparse_state.masks)

    def check_state(self, sparse_state: SparseState, params: Any) -> None:
        """Raises a ValueError if the shapes in a state show that it is of another configuration."""
        fit.check_state(self, sparse_state, params)

    def create_masks(self, scores: Any, sparsities: Any) -> Any:
        """Boolean masks that keep the highest scores of each leaf, None where sparsity is None."""
        if self._is_coupled:
            units = dataclasses.replace(self, sparsity_type=sparsity_types.Unstructured())
            return self.sparsity_type.masks(scores, sparsities, units)

        def create(path, score, sparsity):
            if trees.is_unpruned(sparsity):
                return None
            with trees.errors_at(path):
                if self.custom_topk:
                    return self.topk_fn(as_array(score), sparsity)
                return (yield from sparsity_types.masking(self.structure(path, score), score, sparsity))

        return map_choosing(create, scores, sparsities)

    create_masks.reads_unevaluated = True  # type: ignore[attr-defined]

    def apply_masks(self, params: Any, masks: Any, is_packed: bool = False) -> Any:
        """`params` with zeros where `masks` prunes."""
        return apply_mask(params, masks, is_packed)

    def instant_sparsify(self, params: Any, grads: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Prunes at once to the final sparsity.

        Returns:
          The pruned parameters and their boolean masks, None where a leaf is not pruned.
        """
        targets = self.get_target_sparsities(trees.numbers_only(params))
        self._tell_of_structures(params, targets)
        scores = self._scores(trees.numbers_only(params), None, grads, **kwargs)
        masks = self.create_masks(scores, targets)
        return self.apply_masks(params, masks), masks

    def pre_forward_update(self, params: Any, opt_state: Any) -> Any:
        """The parameters to run the model with. Masks are already enforced, so they are returned as they are."""
        del opt_state
        return params

    def post_gradient_update(self, params: Any, sparse_state: SparseState) -> Any:
        """The parameters to continue with. After a wrapped optimizer's step, they are already on their masks."""
        return self.apply_masks(params, self.current_masks(sparse_state, params))

    @property
    def remembers(self) -> bool:
        """Whether the algorithm keeps statistics, which is whether `init_statistics` is overridden."""
        hook = self.init_statistics
        return getattr(hook, "__func__", hook) is not BaseUpdater.init_statistics

    @property
    def storage(self) -> mask_storage.MaskStorage:
        """How the state keeps masks."""
        if self._is_coupled:
            return mask_storage.AxisStorage()
        return mask_storage.PackedStorage() if self.use_packed_masks else mask_storage.DenseStorage()

    def current_masks(self, sparse_state: SparseState, params: Any) -> Any:
        """The boolean masks of a state, None where a leaf is not pruned."""
        state = projection.find_state(sparse_state)
        if jax.tree.structure(params) == jax.tree.structure(state.masks):
            return mask_storage.decode_tree(self.storage, state.masks, params)
        # Of an optimizer that boxes what it keeps, such as that of flax.nnx, or only a part is pruned.
        masks = dict(trees.named_leaves(state.masks))
        fit.check_paths(masks, params)
        placed = trees.map_named(lambda path, _: masks.get(path), params)
        return mask_storage.decode_tree(self.storage, placed, params)

    def structure(self, path: trees.KeyPath, leaf: Any) -> sparsity_types.SparsityType:
        """The structure of the leaf at this path; functions of (path, parameter) see the leaf's shape and dtype."""
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return sparsity_types.for_leaf(self.sparsity_type, path, shape, self.stack_axis(path, leaf))

    def stack_axis(self, path: trees.KeyPath, leaf: Any) -> int | None:
        """The axis along which the leaf at this path is a stack of layers; None if it is one layer."""
        if self.stack_axes is None:
            return None
        if callable(self.stack_axes):
            return self.stack_axes(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return trees.most_specific(trees.pattern_pairs(self.stack_axes, "stack_axes"), path, "stack_axes")

    def layers(self, params: Any) -> Any:
        """The parameters as filters and distributions see them: a stack as one layer, repeated."""
        if self.stack_axes is None:
            return params

        def layer(path, leaf):
            if trees.is_unpruned(leaf) or not trees.is_floating(leaf):
                return leaf
            axis = self.stack_axis(path, leaf)
            if axis is None:
                return leaf
            with trees.errors_at(path):
                sparsity_types.check_axis(axis, leaf.shape)
            shape = sparsity_types.without_axis(leaf.shape, axis)
            return sparsity_distributions.Layers(shape, leaf.dtype, leaf.shape[axis])

        if not callable(self.stack_axes):
            trees.resolve(self.stack_axes, [path for path, _ in trees.named_leaves(params)], "stack_axes")
        return trees.map_named(layer, params)

    def random_keys(self, tree: Any, step: Any = -1) -> Any:
        """A tree of keys: one per leaf and mask update; -1 stands for the initial masks."""
        seed = self.rng_seed
        key = jax.random.key(seed) if isinstance(seed, int | np.integer) else seed
        key = jax.random.fold_in(key, jnp.asarray(step, jnp.int32) + 1)
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten(list(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(leaves)))))

    def _scores(self, params: Any, sparse_state: SparseState | None, grads: Any, **kwargs: Any) -> Any:
        """What `calculate_scores` gives, unevaluated unless someone overrode it or what reads it."""
        unevaluated = own_mark(self.calculate_scores, "unevaluated")
        if unevaluated and own_mark(self.create_masks, "reads_unevaluated"):
            return unevaluated(self, params, grads)
        return self.calculate_scores(params, sparse_state=sparse_state, grads=grads, **kwargs)

    def _as_float32(self, params: Any, targets: Any) -> Any:
        """Targets as the float32 that keep exactly as many weights."""

        def convert(path, param, target):
            if trees.is_unpruned(target):
                return None
            if isinstance(target, jax.core.Tracer):
                return target.astype(jnp.float32)
            units = self.structure(path, param).num_units(jnp.shape(param))
            return counts.float32_sparsity(units, target)

        return trees.map_named(convert, params, targets)

    @property
    def is_stock(self) -> bool:
        """Whether all it consists of is the library's own and compares by its fields: it may be compiled once."""
        ours = type(self).__module__.split(".")[0] == __name__.split(".")[0]
        fields = {field.name for field in dataclasses.fields(self)}
        parts = (self.scheduler, getattr(self, "drop_fraction_fn", self.scheduler))
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((self.rng_seed, self.masks)))
        return (
            ours
            and not is_traced
            and not self.custom_topk
            and set(vars(self)) <= fields
            and all(type(part).__module__ == sparsity_schedules.__name__ for part in parts)
        )

    @property
    def _is_coupled(self) -> bool:
        return isinstance(self.sparsity_type, coupled_structures.Coupled)

    @property
    def _reads_params(self) -> bool:
        return isinstance(self.masks, str)

    def _targets_at_hand(self, params: Any, sparse_state: SparseState) -> Any:
        """The final sparsities of this configuration as float32, None where a leaf is not pruned."""
        try:
            targets = self.get_target_sparsities(params)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
            # The distribution reads weights, which only `init` can do.
            return trees.from_state(sparse_state.target_sparsities)
        fit.check_pruned(targets, sparse_state)
        return self._as_float32(params, targets)

    def _pruned_last(self, path: trees.KeyPath, score: Any, mask: Any) -> Any:
        """Scores that rank what is pruned below all; where units are of several weights, their zeros do."""
        pooled = sparsity_types.Block | sparsity_types.Channel
        if trees.is_unpruned(mask) or isinstance(self.structure(path, score).of_layer, pooled):
            return score
        filled = Scores.of(score).filled(~mask, jnp.nan)
        return filled if own_mark(self.create_masks, "reads_unevaluated") else as_array(filled)

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and equality.comparable(vars(self)) == equality.comparable(vars(other))

    def __hash__(self) -> int:
        return hash((type(self), equality.comparable(vars(self))))

    def _check_targets(self, params: Any, targets: Any) -> None:
        fit.check_masks_field(self)
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
                if not trees.is_floating(pruned[path]):
                    raise ValueError(
                        f"dtype {jnp.result_type(pruned[path])} cannot be pruned; exclude it with filter_fn."
                    )
                if not self.custom_topk:
                    self.structure(path, pruned[path]).check_shape(jnp.shape(pruned[path]))

    def _tell_of_structures(self, params: Any, targets: Any) -> None:
        """Scripts of the paper's library give a sparsity beside n:m, which decides; `sparsify` refuses that."""
        if disagreement := checks.structure_disagreement(self, params, targets):
            checks.warn_once(disagreement)

    @property
    def custom_topk(self) -> bool:
        """Whether `topk_fn` was given, in place of a structure."""
        return vars(self)["topk_fn"] is not None


@dataclasses.dataclass(eq=False)
class NoPruning(BaseUpdater):
    """The dense baseline: no masks, parameters and updates untouched."""

    follows_schedule = False

    def get_target_sparsities(self, params: Any) -> Any:
        return jax.tree.map(lambda _: None, params)

    def create_masks(self, scores: Any, sparsities: Any) -> Any:
        del sparsities
        return jax.tree.map(lambda _: None, scores)

    def update_state(self, sparse_state: Any, params: Any, grads: Any, **kwargs: Any) -> Any:
        del params, grads, kwargs
        return sparse_state

    def calculate_scores(self, params: Any, sparse_state: Any = None, grads: Any = None, **kwargs: Any) -> Any:
        del sparse_state, grads, kwargs
        return params
