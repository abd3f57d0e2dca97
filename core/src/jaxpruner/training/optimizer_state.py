"""The statistics that an inner optimizer keeps for single weights."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpruner import trees


def reset_moments(inner: optax.GradientTransformation, inner_state: Any, params: Any, regrown: Any) -> Any:
    """Gives regrown weights the optimizer statistics that a new weight would have.

    Factored statistics have no entries for single weights, and stay as they are.

    Args:
      inner: the optimizer.
      inner_state: its state.
      params: the parameters, on their masks.
      regrown: boolean masks of the regrown weights, None where a leaf is not pruned.

    Returns:
      The state, with the values of `inner.init(params)` at the regrown weights.
    """
    grown = {trees.leaf_name(path): mask for path, mask in trees.named_leaves(regrown)}

    # By path: some states, such as that of `optax.monitor`, get further leaves in their first step.
    fresh = dict(trees.named_leaves(inner.init(params)))

    def reset(path, old, owner):
        mask = None if trees.is_unpruned(old) else grown.get(owner)
        if mask is None or jnp.shape(old) != mask.shape or path not in fresh:
            return old
        return _where(mask, fresh[path], old)

    return trees.map_named(reset, inner_state, _statistics_owners(inner, inner_state, params))


# Traced once for leaves of one shape.
_where = jax.jit(jnp.where, inline=True)


def second_moments(inner_state: Any, params: Any) -> dict[trees.KeyPath, Any]:
    """The second moments of single weights in an optimizer state, however it is wrapped, by the path of the parameter.

    These are leaves `nu` of a parameter's shape (Adam and all that keep its state, RMSProp, AdaBelief), and `v`
    (Adafactor's, where it does not factor). T5X's own optimizers keep parameter/v, optax v/parameter.
    """
    shapes = {path: jnp.shape(leaf) for path, leaf in trees.named_leaves(params)}
    found: dict[trees.KeyPath, Any] = {}
    for path, leaf in trees.named_leaves(inner_state):
        for owner, name in ((owner_of(path, shapes), None), (owner_of(path[:-1], shapes), path[-1:])):
            if owner is None:
                continue
            before = path[: len(path) - len(owner)][-1:] if name is None else name
            if before in (("nu",), ("v",)) and jnp.shape(leaf) == shapes[owner]:
                found.setdefault(owner, leaf)
    return found


def _statistics_owners(inner: optax.GradientTransformation, inner_state: Any, params: Any) -> Any:
    """A tree like the state: the name of the parameter that a leaf belongs to, or an empty string."""
    names = trees.map_named(lambda path, _: trees.leaf_name(path), params)
    try:
        return optax.tree_utils.tree_map_params(
            inner, lambda _, name: name, inner_state, names, transform_non_params=lambda _: ""
        )
    except Exception:
        # It runs `init` on placeholders, which fails in unforeseeable ways: multi_transform, muon, sm3 and lbfgs
        # are known. Their statistics are the leaves whose key path ends in the parameter's.
        known = {path for path, _ in trees.named_leaves(params)}

        def owner(path, _):
            found = owner_of(path, known)
            return "" if found is None else trees.leaf_name(found)

        return trees.map_named(owner, inner_state)


def owner_of(path: trees.KeyPath, parameters: Container[trees.KeyPath]) -> trees.KeyPath | None:
    """The parameter that a leaf of the state belongs to, by the longest end of its path that names one."""
    # The last end is empty: it names a bare array.
    return next((path[i:] for i in range(len(path) + 1) if path[i:] in parameters), None)
