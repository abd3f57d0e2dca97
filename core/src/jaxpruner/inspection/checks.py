"""Checks that a training is as sparse as it should be, before its first step and afterwards."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import coupled_structures, mask_storage, sparsity_schedules, sparsity_types, trees
from jaxpruner.training import projection

if TYPE_CHECKING:
    from jaxpruner.base_updater import BaseUpdater

_INSIDE = (
    "Something outside of it changes the updates: let jaxpruner.sparsify come last in a chain, and put wrappers that "
    "average or scale (schedule_free, lookahead, scale) inside of it, sparsify(wrapper(...)). Or these are averages of "
    "the parameters: put them on the masks with jaxpruner.apply_state_masks."
)


def check_schedule(updater: BaseUpdater, num_steps: int | None = None) -> None:
    """Raises a ValueError for a schedule that would not make a training sparse.

    Such a schedule makes no masks, or is gradual but has a single update, which would do all the pruning at once. For
    RigL and SET, it replaces weights in every step, so that no step trains them, or never replaces any. Your own
    schedules are not checked.

    Args:
      updater: the algorithm.
      num_steps: the number of steps of the training, which are counted from 0. If given, the schedule must start and
        end within it.

    Examples:
      >>> import jaxpruner
      >>> updater = jaxpruner.create_updater_from_config({
      ...     "algorithm": "magnitude", "sparsity": 0.8,
      ...     "update_start_step": 0, "update_end_step": 1000, "update_freq": 10,
      ... })
      >>> jaxpruner.check_schedule(updater, num_steps=1001)
      >>> jaxpruner.check_schedule(updater, num_steps=500)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: update_end_step: the last mask update is at step 1000, and the training has 500 steps ...
    """
    if not updater.follows_schedule:
        return
    schedule = updater.scheduler
    name = type(updater).__name__
    if updater.starts_dense and not updater.straight_through:
        _check_pruning(schedule, name)
        _check_phases(updater, schedule, name)
    if hasattr(updater, "drop_fraction_fn") and updater.regrows:
        _check_regrowth(updater, schedule, name)
    if num_steps is None:
        return
    first = schedule.start_step if updater.straight_through else schedule.first_update_step
    for key, step in (("update_start_step", first), ("update_end_step", _end(updater))):
        if step is not None and step >= num_steps:
            when = "first" if key == "update_start_step" else "last"
            raise ValueError(
                f"{key}: the {when} mask update is at step {step}, and the training has {num_steps} steps (the last is "
                f"{num_steps - 1}), so it would not reach its sparsity; let the schedule end earlier, or train longer."
            )


def _end(updater: BaseUpdater) -> int | None:
    if updater.straight_through and isinstance(updater.scheduler, sparsity_schedules.PolynomialSchedule):
        return max(updater.scheduler.update_end_step - 1, 0)  # it makes masks in every step
    return updater.scheduler.last_update_step


def _check_pruning(schedule: sparsity_schedules.Schedule, name: str) -> None:
    if isinstance(schedule, sparsity_schedules.NoUpdateSchedule):
        raise ValueError(
            f"update_start_step: missing. {name} would never make masks and the training would stay dense; give "
            "update_start_step and update_end_step (the same step prunes at once)."
        )
    if not isinstance(schedule, sparsity_schedules.PeriodicSchedule):
        return
    start, end, freq = schedule.update_start_step or 0, schedule.update_end_step or 0, schedule.update_freq
    gradual = isinstance(schedule, sparsity_schedules.PolynomialSchedule)
    if schedule.num_updates == 0 or (gradual and schedule.num_updates == 1 and start != end):
        number = "no multiple" if schedule.num_updates == 0 else "one multiple only"
        raise ValueError(
            f"update_freq: {number} of {freq} lies between update_start_step={start} and update_end_step={end}, so "
            f"masks would {'never be made' if schedule.num_updates == 0 else 'not rise, but prune all at once'}; the "
            f"nearest that does is update_freq={max(1, (end - start) // 2)}, or update_start_step={end} for one update."
        )


def _check_phases(updater: BaseUpdater, schedule: sparsity_schedules.Schedule, name: str) -> None:
    if not issubclass(updater.gradual_schedule, sparsity_schedules.AlternatingSchedule):
        return
    number = schedule.num_updates
    is_ours = isinstance(schedule, sparsity_schedules.OneShotSchedule | sparsity_schedules.AlternatingSchedule)
    if is_ours and number is not None and number < 3:
        raise ValueError(
            f"update_freq: {name} is sparse and dense in turn, and this schedule has {number} mask updates, of which "
            "it would make one sparse phase; give a start, an end and a period with three updates at least, or use "
            "algorithm='magnitude'."
        )


def _check_regrowth(updater: Any, schedule: sparsity_schedules.Schedule, name: str) -> None:
    if schedule.num_updates == 0:
        raise ValueError(
            f"update_start_step: {name} would never change its mask; give update_start_step, update_end_step and an "
            "update_freq that has multiples between them, or use algorithm='static_sparse'."
        )
    is_each_step = isinstance(schedule, sparsity_schedules.PeriodicSchedule) and schedule.update_freq == 1
    if updater.skip_gradients and is_each_step and schedule.num_updates != 1:
        raise ValueError(
            f"update_freq: 1 lets {name} change its mask in every step from start to end, and a step that changes it "
            "does not train; give a period, such as update_freq=100."
        )
    if schedule.first_update_step is not None and _number(updater.drop_fraction_fn, schedule.first_update_step) == 0:
        raise ValueError(
            f"update_end_step: the drop fraction of {name} is 0 already at its first update, step "
            f"{schedule.first_update_step}, so its mask would never change; let the end be later than the start, or "
            "use algorithm='static_sparse'."
        )


def _number(fn: Any, *arguments: Any) -> float | None:
    """What a function of schedules gives, also while something is traced; None where it depends on that."""
    try:
        with jax.ensure_compile_time_eval():
            return float(fn(*arguments))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return None


def check_targets(updater: BaseUpdater, params: Any) -> None:
    """Raises a ValueError if leaves would not get the sparsity that is asked for, and warns of zeros that rank alike.

    Args:
      updater: the algorithm.
      params: the parameters, or their shapes.
    """
    params = trees.numbers_only(params)
    targets = updater.get_target_sparsities(params)
    asked = [target for _, target in trees.named_leaves(targets) if not isinstance(target, jax.core.Tracer)]
    if asked and not any(asked) and updater.masks is None:
        raise ValueError(
            f"sparsity: is 0 for all parameters, so {type(updater).__name__} would prune nothing; give a sparsity (an "
            "updater has it in sparsity_distribution_fn, or in sparsity), or use algorithm='no_prune' for a dense run."
        )
    if disagreement := structure_disagreement(updater, params, targets):
        raise ValueError(disagreement)
    _tell_of_large_units(updater, params, targets)
    _tell_of_zeros(updater, params, targets)


def _asked_of_structures(updater: BaseUpdater, params: Any, targets: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Of each pruned leaf whose sparsity is known: its path, that sparsity, its shape and its structure."""
    if updater.custom_topk:
        return
    pruned = dict(trees.named_leaves(trees.map_pruned(lambda p, _: p, params, targets)))
    for path, target in trees.named_leaves(targets):
        if not isinstance(target, jax.core.Tracer):
            yield path, target, jnp.shape(pruned[path]), updater.structure(path, pruned[path])


def structure_disagreement(updater: BaseUpdater, params: Any, targets: Any) -> str | None:
    """What is wrong if n:m keeps another share than the sparsity that was asked for; None if nothing is."""
    for path, target, _, of_leaf in _asked_of_structures(updater, params, targets):
        structure = of_leaf.of_layer
        if not isinstance(structure, sparsity_types.NByM) or target == 0:
            continue
        given = 1 - structure.n / structure.m
        if abs(given - float(target)) > 1e-6:
            return (
                f"{trees.leaf_name(path)}: a sparsity of {float(target):g} is asked for, and {structure.n}:"
                f"{structure.m} gives {given:g}; ask for sparsity={given:g} with dist_type='uniform' (or for this leaf "
                "in custom_sparsity_map), or choose another n:m."
            )
    return None


# Why an algorithm that scores with first gradients may prune nothing.
SILENT = (
    "all scores were 0: a last layer that starts at zero lets no gradient pass to the others. Let it start from other "
    "values, or make masks of parameters that were trained for some steps, updater.instant_sparsify(params, ...), for "
    "masks= of static_sparse or preserve"
)


# What to do with an algorithm that scores with the loss, in a trainer that hands over gradients alone.
MASKS_BEFORE = (
    "make masks before, updater.instant_sparsify(params, loss_fn=..., batches=...), and train with masks= of "
    "static_sparse or preserve"
)


def check_trainer(updater: BaseUpdater) -> None:
    """Raises a ValueError for an algorithm that scores with the loss, in a trainer that does not pass it on.

    Without it, such an algorithm fails in its first step, which some trainers reach after a long time.
    """
    if getattr(updater, "needs_loss", False):
        raise ValueError(
            f"algorithm: {type(updater).__name__} scores with the loss, which this trainer does not pass on; "
            f"{MASKS_BEFORE}."
        )


@functools.cache
def warn_once(message: str) -> None:
    """Warns once per process."""
    warnings.warn(message, UserWarning, stacklevel=4)


# Shares of a leaf: how far the sparsity of whole units may differ from what was asked for without a message.
_FAR = 0.1


def _tell_of_large_units(updater: BaseUpdater, params: Any, targets: Any) -> None:
    """A leaf of a few units cannot have any sparsity: one unit is always kept."""
    if isinstance(updater.sparsity_type, coupled_structures.Coupled):
        return
    for path, target, shape, structure in _asked_of_structures(updater, params, targets):
        if isinstance(structure.of_layer, sparsity_types.Unstructured):
            continue
        units = structure.num_rivals(shape)
        given = 1 - max(1, round(units * (1 - float(target)))) / max(1, units)
        if abs(given - float(target)) > _FAR:
            warn_once(
                f"{trees.leaf_name(path)}: a sparsity of {float(target):g} is asked for, and of its {units} units of "
                f"{structure.of_layer} a share of {given:.2g} is pruned. Choose smaller units, or other axes, or "
                "exclude the leaf with filter_fn."
            )


def _tell_of_zeros(updater: BaseUpdater, params: Any, targets: Any) -> None:
    """Weights that are all zero rank alike, so that masks made before they are trained keep the first of them."""
    first = 0 if updater.straight_through else updater.scheduler.first_update_step
    is_coupled = isinstance(updater.sparsity_type, coupled_structures.Coupled)  # whose scores are of several leaves
    if first != 0 or not updater.follows_schedule or not updater.starts_dense or is_coupled:
        return
    for path, param in trees.named_leaves(trees.map_pruned(lambda p, t: p if t else None, params, targets)):
        if isinstance(param, jax.Array | np.ndarray) and not isinstance(param, jax.core.Tracer) and param.size:
            if updater.straight_through and not _number(updater.sparsity_at, 0.5, 0):
                return
            if not bool(jnp.any(param != 0)):
                warn_once(
                    f"{trees.leaf_name(path)} is zero throughout, and masks are made at step 0: by the rule for ties "
                    "they keep its first weights. Let update_start_step be later, or exclude it with filter_fn."
                )


def check_sparse(params: Any, opt_state: Any, updater: BaseUpdater | None = None) -> None:
    """Raises a ValueError if parameters do not lie on the masks of their optimizer, or the masks are not as asked.

    Call it at the first summary. It reads the arrays, and costs the step nothing.

    Args:
      params: the parameters after an update, concrete arrays.
      opt_state: the state of the optimizer, however it is wrapped. At count 0 nothing is checked. States that `vmap` or
        `pmap` made are checked one by one, so that the parameters need their leading axes too.
      updater: the algorithm. If given, masks must have the sparsity that was asked for once the schedule is over. The
        parameters of a straight-through method with `wrap_optax` are dense, and are skipped.

    Raises:
      ValueError: it names the leaf, how many weights should be zero but are not, and the likely causes.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner, optax
      >>> tx = jaxpruner.sparsify(
      ...     optax.sgd(0.1), algorithm="magnitude", sparsity=0.5, update_start_step=0, update_end_step=0
      ... )
      >>> params = {"w": jnp.asarray([[1.0, 4.0, 2.0, 3.0]])}
      >>> updates, state = tx.update({"w": jnp.ones((1, 4))}, tx.init(params), params)
      >>> jaxpruner.check_sparse(optax.apply_updates(params, updates), state)
      >>> jaxpruner.check_sparse(params, state)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: w: ...
    """
    states = projection.find_states(opt_state)
    if not states:
        raise ValueError("opt_state: holds no sparse state; pass the state of an optimizer of jaxpruner.sparsify.")
    for of_one, state in (pair for stacked in states for pair in _each(params, stacked)):
        if not _count(state):
            continue
        is_dense = getattr(updater, "straight_through", False) and not isinstance(
            state.inner_state, projection.StraightThroughState
        )
        if not is_dense:
            _require_on_masks(dict(trees.named_leaves(of_one)), state)
        if updater is not None:
            _require_as_asked(of_one, state, updater)


def _each(params: Any, state: projection.SparseState) -> Iterator[tuple[Any, projection.SparseState]]:
    """Parameters and their state; what `vmap` or `pmap` stacked along the first axes, one after another."""
    counts = jax.tree.leaves(state.count)[0]
    if not jnp.ndim(counts):
        yield params, state
        return
    for i in range(len(counts)):
        yield from _each(*jax.tree.map(lambda leaf, i=i: leaf[i], (params, state)))


def _count(state: projection.SparseState) -> int:
    return int(jax.tree.leaves(state.count)[0])


def _require_on_masks(leaves: dict[trees.KeyPath, Any], state: projection.SparseState) -> None:
    for path, stored in trees.named_leaves(state.masks):
        if path not in leaves:
            raise ValueError(
                f"{trees.leaf_name(path)}: the state has a mask for it, and the parameters have no such leaf; give the "
                "parameters that this optimizer trains."
            )
        param = leaves[path]
        shape = jnp.shape(param)
        mask = mask_storage.storage_of(stored, shape).decode(stored, shape)
        if outside := int(jnp.sum((param != 0) & ~mask)):
            raise ValueError(
                f"{trees.leaf_name(path)}: {outside} of the {int(jnp.sum(~mask))} weights that its mask prunes are not "
                f"zero. {_INSIDE}"
            )


def _require_as_asked(params: Any, state: projection.SparseState, updater: BaseUpdater) -> None:
    last, count = _end(updater), _count(state)
    if updater.starts_dense:
        is_over = last is not None and count > last
        is_asked = updater.follows_schedule or updater.reaches_sparsity
    else:
        # Masks that a user made are as sparse as he wanted.
        is_over, is_asked = True, updater.masks is None or isinstance(updater.masks, str)
    if not (is_asked and is_over):
        return
    try:
        asked, held, slack = shares_pruned(params, state, updater)
    except ValueError:
        return  # masks of a part of the parameters, whose budget is shared with others
    # Masks from parameters may have fewer weights than asked: those that are not zero.
    is_exact = getattr(updater, "keeps_count", False) and updater.masks is None
    excess = held - asked if is_exact else 0.0
    if max(asked - held, excess) <= slack:
        return
    if updater.reaches_sparsity:
        once = "and its mask is made once, in the first step: start anew"
        why = once if held else f"since {SILENT}"
        raise ValueError(f"sparsity: asked {asked:.1%}, and {type(updater).__name__} pruned {held:.1%}, {why}.")
    if not updater.starts_dense:
        raise ValueError(
            f"sparsity: asked {asked:.1%}, masks hold {held:.1%}, and {type(updater).__name__} keeps as many weights "
            "as it starts with; start anew, tx.init(params)."
        )
    raise ValueError(
        f"sparsity: asked {asked:.1%}, masks hold {held:.1%}, and the schedule is over (its last "
        f"update is at step {last}, {count} are done). If the sparsity changed when the training was resumed, let "
        "update_end_step be later."
    )


def shares_pruned(params: Any, state: projection.SparseState, updater: BaseUpdater) -> tuple[float, float, float]:
    """The shares that were asked for, that masks prune, and that rounding allows: of the weights, or of groups' budget.

    Args:
      params: the parameters.
      state: the state of their optimizer.
      updater: the algorithm.
    """
    leaves, masks = dict(trees.named_leaves(params)), dict(trees.named_leaves(state.masks))
    pruned = trees.map_named(lambda path, _: leaves[path] if path in masks else None, state.masks)
    if isinstance(updater.sparsity_type, coupled_structures.Coupled):
        chosen = dict(trees.named_leaves(updater.chosen_sparsities(trees.numbers_only(params))))
        return updater.sparsity_type.share_pruned(mask_storage.decode_stored(state.masks, pruned), chosen)
    targets = dict(trees.named_leaves(updater.get_target_sparsities(pruned)))
    asked, held, slack, total = _weights(leaves, masks, targets, updater)
    total = max(total, 1.0)
    return asked / total, held / total, slack / total


def _weights(
    leaves: dict[trees.KeyPath, Any], masks: dict[trees.KeyPath, Any], targets: dict[trees.KeyPath, Any], updater: Any
) -> tuple[float, float, float, float]:
    """How many weights should be pruned and are, what rounding allows, and how many there are."""
    asked = held = slack = total = 0.0
    for path, target in targets.items():
        shape = jnp.shape(leaves[path])
        kept = float(jnp.sum(updater.storage.decode(masks[path], shape), dtype=jnp.float32))
        size = float(np.prod(shape))
        total, asked, held = total + size, asked + float(target) * size, held + size - kept
        # Shares are rounded to a unit in each layer.
        structure, axis = updater.structure(path, leaves[path]), updater.stack_axis(path, leaves[path])
        layers = 1 if axis is None else shape[axis]
        slack += layers * structure.unit_size(shape) + 1e-3 * size
    return asked, held, slack, total
