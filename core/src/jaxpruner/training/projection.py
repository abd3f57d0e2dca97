"""One sparse step without any optimizer library, and the states that sparse training keeps.

One step goes one way: masks (if the schedule asks) -> gradients -> inner optimizer -> masks
enforced -> count + 1. `begin_step` and `end_step` do what comes before and after the inner optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpruner import layouts, mask_storage, trees

if TYPE_CHECKING:
    from jaxpruner.training.protocol import Algorithm


class SparseState(NamedTuple):
    """State of a sparse transformation.

    Attributes:
      masks: a tree like the parameters: a mask, or MaskedNode where the leaf is not pruned.
      inner_state: the state of the wrapped optimizer.
      target_sparsities: the final sparsity of each leaf, float32 scalars.
      count: the number of updates seen, int32.
      statistics: what an algorithm remembers of earlier steps, in a `RememberingState`; None here.
    """

    masks: Any
    inner_state: Any = None
    target_sparsities: Any = None
    count: Any = None

    @property
    def statistics(self) -> Any:
        """What the algorithm remembers: nothing."""
        return None


class _FiveFields(NamedTuple):
    masks: Any
    inner_state: Any = None
    target_sparsities: Any = None
    count: Any = None
    statistics: Any = None


class RememberingState(_FiveFields, SparseState):  # type: ignore[misc]  # tuples of different lengths, on purpose
    """A `SparseState` of an algorithm with a memory, with a fifth field.

    It is a separate class because checkpoints (flax, orbax) name the fields of a state and restore only into the same
    names. So states of algorithms without a memory are unchanged.

    Attributes:
      statistics: a tree like the parameters, or a dict or tuple of such trees, with MaskedNode where a leaf is not
        pruned; see `BaseUpdater.init_statistics`.
    """

    __slots__ = ()


class StraightThroughState(NamedTuple):
    """Inner state of a straight-through transformation that shows sparse parameters.

    Attributes:
      weights: the dense weights of the pruned leaves, MaskedNode elsewhere.
      inner_state: the state of the wrapped optimizer.
    """

    weights: Any
    inner_state: Any = None


class Step(NamedTuple):
    """One step, after its masks are made and before they are enforced.

    Attributes:
      params: the parameters that the inner optimizer steps from (dense weights if straight-through).
      grads: the gradients that it steps with.
      masks: boolean masks in force from now on, None where a leaf is not pruned.
      previous_masks: the masks in force before.
      is_mask_update: whether masks were made before the optimizer's step.
      state: the sparse state with the new masks and count, its inner state as it was.
      remask: for straight-through methods, makes the masks of the stepped weights: maps (state, weights) to a state.
    """

    params: Any
    grads: Any
    masks: Any
    previous_masks: Any
    is_mask_update: Any
    state: SparseState
    remask: Callable[[SparseState, Any], SparseState] | None = None


def init_state(updater: Algorithm, params: Any) -> SparseState:
    """The state for `begin_step` and `end_step` at count 0."""
    state = updater.init_state(trees.numbers_only(params))
    return with_weights(state, params) if updater.straight_through else state


def begin_step(updater: Algorithm, params: Any, grads: Any, state: SparseState, **extra_args: Any) -> Step:
    """Makes masks if the schedule asks for them, and masks the gradients if the updater does.

    Straight-through methods make their masks when the step ends, from the weights after it.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> config = {"algorithm": "magnitude_ste", "sparsity": 0.5, "update_start_step": 0, "update_end_step": 0}
      >>> updater = jaxpruner.create_updater_from_config(config)
      >>> params = {"w": jnp.asarray([[1.0, 4.0, 2.0, 3.0]])}
      >>> state = jaxpruner.init_projection(updater, params)
      >>> step = jaxpruner.begin_step(updater, params, {"w": jnp.asarray([[-9.0, 1.0, 1.0, 1.0]])}, state)
      >>> proposed = {"w": step.params["w"] - step.grads["w"]}  # any optimizer
      >>> params, state = jaxpruner.end_step(step, proposed)
      >>> params["w"].tolist()
      [[10.0, 3.0, 0.0, 0.0]]
    """
    params, grads = trees.numbers_only(params), trees.numbers_only(grads)
    updater.check_state(state, params)
    _check_gradients(grads, params, state.masks)
    is_hidden = isinstance(state.inner_state, StraightThroughState)
    before = updater.starting_masks(params, state)
    if is_hidden:
        params = dense_weights(params, state, mask_storage.decode_tree(updater.storage, before, params))
    state = remembered(updater, params, grads, state._replace(masks=before))
    remask = None
    due: Any = False
    count = state.count if isinstance(state.count, jax.core.Tracer) else int(state.count)
    if updater.straight_through:
        remask = functools.partial(remasked, updater, grads, extra_args)
    else:
        due = updater.scheduler.should_update_mask(count)
        made = when(
            due,
            lambda: _made(updater, state, params, grads, extra_args),
            lambda: (state.masks, state.target_sparsities),
        )
        state = state._replace(masks=made[0], target_sparsities=made[1])
    masks = mask_storage.decode_tree(updater.storage, state.masks, params)
    previous_masks = mask_storage.decode_tree(updater.storage, before, params)
    if updater.regrows:
        # Regrown weights start at 0. They are 0 already, except before the first step, when parameters are dense.
        params = trees.map_pruned(_without_new, params, masks, previous_masks, otherwise=same)
    return Step(
        params=params,
        grads=updater.step_gradients(params, grads, masks, state),
        masks=masks,
        previous_masks=previous_masks,
        is_mask_update=due,
        state=state._replace(count=state.count + 1),
        remask=remask,
    )


def end_step(step: Step, proposed: Any) -> tuple[Any, SparseState]:
    """The masked projection of the parameters that an inner optimizer proposes, and the state.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> updater = jaxpruner.create_updater_from_config({"algorithm": "preserve"})
      >>> params = {"w": jnp.asarray([[0.0, 4.0], [3.0, 0.0]])}
      >>> state = jaxpruner.init_projection(updater, params)
      >>> step = jaxpruner.begin_step(updater, params, {"w": jnp.ones((2, 2))}, state)
      >>> proposed = {"w": step.params["w"] - 0.5 * step.grads["w"]}  # any optimizer, which may leave the masks
      >>> params, state = jaxpruner.end_step(step, proposed)
      >>> params["w"].tolist(), int(state.count)
      ([[0.0, 3.5], [2.5, 0.0]], 1)
    """
    state, masks, proposed = step.state, step.masks, trees.numbers_only(proposed)
    if step.remask is not None:
        state = step.remask(state, proposed)
        masks = mask_storage.decode_stored(state.masks, proposed)
        state = state._replace(inner_state=state.inner_state._replace(weights=pruned_only(proposed, masks)))
    return apply_mask(proposed, masks), state


def project(
    updater: Algorithm, params: Any, proposed: Any, grads: Any, state: SparseState, **extra_args: Any
) -> tuple[Any, SparseState]:
    """One sparse step for optimizers that are not optax transformations.

    `proposed` is the result of any optimizer's step from `params`; the returned parameters lie on the
    masks. The dense weights of straight-through methods make the step that the optimizer made from the masked ones. If
    it should see masked gradients, or step from the dense weights, as a weight decay does, call it between
    `begin_step` and `end_step` instead.

    Args:
      updater: the algorithm.
      params: parameters before the step.
      proposed: parameters that the optimizer proposes.
      grads: gradients at `params`, for the algorithms that score with them.
      state: from `init_projection(updater, params)`.
      **extra_args: passed to `calculate_scores`.

    Returns:
      The new parameters and the new state.

    Raises:
      ValueError: for a straight-through algorithm without its dense weights, or one that changes the gradients.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> config = {"algorithm": "magnitude", "sparsity": 0.5, "update_start_step": 0, "update_end_step": 0}
      >>> updater = jaxpruner.create_updater_from_config(config)
      >>> params = {"w": jnp.asarray([[1.0, 4.0, 2.0, 3.0]])}
      >>> grads = {"w": jnp.ones((1, 4))}
      >>> state = jaxpruner.init_projection(updater, params)
      >>> proposed = {"w": params["w"] - 0.5 * grads["w"]}
      >>> params, state = jaxpruner.project(updater, params, proposed, grads, state)
      >>> params["w"].tolist()
      [[0.0, 3.5, 0.0, 2.5]]
    """
    if updater.straight_through and not isinstance(state.inner_state, StraightThroughState):
        raise ValueError(
            f"state: holds no dense weights, which {type(updater).__name__} trains; make it with "
            "jaxpruner.init_projection(updater, params)."
        )
    params, grads, proposed = (trees.numbers_only(tree) for tree in (params, grads, proposed))
    step = begin_step(updater, params, grads, state, **extra_args)
    if updater.straight_through:
        if any(new is not old for new, old in zip(*map(jax.tree.leaves, (step.grads, grads)), strict=True)):
            raise ValueError(
                f"project: cannot be used with {type(updater).__name__}. This is because it changes the gradients that "
                "the optimizer steps with; let it step between jaxpruner.begin_step and jaxpruner.end_step."
            )
        proposed = trees.map_pruned(_moved, proposed, step.masks, step.params, params, otherwise=same)
    if updater.skip_gradients:
        proposed = when(step.is_mask_update, lambda: step.params, lambda: proposed)
    return end_step(step, proposed)


def remasked(
    updater: Algorithm, grads: Any, extra_args: dict[str, Any], state: SparseState, weights: Any
) -> SparseState:
    """The state of a straight-through method with masks of these weights, at the sparsity scheduled for its count."""
    first, weights = updater.scheduler.start_step, trees.numbers_only(weights)
    made = when(
        True if not first else state.count >= first,
        lambda: _made(updater, state, weights, grads, extra_args),
        lambda: (state.masks, state.target_sparsities),
    )
    return state._replace(masks=made[0], target_sparsities=made[1])


def _made(
    updater: Algorithm, state: SparseState, params: Any, grads: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
    """The masks and the target sparsities of an update."""
    if not updater.reads_optimizer:
        state = state._replace(inner_state=None)
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, params, grads)))
    # Eagerly it is one program, compiled once for equal algorithms; with hooks of a user's own, call by call.
    if is_traced or extra_args or not updater.is_stock:
        return _laid_out(updater.update_state(state, params, grads, **extra_args), state)
    return _compiled(updater, state, params, grads)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(updater: Algorithm, state: SparseState, params: Any, grads: Any) -> tuple[Any, Any]:
    return _laid_out(updater.update_state(state, params, grads), state)


def _laid_out(new: SparseState, old: SparseState) -> tuple[Any, Any]:
    masks = _laid_out_as(old.masks, trees.to_state(new.masks))
    return masks, _laid_out_as(old.target_sparsities, new.target_sparsities)


def remembered(updater: Algorithm, params: Any, grads: Any, state: SparseState) -> SparseState:
    """The state with the statistics of this step; the same where the algorithm remembers nothing.

    Raises:
      ValueError: if `update_statistics` returns another tree than it was given.
    """
    old = state.statistics
    if old is None:
        return state
    new = updater.update_statistics(pruned_only(params, state.masks), pruned_only(grads, state.masks), old)
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"statistics: update_statistics of {type(updater).__name__} gives {jax.tree.structure(new)} in place of "
            f"{jax.tree.structure(old)}; give a tree of what init_statistics gave, with the same leaves."
        )

    def kept(old, new):
        # In the same dtype, whatever that of the gradients is: a state is the carry of a loop. A running sum or mean
        # that has taken in one gradient that is not finite would never be finite again.
        new = layouts.laid_out_like(old, new.astype(old.dtype))
        return jnp.where(jnp.isfinite(new) | ~jnp.isfinite(old), new, old)

    return with_statistics(state, jax.tree.map(kept, old, new))


def _check_gradients(grads: Any, params: Any, masks: Any) -> None:
    """Each pruned leaf needs its gradient; others may lack theirs, as partial gradients of Equinox do."""
    if jax.tree.structure(grads) == jax.tree.structure(params):
        return
    given = {path for path, _ in trees.named_leaves(grads)}
    missing = [path for path, _ in trees.named_leaves(masks) if path not in given]
    if missing:
        raise ValueError(
            f"gradients: have no entry for {trees.leaf_name(missing[0])}, which is pruned; give a tree like the "
            "parameters (zeros where there is no gradient), or exclude the leaf with filter_fn."
        )


def apply_mask(params: Any, masks: Any, is_packed: bool = False) -> Any:
    """`params` with zeros where `masks` prunes; a leaf whose mask is None is returned as it is.

    Args:
      params: a tree of arrays, or one array.
      masks: its masks, boolean or 0 and 1.
      is_packed: whether the masks are packed, one bit per weight.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> params = {"w": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([3.0])}
      >>> masked = jaxpruner.apply_mask(params, {"w": jnp.asarray([True, False]), "b": None})
      >>> masked["w"].tolist(), masked["b"].tolist()
      ([1.0, 0.0], [3.0])
    """
    storage = mask_storage.PackedStorage() if is_packed else mask_storage.DenseStorage()
    return trees.map_pruned(lambda p, mask: _masked(storage, p, mask), params, masks, otherwise=same)


# One program a leaf where they are called eagerly; inlined elsewhere, and traced once for leaves of one shape.


@functools.partial(jax.jit, inline=True)
def is_new(mask: Any, before: Any) -> Any:
    """Where a weight came into its mask."""
    return mask & ~before


@functools.partial(jax.jit, inline=True)
def _without_new(param: Any, mask: Any, before: Any) -> Any:
    return jnp.where(is_new(mask, before), 0, param)


@functools.partial(jax.jit, inline=True)
def _moved(proposed: Any, mask: Any, weight: Any, param: Any) -> Any:
    # A kept weight is what was proposed, to the bit; another makes the step that was made from 0.
    return jnp.where(weight == param, proposed, weight + (proposed - param))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _masked(storage: mask_storage.MaskStorage, param: Any, stored: Any) -> Any:
    return jnp.where(storage.decode(stored, jnp.shape(param)), param, 0)


def apply_state_masks(tree: Any, opt_state: Any) -> Any:
    """Applies the masks of an optimizer state to a tree shaped like the parameters.

    Use it for trees that are evaluated in place of the parameters and are dense where one of their parts was: averages
    over steps (EMA, Polyak), `optax.contrib.schedule_free_eval_params`, slow weights of lookahead and means of
    checkpoints.

    Args:
      tree: any tree whose leaves have the paths of the parameters.
      opt_state: the state of a sparse optimizer, however it is wrapped; masks may be packed.

    Returns:
      The tree with zeros where a mask prunes.

    Raises:
      ValueError: if the state holds no masks, or those of other parameters.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner, optax
      >>> tx = jaxpruner.sparsify(
      ...     optax.sgd(0.1), algorithm="magnitude", sparsity=0.5, update_start_step=0, update_end_step=0
      ... )
      >>> params = {"w": jnp.asarray([[1.0, 4.0, 2.0, 3.0]])}
      >>> _, state = tx.update({"w": jnp.zeros((1, 4))}, tx.init(params), params)
      >>> average = {"w": jnp.full((1, 4), 5.0)}
      >>> jaxpruner.apply_state_masks(average, state)["w"].tolist()
      [[0.0, 5.0, 0.0, 5.0]]
    """
    masks = state_masks(opt_state)
    paths = {path for path, _ in trees.named_leaves(tree)}
    if strange := [path for path in masks if path not in paths]:
        raise ValueError(
            f"apply_state_masks: the state masks {trees.leaf_name(strange[0])}, which the tree does not have; give a "
            "tree with the paths of the parameters that the optimizer trains."
        )

    def place(path: trees.KeyPath, leaf: Any) -> Any:
        if path not in masks:
            return leaf
        with trees.errors_at(path):
            return _masked(_storage(masks[path], leaf), leaf, masks[path])

    return trees.map_named(place, tree)


def state_masks(opt_state: Any) -> dict[trees.KeyPath, Any]:
    """The masks of all sparse states in an optimizer state, as they are stored, by the path of their parameter."""
    states = find_states(opt_state)
    if not states:
        raise ValueError("opt_state: holds no sparse state; pass the state of an optimizer of jaxpruner.sparsify.")
    return {path: mask for state in states for path, mask in trees.named_leaves(state.masks)}


def _storage(mask: Any, param: Any) -> mask_storage.MaskStorage:
    storage = mask_storage.storage_of(mask, jnp.shape(param))
    if jnp.shape(mask) != storage.shape(jnp.shape(param)):
        raise ValueError(
            f"the mask has shape {jnp.shape(mask)} and does not fit a parameter of shape {jnp.shape(param)}; stacked "
            "states are taken apart by jax.vmap."
        )
    return storage


def find_states(opt_state: Any) -> list[SparseState]:
    """All `SparseState`s inside an optimizer state, however it is wrapped.

    It also finds the mappings of their fields that checkpoints and `flax.nnx.state` make.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_state)
    states = [_as_state(node) for node in leaves if _is_state(node)]
    return [trees.unboxed(state) if trees.is_boxed(state.count) else state for state in states]


def _is_state(node: Any) -> bool:
    return isinstance(node, SparseState) or (
        isinstance(node, Mapping) and {"masks", "target_sparsities", "count"} <= set(node)
    )


def _as_state(node: Any) -> SparseState:
    if isinstance(node, SparseState):
        return node
    inner_state = node.get("inner_state")
    if isinstance(inner_state, Mapping) and "weights" in inner_state:
        inner_state = StraightThroughState(inner_state["weights"], inner_state.get("inner_state"))
    state = SparseState(node["masks"], inner_state, node["target_sparsities"], node["count"])
    return with_statistics(state, node.get("statistics"))


def find_state(opt_state: Any) -> SparseState:
    """The one `SparseState` inside an optimizer state, however it is wrapped.

    Raises:
      ValueError: if there is none, or more than one.
    """
    found = find_states(opt_state)
    if len(found) != 1:
        raise ValueError(f"opt_state: holds {len(found)} sparse states; pass the state of one sparse transformation.")
    return found[0]


def with_statistics(state: SparseState, statistics: Any) -> SparseState:
    """The state with these statistics; one without that field if they are None."""
    return SparseState(*state[:4]) if statistics is None else RememberingState(*state[:4], statistics)


def as_state(targets: Any) -> Any:
    """Target sparsities as a state keeps them: an array for each leaf, since no buffer may be donated twice."""
    return trees.to_state(jax.tree.map(lambda target: jnp.asarray(target, jnp.float32), targets))


def with_weights(state: SparseState, params: Any) -> SparseState:
    """The state at count 0 of a straight-through method that shows sparse parameters."""
    weights = own_buffers(pruned_only(params, state.masks))
    return state._replace(inner_state=StraightThroughState(weights, state.inner_state))


def own_buffers(tree: Any) -> Any:
    """A copy of each leaf, since hosts donate the parameters and the state together, and no buffer twice."""
    return jax.tree.map(jnp.copy, tree)


def dense_weights(params: Any, state: SparseState, masks: Any) -> Any:
    """The dense parameters behind the masked ones, of a straight-through state."""
    # A kept weight is read from the parameters: XLA may have rounded the hidden one's update otherwise.
    return trees.map_pruned(
        lambda p, w, mask: jnp.where((state.count == 0) | mask, p, w),
        params,
        state.inner_state.weights,
        masks,
        otherwise=same,
    )


def pruned_only(params: Any, masks: Any) -> Any:
    """The parameters that are pruned, MaskedNode elsewhere."""
    return trees.to_state(trees.map_pruned(lambda p, _: p, params, masks))


def when(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """`lax.cond`, decided at once where the predicate is known: eager steps then compile nothing anew."""
    if not isinstance(predicate, jax.core.Tracer):
        return then() if predicate else otherwise()
    return jax.lax.cond(predicate, then, otherwise)


def _laid_out_as(old: Any, new: Any) -> Any:
    """The new masks in the layout of the old ones, where layouts are part of their types."""
    # Hooks may return trees of another shape, for others to complain about.
    return jax.tree.map(layouts.laid_out_like, old, new) if jax.tree.structure(old) == jax.tree.structure(new) else new


def same(leaf: Any) -> Any:
    """What happens to a leaf that is not pruned."""
    return leaf
