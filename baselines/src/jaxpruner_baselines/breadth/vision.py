"""Networks for images, in Flax Linen but for a convolution in Haiku."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpruner_baselines.breadth.cases import Case, Size, images, of_module, sequences

CLASSES = 10


class _MLP(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for factor in (4, 2):
            x = nn.relu(nn.Dense(factor * self.width)(x))
        return nn.Dense(CLASSES)(x)


def mlp(size: Size) -> Case:
    return of_module(_MLP(32 * size.width), images(size))


class _Block(nn.Module):
    """Pre-norm attention and MLP."""

    @nn.compact
    def __call__(self, x):
        dim = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return x + nn.Dense(dim)(nn.gelu(nn.Dense(4 * dim)(nn.LayerNorm()(x))))


class _ViT(nn.Module):
    dim: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.dim, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        first = self.param("class_token", nn.initializers.normal(), (1, 1, self.dim))
        x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
        for _ in range(2):
            x = _Block()(x)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x)[:, 0])


def vit(size: Size) -> Case:
    return of_module(_ViT(32 * size.width), images(size))


class _ResNet(nn.Module):
    width: int
    norm: str

    @nn.compact
    def __call__(self, x):
        batch_norm = functools.partial(nn.BatchNorm, use_running_average=True)
        norm = batch_norm if self.norm == "batch" else functools.partial(nn.GroupNorm, num_groups=4)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        x = nn.relu(norm()(conv(self.width)(x)))
        for width, stride in ((self.width, 1), (2 * self.width, 2)):
            y = nn.relu(norm()(conv(width, strides=stride)(x)))
            y = norm()(conv(width)(y))
            if x.shape != y.shape:
                x = norm()(conv(width, kernel_size=(1, 1), strides=stride)(x))
            x = nn.relu(x + y)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def resnet_batch_norm(size: Size) -> Case:
    return of_module(_ResNet(16 * size.width, "batch"), images(size))


def resnet_group_norm(size: Size) -> Case:
    return of_module(_ResNet(16 * size.width, "group"), images(size))


class _DenseNet(nn.Module):
    growth: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.growth, (3, 3))(x)
        for _ in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = jnp.concatenate([x, nn.Conv(self.growth, (3, 3))(y)], -1)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def densenet(size: Size) -> Case:
    return of_module(_DenseNet(8 * size.width), images(size))


class _UNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        first = nn.relu(nn.Conv(self.width, (3, 3))(x))
        second = nn.relu(nn.Conv(2 * self.width, (3, 3), strides=2)(first))
        x = nn.relu(nn.Conv(4 * self.width, (3, 3), strides=2)(second))
        for skipped in (second, first):
            x = nn.ConvTranspose(skipped.shape[-1], (2, 2), (2, 2))(x)
            x = jnp.concatenate([x, skipped], -1)
            x = nn.relu(nn.Conv(skipped.shape[-1], (3, 3))(x))
        return nn.Conv(3, (1, 1))(x)


def unet(size: Size) -> Case:
    return of_module(_UNet(8 * size.width), images(size))


class _ConvNeXt(nn.Module):
    dim: int

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(self.dim, (2, 2), (2, 2))(x))
        for i in range(2):
            y = nn.LayerNorm()(nn.Conv(self.dim, (7, 7), feature_group_count=self.dim)(x))
            y = nn.Dense(self.dim)(nn.gelu(nn.Dense(4 * self.dim)(y)))
            x = x + y * self.param(f"scale_{i}", nn.initializers.ones, (self.dim,))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x.mean((1, 2))))


def convnext(size: Size) -> Case:
    return of_module(_ConvNeXt(16 * size.width), images(size))


class _MobileNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.silu(norm()(nn.Conv(self.width, (3, 3))(x)))
        for _ in range(2):
            wide = 4 * self.width
            y = nn.silu(norm()(nn.Conv(wide, (1, 1))(x)))
            y = nn.silu(norm()(nn.Conv(wide, (3, 3), feature_group_count=wide)(y)))
            gates = nn.sigmoid(nn.Dense(wide)(nn.silu(nn.Dense(self.width)(y.mean((1, 2))))))
            x = x + norm()(nn.Conv(self.width, (1, 1))(y * gates[:, None, None]))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def mobilenet(size: Size) -> Case:
    return of_module(_MobileNet(8 * size.width), images(size))


class _Mixer(nn.Module):
    dim: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.dim, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        for _ in range(2):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(y.shape[-1])(nn.gelu(nn.Dense(self.dim)(y)))
            x = x + y.swapaxes(1, 2)
            x = x + nn.Dense(self.dim)(nn.gelu(nn.Dense(4 * self.dim)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


def mixer(size: Size) -> Case:
    return of_module(_Mixer(16 * size.width), images(size))


class _Stack(nn.Module):
    depth: int = 3

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return _Block()(x), None

        layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = layers()(x, None)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


def scanned(size: Size) -> Case:
    return of_module(_Stack(), sequences(size, 32 * size.width))


def haiku_conv(size: Size) -> Case:
    import haiku as hk

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(8 * size.width, 3)(x))
        x = hk.MaxPool(2, 2, "VALID")(jax.nn.relu(hk.Conv2D(16 * size.width, 3)(x)))
        x = jax.nn.relu(hk.Linear(32 * size.width)(hk.Flatten()(x)))
        return hk.Linear(CLASSES)(x)

    network, x = hk.without_apply_rng(hk.transform(forward)), images(size)
    return Case(network.apply, network.init(jax.random.key(0), x), (x,))


def equinox_mlp(size: Size) -> Case:
    import equinox as eqx

    model = eqx.nn.MLP(8 * size.width, CLASSES, 64 * size.width, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(1), (8 * size.batch, 8 * size.width))
    return Case(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, (x,))
