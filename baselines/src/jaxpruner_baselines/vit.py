"""A plain vision transformer (Dosovitskiy et al. 2021; fixed positions and mean pooling as in
Beyer et al. 2022, "Better plain ViT baselines"). Every parameter with more than one axis is a kernel.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def sincos_positions(height: int, width: int, dim: int) -> np.ndarray:
    """Sine-cosine embeddings of a grid, float32 of shape (height * width, dim); dim a multiple of 4."""
    frequency = 1.0 / 10_000 ** (np.arange(dim // 4) / max(dim // 4 - 1, 1))
    y, x = np.mgrid[:height, :width].reshape(2, -1, 1) * frequency
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


class Block(nn.Module):
    """Pre-norm attention and MLP, (batch, tokens, dim) to the same."""

    heads: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, dim = x.shape
        y = nn.LayerNorm(dtype=self.dtype)(x)
        qkv = nn.Dense(3 * dim, dtype=self.dtype, name="qkv")(y).reshape(
            batch, tokens, 3, self.heads, dim // self.heads
        )
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = x + nn.Dense(dim, dtype=self.dtype, name="out")(y.reshape(batch, tokens, dim))
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * dim, dtype=self.dtype, name="mlp_in")(y))
        return x + nn.Dense(dim, dtype=self.dtype, name="mlp_out")(y)


class ViT(nn.Module):
    """Images of shape (batch, height, width, channels) to float32 logits of shape (batch, classes).

    `dtype` is that of activations, by default the images'.
    """

    patch: int
    dim: int
    depth: int
    heads: int
    classes: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        window = (self.patch, self.patch)
        x = nn.Conv(self.dim, window, strides=window, padding="VALID", dtype=self.dtype, name="embed")(images)
        _, height, width, _ = x.shape
        x = x.reshape(x.shape[0], height * width, self.dim) + jnp.asarray(
            sincos_positions(height, width, self.dim), x.dtype
        )
        for i in range(self.depth):
            x = Block(self.heads, self.dtype, name=f"block_{i}")(x)
        return nn.Dense(self.classes, name="head")(jnp.mean(nn.LayerNorm()(x), axis=1))
