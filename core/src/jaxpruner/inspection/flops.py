"""What a sparse network would cost if zeros cost nothing: parameters, and FLOPs of inference and training."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner import trees
from jaxpruner.inspection import provenance

if TYPE_CHECKING:
    from jaxpruner.base_updater import BaseUpdater


def summarize_flops(
    fn: Callable[..., Any], params: Any, *args: Any, updater: BaseUpdater | None = None, steps: int = 0
) -> dict[str, Any]:
    r"""Counts parameters and FLOPs, dense and without what zeros save.

    Reads the jaxpr of `fn(params, *args)` and counts matrix products and convolutions, with two FLOPs per multiply-add.
    Elementwise operations and Pallas kernels are left out. A product with a parameter counts by the share :math:`d` of
    its entries that are not zero, even if it was cast, reshaped, masked or scaled before. Products among activations
    are dense. With :math:`f_p` the FLOPs of parameter :math:`p`:

    .. math:: \text{inference} = f_{other} + \sum_p d_p f_p, \quad
              \text{training} = 3 T f_{other} + \sum_t \sum_p (2 d_p^t + w_p^t) f_p

    A training step is the forward pass, the gradient of the activations and that of the weights. Each costs as much as
    the forward pass (Evci et al., 2020, appendix H). The gradient of the weights is that of kept weights,
    :math:`w = d`. It is dense, :math:`w = 1`, for straight-through methods and in steps that make masks, whatever they
    are made from.
    Sparsities within the training rise along the updater's schedule to those in `params`.

    Args:
      fn: the forward pass, traced once and not run; its arguments may be `jax.ShapeDtypeStruct`. Loops count by their
        length, or once if that depends on data. Of branches, the most expensive counts; of a `shard_map`, one shard.
      params: any pytree of trained parameters, zeros in place.
      *args: the other arguments; one example gives the FLOPs of one example.
      updater: the algorithm that made the zeros, for the cost of training; without it training is dense.
      steps: the number of training steps.

    Returns:
      `_nparams` and `_nparams_nnz` (entries, and those that are not zero), `_inference_flops` and
      `_inference_flops_nnz`, with `steps` also `_training_flops` and `_training_flops_nnz` of all steps, and the dense
      FLOPs of each parameter that is multiplied with, under its slash path. If zeros are lost on the way to a product,
      as by weight standardisation, the product counts as dense and `_shifted_parameters` names the pruned parameters
      (see :func:`shifted_parameters`).

    Raises:
      ValueError: if the forward pass multiplies with none of the parameters.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> params = {"w": jnp.asarray([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])}
      >>> cost = jaxpruner.summarize_flops(lambda params, x: x @ params["w"], params, jnp.ones((1, 3)))
      >>> cost["_inference_flops"], cost["_inference_flops_nnz"]
      (12.0, 6.0)
    """
    named = trees.named_leaves(trees.numbers_only(params))
    sizes = [math.prod(jnp.shape(leaf)) for _, leaf in named]
    nonzero = [int(np.count_nonzero(np.asarray(leaf))) for _, leaf in named]
    counts: _Counts = collections.Counter()
    shifted: set[int] = set()

    def tell(product: provenance.Product) -> None:
        flops: Any = _dot_flops if product.equation.primitive.name == "dot_general" else _convolution_flops
        is_saved = not product.weight.is_shifted
        counts[product.weight.parameters if is_saved else ()] += product.times * flops(product.equation)
        shifted.update(() if is_saved else product.weight.parameters)

    _walk(fn, params, args, sizes, tell, choose=functools.partial(_dearest, counts))
    other = counts.pop((), 0.0)
    if not counts and not shifted:
        raise ValueError(
            "summarize_flops: fn multiplies with none of the parameters. Let it take them as its first argument, "
            "such as lambda params, x: model.apply({'params': params}, x)."
        )

    density = {key: sum(nonzero[i] for i in key) / sum(sizes[i] for i in key) for key in counts}
    summary: dict[str, Any] = {
        "_nparams": sum(sizes),
        "_nparams_nnz": sum(nonzero),
        "_inference_flops": other + sum(counts.values()),
        "_inference_flops_nnz": other + sum(density[key] * flops for key, flops in counts.items()),
    }
    if steps:
        level, is_dense = _course(updater, trees.numbers_only(params), steps)
        # Of the three passes (forward, to the activations, to the weights), zeros make two cheaper, or all three.
        saved = float(np.mean(level * np.where(is_dense, 2, 3)))
        cost = sum((3 - (1 - density[key]) * saved) * flops for key, flops in counts.items())
        summary["_training_flops"] = steps * 3 * summary["_inference_flops"]
        summary["_training_flops_nnz"] = steps * (3 * other + cost)
    if lost := [trees.leaf_name(named[i][0]) for i in sorted(shifted) if nonzero[i] < sizes[i]]:
        summary["_shifted_parameters"] = lost
    each: dict[str, float] = collections.defaultdict(float)
    for key, flops in counts.items():
        for i in key:
            each[trees.leaf_name(named[i][0])] += flops * sizes[i] / sum(sizes[j] for j in key)
    return summary | dict(each)


_Counts = collections.Counter[tuple[int, ...]]


def _course(updater: BaseUpdater | None, params: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step, the share of the final sparsity that is in force, and whether all weights need gradients."""
    if updater is None:
        return np.zeros(steps), np.ones(steps, bool)

    def at_each(decide: Callable[[Any], Any], dtype: Any) -> np.ndarray:
        return np.asarray(jax.vmap(lambda step: jnp.asarray(decide(step), dtype))(jnp.arange(steps)))

    updates = at_each(updater.scheduler.should_update_mask, bool)
    masks = updater.get_initial_masks(params, updater.get_target_sparsities(params))
    # Sparse from the start, and as sparse to the end.
    if updater.masks is not None or not all(mask.all() for mask in jax.tree.leaves(masks)):
        return np.ones(steps), updates & updater.regrows
    if updater.straight_through:  # a mask in every step, in force in the same
        level, last = (
            np.asarray(jax.vmap(lambda step: jnp.asarray(updater.sparsity_at(1.0, step), jnp.float32))(at))
            for at in (jnp.arange(steps), jnp.asarray([steps]))
        )
        return level / last if last else np.zeros(steps), np.ones(steps, bool)
    made = at_each(lambda step: updater.scheduler.get_sparsity_at_step(1.0, step), np.float32)
    # A mask is in force from the step after the one that makes it.
    latest = np.maximum.accumulate(np.where(updates, np.arange(steps), -1))
    before = np.concatenate([[-1], latest[:-1]])
    reached = made[latest[-1]] if latest[-1] >= 0 else 0.0
    level = np.where(before < 0, 0.0, made[before] / reached if reached else 0.0)
    return level, updates


def _dearest(counts: _Counts, branches: Sequence[provenance.Branch]) -> list[provenance.Value]:
    """Of branches the dearest counts."""
    before, walked = counts.copy(), []
    for branch in branches:
        counts.clear()
        walked.append((branch(), counts.copy()))
    outputs, dearest = max(walked, key=lambda branch: sum(branch[1].values()))
    counts.clear()
    counts.update(before)
    counts.update(dearest)
    return outputs


def shifted_parameters(fn: Callable[..., Any], params: Any, *args: Any) -> tuple[str, ...]:
    """The parameters whose zeros are no longer zero when `fn` multiplies with them.

    Weight standardisation, :math:`(w - \\bar w) / \\sigma`, is the usual case: with 80 % zeros in the parameter, no
    zero is left in the product. This is read from the jaxpr of `fn(params, *args)`; nothing is run.

    Args:
      fn: the forward pass, or a whole train step.
      params: its first argument, any pytree.
      *args: the other arguments: arrays, or `jax.ShapeDtypeStruct`.

    Returns:
      Their slash paths, in the order of the parameters.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> def standardised(params, x):
      ...     w = params["up"]
      ...     return jnp.tanh(x @ ((w - w.mean(0)) / w.std(0))) @ params["down"]
      >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
      >>> jaxpruner.shifted_parameters(standardised, params, jnp.ones((1, 3)))
      ('up',)
    """
    named = trees.named_leaves(trees.numbers_only(params))
    found: set[int] = set()

    def tell(product: provenance.Product) -> None:
        if product.weight.is_shifted:
            found.update(product.weight.parameters)

    _walk(fn, params, args, [math.prod(jnp.shape(leaf)) for _, leaf in named], tell)
    return tuple(trees.leaf_name(named[i][0]) for i in sorted(found))


def _walk(
    fn: Callable[..., Any], params: Any, args: Sequence[Any], sizes: Sequence[int], tell: Any, **more: Any
) -> None:
    numbers, _, joined = trees.parted(params, trees.is_number)
    jaxpr = jax.make_jaxpr(lambda numbers, *args: fn(joined(numbers), *args))(numbers, *args).jaxpr
    parameters = [provenance.Value((i,)) for i in range(len(sizes))]
    provenance.walk(jaxpr, parameters + [provenance.DATA] * (len(jaxpr.invars) - len(sizes)), sizes, tell, **more)


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _convolution_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval
    outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    # A transposed convolution spreads its input among zeros.
    return 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs / math.prod(eqn.params["lhs_dilation"])
