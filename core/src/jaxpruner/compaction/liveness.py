"""Which units a function needs, read off the zeros of its parameters.

A unit reaches others only through products that sum over it: every other way to sum freezes its group. It is dead if
its entries are zero on one side of each of these products. Zeros are followed through the function unit by unit: an
array is zero where one of its units is, however it got there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpruner import trees
from jaxpruner.compaction import axes, reading, rules
from jaxpruner.compaction.finding import Found
from jaxpruner.inspection import jaxprs

Alive = Mapping[str, np.ndarray]


class Live(NamedTuple):
    """Where a value may be other than zero.

    Attributes:
      axes: for each axis, the units that may be, by group; all of a group that is missing.
      is_zero: whether it is zero throughout.
    """

    axes: tuple[Alive, ...]
    is_zero: bool = False


def needed_units(found: Found, leaves: Sequence[Any]) -> dict[str, np.ndarray]:
    """The units of each group that are not dead in these parameters, at least one per group.

    Removing a dead unit may leave other units without use, so this is repeated until no more units are dead.
    """
    nonzero = [np.asarray(leaf) != 0 for leaf in leaves]
    along = [found.axes_of(dims) for _, dims in found.parameters]
    needed = {group.name: np.ones(group.size, bool) for group in found.groups.removable}
    while True:
        walk = _Walk(found)
        parameters = [
            _of_parameter(kept_entries(mask, by, needed), by) for mask, by in zip(nonzero, along, strict=True)
        ]
        read = found.reading
        constants = [_of_constant(value) for value in read.constants]
        others = [_anything(dims) for dims in read.inputs[len(constants) + len(parameters) :]]
        walk.run(read, [*constants, *parameters, *others])
        now = {name: walk.needed.get(name, np.zeros(mask.size, bool)) & mask for name, mask in needed.items()}
        if all((now[name] == mask).all() for name, mask in needed.items()):
            break
        needed = now
    for mask in needed.values():
        mask[0] |= not mask.any()
    return needed


def kept_entries(array: Any, along: Sequence[axes.Axis], kept: Alive) -> Any:
    """The array with zeros in place of the units that are not kept."""
    for axis, made in enumerate(along):
        if not axes.groups_of(made).isdisjoint(kept):
            others = [other for other in range(np.ndim(array)) if other != axis]
            array = array * np.expand_dims(axes.spread(made, kept), others).astype(array.dtype)
    return array


def _of_parameter(nonzero: np.ndarray, along: Sequence[axes.Axis]) -> Live:
    def alive(axis: int, made: axes.Axis) -> dict[str, np.ndarray]:
        if not axes.groups_of(made):
            return {}
        others = tuple(other for other in range(nonzero.ndim) if other != axis)
        return _collected(made, nonzero.any(others))

    return Live(tuple(alive(axis, made) for axis, made in enumerate(along)), not nonzero.any())


def _collected(made: axes.Axis, vector: Any) -> dict[str, np.ndarray]:
    alive: dict[str, np.ndarray] = {}
    for name, part in axes.collect(made, vector, np.any):
        alive[name] = alive[name] | part if name in alive else part
    return alive


def _of_constant(value: Any) -> Live:
    is_number = isinstance(value, np.ndarray | np.generic | jax.Array | int | float | bool)
    is_known = (
        is_number
        and not isinstance(value, jax.core.Tracer)
        and trees.is_number(np.asarray(value) if not hasattr(value, "dtype") else value)
    )
    return Live(({},) * np.ndim(value), is_known and not np.any(np.asarray(value)))


def _anything(dims: Sequence[Any]) -> Live:
    return Live(({},) * len(dims))


def _either(lives: Sequence[Live]) -> Live:
    """Of what is zero where all of these are."""
    first, *others = [live for live in lives if not live.is_zero] or [lives[0]]
    for other in others:
        both = [
            {name: a[name] | b[name] for name in a.keys() & b.keys()}
            for a, b in zip(first.axes, other.axes, strict=True)
        ]
        first = Live(tuple(both))
    return first


def _both(lives: Sequence[Live]) -> Live:
    """Of what is zero where one of these is."""
    first, *others = lives
    for other in others:
        meet = [_meet(a, b) for a, b in zip(first.axes, other.axes, strict=True)]
        first = Live(tuple(meet), first.is_zero or other.is_zero)
    return first


def _meet(a: Alive, b: Alive) -> Alive:
    return {name: a[name] & b[name] if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}


# Primitives that move entries, or sum or choose among entries that are zero together.
_MOVES = frozenset([
    "reshape", "transpose", "broadcast_in_dim", "tile", "squeeze", "slice", "split", "rev", "dynamic_slice", "gather",
    "cumsum", "cummax", "cummin", "cumprod", "reduce_sum", "reduce_max", "reduce_min", "reduce_window_max",
    "reduce_window_min", "reduce_window_sum", "sort", "optimization_barrier", "device_put", "unstack",
])  # fmt: skip
# Primitives that combine entries of some of their operands: which operands; all if None.
_JOINS = {"concatenate": None, "stack": None, "pad": None, "dynamic_update_slice": [0, 1], "select_n": None}


class _Walk:
    """One walk through a function."""

    def __init__(self, found: Found):
        self._found = found
        self._names: dict[int, frozenset[str]] = {}
        self.needed: dict[str, np.ndarray] = {}

    def run(self, read: reading.Reading, inputs: Sequence[Live]) -> list[Live]:
        steps = iter(read.steps)
        return jaxprs.go_through(
            read.jaxpr,
            inputs,
            lambda _, given: self._step(next(steps), given),
            lambda atom: _of_constant(atom.val),
            [step.equation for step in read.steps],
        )

    def _step(self, step: rules.Step, given: list[Live]) -> list[Live]:
        name = step.name
        if name in rules.PRODUCTS:
            return [self._product(step, given)]
        if name == "scan":
            return self._scan(step, given)
        if name == "while":
            return self._while(step, given)
        if name == "cond":
            branches = [self.run(branch, given[1:]) for branch in step.inner]
            return [_either(outputs) for outputs in zip(*branches, strict=True)]
        if step.inner:
            return self.run(step.inner[0], given)
        if name == "mul":
            return [_both(_same_rank(given))]
        if name == "div":
            return _same_rank(given)[:1]
        if name == "transpose":
            order = step.equation.params["permutation"]
            return [Live(tuple(given[0].axes[axis] for axis in order), given[0].is_zero)]
        if name in _MOVES and not _fills(step):
            last = len(given) - 1
            return [
                self._moved([given[min(i, last)]], [step.inputs[min(i, last)]], dims)
                for i, dims in enumerate(step.outputs)
            ]
        if name in _JOINS or name.startswith("scatter"):
            which: Any = _JOINS.get(name, [0, 2])
            which = range(len(given)) if which is None else range(1, len(given)) if name == "select_n" else which
            return [self._moved([given[i] for i in which], [step.inputs[i] for i in which], step.outputs[0])]
        if name in rules.ELEMENTWISE and _keeps_zero(step.equation):
            return [_either(_same_rank(given))] * len(step.outputs)
        return [_anything(dims) for dims in step.outputs]

    def _product(self, step: rules.Step, given: Sequence[Live]) -> Live:
        left, right = given[:2]
        contracted, along = rules.products(step)
        if not (left.is_zero or right.is_zero):
            for i, j in contracted:
                for name in self._groups(step.inputs[0][i]) & self._groups(step.inputs[1][j]):
                    alive = _meet(left.axes[i], right.axes[j]).get(name)
                    if alive is None:
                        alive = np.ones(self._size(name), bool)
                    self.needed[name] = self.needed.get(name, False) | alive
        is_zero = left.is_zero or right.is_zero
        if step.name == "conv_general_dilated":
            return self._convolution(step, left, right)
        if step.name != "dot_general":
            return Live(({}, right.axes[2]), is_zero)
        gone_left, gone_right = [i for i, _ in [*contracted, *along]], [j for _, j in [*contracted, *along]]
        batch = [_meet(left.axes[i], right.axes[j]) for i, j in along]
        rest = [alive for i, alive in enumerate(left.axes) if i not in gone_left]
        return Live((*batch, *rest, *(alive for j, alive in enumerate(right.axes) if j not in gone_right)), is_zero)

    def _scan(self, step: rules.Step, given: Sequence[Live]) -> list[Live]:
        constants, carried = jaxprs.scan_sizes(step.equation.params)
        stacked = [live._replace(axes=live.axes[1:]) for live in given[constants + carried :]]
        carry = list(given[constants : constants + carried])
        outputs = self._until_stable(
            carry, lambda carry: self.run(step.inner[0], [*given[:constants], *carry, *stacked]), carried
        )
        return [*carry, *(live._replace(axes=({}, *live.axes)) for live in outputs[carried:])]

    def _while(self, step: rules.Step, given: Sequence[Live]) -> list[Live]:
        params = step.equation.params
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = list(given[second:])
        self._until_stable(carry, lambda carry: self.run(step.inner[1], [*given[first:second], *carry]), len(carry))
        self.run(step.inner[0], [*given[:first], *carry])
        return carry

    def _until_stable(self, carry: list[Live], body: Any, carried: int) -> list[Live]:
        """Runs the body of a loop until what it carries has no more zeros to lose; the carry is changed in place."""
        while True:
            outputs = body(carry)
            merged = [_either([before, after]) for before, after in zip(carry, outputs[:carried], strict=True)]
            if all(_equal(a, b) for a, b in zip(merged, carry, strict=True)):
                return outputs
            carry[:] = merged

    def _convolution(self, step: rules.Step, image: Live, kernel: Live) -> Live:
        image_axes, kernel_axes, result_axes = step.equation.params["dimension_numbers"]
        alive: list[Alive] = [{} for _ in result_axes]
        alive[result_axes[1]] = kernel.axes[kernel_axes[0]]
        if step.feature_groups is not None:  # the channels of a group come from no others
            own, channels = self._groups(step.feature_groups), image.axes[image_axes[1]]
            channels = {name: units for name, units in channels.items() if name in own}
            alive[result_axes[1]] = _meet(alive[result_axes[1]], channels)
        return Live(tuple(alive), image.is_zero or kernel.is_zero)

    def _moved(self, lives: Sequence[Live], inputs: Sequence[rules.Dims], outputs: rules.Dims) -> Live:
        """Entries of these on other axes; a unit may be other than zero if it may be in one place."""
        merged: dict[str, np.ndarray] = {}
        whole: set[str] = set()
        for live, dims in zip(lives, inputs, strict=True):
            if live.is_zero:
                continue
            if not dims:  # a number that goes everywhere, such as that of `pad`
                whole.update(name for dim in outputs for name in self._groups(dim))
            for alive, dim in zip(live.axes, dims, strict=True):
                for name in self._groups(dim):
                    if name not in alive:
                        whole.add(name)
                    else:
                        merged[name] = merged[name] | alive[name] if name in merged else alive[name]
        return Live(
            tuple({n: merged[n] for n in self._groups(dim) if n in merged and n not in whole} for dim in outputs),
            all(live.is_zero for live in lives),
        )

    def _groups(self, dim: axes.Dim) -> frozenset[str]:
        key = id(dim.root)
        if key not in self._names:
            names = self._found.names
            self._names[key] = frozenset(names[atom] for atom in dim.atoms if atom in names)
        return self._names[key]

    def _size(self, name: str) -> int:
        return next(group.size for group in self._found.groups.removable if group.name == name)


def _fills(step: rules.Step) -> bool:
    """Whether other numbers than zero may come in: for indices that are outside, or from windows of padding alone."""
    params = step.equation.params
    if step.name == "gather" and "FILL" in str(params["mode"]):
        is_integer = np.issubdtype(step.equation.outvars[0].aval.dtype, np.integer)
        # Floats are filled with NaN, in the units that are left as well.
        return bool(params["fill_value"]) or (is_integer and params["fill_value"] is None)
    if step.name in ("reduce_window_max", "reduce_window_min"):
        windows = zip(params["window_dimensions"], params["padding"], strict=True)
        return any(max(padding) >= window for window, padding in windows)
    return False


def _same_rank(lives: Sequence[Live]) -> list[Live]:
    """Scalars beside arrays know of no axes."""
    rank = max(len(live.axes) for live in lives)
    return [live if live.axes or not rank else Live(({},) * rank, live.is_zero) for live in lives]


def _equal(a: Live, b: Live) -> bool:
    return a.is_zero == b.is_zero and all(
        x.keys() == y.keys() and all((x[name] == y[name]).all() for name in x)
        for x, y in zip(a.axes, b.axes, strict=True)
    )


def _keeps_zero(equation: Any) -> bool:
    """Whether an elementwise function of zeros is zero: it is asked."""
    literals = tuple(
        complex(atom.val) if jaxprs.is_literal(atom) and np.shape(atom.val) == () else None for atom in equation.invars
    )
    try:
        return _value_at_zero(equation.primitive, literals, _Equation(equation))
    except Exception:  # what cannot be asked alone
        return False


class _Equation:
    """An equation as a key: equal to others of the same parameters and dtypes."""

    def __init__(self, equation: Any):
        self.equation = equation
        dtypes = tuple(str(atom.aval.dtype) for atom in equation.invars)
        self._key = (equation.primitive.name, dtypes, repr(sorted(equation.params.items(), key=str)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Equation) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=4096)
def _value_at_zero(primitive: Any, literals: tuple[Any, ...], key: _Equation) -> bool:
    equation = key.equation
    with jax.ensure_compile_time_eval():
        values = [
            np.zeros((), atom.aval.dtype) if literal is None else np.asarray(literal.real, atom.aval.dtype)
            for literal, atom in zip(literals, equation.invars, strict=True)
        ]
        return not np.any(np.asarray(primitive.bind(*values, **equation.params)))


def constant_units(found: Found, leaves: Sequence[Any], kept: Alive) -> dict[str, int]:
    """How many of the kept units of each group have only zero weights before them, so that their output is constant."""
    constant: dict[str, int] = {}
    owners = {group.name: group for group in found.groups.removable}
    for leaf, (path, dims) in zip(leaves, found.parameters, strict=True):
        for axis, made in enumerate(found.axes_of(dims)):
            for name in axes.groups_of(made):
                if owners[name].owner == path and str(axis) == owners[name].name.rsplit("[", 1)[1][:1]:
                    others = tuple(other for other in range(np.ndim(leaf)) if other != axis)
                    alive = _collected(made, np.asarray(leaf != 0).any(others))[name]
                    if number := int(np.sum(kept[name] & ~alive)):
                        constant[name] = number
    return constant
