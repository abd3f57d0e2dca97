"""The walker of jaxprs. Everything that reads a function goes through its equations here, with its own rules.

The jaxpr of a function is its whole data flow with every shape in it, the same for every framework. Readers differ in
what stands for a value: where it comes from (`provenance`), what its axes are (`compaction.reading`), which of its
entries are zero (`compaction.liveness`), or which operation makes it (`calibration.program`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
# Primitives that only move entries.
MOVES = frozenset({
    "broadcast_in_dim", "copy", "copy_p", "dynamic_slice", "expand_dims", "gather", "name", "optimization_barrier",
    "pvary", "reshape", "rev", "sharding_constraint", "slice", "squeeze", "stop_gradient", "transpose", "unstack",
})  # fmt: skip
CASTS = frozenset({"convert_element_type", "reduce_precision"})
# Primitives that call a jaxpr with their own operands, and those that also have a custom derivative.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_lin")
CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


def go_through(
    jaxpr: Any,
    inputs: Sequence[T],
    rule: Callable[[Any, list[T]], Iterable[T]],
    of_literal: Callable[[Any], T],
    equations: Iterable[Any] | None = None,
) -> list[T]:
    """Runs a jaxpr with values of any kind in place of arrays.

    Args:
      jaxpr: the jaxpr.
      inputs: the values of its constants, then of its arguments.
      rule: maps an equation and the values of its operands to the values of its results.
      of_literal: the value of an atom that is written into the equation.
      equations: those to go through, by default all.

    Returns:
      The values of its outputs.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

    def look_up(atom: Any) -> T:
        return of_literal(atom) if is_literal(atom) else values[atom]

    for equation in jaxpr.eqns if equations is None else equations:
        operands = [look_up(atom) for atom in equation.invars]
        values.update(zip(equation.outvars, rule(equation, operands), strict=True))
    return [look_up(atom) for atom in jaxpr.outvars]


def is_literal(atom: Any) -> bool:
    """Whether this is a constant that is written into an equation, under `val`."""
    return hasattr(atom, "val")


def called(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr that an equation calls, and the constants that it closes over; None if it calls none."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        if inner is not None:
            return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
    return None


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation, with whatever it calls as it is."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = ((), params) if isinstance(params, dict) else params  # apart, in an older JAX
    results = equation.primitive.bind(*functions, *operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the operands of a `scan` are constants of its body, and how many it carries."""
    if "ft_in" in params:  # since JAX 0.12
        constants, carried, _ = params["ft_in"].unpack()
        return len(constants), len(carried)
    return params["num_consts"], params["num_carry"]
