"""Which optimizer states of checkpoints a run can continue from, and what to say about the others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpruner
from jaxpruner_dopamine.sparsity import in_gin


def continued(
    saved: jaxpruner.SparseState,
    described: dict[str, Any] | None,
    updater: jaxpruner.BaseUpdater | None,
    fresh: jaxpruner.SparseState,
    where: str,
) -> tuple[jaxpruner.SparseState, list[str]]:
    """The state of a sparse checkpoint to continue from, and what differs from its configuration."""
    described = described or jaxpruner.describe(updater)  # of a version that stored none
    if updater is None:
        raise ValueError(
            f"sparsify.algorithm: {described['algorithm']!r} in the run of {where}, 'no_prune' now, and a sparse "
            "run does not go on dense. Continue it with the sparsity that it had, keep its zeros with "
            "sparsify.algorithm = 'preserve', or start in another base_dir."
        )
    if isinstance(updater, jaxpruner.PreserveSparsity):
        if any(np.ndim(mask) < np.ndim(zeros) for mask, zeros in _pairs(saved.masks, fresh.masks)):
            raise ValueError(
                f"sparsify.algorithm: 'preserve' does not go on with the whole units that the run of {where} pruned "
                f"(sparsify.sparsity_type = 'groups'). Continue with {described['algorithm']!r} and 'groups', or take "
                "the units out: python -m jaxpruner_dopamine.compact."
            )
        if isinstance(saved.inner_state, jaxpruner.StraightThroughState):
            saved = saved._replace(inner_state=saved.inner_state.inner_state)
        saved = jaxpruner.SparseState(*saved[:4])  # without what another algorithm remembered
        # It can continue from any algorithm's zeros.
        described = jaxpruner.describe(updater) | {"use_packed_masks": described["use_packed_masks"]}
    try:
        changes = jaxpruner.check_resumed(described, updater, where)
    except ValueError as error:
        raise ValueError(f"sparsify.{in_gin(error)}") from error
    require_same_layout(saved, fresh, where)
    return saved, [f"sparsify, in gradient steps: {c}" if c.startswith("update_") else f"sparsify.{c}" for c in changes]


def _pairs(saved: Any, fresh: Any) -> list[tuple[Any, Any]]:
    """The leaves of two trees of masks that have the same path."""
    ours = dict(jax.tree_util.tree_leaves_with_path(fresh))
    return [(leaf, ours[path]) for path, leaf in jax.tree_util.tree_leaves_with_path(saved) if path in ours]


def require_same_layout(saved: Any, expected: Any, where: str) -> None:
    """Raises a ValueError that names the first part of two optimizer states that differs."""
    ours, theirs = ({jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
                    for state in (expected, saved))  # fmt: skip
    for name in dict.fromkeys([*ours, *theirs]):
        there, here = (
            f"{jnp.result_type(leaves[name])}{list(np.shape(leaves[name]))}" if name in leaves else "nothing"
            for leaves in (theirs, ours)
        )
        if there != here:
            raise ValueError(
                f"{where}: its optimizer state is of another network, optimizer or choice of layers: "
                f"{name.lstrip('.')} is {there} there and {here} here. Continue with the network, the optimizer and "
                "the sparsify.filter_fn that it was written with, or start in another base_dir."
            )


def with_inner(state: jaxpruner.SparseState, inner: Any) -> jaxpruner.SparseState:
    """A sparse state around the state of a dense optimizer."""
    if isinstance(state.inner_state, jaxpruner.StraightThroughState):
        inner = state.inner_state._replace(inner_state=inner)
    return state._replace(inner_state=inner)
