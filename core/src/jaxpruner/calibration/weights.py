"""Where a program multiplies with its parameters, and with which of their entries."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner.calibration.program import MOVES, SCALES, Constant, Leaf, Operation, Program, Value, contents
from jaxpruner.inspection.jaxprs import CASTS, PRODUCTS

# Moves that keep each entry, once.
_REORDERINGS = {
    "copy", "copy_p", "expand_dims", "name", "optimization_barrier", "pvary", "reshape", "rev", "sharding_constraint",
    "squeeze", "stop_gradient", "transpose",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A product with (a part of) a leaf.

    Attributes:
      operation: the product.
      side: which of its operands has the leaf.
      leaf: the leaf.
      columns: the outputs that are of this leaf, where several are multiplied with as one; None if all are.
      is_last: whether no later product has the same entries. Those before only add to its statistics.
      part: equal for uses of the same entries.
    """

    operation: Operation
    side: int
    leaf: Leaf
    columns: np.ndarray | None
    is_last: bool
    part: int

    @property
    def weight(self) -> Value | Constant:
        return self.operation.inputs[self.side]

    @property
    def activation(self) -> Any:
        return self.operation.inputs[1 - self.side]

    @property
    def layout(self) -> Layout:
        return layout(self.operation, self.side)

    def of_leaf(self, operand: Any) -> Any:
        """The matrices of an operand of the product, of the outputs that the leaf has."""
        matrices = self.layout.matrices(operand)
        return matrices if self.columns is None else matrices[:, :, self.columns]

    def operand(self, matrices: Any) -> Any:
        """The inverse of `of_leaf`; zero for outputs of other leaves."""
        if self.columns is not None:
            matrices = jnp.zeros(self.layout.shape, matrices.dtype).at[:, :, self.columns].set(matrices)
        return self.layout.operand(matrices)

    @property
    def features(self) -> Any:
        """Equal for uses that read the same inputs of an activation."""
        params = self.operation.params
        if self.operation.name == "dot_general":
            contracted, batch = params["dimension_numbers"]
            return contracted[1 - self.side], batch[1 - self.side], np.argsort(contracted[self.side]).tobytes()
        return self.operation.key, self.weight.shape  # which has the size of the window


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an operand that has weights is a stack of matrices, (batch, inputs, outputs).

    Attributes:
      order: its axes, those of the batch first, then those that are contracted, then the others.
      shape: (batch, inputs, outputs).
      sizes: the lengths of its axes in that order.
    """

    order: tuple[int, ...]
    shape: tuple[int, int, int]
    sizes: tuple[int, ...]
    groups: int = 1

    def matrices(self, weight: Any) -> Any:
        """The operand as matrices."""
        moved = jnp.transpose(weight, self.order)
        if self.groups > 1:  # of a convolution, whose outputs are those of one group after the other
            _, inputs, outputs = self.shape
            return moved.reshape(inputs, self.groups, outputs).transpose(1, 0, 2)
        return moved.reshape(self.shape)

    def operand(self, matrices: Any) -> Any:
        """The inverse of `matrices`."""
        if self.groups > 1:
            matrices = matrices.transpose(1, 0, 2)
        return jnp.transpose(matrices.reshape(self.sizes), tuple(np.argsort(self.order)))


def layout(operation: Operation, side: int) -> Layout:
    """How the operand on this side of a product is a stack of matrices; contracted axes in its own order."""
    shape = operation.inputs[side].shape
    groups = 1
    if operation.name == "dot_general":
        contracted, batch = (sides[side] for sides in operation.params["dimension_numbers"])
        contracted = sorted(contracted)
    else:
        out = operation.params["dimension_numbers"].rhs_spec[0]
        contracted, batch = [axis for axis in range(len(shape)) if axis != out], ()
        groups = operation.params["feature_group_count"]
    free = [axis for axis in range(len(shape)) if axis not in (*contracted, *batch)]
    order = (*batch, *contracted, *free)
    sizes = tuple(shape[axis] for axis in order)
    count, inputs, outputs = (math.prod(shape[axis] for axis in axes) for axes in (batch, contracted, free))
    matrices = (groups, inputs, outputs // groups) if groups > 1 else (count, inputs, outputs)
    return Layout(order, matrices, sizes, groups)


class Weights:
    """What happens to the parameters on the way to products.

    Args:
      program: the program.
      prunable: the numbers of the parameters that may be pruned.
      known: the value of what depends on no argument.

    Attributes:
      uses: the products with what can be pruned, in their order.
      dense: what cannot, with the reason.
      partial: leaves of which some entries are in no product.
      data: the values that depend on arguments or on products.
      turns: as of the program.
    """

    def __init__(self, program: Program, prunable: set[int], known: Callable[[Any], Any]):
        self._program, self._known = program, known
        self._producers = {output: op for op in program.operations for output in op.outputs}
        self._leaf_values = {value: leaf for leaf, value in program.leaves.items() if leaf.number in prunable}
        self._shapes = {
            leaf: jax.ShapeDtypeStruct(value.shape, value.dtype) for value, leaf in self._leaf_values.items()
        }
        self.dense: dict[Leaf, str] = {}
        self.partial: list[Leaf] = []
        self.turns = program.turns
        self.uses: list[Use] = []
        data = set(program.arguments)
        for operation in program.operations:
            # A product may change with its weights, whatever it depends on.
            if operation.name in PRODUCTS or not data.isdisjoint(operation.inputs):
                data.update(operation.outputs)
        self.data = data
        while self._changed(program):
            pass

    def leaves_of(self, value: Any) -> tuple[Leaf, ...]:
        """The leaves whose entries a value has, if it has no others."""
        return self._carried.get(value, ())

    def value(self, weight: Value | Constant, leaves: Mapping[Leaf, Any]) -> Any:
        """The operand of a product for these values of the leaves."""
        return self._evaluate(weight, leaves, moves_only=False)

    def shape(self, leaf: Leaf) -> tuple[int, ...]:
        """The shape of a leaf."""
        return self._shapes[leaf].shape

    def is_scaled(self, weight: Value | Constant) -> bool:
        """Whether entries are scaled or masked on the way."""
        return any(operation.name in SCALES for operation in self._chain(weight))

    def moved(self, use: Use, entries: Any) -> Any:
        """Entries of a leaf in their places in the operand of a product; zero elsewhere."""
        return self._evaluate(use.weight, {**self._zeros(use, entries.dtype), use.leaf: entries}, moves_only=True)

    def put_back(self, use: Use, operand: Any) -> tuple[Any, Any]:
        """Entries of an operand in their places in the leaf; zero elsewhere. And which places these are."""
        if use.weight in self._leaf_values:
            return operand, jnp.ones(operand.shape, bool)
        back = self._back(use, operand.dtype)
        if all(operation.name in _REORDERINGS for operation in self._moves(use.weight)):
            return back(operand), jnp.ones(self._shapes[use.leaf].shape, bool)
        return back(operand), back(jnp.ones_like(operand)) > 0

    def _back(self, use: Use, dtype: Any) -> Callable[[Any], Any]:
        """The transpose of what moves the entries of a leaf into an operand."""
        move = functools.partial(self.moved, use)
        transposed = jax.linear_transpose(move, jax.ShapeDtypeStruct(self._shapes[use.leaf].shape, dtype))
        return lambda operand: transposed(operand)[0]

    def _zeros(self, use: Use, dtype: Any) -> dict[Leaf, Any]:
        """Of what else is multiplied with as one with a leaf."""
        return {leaf: jnp.zeros_like(self._shapes[leaf], dtype) for leaf in self.leaves_of(use.weight)}

    def _evaluate(self, value: Any, leaves: Mapping[Leaf, Any], moves_only: bool) -> Any:
        done: dict[Any, Any] = {}

        def look_up(value):
            if value in self._leaf_values and self._leaf_values[value] in leaves:
                return leaves[self._leaf_values[value]]
            if not self.leaves_of(value):
                return self._known(value)
            if value not in done:
                operation = self._producers[value]
                if moves_only and operation.name in CASTS | SCALES:
                    (source,) = (operand for operand in operation.inputs if self.leaves_of(operand))
                    done[value] = look_up(source)
                else:
                    done.update(zip(operation.outputs, operation.run([*map(look_up, operation.inputs)]), strict=True))
            return done[value]

        return look_up(value)

    def _chain(self, weight: Any) -> list[Operation]:
        """The operations between leaves and an operand."""
        if weight not in self._producers or not self.leaves_of(weight):
            return []
        operation = self._producers[weight]
        return [*itertools.chain.from_iterable(map(self._chain, operation.inputs)), operation]

    def _moves(self, weight: Any) -> list[Operation]:
        return [operation for operation in self._chain(weight) if operation.name in MOVES]

    def chain_inputs(self, weight: Value) -> set[Any]:
        """What else the operations between leaves and an operand read."""
        return {
            operand
            for operation in self._chain(weight)
            for operand in operation.inputs
            if isinstance(operand, Value) and not self.leaves_of(operand)
        }

    def scale(self, use: Use) -> Any:
        """By what entries of a leaf are multiplied on the way to an operand, entry by entry."""
        ones = {leaf: jnp.ones_like(self._shapes[leaf]) for leaf in self.leaves_of(use.weight)}
        return self._evaluate(use.weight, ones, moves_only=False)

    def bias_of(self, use: Use) -> Leaf | None:
        """The parameter that is added to the outputs of a product, one entry an output; None if there is none.

        What else is added before, such as what goes around the layer, does not matter.
        """
        leaves = {value: leaf for leaf, value in self._program.leaves.items()}
        outputs = use.operation.outputs[0]
        while True:
            readers = self._readers.get(outputs, [])
            if len(readers) != 1 or readers[0].name not in ("add", "add_any") or use.layout.shape[0] != 1:
                return None
            other = next((operand for operand in readers[0].inputs if operand is not outputs), None)
            while other in self._producers and self._producers[other].name in MOVES | CASTS:
                other = self._producers[other].inputs[0]
            if other in leaves and math.prod(other.shape) == use.layout.shape[2]:
                return leaves[other]
            outputs = readers[0].outputs[0]

    @functools.cached_property
    def _readers(self) -> dict[Any, list[Operation]]:
        found: dict[Any, list[Operation]] = {}
        for operation in self._program.operations:
            for operand in dict.fromkeys(operation.inputs):
                found.setdefault(operand, []).append(operation)
        return found

    # Which leaves can be pruned.

    def _changed(self, program: Program) -> bool:
        """Finds the uses of what is not dense; whether some leaf has to stay dense for one of them."""
        before = len(self.dense)
        self._carried: dict[Any, Any] = {v: (leaf,) for v, leaf in self._leaf_values.items() if leaf not in self.dense}
        products: list[tuple[Operation, int]] = []
        used: set[Leaf] = set()
        for operation in program.operations:
            sides = [i for i, operand in enumerate(operation.inputs) if self.leaves_of(operand)]
            if not sides:
                continue
            leaves = tuple(dict.fromkeys(leaf for i in sides for leaf in self.leaves_of(operation.inputs[i])))
            if operation.name in PRODUCTS:
                if reason := self._no_product(operation, sides):
                    self.dense.update(dict.fromkeys(leaves, reason))
                else:
                    products.append((operation, sides[0]))
                used.update(leaves)
            elif self._is_followed(operation, sides):
                self._carried.update(dict.fromkeys(operation.outputs, leaves))
            else:
                self.dense.update(dict.fromkeys(leaves, _reason(operation, self.data)))
                used.update(leaves)
        stacks = {
            leaf._replace(index=leaf.index[:depth]) for leaf in self._program.leaves for depth in range(len(leaf.index))
        }
        for leaf in self._leaf_values.values():
            rows = [other for other in used if other.number == leaf.number and len(other.index) > len(leaf.index)]
            if leaf in used and rows:
                reason = "is multiplied with as a stack and layer by layer"
                self.dense.update(dict.fromkeys([leaf, *rows], reason))
            elif leaf not in used and leaf not in stacks:
                self.dense.setdefault(leaf, "is not used")
        if len(self.dense) == before:
            self.uses = self._uses(products)
        return len(self.dense) != before

    def _no_product(self, operation: Operation, sides: Sequence[int]) -> str:
        if len(sides) > 1:
            return "is multiplied with another parameter"
        if jnp.issubdtype(operation.outputs[0].dtype, jnp.complexfloating):
            return "is multiplied with complex numbers"
        if operation.name == "conv_general_dilated":
            if sides == [0]:
                return "is the image of a convolution"
            if operation.params["batch_group_count"] > 1:
                return "is in a convolution with batch groups"
        return ""

    def _is_followed(self, operation: Operation, sides: Sequence[int]) -> bool:
        others = [operand for i, operand in enumerate(operation.inputs) if i not in sides]
        if any(other in self.data for other in others):
            return False
        if operation.name in ("concatenate", "stack"):
            return not others
        if operation.name in MOVES | CASTS or operation.name in ("mul", "neg"):
            return len(sides) == 1
        if operation.name == "div":
            return sides == [0]
        if operation.name == "select_n":  # linear if all else is zero
            return len(sides) == 1 and sides != [0] and all(_is_zero(self._known(each)) for each in others[1:])
        return False

    def _uses(self, products: Sequence[tuple[Operation, int]]) -> list[Use]:
        found: list[Use] = []
        self.partial = []
        for operation, side in products:
            leaves = self.leaves_of(operation.inputs[side])
            for leaf in leaves:
                columns = self._columns(operation, side, leaf) if len(leaves) > 1 else None
                found.append(Use(operation, side, leaf, columns, True, -1))
        by_leaf: dict[Leaf, list[Use]] = {}
        for use in found:
            by_leaf.setdefault(use.leaf, []).append(use)
        placed: dict[Use, Use] = {}
        for number, (leaf, uses) in enumerate(by_leaf.items()):
            parts: dict[Any, list[Use]] = {}
            for use in uses:
                parts.setdefault((self._signature(use.weight), use.layout), []).append(use)
            if reason := self._clash(leaf, uses, [part[0] for part in parts.values()]):
                self.dense[leaf] = reason
                continue
            for i, part in enumerate(parts.values()):
                for use in part:
                    label = number * len(found) + i
                    placed[use] = dataclasses.replace(use, is_last=use is part[-1], part=label)
        return [placed[use] for use in found if use in placed]

    def _clash(self, leaf: Leaf, uses: Sequence[Use], parts: Sequence[Use]) -> str:
        if any(use.columns is not None and use.columns.size == 0 for use in uses):
            return "is multiplied with as one with others, not output by output"
        is_simple = all(operation.name in _REORDERINGS for use in parts for operation in self._moves(use.weight))
        if len(parts) == 1 and is_simple:
            return ""
        times = sum(self._back(use, jnp.float32)(jnp.ones(use.weight.shape, jnp.float32)) for use in parts)
        if bool(jnp.any(times == 0)):
            self.partial.append(leaf)
        return "is repeated, or multiplied with along different axes" if bool(jnp.any(times > 1)) else ""

    def _columns(self, operation: Operation, side: int, leaf: Leaf) -> np.ndarray:
        """The outputs that a leaf has, of several that are multiplied with as one; none if it has parts of them."""
        weight = operation.inputs[side]
        ones = {each: jnp.full(self._shapes[each].shape, float(each == leaf)) for each in self.leaves_of(weight)}
        there = layout(operation, side).matrices(self._evaluate(weight, ones, moves_only=True))
        own, some = np.asarray(there.min((0, 1)) > 0), np.asarray(there.max((0, 1)) > 0)
        return np.flatnonzero(own) if (own == some).all() else np.zeros(0, int)

    def _signature(self, weight: Any) -> Any:
        if weight in self._leaf_values:
            return self._leaf_values[weight]
        if isinstance(weight, Constant):
            return contents(weight.value)
        if not self.leaves_of(weight):
            return id(weight)
        operation = self._producers[weight]
        at = operation.outputs.index(weight)
        return operation.key, at, tuple(map(self._signature, operation.inputs))


def _is_zero(value: Any) -> bool:
    return not np.any(np.asarray(value))


def _reason(operation: Operation, data: set[Any]) -> str:
    if operation.name == "gather" and any(operand in data for operand in operation.inputs):
        return "is looked up by the data, as embeddings are"
    if operation.name in ("cond", "scan", "while"):
        return f"is used inside of {operation.name}"
    return f"is used by {operation.name}"
