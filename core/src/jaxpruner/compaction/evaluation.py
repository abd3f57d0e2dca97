"""Evaluates a function that was read, with fewer units: every equation runs with the new lengths of its axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner.compaction import axes, reading, rules, sparse_kernels
from jaxpruner.compaction.axes import Dim
from jaxpruner.compaction.finding import Found
from jaxpruner.inspection import jaxprs


class Evaluation:
    """A function with the units that are kept.

    Args:
      found: the function as it was read.
      kept: boolean vectors by group; other groups stay whole.
    """

    def __init__(self, found: Found, kept: Mapping[str, np.ndarray]):
        self._found = found
        self._kept = kept
        self._counts = {name: int(np.count_nonzero(mask)) for name, mask in kept.items()}
        self._axes: dict[Dim, axes.Axis] = {}

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """The results for the arguments of the function, parameters first."""
        return self._run(self._found.reading, inputs)

    def axis(self, dim: Dim) -> axes.Axis:
        """What an axis is made of."""
        if dim.root not in self._axes:
            self._axes[dim.root] = axes.resolve(dim, self._found.names)
        return self._axes[dim.root]

    def mask(self, dim: Dim) -> np.ndarray | None:
        """Which entries of an axis stay; None if all do."""
        axis = self.axis(dim)
        if all(self._kept[name].all() for name in axes.groups_of(axis) & self._kept.keys()):
            return None
        return axes.spread(axis, self._kept)

    def cut(self, array: Any, dims: Sequence[Dim]) -> Any:
        """An array of the whole function with the entries that stay."""
        for axis, dim in enumerate(dims):
            if (mask := self.mask(dim)) is not None:
                array = array.take(np.flatnonzero(mask), axis)
        return array

    def size(self, dim: Dim) -> int:
        """The length of an axis."""
        return axes.count(self.axis(dim), self._counts)

    def shape(self, dims: Sequence[Dim]) -> tuple[int, ...]:
        """The lengths of axes."""
        return tuple(map(self.size, dims))

    def _run(self, read: reading.Reading, arguments: Sequence[Any]) -> list[Any]:
        jaxpr = read.jaxpr
        number = len(read.constants)
        constants = [self._constant(value, dims) for value, dims in zip(read.constants, read.inputs, strict=False)]
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants[:number], *arguments], strict=True))

        def look_up(atom: Any, dims: Sequence[Dim]) -> Any:
            return self._constant(atom.val, dims) if jaxprs.is_literal(atom) else values[atom]

        for step in read.steps:
            operands = [look_up(a, dims) for a, dims in zip(step.equation.invars, step.inputs, strict=True)]
            values.update(zip(step.equation.outvars, self._step(step, operands), strict=True))
        return [look_up(atom, dims) for atom, dims in zip(jaxpr.outvars, read.outputs, strict=True)]

    def _constant(self, value: Any, dims: Sequence[Dim]) -> Any:
        return self.cut(value, dims) if dims else value

    def _step(self, step: rules.Step, operands: list[Any]) -> list[Any]:
        if (results := sparse_kernels.evaluate(step, operands)) is not None:
            return results
        if step.inner:
            return _CALLS.get(step.name, Evaluation._call)(self, step, operands)
        equation = step.equation
        if step.name not in rules.RULES or step.name in _CALLS:  # all its axes are whole
            return jaxprs.bind(equation, operands)
        params = equation.params
        if step.name in _PARAMETERS:
            params = {**params, **_PARAMETERS[step.name](self, step)}
        results = equation.primitive.bind(*operands, **params)
        return list(results) if equation.primitive.multiple_results else [results]

    def _call(self, step: rules.Step, operands: list[Any]) -> list[Any]:
        return self._run(step.inner[0], operands)

    def _remat(self, step: rules.Step, operands: list[Any]) -> list[Any]:
        params = step.equation.params
        run = jax.checkpoint(
            lambda *values: self._run(step.inner[0], values), prevent_cse=params["prevent_cse"], policy=params["policy"]
        )
        return run(*operands)

    def _custom_derivative(self, step: rules.Step, operands: list[Any]) -> list[Any]:
        derivative = step.derivative
        if derivative is None:
            return self._call(step, operands)
        differentiable = [i for i, atom in enumerate(step.equation.invars) if reading.is_differentiable(atom)]
        results = [i for i, atom in enumerate(step.equation.outvars) if reading.is_differentiable(atom)]

        def primal(*values):
            return self._run(step.inner[0], values)

        def no_tangent(value):
            return np.zeros(jnp.shape(value), jax.dtypes.float0)

        def forward(values, tangents):
            outputs = primal(*values)
            changes = self._run(derivative, [*values, *(tangents[i] for i in differentiable)])
            given = dict(zip(results, changes, strict=True))
            return outputs, [given.get(i, no_tangent(output)) for i, output in enumerate(outputs)]

        def backward(values, cotangents):
            changes = self._run(derivative, [*values, *(cotangents[i] for i in results)])
            given = dict(zip(differentiable, changes, strict=True))
            return tuple(given.get(i, no_tangent(value)) for i, value in enumerate(values))

        function: Any
        if step.name == "custom_jvp_call":
            function = jax.custom_jvp(primal)
            function.defjvp(forward)
        else:
            function = jax.custom_vjp(primal)
            function.defvjp(lambda *values: (primal(*values), values), backward)
        return function(*operands)

    def _cond(self, step: rules.Step, operands: list[Any]) -> list[Any]:
        branches = [_running(self, branch) for branch in step.inner]
        return jax.lax.switch(operands[0], branches, *operands[1:])

    def _while(self, step: rules.Step, operands: list[Any]) -> list[Any]:
        params = step.equation.params
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        condition, body = step.inner
        return jax.lax.while_loop(
            lambda carry: self._run(condition, [*operands[:first], *carry])[0],
            lambda carry: self._run(body, [*operands[first:second], *carry]),
            operands[second:],
        )

    def _scan(self, step: rules.Step, operands: list[Any]) -> list[Any]:
        params = step.equation.params
        constants, carried = jaxprs.scan_sizes(params)

        def body(carry, stacked):
            outputs = self._run(step.inner[0], [*operands[:constants], *carry, *stacked])
            return outputs[:carried], outputs[carried:]

        carry, stacked = jax.lax.scan(
            body,
            operands[constants : constants + carried],
            operands[constants + carried :],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *stacked]


def _running(evaluation: Evaluation, read: reading.Reading) -> Callable[..., list[Any]]:
    return lambda *values: evaluation._run(read, values)


_CALLS = {
    "remat": Evaluation._remat,
    "remat2": Evaluation._remat,
    "checkpoint": Evaluation._remat,
    "custom_jvp_call": Evaluation._custom_derivative,
    "custom_vjp_call": Evaluation._custom_derivative,
    "custom_vjp_call_jaxpr": Evaluation._custom_derivative,
    "cond": Evaluation._cond,
    "while": Evaluation._while,
    "scan": Evaluation._scan,
}


# What of an equation's parameters tells a length.


def _slice(evaluation: Evaluation, step: rules.Step) -> dict[str, Any]:
    params = step.equation.params
    masks = [evaluation.mask(dim) for dim in step.inputs[0]]

    def before(positions):
        return tuple(
            at if mask is None else int(np.count_nonzero(mask[:at])) for mask, at in zip(masks, positions, strict=True)
        )

    return {"start_indices": before(params["start_indices"]), "limit_indices": before(params["limit_indices"])}


def _pad(evaluation: Evaluation, step: rules.Step) -> dict[str, Any]:
    def config(dim, config):
        low, high, _ = config
        mask = evaluation.mask(dim)
        if mask is None:
            return config
        return int(np.count_nonzero(mask[:low])), int(np.count_nonzero(mask[mask.size - high :])), 0

    configs = step.equation.params["padding_config"]
    return {"padding_config": tuple(map(config, step.outputs[0], configs))}


def _gather(evaluation: Evaluation, step: rules.Step) -> dict[str, Any]:
    sizes = step.equation.params["slice_sizes"]
    whole = step.inputs[0]
    return {
        "slice_sizes": tuple(
            evaluation.size(dim) if size == dim.size else size for dim, size in zip(whole, sizes, strict=True)
        )
    }


def _random_bits(evaluation: Evaluation, step: rules.Step) -> dict[str, Any]:
    return {"shape": evaluation.shape(step.outputs[0][len(step.inputs[0]) :])}


def _of_result(key: str) -> Callable[[Evaluation, rules.Step], dict[str, Any]]:
    return lambda evaluation, step: {key: evaluation.shape(step.outputs[0])}


_PARAMETERS: dict[str, Callable[[Evaluation, rules.Step], dict[str, Any]]] = {
    "broadcast_in_dim": _of_result("shape"),
    "iota": _of_result("shape"),
    "reshape": _of_result("new_sizes"),
    "tile": lambda evaluation, step: {
        "reps": tuple(
            evaluation.size(repeated) // evaluation.size(dim)
            for repeated, dim in zip(step.outputs[0], step.inputs[0], strict=True)
        )
    },
    "dynamic_slice": _of_result("slice_sizes"),
    "split": lambda evaluation, step: {
        "sizes": tuple(evaluation.size(dims[step.equation.params["axis"]]) for dims in step.outputs)
    },
    "slice": _slice,
    "pad": _pad,
    "gather": _gather,
    "random_bits": _random_bits,
    "conv_general_dilated": lambda evaluation, step: (
        {"feature_group_count": evaluation.size(step.feature_groups)} if step.feature_groups else {}
    ),
}
