"""What an architecture of the breadth table is: a function, its parameters, and what else it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Size:
    """How large architectures are made; stock models of hosts have widths of their own.

    Attributes:
      width: multiplies the widths of all layers.
      image: height and width of images.
      tokens: length of sequences.
      batch: examples.
    """

    width: int = 8
    image: int = 16
    tokens: int = 32
    batch: int = 16


QUICK = Size(width=1, image=8, tokens=6, batch=2)


class Case(NamedTuple):
    """An architecture of some size.

    Attributes:
      fn: `fn(params, *args)`.
      params: its parameters, statistics of batch norm included; float arrays only.
      args: what else it takes.
      is_differentiable: whether it has gradients in reverse.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    is_differentiable: bool = True


def of_module(model: Any, *args: Any, **options: Any) -> Case:
    """A module of Flax Linen, with all its collections."""
    params = jax.jit(lambda key, *args: model.init(key, *args, **options))(jax.random.key(0), *args)
    return Case(lambda params, *args: model.apply(params, *args, **options), params, args)


def images(size: Size, channels: int = 3) -> jax.Array:
    shape = size.batch, size.image, size.image, channels
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape, dtype=np.float32))


def sequences(size: Size, width: int) -> jax.Array:
    shape = size.batch, size.tokens, width
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape, dtype=np.float32))


def tokens(size: Size, vocabulary: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, vocabulary, (size.batch, size.tokens)), jnp.int32)


def arrays(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Parameters of a bare function, scaled by what they sum over."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[-2] if len(shape) > 1 else 1))
        for name, shape in shapes.items()
    }
