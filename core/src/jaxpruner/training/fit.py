"""Checks that a state fits the current configuration, and finds the masks that training starts from."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxpruner import coupled_structures, mask_storage, trees
from jaxpruner.training.projection import SparseState, StraightThroughState

if TYPE_CHECKING:
    from jaxpruner.training.protocol import Algorithm

FROM_PARAMS = "from_params"


def check_state(updater: Algorithm, state: SparseState, params: Any) -> None:
    """Raises a ValueError if the shapes in a state show that it is of another configuration."""
    name = type(updater).__name__
    if isinstance(state.inner_state, StraightThroughState) and not updater.straight_through:
        raise ValueError(
            f"opt_state: holds the dense weights of a straight-through algorithm, and algorithm is {name} now; go on "
            "with the algorithm that it was made by, or start from the parameters: tx.init(params), with "
            "initial_sparsity='from_params' to keep their zeros."
        )
    if (state.statistics is not None) != updater.remembers:
        has, does = ("no ", "remembers some") if updater.remembers else ("", "remembers nothing")
        raise ValueError(
            f"opt_state: holds {has}statistics, and {name}, the algorithm now, {does}; go on with the algorithm that "
            "it was made by, or start from the parameters: tx.init(params), with initial_sparsity='from_params' to "
            "keep their zeros."
        )

    def check(path: trees.KeyPath, mask: Any, param: Any) -> None:
        if trees.is_unpruned(mask) or not hasattr(mask, "dtype"):
            return
        expected, shape = updater.storage, jnp.shape(param)
        if (mask.dtype == jnp.uint8) == isinstance(expected, mask_storage.DenseStorage):
            packed = isinstance(expected, mask_storage.PackedStorage)
            raise ValueError(
                f"{trees.leaf_name(path)}: use_packed_masks={packed} now, and the state was made with "
                f"use_packed_masks={not packed} ({mask.dtype} masks); set it as it was then."
            )
        if jnp.shape(mask) != expected.shape(shape):
            raise ValueError(
                f"{trees.leaf_name(path)}: the mask of the state, {mask.dtype}{list(jnp.shape(mask))}, is not one of a "
                f"parameter of shape {shape}, as this configuration keeps it; make the state anew with tx.init(params)."
            )

    trees.map_named(check, state.masks, params)


def check_pruned(targets: Any, state: SparseState) -> None:
    """Raises a ValueError if a state has masks for other leaves than a configuration prunes."""
    asked = {path for path, _ in trees.named_leaves(targets)}
    held = {path for path, _ in trees.named_leaves(state.masks)}
    if asked != held:
        path = min(asked ^ held)
        takes, has = ("takes", "no mask for") if path in asked else ("does not take", "a mask for")
        raise ValueError(
            f"{trees.leaf_name(path)}: filter_fn {takes} it, and the state has {has} it; set filter_fn and "
            "custom_sparsity_map as they were when the state was made, or make the state anew with tx.init(params)."
        )


def check_masks_field(updater: Any) -> None:
    """Raises a ValueError if the algorithm cannot start from `masks`."""
    masks, name = updater.masks, type(updater).__name__
    if isinstance(masks, str) and masks != FROM_PARAMS:
        raise ValueError(f"masks: {masks!r} is not known; give a tree of masks, or {FROM_PARAMS!r}.")
    if masks is not None and updater.straight_through:
        raise ValueError(
            f"masks: cannot be used with {name}. This is because it makes a mask in every step from dense weights, and "
            "would bring back what these prune; use a pruner such as magnitude."
        )
    if masks is not None and updater.renews_all:
        raise ValueError(
            f"masks: cannot be used with {name}, nor initial_sparsity={FROM_PARAMS!r}. This is because its dense "
            "phases train all weights; use a pruner such as magnitude."
        )


def reached(updater: Any, targets: Any, params: Any) -> Any:
    """The sparsities of all leaves that masks reach, from those that were asked for."""
    if not isinstance(updater.sparsity_type, coupled_structures.Coupled):
        return targets
    _check_coupled(updater)
    return updater.sparsity_type.reach(targets, params)


def _check_coupled(updater: Any) -> None:
    """Raises a ValueError for settings that cannot be combined with units of several parameters."""
    name = type(updater).__name__
    if updater.regrows:
        raise ValueError(
            f"sparsity_type: cannot use {name} with groups. This is because a unit whose incoming and outgoing weights "
            "are all zero has no gradient, so that what regrows would never learn; use magnitude or magnitude_ste."
        )
    for field, given in (("topk_fn", updater.custom_topk), ("stack_axes", updater.stack_axes is not None)):
        if given:
            raise ValueError(f"{field}: has no effect on groups, whose units are in several parameters; leave it out.")
    if updater.masks is not None:
        raise ValueError(
            f"masks: cannot be used with groups in {name}. This is because masks of single weights are no masks of "
            "units; remove what is dead first (jaxpruner.compact), and prune the small function."
        )
    if getattr(updater, "custom_sparsity_map", None) and updater.is_global:
        raise ValueError(
            f"custom_sparsity_map: cannot be used with groups in {name}, which ranks all units together; use the "
            "algorithm that ranks each group, or groups.choose(...)."
        )
    if getattr(updater.sparsity_type, "budget", None) == "flops" and not updater.is_global:
        raise ValueError(
            f"budget: {name} prunes each group by itself, and FLOPs are a budget of all; use a global_ algorithm."
        )


def given_masks(masks: Any, params: Any, targets: Any) -> Any:
    """The user's masks for the leaves that are pruned; ones where the user gives none.

    Raises:
      ValueError: for masks of other leaves or shapes.
    """
    given = dict(trees.named_leaves(masks))
    pruned = dict(trees.named_leaves(trees.map_pruned(lambda p, _: p, params, targets)))
    if strange := sorted(set(given) - set(pruned)):
        raise ValueError(
            f"masks: {trees.leaf_name(strange[0])} is no parameter that filter_fn selects; give a tree like the "
            "parameters with None where a leaf is not pruned."
        )

    def take(path: trees.KeyPath, param: Any, target: Any) -> Any:
        if trees.is_unpruned(target):
            return None
        mask = given.get(path)
        if mask is None:
            return jnp.ones_like(param, dtype=bool)
        if jnp.shape(mask) != jnp.shape(param):
            raise ValueError(
                f"masks: {trees.leaf_name(path)} has shape {jnp.shape(mask)}, and the parameter {jnp.shape(param)}; "
                "give boolean masks of the parameters' shapes (updater.current_masks makes such of packed ones)."
            )
        return jnp.asarray(mask) != 0

    return trees.map_named(take, params, targets)


def nonzero(param: Any) -> Any:
    """What is not zero; all of a leaf that is zero throughout, which starts at zero and is not pruned."""
    return (param != 0) | ~jnp.any(param != 0)


def check_paths(masks: Collection[trees.KeyPath], params: Any) -> None:
    """Raises a ValueError for a mask of a leaf that the parameters lack, such as those of `{"params": ...}`."""
    paths = {path for path, _ in trees.named_leaves(params)}
    if strange := [path for path in masks if path not in paths]:
        raise ValueError(
            f"params: the state masks {trees.leaf_name(strange[0])}, which is no path of these parameters "
            f"({', '.join(sorted(map(trees.leaf_name, paths))[:3])}, ...); give those that the optimizer trains."
        )
