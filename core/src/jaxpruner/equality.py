"""When two configurations are the same: fields are compared by their contents."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def comparable(value: Any) -> Any:
    """A hashable value that is equal for equal fields."""
    if isinstance(value, functools.partial):
        return "partial", value.func, comparable(value.args), comparable(value.keywords)
    if hasattr(value, "items"):
        return "mapping", frozenset((key, comparable(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(comparable, value))
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return "key", str(value.dtype), comparable(jax.random.key_data(value))
        return "array", value.shape, str(value.dtype), np.asarray(value).tobytes()
    try:
        hash(value)
    except TypeError:
        return "object", id(value)
    return value
