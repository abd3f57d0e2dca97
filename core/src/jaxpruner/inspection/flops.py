"""What a sparse network would cost where zeros cost nothing: parameters, and FLOPs of inference and training."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import trees

if TYPE_CHECKING:
    from jaxpruner.base_updater import BaseUpdater

# What only moves entries, or casts them; and what keeps zeros at zero.
_MOVES = {
    "all_gather", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims",
    "gather", "name", "optimization_barrier", "pad", "pvary", "reduce_precision", "reshape", "rev",
    "sharding_constraint", "slice", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
_SCALES = {"div", "mul", "neg", "select_n"}


def summarize_flops(
    fn: Callable[..., Any], params: Any, *args: Any, updater: BaseUpdater | None = None, steps: int = 0
) -> dict[str, Any]:
    r"""Counts parameters and FLOPs, dense and without what zeros save.

    Read from the jaxpr of `fn(params, *args)`: matrix products and convolutions, two FLOPs a multiply-add; what is done
    element by element is left out, and so are kernels of Pallas. A product with a parameter counts by the share
    :math:`d` of its entries that are not zero, also if it was cast, reshaped, masked or scaled before; products among
    activations are dense. With :math:`f_p` the FLOPs of parameter :math:`p`:

    .. math:: \text{inference} = f_{other} + \sum_p d_p f_p, \quad
              \text{training} = 3 T f_{other} + \sum_t \sum_p (2 d_p^t + w_p^t) f_p

    A training step is the forward pass, the gradient of the activations and that of the weights, each as dear as the
    forward pass (Evci et al., 2020, appendix H). The gradient of the weights is that of kept weights, :math:`w = d`,
    but dense, :math:`w = 1`, for straight-through methods and in steps that make masks, whatever they are made from.
    Densities within the training rise along the updater's schedule to what they are in `params`.

    Args:
      fn: the forward pass, traced once and not run; its arguments may be `jax.ShapeDtypeStruct`. Loops count by their
        length, or once where that depends on data; of branches the dearest counts, of a `shard_map` one shard.
      params: any pytree of trained parameters, zeros in place.
      *args: what else it takes; one example gives FLOPs of one example.
      updater: the algorithm that made the zeros, for the cost of training; without it training is dense.
      steps: those of the training.

    Returns:
      `_nparams` and `_nparams_nnz` (entries, and those that are not zero), `_inference_flops` and
      `_inference_flops_nnz`, with `steps` also `_training_flops` and `_training_flops_nnz` of all of them, and under
      its slash path the dense FLOPs of each parameter that is multiplied with.

    Raises:
      ValueError: if the forward pass multiplies with none of the parameters.
    """
    named = trees.named_leaves(params)
    sizes = [math.prod(jnp.shape(leaf)) for _, leaf in named]
    nonzero = [int(np.count_nonzero(np.asarray(leaf))) for _, leaf in named]
    jaxpr = jax.make_jaxpr(fn)(params, *args).jaxpr
    counts: _Counts = collections.Counter()
    parameters = [_Value((i,), False) for i in range(len(named))]
    _count(jaxpr, parameters + [_DATA] * (len(jaxpr.invars) - len(named)), 1.0, sizes, counts)
    other = counts.pop((), 0.0)
    if not counts:
        raise ValueError(
            "summarize_flops: fn multiplies with none of the parameters. Let it take them as its first argument, "
            "such as lambda params, x: model.apply({'params': params}, x)."
        )

    density = {key: sum(nonzero[i] for i in key) / sum(sizes[i] for i in key) for key in counts}
    summary = {
        "_nparams": sum(sizes),
        "_nparams_nnz": sum(nonzero),
        "_inference_flops": other + sum(counts.values()),
        "_inference_flops_nnz": other + sum(density[key] * flops for key, flops in counts.items()),
    }
    if steps:
        level, is_dense = _course(updater, params, steps)
        # Of three passes, forward, to the activations and to the weights, zeros make two cheaper, or all.
        saved = float(np.mean(level * np.where(is_dense, 2, 3)))
        cost = sum((3 - (1 - density[key]) * saved) * flops for key, flops in counts.items())
        summary["_training_flops"] = steps * 3 * summary["_inference_flops"]
        summary["_training_flops_nnz"] = steps * (3 * other + cost)
    each: collections.Counter[str] = collections.Counter()
    for key, flops in counts.items():
        for i in key:
            each[trees.leaf_name(named[i][0])] += flops * sizes[i] / sum(sizes[j] for j in key)
    return summary | dict(each)


def _course(updater: BaseUpdater | None, params: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step, the share of the final sparsity that is in force, and whether all weights need gradients."""
    if updater is None:
        return np.zeros(steps), np.ones(steps, bool)

    def at_each(decide: Callable[[Any], Any], dtype: Any) -> np.ndarray:
        return np.asarray(jax.vmap(lambda step: jnp.asarray(decide(step), dtype))(jnp.arange(steps)))

    updates = at_each(updater.scheduler.should_update_mask, bool)
    masks = updater.get_initial_masks(params, updater.get_target_sparsities(params))
    if not all(mask.all() for mask in jax.tree.leaves(masks)):  # sparse from the start, and as sparse to the end
        return np.ones(steps), updates & updater.regrows
    made = at_each(lambda step: updater.scheduler.get_sparsity_at_step(1.0, step), np.float32)
    # A mask is in force from the step after the one that makes it.
    latest = np.maximum.accumulate(np.where(updates, np.arange(steps), -1))
    before = np.concatenate([[-1], latest[:-1]])
    reached = made[latest[-1]] if latest[-1] >= 0 else 0.0
    level = np.where(before < 0, 0.0, made[before] / reached if reached else 0.0)
    return level, updates | updater.straight_through


class _Value(NamedTuple):
    """Where a value of a jaxpr comes from.

    Attributes:
      parameters: those whose entries it has, by number; none if it is something else.
      is_data: whether it depends on arguments that are no parameters.
    """

    parameters: tuple[int, ...]
    is_data: bool


_Counts = collections.Counter[tuple[int, ...]]
_CONSTANT, _DATA = _Value((), False), _Value((), True)


def _count(jaxpr: Any, inputs: Sequence[_Value], times: float, sizes: Sequence[int], counts: _Counts) -> list[_Value]:
    """Adds the FLOPs of each product to those of the parameters in it; returns where the outputs come from."""
    values = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Value:
        return _CONSTANT if hasattr(atom, "val") else values.get(atom, _CONSTANT)

    def larger(candidates: Sequence[_Value]) -> tuple[int, ...]:
        return max((v.parameters for v in candidates), key=lambda key: sum(sizes[i] for i in key))

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        is_data = any(value.is_data for value in given)
        weights = [value for value in given if value.parameters]
        outputs = [_Value((), is_data)] * len(eqn.outvars)
        if name in ("dot_general", "conv_general_dilated"):
            flops = _dot_flops(eqn) if name == "dot_general" else _convolution_flops(eqn)
            counts[larger(given)] += times * flops
        elif name == "cond":
            branches = []
            for branch in eqn.params["branches"]:
                own: _Counts = collections.Counter()
                branches.append((_count(branch.jaxpr, given[1:], times, sizes, own), own))
            outputs, dearest = max(branches, key=lambda branch: sum(branch[1].values()))
            counts.update(dearest)
        elif name == "while":
            body = eqn.params["body_jaxpr"].jaxpr
            outputs = _count(body, given[eqn.params["cond_nconsts"] :], times, sizes, counts)
        elif (inner := _inner(eqn)) is not None:
            outputs = _count(inner, given, times * eqn.params.get("length", 1), sizes, counts)
        elif name == "concatenate":
            # Kernels that are multiplied with as one.
            if len(weights) == len(given):
                outputs = [_Value(tuple(sorted({i for value in given for i in value.parameters})), is_data)]
        elif weights and not is_data and name in _MOVES | _SCALES:  # what data choose or scale are activations
            outputs = [_Value(larger(weights), is_data)]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _inner(eqn: Any) -> Any:
    """The jaxpr that an equation calls with its own operands: jit, scan, checkpoint, custom derivatives."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = getattr(eqn.params.get(key), "jaxpr", eqn.params.get(key))
        if inner is not None and len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(eqn.outvars):
            return inner
    return None


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _convolution_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval
    outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    # A transposed convolution spreads its input among zeros.
    return 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs / math.prod(eqn.params["lhs_dilation"])
