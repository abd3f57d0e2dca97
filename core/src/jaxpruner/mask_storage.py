"""How a mask is kept in the optimizer state: one byte or one bit per weight.

Everything else in the library sees boolean masks; only this module knows about bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import trees

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, UInt8

_BITS = 8


@dataclasses.dataclass(frozen=True)
class DenseStorage:
    """One boolean per weight, in the parameter's own shape."""

    def encode(self, mask: Bool[Array, "*s"]) -> Bool[Array, "*s"]:
        return jnp.asarray(mask, bool)

    def decode(self, stored: Bool[Array, "*s"], shape: tuple[int, ...]) -> Bool[Array, "*s"]:
        del shape
        return jnp.asarray(stored, bool)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the mask of a parameter of this shape is kept."""
        return shape


@dataclasses.dataclass(frozen=True)
class PackedStorage:
    """One bit per weight, packed along one axis, so that the packed mask shards like its parameter.

    The packed axis, of length d, becomes ceil(d / 8) long. Bit i of a byte (least significant
    first) stands for entry 8 * byte + i. The other axes stay.
    """

    def encode(self, mask: Bool[Array, "*s"]) -> UInt8[Array, "*packed"]:
        return _pack(mask)

    def decode(self, stored: UInt8[Array, "*packed"], shape: tuple[int, ...]) -> Bool[Array, "*s"]:
        return _unpack(stored, tuple(shape))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the mask of a parameter of this shape is kept."""
        return packed_shape(shape)


@dataclasses.dataclass(frozen=True)
class AxisStorage:
    """One bit per entry of each axis, for masks that keep whole slices along each axis.

    Such a mask is true where all of its axes are. The bits of the axes follow one another, packed like a mask of one
    axis.
    """

    def encode(self, mask: Bool[Array, "*s"]) -> UInt8[Array, " packed"]:
        mask = jnp.asarray(mask, bool)
        others = [tuple(a for a in range(mask.ndim) if a != axis) for axis in range(mask.ndim)]
        return _pack(jnp.concatenate([mask.any(rest) for rest in others]) if mask.ndim else mask)

    def decode(self, stored: UInt8[Array, " packed"], shape: tuple[int, ...]) -> Bool[Array, "*s"]:
        if not shape:
            return _unpack(stored, ())
        bits = _unpack(stored, (sum(shape),))
        mask = jnp.ones((), bool)
        for axis, along in enumerate(jnp.split(bits, np.cumsum(shape)[:-1])):
            mask = mask & jnp.expand_dims(along, [a for a in range(len(shape)) if a != axis])
        return mask

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the mask of a parameter of this shape is kept."""
        return packed_shape((sum(shape),) if shape else ())


MaskStorage = DenseStorage | PackedStorage | AxisStorage


# One program where they are called eagerly; inlined elsewhere.


@functools.partial(jax.jit, inline=True)
def _pack(mask: Bool[Array, "*s"]) -> UInt8[Array, "*packed"]:
    mask = jnp.atleast_1d(jnp.asarray(mask, bool))
    axis = packed_axis(mask.shape)
    padding = [(0, 0)] * mask.ndim
    padding[axis] = (0, -mask.shape[axis] % _BITS)
    if padding[axis][1]:
        mask = jnp.pad(mask, padding)
    # The new axis of 8 comes after the packed one: a sharding of that axis stays on its bytes.
    groups = mask.reshape(*mask.shape[:axis], mask.shape[axis] // _BITS, _BITS, *mask.shape[axis + 1 :])
    bits = groups.astype(jnp.uint8) << _bit_positions(groups.ndim, axis + 1)
    return bits.sum(axis + 1, dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _unpack(stored: UInt8[Array, "*packed"], shape: tuple[int, ...]) -> Bool[Array, "*s"]:
    axis = packed_axis(shape or (1,))
    groups = jnp.expand_dims(stored, axis + 1)
    bits = (groups >> _bit_positions(groups.ndim, axis + 1)) & 1
    mask = bits.astype(bool).reshape(*stored.shape[:axis], stored.shape[axis] * _BITS, *stored.shape[axis + 1 :])
    length = shape[axis] if shape else 1
    if mask.shape[axis] != length:
        mask = mask[(slice(None),) * axis + (slice(length),)]
    return mask.reshape(shape)


def storage_of(stored: Any, shape: tuple[int, ...]) -> MaskStorage:
    """How the mask of a parameter of this shape was stored, by its dtype and its own shape."""
    if stored.dtype != jnp.uint8:
        return DenseStorage()
    return AxisStorage() if len(shape) > 1 and len(jnp.shape(stored)) == 1 else PackedStorage()


def decode_stored(stored: Any, params: Any) -> Any:
    """The boolean masks and None of a stored tree, however each was stored."""

    def decode(param, mask):
        shape = jnp.shape(param)
        return storage_of(mask, shape).decode(mask, shape)

    return trees.map_pruned(decode, params, stored)


def packed_axis(shape: tuple[int, ...]) -> int:
    """The axis that is packed: the one with the most factors of two, the first of equals.

    Its packed length is then divisible by as many devices as possible, and leading axes unpack
    without moving data between vector lanes.
    """
    return max(range(len(shape)), key=lambda axis: (math.gcd(shape[axis], 1 << 30), -axis))


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the packed mask of a parameter of this shape."""
    shape = shape or (1,)
    axis = packed_axis(shape)
    return (*shape[:axis], -(-shape[axis] // _BITS), *shape[axis + 1 :])


def _bit_positions(ndim: int, axis: int) -> UInt8[Array, "*ones"]:
    shape = [1] * ndim
    shape[axis] = _BITS
    return jnp.arange(_BITS, dtype=jnp.uint8).reshape(shape)


def encode_tree(storage: MaskStorage, masks: Any) -> Any:
    """A tree of boolean masks and None as the state keeps it."""
    return trees.to_state(trees.map_pruned(lambda _, mask: storage.encode(mask), masks, masks))


def decode_tree(storage: MaskStorage, stored: Any, params: Any) -> Any:
    """The boolean masks and None of a stored tree; `params` tells the shapes."""
    return trees.map_pruned(lambda p, mask: storage.decode(mask, jnp.shape(p)), params, stored)
