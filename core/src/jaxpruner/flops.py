"""What a sparse network would cost where zeros cost nothing: parameters, and FLOPs of inference and training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import trees

if TYPE_CHECKING:
    from jaxpruner.base_updater import BaseUpdater

# Of one operand of these, zeros stay zeros.
_KEEP_ZEROS = {
    "broadcast_in_dim", "convert_element_type", "copy", "div", "dynamic_slice", "expand_dims", "mul", "neg",
    "optimization_barrier", "reduce_precision", "reshape", "rev", "select_n", "sharding_constraint", "slice", "squeeze",
    "transpose",
}  # fmt: skip


def summarize_flops(
    fn: Callable[..., Any], params: Any, *args: Any, updater: BaseUpdater | None = None, steps: int = 0
) -> dict[str, Any]:
    r"""Counts parameters and FLOPs, dense and without what zeros save.

    Read from the jaxpr of `fn(params, *args)`: matrix products and convolutions, two FLOPs a multiply-add; what is done
    element by element is left out. A product with a parameter counts by the share :math:`d` of its entries that are not
    zero; products among activations are dense. With :math:`f_p` the FLOPs of parameter :math:`p`:

    .. math:: \text{inference} = f_{other} + \sum_p d_p f_p, \quad
              \text{training} = 3 T f_{other} + \sum_t \sum_p (2 d_p^t + w_p^t) f_p

    A training step is the forward pass, the gradient of the activations and that of the weights, each as dear as the
    forward pass (Evci et al., 2020, appendix H). The gradient of the weights is that of kept weights, :math:`w = d`,
    but dense, :math:`w = 1`, for straight-through methods and in steps that make masks. Densities within the training
    follow the updater's schedule to what they are in `params`.

    Args:
      fn: the forward pass, traced once and not run; its arguments may be `jax.ShapeDtypeStruct`. Loops count by their
        length, or once where that depends on data; of branches the dearest counts.
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
    closed = jax.make_jaxpr(fn)(params, *args)
    counts: dict[int | None, float] = {None: 0.0}
    sources = {var: i for i, var in enumerate(closed.jaxpr.invars[: len(named)])}
    for source, flops in _products(closed.jaxpr, sources):
        counts[source] = counts.get(source, 0.0) + flops
    if counts.keys() == {None}:
        raise ValueError(
            "summarize_flops: fn multiplies with none of the parameters. Let it take them as its first argument, "
            "such as lambda params, x: model.apply({'params': params}, x)."
        )

    other = counts.pop(None)
    density = {i: nonzero[i] / sizes[i] for i in counts}
    summary = {
        "_nparams": sum(sizes),
        "_nparams_nnz": sum(nonzero),
        "_inference_flops": other + sum(counts.values()),
        "_inference_flops_nnz": other + sum(density[i] * flops for i, flops in counts.items()),
    }
    if steps:
        level, is_dense = _course(updater, params, steps)
        # Of three passes, forward, to the activations and to the weights, zeros make two cheaper, or all.
        saved = float(np.mean(level * np.where(is_dense, 2, 3)))
        cost = sum((3 - (1 - density[i]) * saved) * flops for i, flops in counts.items())
        summary["_training_flops"] = steps * 3 * summary["_inference_flops"]
        summary["_training_flops_nnz"] = steps * (3 * other + cost)
    return summary | {trees.leaf_name(named[i][0]): flops for i, flops in counts.items()}


def _course(updater: BaseUpdater | None, params: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step, the share of the final sparsity that is in force, and whether all weights need gradients."""
    if updater is None:
        return np.zeros(steps), np.ones(steps, bool)

    def at_each(decide: Callable[[Any], Any], dtype: Any) -> np.ndarray:
        return np.asarray(jax.vmap(lambda step: jnp.asarray(decide(step), dtype))(jnp.arange(steps)))

    updates = at_each(updater.scheduler.should_update_mask, bool)
    masks = updater.get_initial_masks(params, updater.get_target_sparsities(params))
    starts_sparse = not all(mask.all() for mask in jax.tree.leaves(masks))
    if starts_sparse:  # and stays as sparse
        level = np.ones(steps)
    else:
        made = at_each(lambda step: updater.scheduler.get_sparsity_at_step(1.0, step), np.float32)
        # A mask is in force from the step after the one that makes it.
        latest = np.maximum.accumulate(np.where(updates, np.arange(steps), -1))
        before = np.concatenate([[-1], latest[:-1]])
        level = np.where(before < 0, 0.0, made[before])
    return level, updates | updater.straight_through


def _products(jaxpr: Any, sources: dict[Any, int], times: float = 1.0) -> Iterator[tuple[int | None, float]]:
    """(the parameter that is multiplied with, FLOPs) of each product. `sources` says which values are parameters."""
    sources = dict(sources)
    for eqn in jaxpr.eqns:
        found = [None if hasattr(atom, "val") else sources.get(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            flops = _dot_flops(eqn) if name == "dot_general" else _convolution_flops(eqn)
            # If both are parameters, as a scale that was broadcast may be, the larger one is the weight.
            candidates = [(atom.aval.size, s) for atom, s in zip(eqn.invars, found, strict=True) if s is not None]
            yield (max(candidates)[1] if candidates else None), times * flops
        elif name == "cond":
            branches = [list(_bound(branch.jaxpr, found[1:], times)) for branch in eqn.params["branches"]]
            yield from max(branches, key=lambda products: sum(flops for _, flops in products))
        elif name == "while":
            skipped = eqn.params["cond_nconsts"]
            yield from _bound(eqn.params["body_jaxpr"].jaxpr, found[skipped:], times)
        else:
            for inner in _inner(eqn):
                yield from _bound(inner, found, times * eqn.params.get("length", 1))
            if name in _KEEP_ZEROS:
                kept = {(s, atom.aval.size) for atom, s in zip(eqn.invars, found, strict=True) if s is not None}
                # A scale or bias that is spread over activations is no weight any more.
                if len(kept) == 1 and (only := kept.pop())[1] >= eqn.outvars[0].aval.size:
                    sources[eqn.outvars[0]] = only[0]


def _bound(jaxpr: Any, found: list[int | None], times: float) -> Iterator[tuple[int | None, float]]:
    return _products(jaxpr, {var: s for var, s in zip(jaxpr.invars, found, strict=True) if s is not None}, times)


def _inner(eqn: Any) -> list[Any]:
    """The jaxprs that an equation calls with its own operands: jit, scan, checkpoint, custom derivatives."""
    values = (eqn.params.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
    return [getattr(value, "jaxpr", value) for value in values if value is not None]


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _convolution_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval
    outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs
