"""Scores: which weights matter. The highest are kept.

Each function takes arrays to an array of the same shape and knows nothing of masks or state.
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
