"""Prunes an architecture by half, compacts it, and compares the two."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpruner
from jaxpruner_baselines.benchmarks.figures import alternate
from jaxpruner_baselines.breadth.cases import Case

SPARSITY = 0.5
SEED = 0
WHOLE, SMALL = "masked", "compact"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found out about one architecture.

    Attributes:
      groups: those that can lose units.
      frozen: those that cannot.
      units_removed: the share of the units of all groups.
      flops: of the forward pass, after / before.
      params: after / before.
      difference: the largest one to the masked network's outputs, relative to the largest output.
      gradients: the same of the gradients of what is left; None where the function has none.
      find_seconds: `find_groups`.
      compact_seconds: `compact`, without its check.
      speedup: time of the forward pass, masked / compact, the median of pairs.
      milliseconds: of the forward pass, masked and compact.
      reasons: why frozen groups are, each with the number of groups.
    """

    groups: int
    frozen: int
    units_removed: float
    flops: float
    params: float
    difference: float
    gradients: float | None
    find_seconds: float
    compact_seconds: float
    speedup: float
    milliseconds: tuple[float, float]
    reasons: dict[str, int]


def randomized(params: Any) -> Any:
    """Every entry other than at the start: biases and statistics of norms, too, are not 0 and 1."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(SEED)

    def one(leaf):
        noise = 0.5 + np.abs(rng.standard_normal(leaf.shape, dtype=np.float32))
        if leaf.ndim < 2:
            return jnp.asarray(0.5 * noise, leaf.dtype)
        # Kernels keep their signs and scale; where a head starts at zero, nothing would reach the results.
        if not np.any(kernel := np.asarray(leaf)):
            kernel = rng.standard_normal(leaf.shape, dtype=np.float32) / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(kernel * noise, leaf.dtype)

    return treedef.unflatten([one(leaf) for leaf in leaves])


def loss_of(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Any], tuple[jax.Array, Any]]:
    """A weighted mean of all float results, which makes no rounding of theirs larger; and the results."""

    def weighted(leaf):
        return jnp.mean(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape))

    def loss(params):
        outputs = fn(params, *args)
        floats = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(map(weighted, floats)), outputs

    return loss


def halved(params: Any, groups: Any) -> Any:
    """Half of the units of each group at zero, those of the smallest magnitudes."""
    updater = jaxpruner.create_updater_from_config(
        {
            "algorithm": "magnitude",
            "sparsity": SPARSITY,
            "sparsity_type": groups,
            "filter_fn": lambda path, leaf: leaf.ndim > 1,
        }
    )
    return updater.instant_sparsify(params)[0]


def largest_difference(expected: Any, got: Any) -> float:
    """Relative to the largest entry of each array; of integers the share that differs."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if np.issubdtype(a.dtype, np.floating):
            difference = float(np.max(np.abs(a - b)) / (np.max(np.abs(a)) + 1e-12))
            worst = max(worst, difference if np.isfinite(difference) else np.inf)
        else:
            worst = max(worst, float(np.mean(a != b)))
    return worst


def _gradient_difference(expected: Any, got: Any) -> float:
    """Relative to the largest gradient of all."""
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True))
    largest = max(float(np.max(np.abs(a), initial=0.0)) for a, _ in pairs)
    difference = max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in pairs) / (largest + 1e-12)
    return difference if np.isfinite(difference) else np.inf


def measure(case: Case, repeats: int) -> Generator[str, None, Measured]:
    """Yields what it does; returns what it found."""
    yield "finds groups"
    started = time.perf_counter()
    groups = jaxpruner.find_groups(case.fn, case.params, *case.args)
    find_seconds = time.perf_counter() - started
    yield "prunes"
    params = halved(randomized(case.params), groups)
    yield "compacts"
    started = time.perf_counter()
    small = jaxpruner.compact(case.fn, params, *case.args, check=False)
    compact_seconds = time.perf_counter() - started
    report = small.report()

    yield "compares"
    whole_forward, small_forward = jax.jit(case.fn), jax.jit(small.fn)
    gradients = None
    if case.is_differentiable:
        whole_grads, expected = jax.jit(jax.grad(loss_of(case.fn, case.args), has_aux=True))(params)
        small_grads, got = jax.jit(jax.grad(loss_of(small.fn, case.args), has_aux=True))(small.params)
        gradients = _gradient_difference(small.cut(jax.device_get(whole_grads)), jax.device_get(small_grads))
    else:
        expected, got = whole_forward(params, *case.args), small_forward(small.params, *case.args)
    sides = {
        WHOLE: functools.partial(whole_forward, params, *case.args),
        SMALL: functools.partial(small_forward, small.params, *case.args),
    }
    times = yield from alternate(sides, dict.fromkeys(sides, repeats))
    reasons: dict[str, int] = {}
    for group in groups.frozen:
        reasons[group.reasons[0]] = reasons.get(group.reasons[0], 0) + 1
    before, after = (sum(pair[i] for pair in report.units.values()) for i in range(2))
    return Measured(
        groups=len(groups.removable),
        frozen=len(groups.frozen),
        units_removed=1 - after / max(before, 1),
        flops=report.flops[1] / report.flops[0],
        params=report.params[1] / report.params[0],
        difference=largest_difference(expected, got),
        gradients=gradients,
        find_seconds=find_seconds,
        compact_seconds=compact_seconds,
        speedup=statistics.median(w / s for w, s in zip(times[WHOLE], times[SMALL], strict=True)),
        milliseconds=(statistics.median(times[WHOLE]), statistics.median(times[SMALL])),
        reasons=reasons,
    )
