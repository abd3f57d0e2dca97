"""Reads a function: which axes of which values are the same.

The jaxpr of a function is its whole data flow with every shape in it, the same for every framework. Each equation is
kept with what its axes are made of, so that it can be read again: for zeros, for FLOPs, and to be run with other sizes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np

import jaxpruner.compaction.moves  # noqa: F401, whose rules are registered
from jaxpruner.compaction.axes import Dim
from jaxpruner.compaction.rules import RULES, Dims, Step, freeze, fresh, rule, unify, unknown
from jaxpruner.inspection import jaxprs

OUTPUT = "is an axis of what the function returns"
ARGUMENT = "is an axis of an argument"
CONSTANT = "meets a constant of the function: pass it in as an argument, or as a parameter"


@dataclasses.dataclass(eq=False)
class Reading:
    """A jaxpr that was read.

    Attributes:
      jaxpr: the jaxpr.
      constants: the values that it closes over.
      inputs: the axes of these, then of its arguments.
      outputs: the axes of its results.
      steps: its equations, without those that nothing needs.
    """

    jaxpr: Any
    constants: Sequence[Any]
    inputs: list[Dims]
    outputs: list[Dims]
    steps: list[Step]


def read(closed: Any, arguments: Sequence[Dims]) -> Reading:
    """Reads a closed jaxpr for arguments of these axes."""
    jaxpr, constants = closed.jaxpr, closed.consts
    inputs = [*map(_of_constant, constants), *arguments]
    steps = []

    def follow(equation: Any, given: list[Dims]) -> list[Dims]:
        step = Step(equation, given)
        step.outputs = RULES.get(step.name, unknown)(step)
        steps.append(step)
        return step.outputs

    outputs = jaxprs.go_through(jaxpr, inputs, follow, lambda atom: _of_constant(atom.val), _needed(jaxpr))
    return Reading(jaxpr, constants, inputs, outputs, steps)


def _needed(jaxpr: Any) -> list[Any]:
    """The equations that the results depend on, and those that do something."""
    needed = {atom for atom in jaxpr.outvars if not jaxprs.is_literal(atom)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            needed.update(atom for atom in equation.invars if not jaxprs.is_literal(atom))
            kept.append(equation)
    return kept[::-1]


def _of_constant(value: Any) -> Dims:
    shape = np.shape(value)
    if not shape:
        return ()
    if isinstance(value, jax.core.Tracer) or not isinstance(value, np.ndarray | jax.Array):
        return fresh(shape, CONSTANT)
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        return fresh(shape, CONSTANT)
    entries = np.asarray(value)
    # Along an axis of equal entries it does not matter which of them stay.
    is_uniform = [
        bool(np.all(entries == entries.take([0], axis))) if entries.size else False for axis in range(len(shape))
    ]
    return tuple(Dim(size, None if same else CONSTANT) for size, same in zip(shape, is_uniform, strict=True))


# Primitives that call other jaxprs.


@rule(*jaxprs.CALLS)
def _call(step: Step) -> list[Dims]:
    if (inner := jaxprs.called(step.equation)) is None:
        return unknown(step)
    step.inner = [read(jax.extend.core.ClosedJaxpr(*inner), step.inputs)]
    return step.inner[0].outputs


# How many nested custom derivatives are read. (Those of TensorFlow Probability have derivatives without end.) Beyond
# this number, functions are differentiated as what they compute.
_ORDERS = contextvars.ContextVar("_ORDERS", default=2)


@contextlib.contextmanager
def _up_to(orders: int) -> Iterator[None]:
    token = _ORDERS.set(orders)
    try:
        yield
    finally:
        _ORDERS.reset(token)


@rule(*jaxprs.CUSTOM_CALLS)
def _custom(step: Step) -> list[Dims]:
    if (inner := jaxprs.called(step.equation)) is None:
        return unknown(step)
    try:
        derivative = _derivative(step) if _ORDERS.get() else None
    except Exception:  # whatever a rule of a user's raises: it stays as it is, to be differentiated by its rule or not
        return unknown(step)
    with _up_to(0):  # inside, nothing is ever differentiated
        step.inner = [read(jax.extend.core.ClosedJaxpr(*inner), step.inputs)]
    outputs = step.inner[0].outputs
    if derivative is not None:
        inputs = [dims for dims, atom in zip(step.inputs, step.equation.invars, strict=True) if is_differentiable(atom)]
        results = [dims for dims, a in zip(outputs, step.equation.outvars, strict=True) if is_differentiable(a)]
        is_forward = step.name == "custom_jvp_call"
        with _up_to(_ORDERS.get() - 1):
            step.derivative = read(derivative, [*step.inputs, *(inputs if is_forward else results)])
        for a, b in zip(step.derivative.outputs, results if is_forward else inputs, strict=True):
            unify(a, b, step.where)
    return outputs


def _derivative(step: Step) -> Any:
    """The jaxpr of (operands, tangents) to tangents, or of (operands, cotangents) to cotangents."""
    equation = step.equation
    differentiable = [i for i, atom in enumerate(equation.invars) if is_differentiable(atom)]
    results = [i for i, atom in enumerate(equation.outvars) if is_differentiable(atom)]
    if not differentiable or not results:
        return None

    def of_operands(operands: Sequence[Any]) -> Callable[..., Any]:
        def of_differentiable(*values: Any) -> list[Any]:
            given = dict(zip(differentiable, values, strict=True))
            outputs = jaxprs.bind(equation, [given.get(i, operand) for i, operand in enumerate(operands)])
            return [outputs[i] for i in results]

        return of_differentiable

    def forward(operands, tangents):
        return jax.jvp(of_operands(operands), [operands[i] for i in differentiable], tangents)[1]

    def backward(operands, cotangents):
        return jax.vjp(of_operands(operands), *(operands[i] for i in differentiable))[1](cotangents)

    is_forward = step.name == "custom_jvp_call"
    operands = [_spec(atom) for atom in equation.invars]
    directions = [operands[i] for i in differentiable] if is_forward else [_spec(equation.outvars[i]) for i in results]
    return jax.make_jaxpr(forward if is_forward else backward)(operands, directions)


def _spec(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype, weak_type=getattr(atom.aval, "weak_type", False))


def is_differentiable(atom: Any) -> bool:
    """Whether a value has a tangent: a floating or complex number."""
    return jax.dtypes.issubdtype(atom.aval.dtype, np.inexact)


@rule("cond")
def _cond(step: Step) -> list[Dims]:
    step.inner = [read(branch, step.inputs[1:]) for branch in step.equation.params["branches"]]
    first, *others = (branch.outputs for branch in step.inner)
    for outputs in others:
        for a, b in zip(first, outputs, strict=True):
            unify(a, b, step.where)
    return first


@rule("while")
def _while(step: Step) -> list[Dims]:
    params = step.equation.params
    at = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    carry = step.inputs[at[1] :]
    step.inner = [
        read(params["cond_jaxpr"], [*step.inputs[: at[0]], *carry]),
        read(params["body_jaxpr"], [*step.inputs[at[0] : at[1]], *carry]),
    ]
    for before, after in zip(carry, step.inner[1].outputs, strict=True):
        unify(before, after, step.where)
    return carry


@rule("scan")
def _scan(step: Step) -> list[Dims]:
    params = step.equation.params
    constants, carried = jaxprs.scan_sizes(params)
    carry = step.inputs[constants : constants + carried]
    stacked = step.inputs[constants + carried :]
    reason = "is run through by scan"
    freeze([dims[0] for dims in stacked], reason)
    body = read(params["jaxpr"], [*step.inputs[:constants], *carry, *(dims[1:] for dims in stacked)])
    step.inner = [body]
    for before, after in zip(carry, body.outputs[:carried], strict=True):
        unify(before, after, step.where)
    length = Dim(params["length"], reason)
    return [*carry, *((length, *dims) for dims in body.outputs[carried:])]
