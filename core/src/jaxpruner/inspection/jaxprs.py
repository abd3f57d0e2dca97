"""The walker of jaxprs: which parameters a value holds the entries of, on the way to the products that use them.

The jaxpr of a function is its whole data flow, the same for every framework. One walk follows the parameters through
casts, reshapes, masks and scalings, into loops, branches and calls, and tells each product with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# What only moves entries, or casts them.
_MOVES = {
    "all_gather", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims",
    "gather", "name", "optimization_barrier", "pad", "pvary", "reduce_precision", "reshape", "rev",
    "sharding_constraint", "slice", "squeeze", "stop_gradient", "transpose", "unstack",
}  # fmt: skip
# What keeps zeros at zero, entry by entry.
_SCALES = {
    "abs", "asinh", "atan", "cbrt", "ceil", "div", "erf", "expm1", "floor", "integer_pow", "log1p", "mul", "neg",
    "round", "select_n", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
}  # fmt: skip
# What adds something to entries, so that zeros are zeros no more.
_SHIFTS = {"add", "add_any", "cos", "cosh", "exp", "exp2", "logistic", "max", "min", "pow", "rsqrt", "sub"}
PRODUCTS = {"dot_general", "conv_general_dilated"}


class Value(NamedTuple):
    """Where a value of a jaxpr comes from.

    Attributes:
      parameters: those whose entries it has, by number; none if it is something else.
      is_data: whether it depends on arguments that are no parameters.
      is_shifted: whether zeros of the parameters are zeros no more, as after weight standardisation.
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
    values = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return CONSTANT if hasattr(atom, "val") else values.get(atom, CONSTANT)

    def largest(candidates: Sequence[Value]) -> Value:
        return max(candidates, key=lambda value: sum(sizes[i] for i in value.parameters))

    def inside(body: Any, given: Sequence[Value], times: float) -> list[Value]:
        return walk(body, given, sizes, tell, choose, times)

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        is_data = any(value.is_data for value in given)
        weights = [value for value in given if value.parameters]
        outputs = [Value(is_data=is_data)] * len(eqn.outvars)
        if name in PRODUCTS:
            tell(Product(eqn, largest(given), times))
        elif name == "cond":
            branches = [_branch(inside, branch.jaxpr, given[1:], times) for branch in eqn.params["branches"]]
            outputs = choose(branches) if choose else [branch() for branch in branches][-1]
        elif name == "while":
            outputs = inside(eqn.params["body_jaxpr"].jaxpr, given[eqn.params["cond_nconsts"] :], times)
        elif (inner := _inner(eqn)) is not None:
            outputs = inside(inner, given, times * eqn.params.get("length", 1))
        elif name in ("concatenate", "stack"):
            # Kernels that are multiplied with as one.
            if len(weights) == len(given):
                together = tuple(sorted({i for value in given for i in value.parameters}))
                outputs = [Value(together, is_data, any(value.is_shifted for value in given))]
        elif weights and not is_data and name in _MOVES | _SCALES:  # what data choose or scale are activations
            outputs = [largest(weights)._replace(is_data=is_data)]
        elif weights and not is_data and name in _SHIFTS:
            outputs = [largest(weights)._replace(is_shifted=True)]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the operands of a `scan` are constants of its body, and how many it carries."""
    if "ft_in" in params:  # since JAX 0.12
        constants, carried, _ = params["ft_in"].unpack()
        return len(constants), len(carried)
    return params["num_consts"], params["num_carry"]


def _branch(inside: Callable[..., list[Value]], body: Any, given: Sequence[Value], times: float) -> Branch:
    return lambda: inside(body, given, times)


def _inner(eqn: Any) -> Any:
    """The jaxpr that an equation calls with its own operands: jit, scan, checkpoint, custom derivatives."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = getattr(eqn.params.get(key), "jaxpr", eqn.params.get(key))
        if inner is not None and len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(eqn.outvars):
            return inner
    return None
