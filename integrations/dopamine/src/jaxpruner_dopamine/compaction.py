"""Agents without their dead units: the compact network, in place of the one that an agent acts with."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import jaxpruner
from jaxpruner.compaction import files
from jaxpruner_dopamine.mixin import SparseAgent


class CompactNetwork:
    """A compact Dopamine network, called as agents call their network: `apply(params, state, ...)`.

    Attributes:
      small: the compact function that the agent acts with, its parameters and its report.
    """

    def __init__(self, network_def: Any, whole: Any, small: jaxpruner.Compact):
        self.network_def, self.small = network_def, small
        self._shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole)
        self._calls: dict[Any, jaxpruner.Compact] = {}

    def __getattr__(self, name: str) -> Any:
        # Methods that agents name in `apply(..., method=network_def.actor)`.
        return getattr(self.network_def, name)

    def apply(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The network's outputs, from the small parameters."""
        arrays, settings = _parted(kwargs)
        key = (len(args), frozenset(settings.items()))
        if key not in self._calls:
            # Types alone: this happens where JAX traces.
            example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), (args, arrays))
            whole = functools.partial(_call, self.network_def, settings)
            self._calls[key] = jaxpruner.compact(whole, self._shapes, *example, keep=self.small.kept)
        return self._calls[key].fn(params, args, arrays)


def _parted(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays, and what is none: a number of quantiles, a method."""
    arrays = {name: value for name, value in kwargs.items() if hasattr(value, "dtype")}
    return arrays, {name: value for name, value in kwargs.items() if name not in arrays}


def _call(network_def: Any, settings: dict[str, Any], params: Any, args: Any, arrays: dict[str, Any]) -> Any:
    return network_def.apply(params, *args, **arrays, **settings)


def acting_function(agent: SparseAgent) -> tuple[Any, tuple[Any, Any]]:
    """`fn(params, (state,), arrays)` that an agent acts with, and an example of the arguments after the parameters."""
    arrays, settings = _parted(agent._acting())
    rng = np.random.default_rng(0)
    is_picture = np.issubdtype(np.dtype(getattr(agent, "observation_dtype", float)), np.integer)
    state: Any = rng.integers(0, 256, agent.state.shape) if is_picture else rng.normal(size=agent.state.shape)
    state = agent._seen(state.astype(agent.state.dtype))
    return functools.partial(_call, agent.network_def, settings), ((state,), arrays)


def compacted(agent: SparseAgent) -> CompactNetwork:
    """The network of an agent without the units that are dead in its parameters."""
    fn, example = acting_function(agent)
    params = agent._params
    return CompactNetwork(agent.network_def, params, jaxpruner.compact(fn, params, *example))


def load(agent: SparseAgent, path: str | os.PathLike[str]) -> CompactNetwork:
    """The network of `jaxpruner.compaction.files.save_compact(path, network.small)`, for an agent like it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is of another network.
    """
    fn, example = acting_function(agent)
    return CompactNetwork(agent.network_def, agent._params, files.load_compact(path, fn, agent._params, *example))


@contextlib.contextmanager
def acting_with(agent: SparseAgent, network: CompactNetwork) -> Iterator[SparseAgent]:
    """Within this context, an agent acts with a compact network, by its own code."""
    where = agent._params_attribute
    before = {name: getattr(agent, name) for name in ("network_def", where)}
    agent.network_def = network
    setattr(agent, where, network.small.params)
    try:
        yield agent
    finally:
        for name, value in before.items():
            setattr(agent, name, value)
