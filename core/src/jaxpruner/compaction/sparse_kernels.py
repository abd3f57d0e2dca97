"""Kernels that are kept as sparse matrices, for very sparse weights that cannot be removed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from jaxpruner.compaction import rules
from jaxpruner.compaction.reading import Reading
from jaxpruner.inspection import jaxprs


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["shape", "contracted"])
@dataclasses.dataclass(frozen=True)
class SparseKernel:
    """A kernel as a matrix in compressed rows, one row per output.

    The kernel times activations is the matrix times the activations as columns, which is what the CPU kernel of
    `jax.experimental.sparse.BCSR` computes.

    Attributes:
      matrix: `[outputs, inputs]`.
      shape: the shape of the kernel.
      contracted: its axes that are multiplied and summed.
    """

    matrix: sparse.BCSR
    shape: tuple[int, ...]
    contracted: tuple[int, ...]

    @classmethod
    def of(cls, kernel: Any, contracted: Sequence[int]) -> SparseKernel:
        """The zeros of a concrete kernel left out."""
        kernel = np.asarray(kernel)
        others = [axis for axis in range(kernel.ndim) if axis not in contracted]
        inputs = math.prod(kernel.shape[axis] for axis in contracted)
        rows = kernel.transpose([*others, *contracted]).reshape(-1, inputs)
        return cls(sparse.BCSR.fromdense(jnp.asarray(rows)), kernel.shape, tuple(contracted))

    @property
    def parts(self) -> tuple[Any, ...]:
        """Arrays that say all of it, for a file."""
        matrix = self.matrix
        return self.contracted, self.shape, matrix.data, matrix.indices, matrix.indptr

    @classmethod
    def of_parts(cls, contracted: Any, shape: Any, data: Any, indices: Any, indptr: Any) -> SparseKernel:
        """The inverse of `parts`."""
        contracted, shape = (tuple(map(int, each)) for each in (contracted, shape))
        inputs = math.prod(shape[axis] for axis in contracted)
        outputs = math.prod(shape) // max(inputs, 1)
        entries = jnp.asarray(data), jnp.asarray(indices), jnp.asarray(indptr)
        return cls(sparse.BCSR(entries, shape=(outputs, inputs)), shape, contracted)

    @property
    def dtype(self) -> Any:
        """The type of its entries."""
        return self.matrix.dtype

    @property
    def _order(self) -> list[int]:
        return [*(axis for axis in range(len(self.shape)) if axis not in self.contracted), *self.contracted]

    def todense(self) -> jax.Array:
        """The kernel with its zeros."""
        order = self._order
        ordered = self.matrix.todense().reshape([self.shape[axis] for axis in order])
        return ordered.transpose(np.argsort(order))

    def multiply(self, activations: Any, axes: Sequence[int]) -> jax.Array:
        """Activations times the kernel, summed over these of their axes: their other axes, then the kernel's."""
        rest = [axis for axis in range(activations.ndim) if axis not in axes]
        columns = activations.transpose([*axes, *rest]).reshape(self.matrix.shape[1], -1)
        product = (self.matrix @ columns).T
        outputs = [size for axis, size in enumerate(self.shape) if axis not in self.contracted]
        return product.reshape([activations.shape[axis] for axis in rest] + outputs)


def is_sparse(value: Any) -> bool:
    """Whether this is a kernel that is kept sparse."""
    return isinstance(value, SparseKernel)


_CALLS = ("jit", "pjit", "closed_call", "core_call")


def multiplied(read: Reading, inputs: Sequence[Any]) -> dict[int, tuple[int, ...]]:
    """Which of these inputs of a jaxpr are multiplied with as they are: their numbers, and the axes that are summed."""
    found: dict[int, tuple[int, ...]] = {}
    numbers = {variable: i for i, variable in enumerate(inputs) if variable is not None}
    for step in read.steps:
        operands = [None if jaxprs.is_literal(atom) else numbers.get(atom) for atom in step.equation.invars]
        if step.name == "dot_general" and operands.count(None) == 1:
            side = 0 if operands[1] is None else 1
            contract, batch = step.equation.params["dimension_numbers"]
            if not batch[0] and (number := operands[side]) is not None:
                found.setdefault(number, tuple(contract[side]))
        elif step.name in _CALLS and set(operands) != {None}:
            inner = multiplied(step.inner[0], step.inner[0].jaxpr.invars)
            found |= {number: axes for i, axes in inner.items() if (number := operands[i]) is not None}
    return found


def evaluate(step: rules.Step, operands: list[Any]) -> list[Any] | None:
    """An equation of which an operand may be sparse: multiplied where it is a product with it, else made dense."""
    if not any(map(is_sparse, operands)) or (step.inner and step.name in _CALLS):
        return None
    if step.name == "dot_general":
        contract, batch = step.equation.params["dimension_numbers"]
        side = 0 if is_sparse(operands[0]) else 1
        kernel, other = operands[side], operands[1 - side]
        if not batch[0] and not is_sparse(other) and set(contract[side]) == set(kernel.contracted):
            pairs = dict(zip(contract[side], contract[1 - side], strict=True))
            product = kernel.multiply(other, [pairs[axis] for axis in kernel.contracted])
            if side == 0:  # the kernel's axes come first
                rest = other.ndim - len(kernel.contracted)
                product = jnp.moveaxis(product, range(rest), range(product.ndim - rest, product.ndim))
            wanted = step.equation.params.get("preferred_element_type")
            return [product if wanted is None else product.astype(wanted)]
    operands[:] = [operand.todense() if is_sparse(operand) else operand for operand in operands]
    return None
