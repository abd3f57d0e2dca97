"""The rules of compaction, one per primitive: which axes of operands and results are the same.

If a primitive does something that does not allow an axis to lose entries, the rule says so as a reason. A primitive
without a rule freezes everything that it touches, so an unknown primitive never gives a wrong result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxpruner.compaction import axes
from jaxpruner.compaction.axes import Dim

if TYPE_CHECKING:
    from jaxpruner.compaction.reading import Reading

Dims = tuple[Dim, ...]


@dataclasses.dataclass(eq=False)
class Step:
    """One equation.

    Attributes:
      equation: the equation.
      inputs: the axes of its operands.
      outputs: the axes of its results.
      inner: what it calls.
      derivative: the custom derivative of what it calls, if there is one; for `conv_general_dilated` nothing.
      feature_groups: the groups of channels of a convolution.
    """

    equation: Any
    inputs: list[Dims]
    outputs: list[Dims] = dataclasses.field(default_factory=list)
    inner: list[Reading] = dataclasses.field(default_factory=list)
    derivative: Reading | None = None
    feature_groups: Dim | None = None

    @property
    def name(self) -> str:
        return self.equation.primitive.name

    @property
    def where(self) -> str:
        """The equation in words, for reasons."""
        return self.name


def fresh(shape: Sequence[int], reason: str | None = None) -> Dims:
    """Axes of which nothing is known."""
    return tuple(Dim(size, reason) for size in shape)


def freeze(dims: Sequence[Dim], reason: str) -> None:
    """Says that none of these axes may be shortened."""
    for dim in dims:
        dim.freeze(reason)


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of a value of a jaxpr."""
    return tuple(atom.aval.shape)


def unify(first: Dims, second: Dims, where: str) -> None:
    """Ties the axes of two values of one shape."""
    for a, b in zip(first, second, strict=True):
        axes.unify(a, b, where)


def without(dims: Dims, removed: Sequence[int]) -> Dims:
    """The axes but those at these positions."""
    return tuple(dim for axis, dim in enumerate(dims) if axis not in removed)


# Rules: a step to the axes of its results.

Rule = Callable[[Step], list[Dims]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of primitives."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def unknown(step: Step) -> list[Dims]:
    """The rule of primitives that have none: nothing that they touch may be shortened."""
    reason = f"meets {step.name}, which there is no rule for"
    for dims in step.inputs:
        freeze(dims, reason)
    return [fresh(shape_of(atom), reason) for atom in step.equation.outvars]


ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p", "cos",
    "cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "logistic", "lt",
    "lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg", "nextafter", "not", "or", "population_count", "pow",
    "pvary", "real", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
    "tan", "tanh", "xor", "zeta", "polygamma", "regularized_incomplete_beta", "random_gamma",
)  # fmt: skip


@rule(*ELEMENTWISE)
def _elementwise(step: Step) -> list[Dims]:
    shaped = [dims for dims in step.inputs if dims]
    outputs = []
    for dims in zip(*shaped, strict=True):
        # Axes of one entry are spread along the others'.
        first, *others = [dim for dim in dims if dim.size != 1] or dims[:1]
        for other in others:
            axes.unify(first, other, step.where)
        outputs.append(first)
    return [tuple(outputs)] * len(step.equation.outvars)


@rule("bitcast_convert_type")
def _bitcast(step: Step) -> list[Dims]:
    same = shape_of(step.equation.invars[0]) == shape_of(step.equation.outvars[0])
    return _elementwise(step) if same else unknown(step)


@rule("optimization_barrier", "device_put")
def _each_by_itself(step: Step) -> list[Dims]:
    return list(step.inputs)


REDUCTIONS = (
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor", "reduce",
)  # fmt: skip


@rule(*REDUCTIONS)
def _reduce(step: Step) -> list[Dims]:
    params = step.equation.params
    reduced = params["dimensions"] if "dimensions" in params else params["axes"]
    shaped = [dims for dims in step.inputs if dims]
    for dims in shaped[1:]:
        unify(shaped[0], dims, step.where)
    for dims in shaped[:1]:
        freeze([dims[axis] for axis in reduced], f"is reduced by {step.name}")
    return [without(shaped[0], reduced) if shaped else ()] * len(step.equation.outvars)


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(step: Step) -> list[Dims]:
    step.inputs[0][step.equation.params["axis"]].freeze(f"is run through by {step.name}")
    return [step.inputs[0]]


@rule("sort")
def _sort(step: Step) -> list[Dims]:
    for dims in step.inputs[1:]:
        unify(step.inputs[0], dims, step.where)
    step.inputs[0][step.equation.params["dimension"]].freeze("is sorted")
    return list(step.inputs)


@rule("top_k")
def _top_k(step: Step) -> list[Dims]:
    dims = list(step.inputs[0])
    axis = step.equation.params.get("axis", -1)
    dims[axis].freeze("is ranked by top_k")
    dims[axis] = Dim(shape_of(step.equation.outvars[0])[axis], "is ranked by top_k")
    return [tuple(dims)] * 2


@rule(
    "reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "select_and_scatter_add",
    "select_and_gather_add",
)  # fmt: skip
def _window(step: Step) -> list[Dims]:
    params, result = step.equation.params, shape_of(step.equation.outvars[0])
    operands = [dims for dims in step.inputs if dims]
    outputs = []
    for axis, window in enumerate(params["window_dimensions"]):
        strides, padding = params.get("window_strides"), params.get("padding")
        passes = window == 1 and (not strides or strides[axis] == 1) and (not padding or tuple(padding[axis]) == (0, 0))
        here = [dims[axis] for dims in operands]
        if passes and len({dim.size for dim in here}) == 1 and here[0].size == result[axis]:
            for dim in here[1:]:
                axes.unify(here[0], dim, step.where)
            outputs.append(here[0])
        else:
            freeze(here, f"is swept by {step.name}")
            outputs.append(Dim(result[axis], f"is swept by {step.name}"))
    return [tuple(outputs)] * len(step.equation.outvars)


@rule("dot_general")
def _dot_general(step: Step) -> list[Dims]:
    left, right = step.inputs
    (contract_left, contract_right), (batch_left, batch_right) = step.equation.params["dimension_numbers"]
    for i, j in [*zip(contract_left, contract_right, strict=True), *zip(batch_left, batch_right, strict=True)]:
        axes.unify(left[i], right[j], step.where)
    batch = tuple(left[axis] for axis in batch_left)
    return [(*batch, *without(left, [*contract_left, *batch_left]), *without(right, [*contract_right, *batch_right]))]


@rule("conv_general_dilated")
def _convolution(step: Step) -> list[Dims]:
    image, kernel = step.inputs
    params = step.equation.params
    image_axes, kernel_axes, result_axes = params["dimension_numbers"]
    shape = shape_of(step.equation.outvars[0])
    outputs = list(fresh(shape))
    outputs[result_axes[0]] = image[image_axes[0]]
    outputs[result_axes[1]] = kernel[kernel_axes[0]]
    if params["batch_group_count"] != 1:
        return unknown(step)
    groups = params["feature_group_count"]
    channels, inputs, features = image[image_axes[1]], kernel[kernel_axes[1]], kernel[kernel_axes[0]]
    if groups == 1:
        axes.unify(channels, inputs, step.where)
    else:
        step.feature_groups = Dim(groups)
        axes.unify(channels, axes.product([step.feature_groups, inputs]), step.where)
        axes.unify(features, axes.product([step.feature_groups, Dim(features.size // groups)]), step.where)
    for i, (a, b, c) in enumerate(zip(image_axes[2:], kernel_axes[2:], result_axes[2:], strict=True)):
        is_pointwise = kernel[b].size == 1 and params["window_strides"][i] == params["lhs_dilation"][i] == 1
        if is_pointwise and tuple(params["padding"][i]) == (0, 0):
            outputs[c] = image[a]
        else:
            freeze([image[a], kernel[b], outputs[c]], "is swept by a convolution")
    return [tuple(outputs)]


@rule("ragged_dot_general", "ragged_dot")
def _ragged_dot(step: Step) -> list[Dims]:
    left, right, sizes = step.inputs
    reason = f"is taken in ragged groups by {step.name}"
    numbers = step.equation.params.get("ragged_dot_dimension_numbers")
    if (len(left), len(right)) != (2, 3) or (
        numbers is not None and tuple(map(tuple, numbers.dot_dimension_numbers[0])) != ((1,), (1,))
    ):
        return unknown(step)
    freeze([left[0], right[0], *sizes], reason)
    axes.unify(left[1], right[1], step.where)
    return [(left[0], right[2])]


@rule("random_bits")
def _random_bits(step: Step) -> list[Dims]:
    # Other shapes give other draws, of the same distribution.
    return [(*step.inputs[0], *fresh(step.equation.params["shape"]))]


def products(step: Step) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Of a matrix product or convolution, the pairs of axes that are contracted, and those that run along."""
    params = step.equation.params
    if step.name == "dot_general":
        (left, right), (batch_left, batch_right) = params["dimension_numbers"]
        return list(zip(left, right, strict=True)), list(zip(batch_left, batch_right, strict=True))
    if step.name == "conv_general_dilated":
        image_axes, kernel_axes, _ = params["dimension_numbers"]
        return [(image_axes[1], kernel_axes[1])], []
    return [(1, 1)], []


PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")
