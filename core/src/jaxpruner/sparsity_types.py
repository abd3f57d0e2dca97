"""Structures: which sets of weights a mask may keep.

A structure turns scores into a mask of an exact number of units (weights, blocks, channels, or
weights of each group of m), and regrows a mask without changing that number.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import selection, trees
from jaxpruner.selection import Competition, counts
from jaxpruner.selection.score_reading import Scores, as_array

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    Sparsity = float | Float[Array, ""]


class SparsityType(abc.ABC):
    """A structure that masks obey."""

    @abc.abstractmethod
    def mask(self, scores: Float[Array, "*s"], sparsity: Sparsity) -> Bool[Array, "*s"]:
        """The mask that keeps the units of the highest scores.

        Args:
          scores: one score a weight; NaN ranks below everything.
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
        """Drops the lowest of the active units and grows as many of the highest of the others.

        A unit that was just dropped may grow again, as in RigL: candidates are all units that the
        drop did not keep. The number of active units stays exactly the same.
        """

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises a ValueError if no mask of this shape can be made."""
        del shape

    def num_units(self, shape: tuple[int, ...]) -> int:
        """How many units of a leaf of this shape are kept or pruned."""
        return math.prod(shape)


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

    def num_units(self, shape):
        return jax.eval_shape(self.pool, jax.ShapeDtypeStruct(shape, jnp.float32)).size

    def mask(self, scores, sparsity):
        return selection.together([self._masking(scores, sparsity)])[0]

    def regrow(self, mask, drop_scores, grow_scores, drop_fraction):
        return selection.together([self._regrowing(mask, drop_scores, grow_scores, drop_fraction)])[0]

    # The two above, as they ask for their selections.

    def _masking(self, scores, sparsity) -> selection.Choosing:
        self.check_shape(scores.shape)
        units = self._unit_scores(scores)
        (kept,) = yield Competition([units], counts.keep_count(units.size, sparsity))
        return self.expand(kept, scores.shape)

    def _regrowing(self, mask, drop_scores, grow_scores, drop_fraction) -> selection.Choosing:
        active = self.active_units(mask)
        number = selection.count_true(active)
        # NaN ranks lowest of all: an inactive unit is kept only if there is no other.
        drop = Scores.of(self._unit_scores(drop_scores)).filled(~active, jnp.nan)
        (kept,) = yield Competition([drop], counts.keep_count(number, drop_fraction))
        survivors = active & kept
        grow = Scores.of(self._unit_scores(grow_scores)).filled(survivors, jnp.inf)
        (grown,) = yield Competition([grow], number)
        return self.expand(grown, mask.shape)

    def _unit_scores(self, scores):
        # Where a unit is a weight, scores need not be evaluated.
        return scores if type(self).pool is Unstructured.pool else self.pool(as_array(scores))


@dataclasses.dataclass(frozen=True)
class Unstructured(_Units):
    """Any set of weights. A leaf of n keeps `max(1, round_half_even(n * (1 - sparsity)))`.

    Ties keep the lower flat (C-order) index.
    """

    def pool(self, scores):
        return scores

    def active_units(self, mask):
        return mask

    def expand(self, units, shape):
        del shape
        return units


@dataclasses.dataclass(frozen=True)
class Block(_Units):
    """Blocks of weights that are kept or pruned together.

    The first two axes are tiled by `block_shape = (h, w)` and all other axes belong whole to each
    block; a leaf of one axis is tiled by w. Blocks at ragged edges are smaller. The score of a
    block is the average over its weights, or their maximum with `use_avg_pooling=False`.
    """

    block_shape: tuple[int, int] = (1, 1)
    use_avg_pooling: bool = True

    def __post_init__(self):
        object.__setattr__(self, "block_shape", tuple(self.block_shape))
        if len(self.block_shape) != 2 or min(self.block_shape) < 1:
            raise ValueError(f"block_shape: {self.block_shape} is not two positive sizes; give (h, w), such as (4, 4).")

    def pool(self, scores):
        wide = _at_least_float32(scores)
        rows, columns = self._plane(scores.shape)
        planes = wide.reshape(rows, columns, math.prod(scores.shape[2:]))
        if not self.use_avg_pooling:
            return self._tiles(planes.max(-1, initial=-jnp.inf), -jnp.inf).max((1, 3), initial=-jnp.inf)
        entries = self._tiles(jnp.ones(planes.shape[:2]), 0).sum((1, 3)) * planes.shape[2]
        return self._tiles(planes.sum(-1), 0).sum((1, 3)) / entries

    def expand(self, units, shape):
        h, w = self.block_shape
        rows, columns = self._plane(shape)
        plane = jnp.repeat(jnp.repeat(units, h, 0), w, 1)[:rows, :columns]
        return jnp.broadcast_to(plane.reshape(*shape[:2], *[1] * (len(shape) - 2)), shape)

    def _plane(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[:2] if len(shape) > 1 else (1, math.prod(shape))

    def _tiles(self, plane, fill):
        h, w = self.block_shape
        rows, columns = plane.shape
        padded = jnp.pad(plane, [(0, -rows % h), (0, -columns % w)], constant_values=fill)
        return padded.reshape(padded.shape[0] // h, h, padded.shape[1] // w, w)


@dataclasses.dataclass(frozen=True)
class Channel(_Units):
    """Whole slices along `axis`, scored by the sum over all other axes."""

    axis: int = -1

    def check_shape(self, shape):
        _check_axis(self.axis, shape)

    def pool(self, scores):
        return _at_least_float32(scores).sum([a for a in range(scores.ndim) if a != self.axis % scores.ndim])

    def expand(self, units, shape):
        others = [a for a in range(len(shape)) if a != self.axis % len(shape)]
        return jnp.broadcast_to(jnp.expand_dims(units, others), shape)


@dataclasses.dataclass(frozen=True)
class NByM(SparsityType):
    """Exactly n of every m successive weights along `axis` (Mishra et al., 2021).

    Sparsity 0 leaves the leaf dense, any other value applies n:m. Ties keep the later position.
    """

    n: int
    m: int
    axis: int = -1

    def check_shape(self, shape):
        if not 0 < self.n <= self.m:
            raise ValueError(f"n={self.n} of every m={self.m} weights cannot be kept; choose 1 <= n <= m.")
        _check_axis(self.axis, shape)
        if shape[self.axis] % self.m:
            raise ValueError(
                f"axis {self.axis} of {shape} is not a multiple of m={self.m}; exclude it with "
                "filter_fn or choose another axis."
            )

    def mask(self, scores, sparsity):
        self.check_shape(scores.shape)
        # Elementwise comparisons within groups of m: no sort, no gather, m * (m - 1) / 2 of them.
        axis = self.axis % scores.ndim
        keys = selection.order_preserving_keys(scores)
        groups = keys.reshape(*keys.shape[:axis], -1, self.m, *keys.shape[axis + 1 :])
        members = [jnp.take(groups, i, axis + 1) for i in range(self.m)]
        better = [jnp.zeros(members[0].shape, np.min_scalar_type(self.m)) for _ in range(self.m)]
        for early in range(self.m):
            for late in range(early + 1, self.m):
                late_wins = members[late] >= members[early]
                better[early] += late_wins
                better[late] += ~late_wins
        kept = jnp.stack([rank < self.n for rank in better], axis + 1).reshape(scores.shape)
        return kept | (jnp.asarray(sparsity) == 0)

    def regrow(self, mask, drop_scores, grow_scores, drop_fraction):
        drop = Scores.of(drop_scores).filled(~mask, jnp.nan)
        survivors = mask & selection.top_k_mask(drop, counts.keep_count(selection.count_true(mask), drop_fraction))
        # Each group refills the places it lost. A leaf that is dense stays dense.
        refilled = self.mask(jnp.where(survivors, jnp.inf, grow_scores), 0.5)
        return jnp.where(jnp.all(mask), mask, refilled)


def masking(structure: SparsityType, scores: Any, sparsity: Sparsity) -> selection.Choosing:
    """`structure.mask`, whose selection can be made together with those of other leaves.

    A structure whose `mask` someone overrode is called as it is, with an array.
    """
    if type(structure).mask is not _Units.mask:
        return structure.mask(as_array(scores), sparsity)
    return (yield from structure._masking(scores, sparsity))


def regrowing(
    structure: SparsityType, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Sparsity
) -> selection.Choosing:
    """`structure.regrow`, whose selections can be made together with those of other leaves.

    A structure whose `regrow` someone overrode is called as it is, with arrays.
    """
    if type(structure).regrow is not _Units.regrow:
        return structure.regrow(mask, as_array(drop_scores), as_array(grow_scores), drop_fraction)
    return (yield from structure._regrowing(mask, drop_scores, grow_scores, drop_fraction))


def _at_least_float32(scores: Float[Array, "*s"]) -> Float[Array, "*s"]:
    scores = as_array(scores)
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def for_leaf(sparsity_type: Any, path: trees.KeyPath, param: Any) -> SparsityType:
    """The structure of one leaf.

    Args:
      sparsity_type: a structure, a class of one, a function of (path, param), or path patterns ->
        structure as a mapping or pairs, where the first match wins and Unstructured is the rest.
      path: the leaf's path.
      param: the leaf.

    Raises:
      ValueError: if that gives no structure.
    """
    structure = sparsity_type
    if isinstance(structure, type):
        structure = _without_arguments(structure)
    elif (patterns := _patterns(structure)) is not None:
        structure = next((s for p, s in patterns.items() if trees.matches(p, path)), Unstructured())
    elif callable(structure):
        structure = structure(path, param)
    if not isinstance(structure, SparsityType):
        raise ValueError(
            f"Sparsity type {structure!r} is not known; give Unstructured(), NByM(n, m), "
            "Block((h, w)) or Channel(axis)."
        )
    return structure


def _without_arguments(structure: type) -> Any:
    try:
        return structure()
    except TypeError as error:
        raise ValueError(
            f"Sparsity type {structure.__name__} is a class that needs sizes; give an instance."
        ) from error


def check_patterns(sparsity_type: Any, paths: Sequence[trees.KeyPath]) -> None:
    """Raises a ValueError if a pattern of per-leaf structures names none of the pruned leaves."""
    if (patterns := _patterns(sparsity_type)) is not None:
        trees.resolve(patterns, paths, "sparsity_type")


def _patterns(sparsity_type: Any) -> dict[Any, SparsityType] | None:
    if isinstance(sparsity_type, Mapping):
        return dict(sparsity_type)
    return dict(sparsity_type) if isinstance(sparsity_type, list | tuple) else None


def _check_axis(axis: int, shape: tuple[int, ...]) -> None:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} does not exist in {shape}; exclude it with filter_fn or choose another axis.")
