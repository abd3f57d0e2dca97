"""What axes are made of: units that must be removed together, in products and sums.

An axis of a flattened `(heads, head_dim)` is a product of two factors, row-major. An axis of concatenated values is a
sum of parts. While a function is read, axes are `Dim`s, and two that an equation ties are bound together: if one is a
product or a sum, the other becomes the same. The result is an `Axis`, which no longer changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Dim:
    """An axis, or a factor or part of one, while a function is read."""

    __slots__ = ("_bound", "_kind", "_parts", "_reasons", "size")

    def __init__(self, size: int, reason: str | None = None):
        self.size = size
        self._bound: Dim | None = None
        self._kind: str | None = None
        self._parts: tuple[Dim, ...] = ()
        # Why it cannot be shortened, in the order found; a mapping for its order.
        self._reasons: dict[str, None] = {} if reason is None else {reason: None}

    @property
    def root(self) -> Dim:
        """The one that stands for all that are bound to it."""
        dim = self
        while dim._bound is not None:
            dim = dim._bound
        return dim

    @property
    def atoms(self) -> tuple[Dim, ...]:
        """The parts that it finally consists of."""
        root = self.root
        return tuple(atom for part in root._parts for atom in part.atoms) if root._kind else (root,)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons why this atom cannot be shortened; none if it can."""
        return tuple(self.root._reasons)

    def freeze(self, reason: str) -> None:
        """Says that none of it may be removed."""
        for atom in self.atoms:
            atom._reasons.setdefault(reason)

    def _become(self, kind: str, parts: Sequence[Dim]) -> None:
        for reason in self._reasons:
            for part in parts:
                part.freeze(reason)
        self._kind, self._parts = kind, tuple(parts)

    def _bind(self, other: Dim) -> None:
        for reason in self._reasons:
            other.freeze(reason)
        self._bound = other


def product(factors: Sequence[Dim]) -> Dim:
    """The axis of these factors, the major one first."""
    factors = [factor for dim in factors for factor in _factors(dim)]
    if len(factors) == 1:
        return factors[0]
    dim = Dim(math.prod(factor.size for factor in factors))
    if factors:
        dim._become("product", factors)
    return dim


def concatenation(parts: Sequence[Dim]) -> Dim:
    """The axis of these one after the other."""
    parts = [part for part in parts if part.size != 0]
    if len(parts) == 1:
        return parts[0]
    dim = Dim(sum(part.size for part in parts))
    if parts:
        dim._become("sum", parts)
    return dim


def unify(first: Dim, second: Dim, where: str) -> None:
    """Ties two axes of one size; where that is beyond products and sums, both are frozen."""
    first, second = first.root, second.root
    if first is second or first.size == 1:
        return
    if first._kind is None:
        first._bind(second)
    elif second._kind is None:
        second._bind(first)
    elif first._kind == second._kind == "sum":
        _unify_sums(first, second, where)
    else:
        if second._kind == "sum":
            first, second = second, first
        factors = _factors(second)
        if (regrouped := regroup([first], [factor.size for factor in factors], where)) is None:
            second.freeze(f"cannot be told apart in {where}")
            return
        for mine, factor in zip(regrouped, factors, strict=True):
            unify(mine, factor, where)


def _unify_sums(first: Dim, second: Dim, where: str) -> None:
    left, right = list(_parts(first)), list(_parts(second))
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a.size > b.size:
            a, rest = cut(a, b.size, where)
            left.insert(0, rest)
        elif b.size > a.size:
            b, rest = cut(b, a.size, where)
            right.insert(0, rest)
        unify(a, b, where)


def regroup(dims: Sequence[Dim], sizes: Sequence[int], where: str) -> list[Dim] | None:
    """The axes of a row-major reshape to these sizes; None, with all frozen, where it cuts across factors."""
    pending = [factor for dim in dims for factor in _factors(dim)]
    regrouped = []
    for size in sizes:
        taken: list[Dim] = []
        missing = size
        while missing != 1:
            pending[:1] = _factors(pending[0])  # it may have been divided where it came before
            factor = pending.pop(0)
            if factor.size != missing and missing % factor.size:
                # The major part of the factor goes here, the rest to the next axis.
                if factor.size % missing or (divided := _divide(factor, missing, where)) is None:
                    for dim in dims:
                        dim.freeze(f"cannot be told apart in {where}")
                    return None
                factor, rest = divided
                pending[:0] = _factors(rest)
            taken.append(factor)
            missing //= factor.size
        regrouped.append(product(taken))
    return regrouped


def _divide(dim: Dim, major: int, where: str) -> tuple[Dim, Dim] | None:
    """A factor as the product of one of `major` entries and the rest."""
    root = dim.root
    minor = Dim(root.size // major)
    if root._kind == "sum":
        if any(part.size % minor.size for part in _parts(root)):
            return None
        majors = []
        for part in _parts(root):
            majors.append(Dim(part.size // minor.size))
            unify(part, product([majors[-1], minor]), where)
        whole = concatenation(majors)
        root._kind, root._parts = "product", (whole, minor)
        return whole, minor
    parts = Dim(major), minor
    root._become("product", parts)
    return parts


def cut(dim: Dim, position: int, where: str) -> tuple[Dim, Dim]:
    """The two parts of an axis before and after a position; frozen ones where it cuts across factors."""
    root = dim.root
    if root._kind == "product":
        major, *rest = _factors(root)
        if not rest:
            return cut(major, position, where)
        if position % (inner := math.prod(factor.size for factor in rest)):
            reason = f"cannot be told apart in {where}"
            root.freeze(reason)
            return Dim(position, reason), Dim(root.size - position, reason)
        left, right = cut(major, position // inner, where)
        return product([left, *rest]), product([right, *rest])
    if root._kind is None:
        parts = Dim(position), Dim(root.size - position)
        root._become("sum", parts)
        return parts
    before, after, at = [], [], 0
    for part in _parts(root):
        if at + part.size <= position:
            before.append(part)
        elif at >= position:
            after.append(part)
        else:
            left, right = cut(part, position - at, where)
            before.append(left)
            after.append(right)
        at += part.size
    return concatenation(before), concatenation(after)


def _factors(dim: Dim) -> list[Dim]:
    root = dim.root
    if root._kind == "product":
        return [factor for part in root._parts for factor in _factors(part)]
    return [root] if root.size != 1 else []


def _parts(dim: Dim) -> list[Dim]:
    root = dim.root
    return [part for each in root._parts for part in _parts(each)] if root._kind == "sum" else [root]


# What an axis is once the function has been read.


class Fixed(NamedTuple):
    """Entries that all stay."""

    size: int


class Units(NamedTuple):
    """The units of a group, one entry each."""

    group: str
    size: int


@dataclasses.dataclass(frozen=True)
class Product:
    """Factors, the major one first."""

    factors: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return math.prod(factor.size for factor in self.factors)


@dataclasses.dataclass(frozen=True)
class Sum:
    """Parts, one after the other."""

    parts: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


Axis = Fixed | Units | Product | Sum


def resolve(dim: Dim, names: Mapping[Dim, str]) -> Axis:
    """The axis that a `Dim` has become; atoms without a name stay whole."""
    root = dim.root
    if root._kind is None:
        return Units(names[root], root.size) if root in names else Fixed(root.size)
    parts = tuple(resolve(part, names) for part in root._parts)
    if all(isinstance(part, Fixed) for part in parts):
        return Fixed(root.size)
    return Product(parts) if root._kind == "product" else Sum(parts)


def groups_of(axis: Axis) -> frozenset[str]:
    """The groups whose units are in an axis."""
    if isinstance(axis, Units):
        return frozenset([axis.group])
    return frozenset().union(*map(groups_of, _children(axis)))


def _children(axis: Axis) -> tuple[Axis, ...]:
    return getattr(axis, "factors", getattr(axis, "parts", ()))


def spread(axis: Axis, masks: Mapping[str, Any], xp: Any = np) -> Any:
    """Which entries of an axis stay, given which units of its groups stay: boolean, `[size]`.

    Args:
      axis: the axis.
      masks: boolean vectors by group; groups that are not in it stay whole.
      xp: `numpy`, or `jax.numpy` for masks that are traced.
    """
    if isinstance(axis, Units) and axis.group in masks:
        return masks[axis.group]
    if isinstance(axis, Fixed | Units):
        return xp.ones(axis.size, bool)
    parts = [spread(child, masks, xp) for child in _children(axis)]
    if isinstance(axis, Sum):
        return xp.concatenate(parts)
    kept = parts[0]
    for part in parts[1:]:
        kept = (kept[:, None] & part[None, :]).reshape(-1)
    return kept


def collect(axis: Axis, vector: Any, reduce: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """The vector of an axis as one of each of its groups, entries of one unit reduced (`reduce(array, axes)`)."""
    if isinstance(axis, Units):
        yield axis.group, vector
    elif isinstance(axis, Sum):
        at = 0
        for part in axis.parts:
            yield from collect(part, vector[at : at + part.size], reduce)
            at += part.size
    elif isinstance(axis, Product):
        entries = vector.reshape([factor.size for factor in axis.factors])
        for i, factor in enumerate(axis.factors):
            others = tuple(j for j in range(len(axis.factors)) if j != i)
            yield from collect(factor, reduce(entries, others), reduce)


def count(axis: Axis, kept: Mapping[str, Any]) -> Any:
    """The length of an axis with `kept[group]` units of each group; groups that are not in it stay whole."""
    if isinstance(axis, Fixed | Units):
        return kept.get(axis.group, axis.size) if isinstance(axis, Units) else axis.size
    counts = [count(child, kept) for child in _children(axis)]
    return sum(counts) if isinstance(axis, Sum) else math.prod(counts)
