"""Scores: which weights matter. The highest are kept.

Each function maps arrays to an array of the same shape, and knows nothing of masks or state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, PRNGKeyArray


def magnitude(w: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`|w|` (Han et al., 2015; Zhu & Gupta, 2017)."""
    return jnp.abs(w)


def saliency(w: Float[Array, "*s"], g: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`|w * g|`, the first-order change of the loss when w is removed (Molchanov et al., 2016)."""
    # In float32 at least: products of small float16 numbers would vanish, and ties decide.
    wide = jnp.promote_types(jnp.result_type(w, g), jnp.float32)
    return jnp.abs(w.astype(wide) * g.astype(wide))


# For selection, see `score_reading.is_magnitude`.
magnitude.is_magnitude = saliency.is_magnitude = True  # type: ignore[attr-defined]


def cost(w: Float[Array, "*s"], curvature: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`w ** 2 * h`, twice the second-order change of the loss when w is removed, with the diagonal h of its Hessian."""
    wide = jnp.promote_types(jnp.result_type(w, curvature), jnp.float32)
    return jnp.square(w.astype(wide)) * curvature.astype(wide)


def lamp(w: Float[Array, "*s"]) -> Float[Array, "*s"]:
    r"""The share of a weight among those of its leaf that are not smaller (Lee et al., 2021).

    .. math:: s_i = w_i^2 / \sum_{j : |w_j| \ge |w_i|} w_j^2

    Of equal weights, the earlier one counts as the larger, so that all sums differ. The score is 0 where w is 0.
    """
    wide = jnp.promote_types(w.dtype, jnp.float32)
    squares = jnp.square(w.astype(wide)).reshape(-1)
    order = jnp.argsort(-squares, stable=True)
    descending = squares[order]
    sums = jnp.cumsum(descending)
    shares = jnp.where(descending > 0, descending / jnp.where(sums > 0, sums, 1), 0)
    return jnp.zeros_like(shares).at[order].set(shares).reshape(w.shape)


def uniform_random(
    key: PRNGKeyArray, shape: tuple[int, ...], among: Bool[Array, "*s"] | None = None, layout: Any = None
) -> Float[Array, "*s"]:
    """Uniform draws from [0, 1), made in a sharding if one is given; outside `among` -1, below every draw."""
    if layout is None or isinstance(layout.mesh, jax.sharding.Mesh):
        draws = jax.random.uniform(key, shape)
        # Called eagerly, where no mesh is set that the draws could be made on.
        draws = draws if layout is None else jax.device_put(draws, layout)
    else:
        draws = jax.random.uniform(key, shape, out_sharding=layout)
    return draws if among is None else jnp.where(among, draws, -1.0)
