"""Structures: which sets of weights a mask may keep.

A structure turns scores into a mask of an exact number of units (weights, blocks, channels, or
weights of each group of m), and regrows a mask without changing that number.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxpruner import selection, trees
from jaxpruner.selection import Competition, counts
from jaxpruner.selection.score_reading import Scores, as_array, at_least_float32, where_finite

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    Sparsity = float | Float[Array, ""]


class SparsityType(abc.ABC):
    """A structure that masks obey."""

    @abc.abstractmethod
    def mask(self, scores: Float[Array, "*s"], sparsity: Sparsity) -> Bool[Array, "*s"]:
        """The mask that keeps the units of the highest scores.

        Args:
          scores: one score per weight; NaN ranks below everything.
          sparsity: fraction of the units that is pruned, in [0, 1); may be traced.

        Raises:
          ValueError: if the shape does not fit the structure.
        """

    @abc.abstractmethod
    def regrow(
        self,
        mask: Bool[Array, "*s"],
        drop_scores: Float[Array, "*s"],
        grow_scores: Float[Array, "*s"],
        drop_fraction: Sparsity,
    ) -> Bool[Array, "*s"]:
        """Drops the lowest active units and grows as many of the highest others.

        A unit that was just dropped may grow again, as in RigL: candidates are all units that the
        drop did not keep. The number of active units stays exactly the same.
        """

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises a ValueError if no mask of this shape can be made."""
        del shape

    def num_units(self, shape: tuple[int, ...]) -> int:
        """How many units of a leaf of this shape are kept or pruned."""
        return math.prod(shape)

    def num_rivals(self, shape: tuple[int, ...]) -> int:
        """How many units compete in one selection: all of them, unless each output has a selection of its own."""
        return self.num_units(shape)

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """How many weights the largest unit of a leaf of this shape has: the possible error of a rounded number."""
        return -(-math.prod(shape) // max(1, self.num_units(shape)))

    @property
    def of_layer(self) -> SparsityType:
        """The structure of one layer: this one, unless it is of a stack of them."""
        return self

    def for_leaf(self, path: trees.KeyPath, shape: tuple[int, ...]) -> SparsityType:
        """The structure of one leaf: this one, unless it depends on the leaf's name."""
        del path, shape
        return self


class _Units(SparsityType):
    """A structure whose units compete with each other over the whole leaf."""

    @abc.abstractmethod
    def pool(self, scores: Float[Array, "*s"]) -> Float[Array, "*units"]:
        """One score a unit."""

    @abc.abstractmethod
    def expand(self, units: Bool[Array, "*units"], shape: tuple[int, ...]) -> Bool[Array, "*s"]:
        """The mask of a leaf of this shape from the mask of its units."""

    def active_units(self, mask: Bool[Array, "*s"]) -> Bool[Array, "*units"]:
        """The mask of the units from the mask of the leaf."""
        return self.pool(mask) > 0

    def num_units(self, shape: tuple[int, ...]) -> int:
        return jax.eval_shape(self.pool, jax.ShapeDtypeStruct(shape, jnp.float32)).size

    def mask(self, scores: Any, sparsity: Sparsity) -> Any:
        return selection.together([self._masking(scores, sparsity)])[0]

    def regrow(self, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Sparsity) -> Any:
        return selection.together([self._regrowing(mask, drop_scores, grow_scores, drop_fraction)])[0]

    # The two above, as they ask for their selections.

    def _masking(self, scores: Any, sparsity: Sparsity) -> selection.Choosing:
        self.check_shape(scores.shape)
        units = self._unit_scores(scores)
        (kept,) = yield Competition([units], counts.Share(units.size, sparsity))
        return self.expand(kept, scores.shape)

    def _regrowing(self, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Sparsity) -> selection.Choosing:
        drop, grow = Scores.of(self._unit_scores(drop_scores)), Scores.of(self._unit_scores(grow_scores))
        (grown,) = yield selection.Regrowth(self.active_units(mask), drop, grow, drop_fraction)
        return self.expand(grown, mask.shape)

    def _unit_scores(self, scores: Any) -> Any:
        # Where a unit is a weight, scores need not be evaluated.
        return scores if type(self).pool is Unstructured.pool else self.pool(as_array(scores))


@dataclasses.dataclass(frozen=True)
class Unstructured(_Units):
    """Any set of weights. A leaf of n keeps `max(1, round_half_even(n * (1 - sparsity)))`.

    Ties keep the lower flat (C-order) index.

    Examples:
      >>> Unstructured().mask(jnp.asarray([4.0, 1.0, 3.0, 2.0]), 0.5).tolist()
      [True, False, True, False]
    """

    def pool(self, scores: Any) -> Any:
        return scores

    def active_units(self, mask: Any) -> Any:
        return mask

    def num_units(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)

    def expand(self, units: Any, shape: tuple[int, ...]) -> Any:
        del shape
        return units


@dataclasses.dataclass(frozen=True)
class Block(_Units):
    """Blocks of weights that are kept or pruned together.

    Two axes, by default the first two, are tiled by `block_shape = (h, w)`. Each block spans all other
    axes. A leaf with one axis is tiled by w. Blocks at ragged edges are smaller. The score of a
    block is the average over its weights, or their maximum with `use_avg_pooling=False`.

    Examples:
      >>> scores = jnp.asarray([[1.0, 1.0, 5.0, 0.0], [1.0, 1.0, 5.0, 0.0]])
      >>> Block((2, 2)).mask(scores, 0.5).tolist()
      [[False, False, True, True], [False, False, True, True]]
    """

    block_shape: tuple[int, int] = (1, 1)
    use_avg_pooling: bool = True
    axes: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_shape", tuple(self.block_shape))
        object.__setattr__(self, "axes", tuple(self.axes))
        if len(self.axes) != 2:
            raise ValueError(f"axes: {self.axes} is not two axes; give those that are tiled, such as (0, 1).")
        if len(self.block_shape) != 2 or min(self.block_shape) < 1:
            raise ValueError(f"block_shape: {self.block_shape} is not two positive sizes; give (h, w), such as (4, 4).")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) > 1:
            for axis in self.axes:
                check_axis(axis, shape)
            if self.axes[0] % len(shape) == self.axes[1] % len(shape):
                raise ValueError(f"axes {self.axes} of {shape} are one axis; choose two.")

    def num_units(self, shape: tuple[int, ...]) -> int:
        rows, columns = self._plane(self._tiled_first(shape))
        return -(-rows // self.block_shape[0]) * -(-columns // self.block_shape[1])

    def unit_size(self, shape: tuple[int, ...]) -> int:
        first = self._tiled_first(shape)
        rows, columns = self._plane(first)
        return min(rows, self.block_shape[0]) * min(columns, self.block_shape[1]) * math.prod(first[2:])

    def pool(self, scores: Any) -> Any:
        wide = at_least_float32(scores)
        if wide.ndim > 1:
            wide = jnp.moveaxis(wide, self.axes, (0, 1))
        rows, columns = self._plane(wide.shape)
        planes = wide.reshape(rows, columns, math.prod(wide.shape[2:]))
        if not self.use_avg_pooling:
            return self._tiles(planes.max(-1, initial=-jnp.inf), -jnp.inf).max((1, 3), initial=-jnp.inf)
        entries = self._tiles(jnp.ones(planes.shape[:2]), 0).sum((1, 3)) * planes.shape[2]
        return self._tiles(planes.sum(-1), 0).sum((1, 3)) / entries

    def expand(self, units: Any, shape: tuple[int, ...]) -> Any:
        h, w = self.block_shape
        first = self._tiled_first(shape)
        rows, columns = self._plane(first)
        plane = jnp.repeat(jnp.repeat(units, h, 0), w, 1)[:rows, :columns]
        mask = jnp.broadcast_to(plane.reshape(*first[:2], *[1] * (len(first) - 2)), first)
        return jnp.moveaxis(mask, (0, 1), self.axes) if len(shape) > 1 else mask

    def _tiled_first(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with the two tiled axes in front."""
        if len(shape) < 2:
            return shape
        tiled = [axis % len(shape) for axis in self.axes]
        return tuple(shape[axis] for axis in tiled + [a for a in range(len(shape)) if a not in tiled])

    def _plane(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[0], shape[1]) if len(shape) > 1 else (1, math.prod(shape))

    def _tiles(self, plane: Any, fill: Any) -> Any:
        h, w = self.block_shape
        rows, columns = plane.shape
        padded = jnp.pad(plane, [(0, -rows % h), (0, -columns % w)], constant_values=fill)
        return padded.reshape(padded.shape[0] // h, h, padded.shape[1] // w, w)


@dataclasses.dataclass(frozen=True)
class Channel(_Units):
    """Whole slices along `axis`, scored by the sum over all other axes.

    The axis may be `"output"` or `"input"`: the last axis that a layer does not contract, or the last one that it does
    (:func:`contracted_axes`).

    Examples:
      >>> Channel(-1).mask(jnp.asarray([[1.0, 3.0], [1.0, 0.5]]), 0.5).tolist()
      [[False, True], [False, True]]
    """

    axis: int | str = -1

    def __post_init__(self) -> None:
        if isinstance(self.axis, str) and self.axis not in ("input", "output"):
            raise ValueError(f"axis: {self.axis!r} is not known; give a number, 'input' or 'output'.")

    def for_leaf(self, path: trees.KeyPath, shape: tuple[int, ...]) -> SparsityType:
        if not isinstance(self.axis, str):
            return self
        contracted = contracted_axes(path, shape)
        others = [axis for axis in range(len(shape)) if axis not in contracted]
        return Channel(contracted[0 if path[-1:] == ("weight",) else -1] if self.axis == "input" else others[-1])

    def check_shape(self, shape: tuple[int, ...]) -> None:
        check_axis(self.axis, shape)

    def num_units(self, shape: tuple[int, ...]) -> int:
        return shape[int(self.axis)]

    def pool(self, scores: Any) -> Any:
        return at_least_float32(scores).sum([a for a in range(scores.ndim) if a != int(self.axis) % scores.ndim])

    def expand(self, units: Any, shape: tuple[int, ...]) -> Any:
        others = [a for a in range(len(shape)) if a != int(self.axis) % len(shape)]
        return jnp.broadcast_to(jnp.expand_dims(units, others), shape)


@dataclasses.dataclass(frozen=True)
class NByM(SparsityType):
    """Exactly n of every m successive weights along `axis` (Mishra et al., 2021).

    Several axes are folded into one, in C order. `"input"` stands for the axes that a layer contracts
    (:func:`contracted_axes`), along which hardware needs the groups. Sparsity 0 leaves the leaf dense; any other value
    applies n:m. Ties keep the later position.

    Examples:
      >>> NByM(2, 4).mask(jnp.asarray([4.0, 1.0, 3.0, 2.0]), 0.5).tolist()
      [True, False, True, False]
    """

    n: int
    m: int
    axis: int | tuple[int, ...] | str = -1

    def __post_init__(self) -> None:
        if isinstance(self.axis, list):
            object.__setattr__(self, "axis", tuple(self.axis))
        if isinstance(self.axis, str) and self.axis != "input":
            raise ValueError(f"axis: {self.axis!r} is not known; give a number, several, or 'input'.")

    def for_leaf(self, path: trees.KeyPath, shape: tuple[int, ...]) -> SparsityType:
        return dataclasses.replace(self, axis=contracted_axes(path, shape)) if self.axis == "input" else self

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"n={self.n} of every m={self.m} weights cannot be kept; choose 1 <= n <= m.")
        axes = as_axes(self.axis, shape)
        for axis in axes:
            check_axis(axis, shape)
        if math.prod(shape[axis] for axis in axes) % self.m:
            what = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}, folded,"
            raise ValueError(
                f"{what} of {shape} is not a multiple of m={self.m}; exclude it with filter_fn or choose another axis."
            )

    def mask(self, scores: Any, sparsity: Sparsity) -> Any:
        self.check_shape(scores.shape)
        axes = tuple(axis % scores.ndim for axis in as_axes(self.axis, scores.shape))
        return selection.n_of_m(scores, self.n, self.m, axes) | (jnp.asarray(sparsity) == 0)

    def regrow(self, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Sparsity) -> Any:
        drop = Scores.of(drop_scores).filled(~mask, jnp.nan)
        survivors = mask & selection.top_k_mask(drop, counts.Share(selection.count_true(mask), drop_fraction))
        # Each group refills the places it lost. A leaf that is dense stays dense.
        refilled = self.mask(jnp.where(survivors, jnp.inf, grow_scores), 0.5)
        return jnp.where(jnp.all(mask), mask, refilled)


@dataclasses.dataclass(frozen=True)
class PerOutput(SparsityType):
    """The same number of weights for each output of a layer: constant fan-in (Lasby et al., 2024; Sun et al., 2024).

    Of the k inputs of each output, `max(1, round_half_even(k * (1 - sparsity)))` are kept. The inputs are along `axis`.
    Several axes are folded into one, in C order, and `"input"` stands for those that a layer contracts
    (:func:`contracted_axes`). Ties keep the lower index.

    Examples:
      >>> PerOutput().mask(jnp.asarray([[1.0, 3.0], [2.0, 0.5]]), 0.5).tolist()
      [[False, True], [True, False]]
    """

    axis: int | tuple[int, ...] | str = "input"

    def __post_init__(self) -> None:
        if isinstance(self.axis, list):
            object.__setattr__(self, "axis", tuple(self.axis))
        if isinstance(self.axis, str) and self.axis != "input":
            raise ValueError(f"axis: {self.axis!r} is not known; give a number, several, or 'input'.")

    def for_leaf(self, path: trees.KeyPath, shape: tuple[int, ...]) -> SparsityType:
        return dataclasses.replace(self, axis=contracted_axes(path, shape)) if self.axis == "input" else self

    def check_shape(self, shape: tuple[int, ...]) -> None:
        for axis in as_axes(self.axis, shape):
            check_axis(axis, shape)

    def num_rivals(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in as_axes(self.axis, shape))

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """A weight of each output."""
        return math.prod(shape) // max(1, self.num_rivals(shape))

    def mask(self, scores: Any, sparsity: Sparsity) -> Any:
        return self._highest(scores, counts.keep_count(self.num_rivals(scores.shape), sparsity).lo)

    def regrow(self, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Sparsity) -> Any:
        # Each output drops the same number of weights, and grows as many again.
        number = self._inputs_first(mask).sum(0, dtype=jnp.int32).max(initial=0)
        stay = counts.keep_count(counts.Count(None, number.astype(jnp.uint32)), drop_fraction).lo
        survivors = self._highest(Scores.of(drop_scores).filled(~mask, jnp.nan), stay)
        return self._highest(jnp.where(survivors, jnp.inf, as_array(grow_scores)), number)

    def _highest(self, scores: Any, keep: Any) -> Bool[Array, "*s"]:
        self.check_shape(scores.shape)
        first, axes = self._inputs_first(as_array(scores)), as_axes(self.axis, scores.shape)
        rivals = first.reshape(math.prod(first.shape[: len(axes)]), math.prod(first.shape[len(axes) :]))
        kept = selection.highest_of_each(rivals, keep).reshape(first.shape)
        return jnp.moveaxis(kept, range(len(axes)), axes)

    def _inputs_first(self, scores: Any) -> Any:
        axes = as_axes(self.axis, scores.shape)
        return jnp.moveaxis(scores, axes, range(len(axes)))


def as_axes(axis: int | tuple[int, ...] | str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One or several axes as several."""
    if isinstance(axis, str):
        return contracted_axes((), shape)
    return axis if isinstance(axis, tuple) else (axis,)


@dataclasses.dataclass(frozen=True)
class Stacked(SparsityType):
    """A stack of layers along `axis`: each has its own mask, of the same structure and sparsity."""

    structure: SparsityType
    axis: int

    @property
    def of_layer(self) -> SparsityType:
        return self.structure

    def check_shape(self, shape: tuple[int, ...]) -> None:
        check_axis(self.axis, shape)
        self.structure.check_shape(without_axis(shape, self.axis))

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Those of one layer."""
        return self.structure.num_units(without_axis(shape, self.axis))

    def num_rivals(self, shape: tuple[int, ...]) -> int:
        return self.structure.num_rivals(without_axis(shape, self.axis))

    def unit_size(self, shape: tuple[int, ...]) -> int:
        """Those of one layer."""
        return self.structure.unit_size(without_axis(shape, self.axis))

    def mask(self, scores: Any, sparsity: Sparsity) -> Any:
        each = jax.vmap(self.structure.mask, in_axes=(self.axis, None), out_axes=self.axis)
        return each(scores, sparsity)

    def regrow(self, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Sparsity) -> Any:
        along = self.axis
        each = jax.vmap(self.structure.regrow, in_axes=(along, along, along, None), out_axes=along)
        return each(mask, drop_scores, grow_scores, drop_fraction)


def without_axis(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape of one layer of a stack."""
    return tuple(size for i, size in enumerate(shape) if i != axis % len(shape))


# DenseGeneral of Flax makes several output axes of one input there.
_SEVERAL_OUTPUTS = frozenset(["query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "qkv"])


def contracted_axes(path: trees.KeyPath, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that a layer contracts with its input, by the conventions of JAX's libraries.

    | leaf | axes |
    |---|---|
    | `kernel`, `w` and others, (..., in, out) | all but the last (Flax, Haiku; convolutions: height, width, in) |
    | three axes in `query`, `key`, `value` | the first (Flax's attention: in, heads, head_dim) |
    | `weight`, (out, in, ...) | all but the first (Equinox) |
    | `embedding` | the last (tied to the output) |

    Raises:
      ValueError: for a leaf of one axis.

    Examples:
      >>> contracted_axes(("mlp", "kernel"), (16, 64))
      (0,)
      >>> contracted_axes(("mlp", "weight"), (64, 16))
      (1,)
    """
    if len(shape) < 2:
        raise ValueError(f"axis 'input': a leaf of shape {shape} contracts nothing; exclude it with filter_fn.")
    name, layer = (*[""] * (2 - len(path)), *path)[-1], (*[""] * (2 - len(path)), *path)[-2]
    if name == "weight":
        return tuple(range(1, len(shape)))
    if name in ("embedding", "embeddings"):
        return (len(shape) - 1,)
    if len(shape) == 3 and layer in _SEVERAL_OUTPUTS:
        return (0,)
    return tuple(range(len(shape) - 1))


def masking(structure: SparsityType, scores: Any, sparsity: Sparsity) -> selection.Choosing:
    """`structure.mask`, whose selection can be made together with those of other leaves.

    If `mask` is overridden, it is called as it is, with an array.
    """
    if not isinstance(structure, _Units) or type(structure).mask is not _Units.mask:
        return structure.mask(as_array(scores), sparsity)
    return (yield from structure._masking(scores, sparsity))


def regrowing(
    structure: SparsityType, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Sparsity
) -> selection.Choosing:
    """`structure.regrow`, whose selections can be made together with those of other leaves.

    If `regrow` is overridden, it is called as it is, with arrays. Scores that are not finite, as after overflowing
    gradients, do not say where to grow, so the mask stays.
    """
    if not isinstance(structure, _Units) or type(structure).regrow is not _Units.regrow:
        grow = as_array(grow_scores)
        return where_finite(grow, structure.regrow(mask, as_array(drop_scores), grow, drop_fraction), mask)
    return (yield from structure._regrowing(mask, drop_scores, grow_scores, drop_fraction))


def for_leaf(sparsity_type: Any, path: trees.KeyPath, param: Any, stack_axis: int | None = None) -> SparsityType:
    """The structure of one leaf.

    Args:
      sparsity_type: a structure, a class of one, a function of (path, param), or path patterns ->
        structure as a mapping or pairs, where the most specific one wins and all other leaves are Unstructured.
      path: the leaf's path.
      param: the leaf, or its shape.
      stack_axis: the axis along which it is a stack of layers; functions see one layer.

    Raises:
      ValueError: if the result is not a structure.
    """
    if stack_axis is not None:
        check_axis(stack_axis, param.shape)
        layer = jax.ShapeDtypeStruct(without_axis(param.shape, stack_axis), param.dtype)
        return Stacked(for_leaf(sparsity_type, path, layer), stack_axis)
    structure = sparsity_type
    if isinstance(structure, type):
        structure = _without_arguments(structure)
    elif _is_patterns(structure):
        pairs = trees.pattern_pairs(structure, "sparsity_type")
        structure = trees.most_specific(pairs, path, "sparsity_type", Unstructured())
    elif callable(structure):
        structure = structure(path, param)
    if not isinstance(structure, SparsityType):
        raise ValueError(
            f"Sparsity type {structure!r} is not known; give Unstructured(), NByM(n, m), "
            "Block((h, w)) or Channel(axis)."
        )
    return structure if param is None else structure.for_leaf(path, param.shape)


def _without_arguments(structure: type) -> Any:
    try:
        return structure()
    except TypeError as error:
        raise ValueError(
            f"Sparsity type {structure.__name__} is a class that needs sizes; give an instance."
        ) from error


def check_patterns(sparsity_type: Any, paths: Sequence[trees.KeyPath]) -> None:
    """Raises a ValueError if a pattern of per-leaf structures names none of the pruned leaves."""
    if _is_patterns(sparsity_type):
        trees.resolve(sparsity_type, paths, "sparsity_type")


def _is_patterns(sparsity_type: Any) -> bool:
    return hasattr(sparsity_type, "items") or isinstance(sparsity_type, list | tuple)


def check_axis(axis: int | str, shape: tuple[int, ...]) -> None:
    """Raises a ValueError if a shape has no such axis."""
    if isinstance(axis, str) or not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} does not exist in {shape}; exclude it with filter_fn or choose another axis.")
