"""Which parameters' entries a value holds, on the way to the products that use them.

One walk follows the parameters through casts, reshapes, masks and scalings, into loops, branches and calls, and reports
each product with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxpruner.inspection import jaxprs

_MOVES = jaxprs.MOVES | jaxprs.CASTS | {"all_gather", "pad"}
# Primitives that keep zeros at zero, entry by entry.
_SCALES = {
    "abs", "asinh", "atan", "cbrt", "ceil", "div", "erf", "expm1", "floor", "integer_pow", "log1p", "mul", "neg",
    "round", "select_n", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
}  # fmt: skip
# Primitives that add something to entries, so that zeros are no longer zero.
_SHIFTS = {"add", "add_any", "cos", "cosh", "exp", "exp2", "logistic", "max", "min", "pow", "rsqrt", "sub"}


class Value(NamedTuple):
    """Where a value of a jaxpr comes from.

    Attributes:
      parameters: those whose entries it has, by number; none if it is something else.
      is_data: whether it depends on arguments that are not parameters.
      is_shifted: whether zeros of the parameters are no longer zero, as after weight standardisation.
    """

    parameters: tuple[int, ...] = ()
    is_data: bool = False
    is_shifted: bool = False


class Product(NamedTuple):
    """A matrix product or convolution on the way.

    Attributes:
      equation: the equation.
      weight: the operand that has entries of the largest parameters; without parameters if none has.
      times: how often it runs, by the lengths of the loops around it.
    """

    equation: Any
    weight: Value
    times: float


CONSTANT, DATA = Value(), Value(is_data=True)

Branch = Callable[[], "list[Value]"]


def walk(
    jaxpr: Any,
    inputs: Sequence[Value],
    sizes: Sequence[int],
    tell: Callable[[Product], None],
    choose: Callable[[Sequence[Branch]], list[Value]] | None = None,
    times: float = 1.0,
) -> list[Value]:
    """Follows values through a jaxpr.

    Args:
      jaxpr: the jaxpr.
      inputs: where its inputs come from.
      sizes: the number of entries of each parameter.
      tell: called with each product.
      choose: walks the branches of a `cond` and returns the outputs of one; by default all are walked.
      times: how often the jaxpr runs.

    Returns:
      Where its outputs come from.
    """

    def largest(candidates: Sequence[Value]) -> Value:
        return max(candidates, key=lambda value: sum(sizes[i] for i in value.parameters))

    def inside(body: Any, given: Sequence[Value], times: float) -> list[Value]:
        return walk(body, given, sizes, tell, choose, times)

    def rule(eqn: Any, given: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        is_data = any(value.is_data for value in given)
        weights = [value for value in given if value.parameters]
        nothing = [Value(is_data=is_data)] * len(eqn.outvars)
        if name in jaxprs.PRODUCTS:
            tell(Product(eqn, largest(given), times))
            return nothing
        if name == "cond":
            branches = [_branch(inside, branch.jaxpr, given[1:], times) for branch in eqn.params["branches"]]
            return choose(branches) if choose else [branch() for branch in branches][-1]
        if name == "while":
            return inside(eqn.params["body_jaxpr"].jaxpr, given[eqn.params["cond_nconsts"] :], times)
        if (inner := _inner(eqn)) is not None:
            return inside(inner, given, times * eqn.params.get("length", 1))
        if name in ("concatenate", "stack"):
            # Kernels that are multiplied with as one.
            if len(weights) < len(given):
                return nothing
            together = tuple(sorted({i for value in given for i in value.parameters}))
            return [Value(together, is_data, any(value.is_shifted for value in given))]
        if not weights or is_data:  # what data choose or scale are activations
            return nothing
        if name == "optimization_barrier":
            return given
        if name in _MOVES | _SCALES:
            return [largest(weights)] * len(eqn.outvars)
        return [largest(weights)._replace(is_shifted=True)] if name in _SHIFTS else nothing

    constants = [CONSTANT] * len(jaxpr.constvars)
    return jaxprs.go_through(jaxpr, [*constants, *inputs], rule, lambda _: CONSTANT)


def _branch(inside: Callable[..., list[Value]], body: Any, given: Sequence[Value], times: float) -> Branch:
    return lambda: inside(body, given, times)


def _inner(eqn: Any) -> Any:
    """The jaxpr that an equation calls with its own operands: jit, scan, checkpoint, custom derivatives."""
    inner, _ = jaxprs.called(eqn) or (None, ())
    fits = inner is not None and len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(eqn.outvars)
    return inner if fits else None
