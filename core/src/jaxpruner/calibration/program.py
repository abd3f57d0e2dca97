"""A function as a list of operations: calls are inlined, and loops over layers unrolled.

The jaxpr of a function is its whole data flow, the same for every framework. Calibration needs an order: the products
with parameters one after the other, each after everything that it depends on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner.inspection import jaxprs
from jaxpruner.inspection.jaxprs import CASTS, PRODUCTS

# `index` is a turn of a loop that was unrolled.
MOVES = jaxprs.MOVES | {"concatenate", "index", "split", "stack"}
# Linear, entry by entry: masks, scales, signs.
SCALES = frozenset({"div", "mul", "neg", "select_n"})
_CALLS = {*jaxprs.CALLS, *jaxprs.CUSTOM_CALLS}


class Leaf(NamedTuple):
    """A parameter, or a layer of one that is a stack of them: its number, and where in the stack."""

    number: int
    index: tuple[int, ...] = ()  # type: ignore[assignment]  # in place of the method of tuples


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value of the program: the result of an operation, or given."""

    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value that is known when the program is made; a literal is part of it."""

    value: Any
    is_literal: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One operation.

    Attributes:
      name: its primitive.
      run: from its operands to its results.
      inputs: its operands.
      outputs: its results.
      key: equal for operations that are the same but for their operands.
      params: those of the equation.
    """

    name: str
    run: Callable[[Sequence[Any]], list[Any]]
    inputs: tuple[Value | Constant, ...]
    outputs: tuple[Value, ...]
    key: Any
    params: Mapping[str, Any]


@dataclasses.dataclass(eq=False)
class Program:
    """Operations in their order.

    Attributes:
      operations: the operations.
      leaves: what is read of the parameters.
      arguments: the values of the other arguments, in order.
      turns: for each layer of a stack, the number of the loop that runs through it, and the turn of that loop.
    """

    operations: list[Operation]
    leaves: dict[Leaf, Value]
    arguments: list[Value]
    turns: dict[Leaf, tuple[int, int]]

    def fingerprint(self) -> str:
        """Equal for programs that compute the same from the same parameters, in whatever process."""
        numbers: dict[Any, Any] = {value: tuple(leaf) for leaf, value in self.leaves.items()}
        numbers |= {value: f"argument {i}" for i, value in enumerate(self.arguments)}
        text = hashlib.sha256()
        for operation in self.operations:
            names = [
                contents(operand.value) if isinstance(operand, Constant) else numbers[operand]
                for operand in operation.inputs
            ]
            numbers |= {output: len(numbers) for output in operation.outputs}
            text.update(repr((names, [output.shape for output in operation.outputs])).encode())
            text.update(_in_any_process(repr(operation.key)).encode())
        return text.hexdigest()


def program_of(closed: Any, parameters: int, prunable: set[int]) -> Program:
    """The program of a closed jaxpr.

    Args:
      closed: the jaxpr.
      parameters: how many of its first arguments are parameters.
      prunable: the numbers of those that may be pruned. Loops that multiply with them are unrolled; any other loop is
        one operation.
    """
    return _Writer(prunable).write(closed, parameters)


def stack_depths(closed: Any, parameters: int) -> list[int]:
    """How many of the first axes of each parameter count layers: those that loops with products run through."""
    depths = [0] * parameters

    # A value is a parameter, or a layer of one: its number, and how deep in its stack. Others are None.
    def rule(equation: Any, operands: list[Any]) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        if name in CASTS:
            return operands
        if name in _CALLS and (inner := jaxprs.called(equation)) is not None:
            return follow(*inner, operands)
        if name == "scan" and _has_product(params["jaxpr"].jaxpr):
            constants, carried = jaxprs.scan_sizes(params)
            layers = [stack and (stack[0], stack[1] + 1) for stack in operands[constants + carried :]]
            for number, depth in filter(None, layers):
                depths[number] = max(depths[number], depth)
            body = params["jaxpr"]
            follow(body.jaxpr, body.consts, [*operands[:constants], *[None] * carried, *layers])
        return [None] * len(equation.outvars)

    def follow(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        return jaxprs.go_through(jaxpr, [*[None] * len(constants), *inputs], rule, lambda _: None)

    others = len(closed.jaxpr.invars) - parameters
    follow(closed.jaxpr, closed.consts, [*((number, 0) for number in range(parameters)), *[None] * others])
    return depths


class _Writer:
    def __init__(self, prunable: set[int]):
        self._prunable = prunable
        self._operations: list[Operation] = []
        self._leaves: dict[Leaf, Value] = {}
        # Values that are a leaf, cast or not: those casts lie between it and a stack that is run through.
        self._leaf_of: dict[Value, tuple[Leaf, tuple[Any, ...]]] = {}
        self._weights: set[Value] = set()
        self._keys: dict[int, Any] = {}
        self._turns: dict[Leaf, tuple[int, int]] = {}
        self._loops = 0

    def write(self, closed: Any, parameters: int) -> Program:
        variables = closed.jaxpr.invars
        given = [self._leaf(Leaf(i), variable.aval) for i, variable in enumerate(variables[:parameters])]
        arguments = [_value(variable.aval) for variable in variables[parameters:]]
        self._inline(closed.jaxpr, closed.consts, [*given, *arguments])
        return Program(self._operations, self._leaves, arguments, self._turns)

    def _leaf(self, leaf: Leaf, aval: Any) -> Value:
        if leaf not in self._leaves:
            value = self._leaves[leaf] = _value(aval)
            self._leaf_of[value] = (leaf, ())
            if leaf.number in self._prunable:
                self._weights.add(value)
        return self._leaves[leaf]

    def _inline(self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        return jaxprs.go_through(jaxpr, [*map(Constant, constants), *inputs], self._equation, _literal)

    def _equation(self, equation: Any, operands: list[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        if name in _CALLS and (inner := jaxprs.called(equation)) is not None:
            return self._inline(*inner, operands)
        is_weighted = any(operand in self._weights for operand in operands)
        if name == "scan" and is_weighted and _has_product(equation.params["jaxpr"].jaxpr):
            return self._unrolled(equation, operands)
        outputs = tuple(_value(variable.aval) for variable in equation.outvars)
        key = self._keys.setdefault(id(equation), (name, _text(equation.params)))

        def run(values: Sequence[Any]) -> list[Any]:
            return jaxprs.bind(equation, values)

        self._operations.append(Operation(name, run, tuple(operands), outputs, key, equation.params))
        if is_weighted and name in MOVES | CASTS | SCALES:
            self._weights.update(outputs)
        if name in CASTS and operands[0] in self._leaf_of:
            leaf, casts = self._leaf_of[operands[0]]
            self._leaf_of[outputs[0]] = leaf, (*casts, equation)
        return outputs

    def _unrolled(self, equation: Any, operands: list[Any]) -> list[Any]:
        params = equation.params
        constants, carried = jaxprs.scan_sizes(params)
        length = params["length"]
        body = params["jaxpr"]
        carry, stacks = operands[constants : constants + carried], operands[constants + carried :]
        avals = [variable.aval for variable in body.jaxpr.invars[constants + carried :]]
        rows: list[Any] = [None] * length
        self._loops += 1
        loop = self._loops
        for i in reversed(range(length)) if params["reverse"] else range(length):
            layer = [self._row(stack, (loop, i), aval) for stack, aval in zip(stacks, avals, strict=True)]
            outputs = self._inline(body.jaxpr, body.consts, [*operands[:constants], *carry, *layer])
            carry, rows[i] = outputs[:carried], outputs[carried:]
        results = equation.outvars[carried:]
        columns = zip(*rows, strict=True) if length else [()] * len(results)
        return [*carry, *(self._stacked(column, v.aval) for column, v in zip(columns, results, strict=True))]

    def _row(self, stack: Any, turn: tuple[int, int], aval: Any) -> Any:
        """What one turn of a loop sees of what is run through: of a parameter its layer."""
        _, i = turn
        if isinstance(stack, Value) and stack in self._leaf_of:
            leaf, casts = self._leaf_of[stack]
            source = jax.ShapeDtypeStruct(aval.shape, casts[0].invars[0].aval.dtype) if casts else aval
            layer = Leaf(leaf.number, (*leaf.index, i))
            row = self._leaf(layer, source)
            self._turns.setdefault(layer, turn)
            for cast in casts:
                params = {**cast.params, "sharding": None} if "sharding" in cast.params else cast.params
                to = jax.ShapeDtypeStruct(aval.shape, cast.outvars[0].aval.dtype)
                row = self._append(cast.primitive.name, _binding(cast.primitive, params), (row,), to, _text(params))
                if leaf.number in self._prunable:
                    self._weights.add(row)
            return row
        number = Constant(jnp.asarray(i, jnp.int32))
        row = self._append("index", _index, (stack, number), aval)
        if stack in self._weights:
            self._weights.add(row)
        return row

    def _stacked(self, rows: Sequence[Any], aval: Any) -> Value | Constant:
        if not rows:
            return Constant(jnp.zeros(aval.shape, aval.dtype))
        return self._append("stack", _stack, tuple(rows), aval)

    def _append(self, name: str, run: Any, inputs: tuple[Any, ...], aval: Any, key: Any = None) -> Value:
        output = _value(aval)
        self._operations.append(Operation(name, run, inputs, (output,), (name, key), {}))
        return output


def _binding(primitive: Any, params: Mapping[str, Any]) -> Callable[[Sequence[Any]], list[Any]]:
    return lambda values: [primitive.bind(*values, **params)]


def _index(values: Sequence[Any]) -> list[Any]:
    return [jax.lax.dynamic_index_in_dim(values[0], values[1], keepdims=False)]


def _stack(values: Sequence[Any]) -> list[Any]:
    return [jnp.stack(values)]


def _literal(atom: Any) -> Constant:
    value = atom.val if hasattr(atom.val, "aval") else np.asarray(atom.val, atom.aval.dtype)
    return Constant(value, is_literal=True)


def _value(aval: Any) -> Value:
    return Value(tuple(aval.shape), aval.dtype)


def _has_product(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in PRODUCTS or any(map(_has_product, _inside(equation.params)))
        for equation in jaxpr.eqns
    )


def _inside(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, list | tuple) else [value]:
            if hasattr(inner := getattr(each, "jaxpr", each), "eqns"):
                yield inner


def contents(value: Any) -> Any:
    """Equal for constants of the same entries, of which `repr` shows some only."""
    is_key = jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key)
    entries = np.asarray(jax.random.key_data(value) if is_key else value)
    return entries.shape, str(entries.dtype), hashlib.sha256(entries.tobytes()).hexdigest()


def _text(params: Mapping[str, Any]) -> str:
    """Equal for parameters of equations that are equal; functions are equal to themselves only."""
    return repr([sorted((key, repr(value)) for key, value in params.items()), *_constants(params)])


def _in_any_process(text: str) -> str:
    """A text without what another process writes otherwise: addresses, and the order of sets."""
    text = re.sub(r"0x[0-9a-f]+", "", text)
    return re.sub(r"set\(\{[^{}]*\}", lambda found: ", ".join(sorted(re.split("[{}, ]+", found[0]))), text)


def _constants(params: Mapping[str, Any]) -> Iterator[Any]:
    """The constants in the jaxprs that an equation calls."""
    for value in params.values():
        for each in value if isinstance(value, list | tuple) else [value]:
            yield from map(contents, getattr(each, "consts", ()))
    for jaxpr in _inside(params):
        for equation in jaxpr.eqns:
            yield from (contents(atom.val) for atom in equation.invars if jaxprs.is_literal(atom))
            yield from _constants(equation.params)
