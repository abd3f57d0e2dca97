"""Which weights of a layer are pruned, and what the others become, from statistics of its inputs."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from jaxpruner import sparsity_types
from jaxpruner.calibration.statistics import Statistics, wide_dtype
from jaxpruner.selection import counts, highest_of_each, n_of_m, top_k_mask

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    Matrices = Float[Array, "batch inputs outputs"]

DAMPING, BLOCK = 0.01, 128
_DAMPINGS = 12  # times ten each, before a Hessian is given up


def magnitude(weights: Matrices, statistics: Statistics | None) -> Matrices:
    """`|w|`."""
    del statistics
    return jnp.abs(weights)


def wanda(weights: Matrices, statistics: Statistics) -> Matrices:
    r""":math:`|w_{ij}| \, \|x_i\|_2`, with the norm of input i over all tokens (Sun et al., 2024)."""
    return jnp.abs(weights) * statistics.norms[:, :, None]


def fluctuation(weights: Matrices, statistics: Statistics) -> Matrices:
    r""":math:`\mathrm{var}(x_i) \, w_{ij}^2`, whose sum over a unit is FLAP's score of it (An et al., 2024)."""
    return statistics.variances[:, :, None] * jnp.square(weights)


def inverse_factor(gram: Float[Array, "i i"], name: str, damping: float = DAMPING) -> Float[Array, "i i"]:
    r"""The upper triangular U of :math:`(H + \lambda I)^{-1} = U^T U`, with H the Gram matrix.

    :math:`\lambda` is `damping` times the mean of H's diagonal. Inputs that are always zero get that mean as their
    entry. If the matrix is not positive definite, the damping is increased tenfold, repeatedly, with a message.

    Args:
      gram: H.
      name: of the parameter, for messages.
      damping: the share of the mean.

    Raises:
      ValueError: if no damping helps.
    """
    for i in range(_DAMPINGS):
        factor = _inverse_factor(gram, damping * 10**i)
        if bool(jnp.isfinite(factor).all()):
            if i:
                warnings.warn(
                    f"{name}: the Hessian of its inputs is not positive definite with a damping of {damping:g}, and "
                    f"has {damping * 10**i:g}. More tokens for calibration would help.",
                    stacklevel=2,
                )
            return factor
    raise ValueError(
        f"{name}: the Hessian of its inputs is not positive definite, whatever the damping; look at its "
        "activations, or leave it dense by filter_fn."
    )


@jax.jit
def _inverse_factor(gram: Float[Array, "i i"], damping: Float[Array, ""]) -> Float[Array, "i i"]:
    diagonal = jnp.diagonal(gram)
    is_alive = diagonal > 0
    mean = jnp.where(is_alive.any(), diagonal.sum() / jnp.maximum(is_alive.sum(), 1), 1.0)
    hessian = gram + jnp.diag(jnp.where(is_alive, 0.0, mean) + damping * mean)
    # With J the reversal, J H J = L Lᵀ makes H = R Rᵀ of the upper triangular R = J L J, so that U = R⁻¹: one
    # factorization instead of two with an inverse between them.
    factor = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(factor, jnp.eye(len(factor), dtype=factor.dtype), lower=False)


def sparsegpt(
    weights: Float[Array, "i o"],
    gram: Float[Array, "i i"],
    structure: sparsity_types.SparsityType,
    keep: int,
    name: str,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> tuple[Float[Array, "i o"], Bool[Array, "i o"]]:
    r"""SparseGPT (Frantar & Alistarh, 2023): inputs one after the other, errors spread over those that follow.

    With U of :func:`inverse_factor`, the score of a weight is :math:`(w_{ij} / U_{ii})^2`. Masks are chosen for `block`
    inputs at a time (for n:m, for m inputs at a time). If weight (i, j) is pruned, all :math:`k > i` change by
    :math:`w_{kj} \mathrel{-}= U_{ik} \, w_{ij} / U_{ii}`.

    Args:
      weights: a matrix.
      gram: the sum of :math:`x x^T` over tokens.
      structure: unstructured (spread evenly over blocks), per output, or n:m along the inputs.
      keep: how many weights stay, of the matrix or of each output; n:m has its own number.
      name: of the parameter, for messages.
      damping: see :func:`inverse_factor`.
      block: inputs per block.

    Returns:
      The updated weights that stay, and the mask. All weights of an input that is always zero become zero, even those
      that the mask keeps to reach its number.
    """
    inputs = len(weights)
    factor = inverse_factor(gram, name, damping)
    group = structure.m if isinstance(structure, sparsity_types.NByM) else 1
    block = max(block // group, 1) * group
    result = jnp.where(jnp.diagonal(gram)[:, None] > 0, weights.astype(wide_dtype()), 0.0)
    masks, chosen = [], 0
    for start in range(0, inputs, block):
        size = min(block, inputs - start)
        # The rounded number for all blocks so far, minus what they have: exact at the end, and even in between.
        until = round(keep * (start + size) / inputs)
        result, mask = _block(result, factor, start, until - chosen, structure=structure, size=size)
        chosen = until
        masks.append(mask)
    return result, jnp.concatenate(masks)


@functools.partial(jax.jit, static_argnames=("structure", "size"), donate_argnums=0)
def _block(
    weights: Any, factor: Any, start: Any, keep: Any, *, structure: sparsity_types.SparsityType, size: int
) -> tuple[Any, Any]:
    """The weights after `size` inputs from `start`, and the mask of these."""
    rows = jax.lax.dynamic_slice_in_dim(weights, start, size)
    within = jax.lax.dynamic_slice(factor, (start, start), (size, size))
    diagonal = jnp.diagonal(within)[:, None]
    nothing = jnp.where(rows == 0, rows, 0)  # zeros that lie where the rows do, on whatever mesh
    group = 1
    if isinstance(structure, sparsity_types.NByM):
        group = structure.m
        mask = nothing != 0
    elif isinstance(structure, sparsity_types.PerOutput):
        mask = highest_of_each(jnp.square(rows / diagonal), keep)
    else:
        mask = highest_of_each(jnp.square(rows / diagonal).reshape(-1, 1), keep).reshape(rows.shape)

    def step(g, carry):
        kept, mask, errors = carry
        at = g * group
        # These weights after the updates from earlier inputs of the block.
        left = jax.lax.dynamic_slice_in_dim(within, at, group, axis=1)
        current = jax.lax.dynamic_slice_in_dim(rows, at, group) - left.T @ errors
        pivots = jax.lax.dynamic_slice_in_dim(diagonal, at, group)
        if isinstance(structure, sparsity_types.NByM):
            stay = sparsity_types.NByM(structure.n, structure.m, 0).mask(jnp.square(current / pivots), 0.5)
            mask = jax.lax.dynamic_update_slice_in_dim(mask, stay, at, 0)
        else:
            stay = jax.lax.dynamic_slice_in_dim(mask, at, group)
        own = jax.lax.dynamic_slice(within, (at, at), (group, group))
        wrong: list[Array] = []
        for i in range(group):
            value = current[i] - sum(own[k, i] * wrong[k] for k in range(i))
            kept = jax.lax.dynamic_update_index_in_dim(kept, jnp.where(stay[i], value, 0.0), at + i, 0)
            wrong.append(jnp.where(stay[i], 0.0, value) / own[i, i])
        return kept, mask, jax.lax.dynamic_update_slice_in_dim(errors, jnp.stack(wrong), at, 0)

    kept, mask, errors = jax.lax.fori_loop(0, size // group, step, (nothing, mask, nothing))
    below = jnp.arange(len(weights))[:, None] >= start + size
    across = jax.lax.dynamic_slice_in_dim(factor, start, size)
    weights = weights - jnp.where(below, across.T @ errors, 0.0)
    return jax.lax.dynamic_update_slice_in_dim(weights, kept, start, 0), mask


@functools.partial(jax.jit, static_argnames=("score", "structure"))
def mask(
    weights: Matrices,
    statistics: Statistics | None,
    keep: counts.Count,
    *,
    score: Callable[[Matrices, Any], Matrices],
    structure: sparsity_types.SparsityType,
) -> Bool[Array, "batch inputs outputs"]:
    """Which weights have the highest scores.

    Args:
      weights: matrices.
      statistics: of their inputs.
      keep: how many weights stay, of all matrices or of each output; n:m has its own number.
      score: such as :func:`wanda`.
      structure: unstructured, per output, or n:m along the inputs.
    """
    scores = score(weights, statistics)
    if isinstance(structure, sparsity_types.NByM):
        return n_of_m(scores, structure.n, structure.m, (1,))
    if isinstance(structure, sparsity_types.PerOutput):
        return jax.vmap(highest_of_each, (0, None))(scores, keep.lo)
    return top_k_mask(scores, keep)


def keep_count(structure: sparsity_types.SparsityType, shape: tuple[int, ...], sparsity: float) -> int:
    """How many weights of matrices (batch, inputs, outputs) stay: of each output, or of all."""
    number = shape[1] if isinstance(structure, sparsity_types.PerOutput) else math.prod(shape)
    return counts.to_int(counts.keep_count(number, sparsity))
