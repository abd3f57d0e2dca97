"""Masks from scores, by the names that existing scripts use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxpruner import sparsity_types

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

TopKFn = Callable[..., "Bool[Array, '*s']"]


def get_topk_fn(sparsity_type: sparsity_types.SparsityType | type[sparsity_types.SparsityType]) -> TopKFn:
    """The function `fn(scores, sparsity) -> mask` of a structure.

    Args:
      sparsity_type: a structure, or a class of one that needs no arguments (`Unstructured`).

    Returns:
      A function from scores of any shape and a sparsity in [0, 1), which may be traced, to a boolean
      mask that keeps the highest scores.

    Raises:
      ValueError: if it is not a structure.

    Examples:
      >>> import jax.numpy as jnp
      >>> topk_fn = get_topk_fn(sparsity_types.NByM(1, 2))
      >>> topk_fn(jnp.asarray([1.0, 4.0, 3.0, 2.0]), 0.5).tolist()
      [False, True, True, False]
    """
    structure = sparsity_types.for_leaf(sparsity_type, (), None)

    def topk_fn(scores: Float[Array, "*s"], sparsity: float | Float[Array, ""]) -> Bool[Array, "*s"]:
        return structure.mask(jnp.asarray(scores), sparsity)

    return topk_fn
