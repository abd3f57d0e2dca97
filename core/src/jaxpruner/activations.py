"""Sparse activations: the largest of each example pass through."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxpruner import sparsity_types

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


def sparsify_activations(
    x: Float[Array, "*batch *features"],
    sparsity: float | Float[Array, ""],
    structure: sparsity_types.SparsityType | type[sparsity_types.SparsityType] = sparsity_types.Unstructured(),
    batch_axes: int = 1,
) -> Float[Array, "*batch *features"]:
    r"""The largest activations of each example, 0 elsewhere, with straight-through gradients.

    .. math:: y = m(|x|) \odot x, \qquad \partial y / \partial x := 1

    so that activations that are not among the largest still learn (Bengio et al., 2013).

    Args:
      x: activations, examples along the leading axes.
      sparsity: the share of each example that is 0, in [0, 1); may be traced. n:m takes any value except 0.
      structure: which sets of one example may pass; its axes are counted without those of the batch.
      batch_axes: how many leading axes are examples; 0 takes all of `x` as one example.

    Raises:
      ValueError: if an example does not fit the structure, or has no axis.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpruner
      >>> x = jnp.asarray([[1.0, -3.0, 2.0, 0.5]])
      >>> jaxpruner.sparsify_activations(x, 0.5).tolist()
      [[0.0, -3.0, 2.0, 0.0]]
      >>> jax.grad(lambda x: jaxpruner.sparsify_activations(x, 0.5).sum())(x).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """
    if not 0 <= batch_axes < max(x.ndim, 1):
        raise ValueError(
            f"batch_axes: {batch_axes} of the {x.ndim} axes of {x.shape} leave nothing of an example; give fewer."
        )
    structure = sparsity_types.for_leaf(structure, (), jax.ShapeDtypeStruct(x.shape[batch_axes:], x.dtype))
    structure.check_shape(x.shape[batch_axes:])
    choose = functools.partial(structure.mask, sparsity=sparsity)
    for _ in range(batch_axes):
        choose = jax.vmap(choose)
    return _through(x, choose(jax.lax.stop_gradient(jnp.abs(x))))


@jax.custom_jvp
def _through(x: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.where(mask, x, 0)


@_through.defjvp
def _through_jvp(primals: Any, tangents: Any) -> Any:
    return _through(*primals), tangents[0]
