"""Adds the sparsity to what a Scenic train step passes to its logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jaxpruner
from jaxpruner.training.projection import find_states, pruned_only


def sparsity_logs(train_state: Any) -> dict[str, Any]:
    """`{"sparsity": ...}` of a Scenic train state; empty if it is not sparse.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner, optax
      >>> from scenic.train_lib import train_utils
      >>> params = {"head": {"kernel": jnp.array([[0.0, -4.0], [3.0, 0.0]]), "bias": jnp.zeros(2)}}
      >>> tx = jaxpruner.sparsify(optax.sgd(0.1), algorithm="preserve")
      >>> sparsity_logs(train_utils.TrainState(params=params, opt_state=tx.init(params)))
      {'sparsity': 0.5}
    """
    pruned = [pruned_only(train_state.params, state.masks) for state in find_states(train_state.opt_state)]
    if not jax.tree.leaves(pruned):
        return {}
    return {"sparsity": jaxpruner.summarize_sparsity(pruned, only_total_sparsity=True)["_total_sparsity"]}


def with_sparsity(result: Any) -> Any:
    """What a train step returns, with `sparsity` where its trainer logs.

    This is in the training logs of (state, metrics, logs, ...). If a trainer returns no logs, it is a metric with its
    normalizer. A result with neither is returned as it is.
    """
    if not isinstance(result, tuple) or not hasattr(result[0], "opt_state"):
        return result
    state, *rest = result
    sparsity = sparsity_logs(state)
    if len(rest) > 1 and _are_metrics(rest[0]) and _are_logs(rest[1]):
        rest[1] = {**rest[1], **sparsity}
        return (state, *rest)
    for i, part in enumerate(rest):
        if _are_metrics(part):
            rest[i] = {**part, **{name: (value, 1) for name, value in sparsity.items()}}
            break
    return (state, *rest)


def _are_logs(part: Any) -> bool:
    """Whether these are numbers and vectors, whose means Scenic logs. Outputs of a model have more axes."""
    return isinstance(part, Mapping) and all(_is_numeric(value) and jnp.ndim(value) < 2 for value in part.values())


def _are_metrics(part: Any) -> bool:
    return isinstance(part, Mapping) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in part.values())


def _is_numeric(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(value, int | float) or (dtype is not None and jnp.issubdtype(dtype, jnp.number))
