"""The networks whose training steps are timed: shapes and FLOPs of well-known ones, on random data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpruner_baselines.vit import Block, ViT


class Problem(NamedTuple):
    """What is trained.

    Attributes:
      init: a key to the parameters.
      loss: (parameters, *batch) to a number.
      batch: arrays.
    """

    init: Callable[[Any], Any]
    loss: Callable[..., Any]
    batch: tuple[Any, ...]


class Network(Protocol):
    """A network of certain sizes; `dtype` is that of activations."""

    def problem(self, dtype: str) -> Problem: ...


def classification(model: nn.Module, shape: tuple[int, ...], classes: int) -> Problem:
    """Random images of this shape, of random classes."""
    rng = np.random.default_rng(0)
    images = jax.device_put(rng.standard_normal(shape, dtype=np.float32))
    labels = jax.device_put(rng.integers(0, classes, shape[0]))

    def loss(params, images, labels):
        logits = model.apply(params, images).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Problem(lambda key: model.init(key, images), loss, (images, labels))


@dataclasses.dataclass(frozen=True)
class VisionTransformer:
    """By default ViT-S/16 on 224x224 images: 196 tokens."""

    image: int = 224
    patch: int = 16
    dim: int = 384
    depth: int = 12
    heads: int = 6
    classes: int = 1000
    batch: int = 8

    def problem(self, dtype):
        model = ViT(self.patch, self.dim, self.depth, self.heads, self.classes, jnp.dtype(dtype))
        return classification(model, (self.batch, self.image, self.image, 3), self.classes)


class _Bottleneck(nn.Module):
    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(nn.GroupNorm, num_groups=min(32, self.width), dtype=self.dtype)
        y = nn.relu(norm()(conv(self.width, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.width, (3, 3), (self.stride, self.stride))(y)))
        y = norm()(conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.width, (1, 1), (self.stride, self.stride))(x))
        return nn.relu(x + y)


class _ResNet(nn.Module):
    blocks: tuple[int, ...]
    width: int
    classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.GroupNorm(min(32, self.width), dtype=self.dtype)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                x = _Bottleneck(self.width * 2**stage, 2 if stage and not block else 1, self.dtype)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class ResNet:
    """By default ResNet-50 on 224x224 images, with group norm, which has no state beside the parameters."""

    image: int = 224
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    batch: int = 8

    def problem(self, dtype):
        model = _ResNet(self.blocks, self.width, self.classes, jnp.dtype(dtype))
        return classification(model, (self.batch, self.image, self.image, 3), self.classes)


class _Layer(Block):
    def __call__(self, x, _):
        return super().__call__(x), None


class _LanguageModel(nn.Module):
    vocabulary: int
    dim: int
    depth: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.dim, dtype=self.dtype)
        layers = nn.scan(nn.remat(_Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)(
            self.heads, self.dtype
        )
        x, _ = layers(embed(tokens), None)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """By default of 98 million parameters: 12 layers under `nn.scan` with `nn.remat`, tied embeddings, no mask."""

    vocabulary: int = 16_384
    dim: int = 768
    depth: int = 12
    heads: int = 12
    tokens: int = 128
    batch: int = 4

    def problem(self, dtype):
        model = _LanguageModel(self.vocabulary, self.dim, self.depth, self.heads, jnp.dtype(dtype))
        tokens = jax.device_put(np.random.default_rng(0).integers(0, self.vocabulary, (self.batch, self.tokens + 1)))

        def loss(params, tokens):
            logits = model.apply(params, tokens[:, :-1]).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        return Problem(lambda key: model.init(key, tokens[:, :-1]), loss, (tokens,))
