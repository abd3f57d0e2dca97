"""Compact networks against dense ones: how much of what the FLOPs promise becomes speed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxpruner
from jaxpruner_baselines.benchmarks import networks
from jaxpruner_baselines.benchmarks.figures import Reach, alternate, timed
from jaxpruner_baselines.benchmarks.masks import Events
from jaxpruner_baselines.benchmarks.steps import training_step

DENSE = "dense"
OF_IDEAL = 0.8


@dataclasses.dataclass(frozen=True)
class Sizes:
    """ViT-S/16 and ResNet-50, in batches and images that two cores do in less than a second."""

    networks: tuple[networks.Network, ...] = (networks.VisionTransformer(batch=2), networks.ResNet(image=128, batch=2))
    removed: tuple[float, ...] = (0.25, 0.5, 0.75)
    repeats: int = 5


QUICK = Sizes(
    (networks.VisionTransformer(image=32, patch=8, dim=32, depth=1, heads=2, classes=10, batch=2),),
    removed=(0.5,),
    repeats=2,
)


def compact_speed(sizes: Sizes) -> Events:
    """The loss, and the training step with AdamW, without some of the units of each group, which are drawn."""
    for network in sizes.networks:
        yield from _of(network, sizes)


def _of(network: networks.Network, sizes: Sizes) -> Events:
    name = type(network).__name__
    problem = network.problem("float32")
    params = jax.jit(problem.init)(jax.random.key(0))
    yield f"{name}: finds groups"
    groups = jaxpruner.find_groups(problem.loss, params, *problem.batch)
    rng = np.random.default_rng(0)
    problems, ideals = {DENSE: (problem.loss, params)}, {}
    for share in sizes.removed:
        side = f"{share:.0%} removed"
        kept = {
            group.name: rng.permutation(group.size)[: max(1, round(group.size * (1 - share)))]
            for group in groups.removable
        }
        yield f"{name}: compacts, {side}"
        small = jaxpruner.compact(problem.loss, params, *problem.batch, keep=kept, check=False)
        problems[side] = small.fn, small.params
        before, after = small.report().flops
        ideals[side] = before / after
    for what, calls in (("forward pass", _forward), ("training step", _step)):
        sides = {side: calls(*made, problem.batch) for side, made in problems.items()}
        times = yield from alternate(sides, dict.fromkeys(sides, sizes.repeats))
        for side, ideal in ideals.items():
            config = {"network": name, **dataclasses.asdict(network), "ideal": round(ideal, 4)}
            reach = Reach(at_least=round(OF_IDEAL * ideal, 2))
            yield timed(f"compact {name}, {what}, {side}", times, side, DENSE, reach, config)


def _forward(loss: Callable[..., Any], params: Any, batch: tuple[Any, ...]) -> Callable[[], Any]:
    return functools.partial(jax.jit(loss), params, *batch)


def _step(loss: Callable[..., Any], params: Any, batch: tuple[Any, ...]) -> Callable[[], Any]:
    # Copies, since a step donates its state.
    start = networks.Problem(lambda key: jax.tree.map(jax.numpy.copy, params), loss, batch)
    return training_step(start, "float32", None)()


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A square kernel at these sparsities, times batches of these sizes."""

    width: int = 1024
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    batches: tuple[int, ...] = (1, 16, 256)
    repeats: int = 51


QUICK_KERNELS = Kernels(width=32, sparsities=(0.9,), batches=(4,), repeats=2)


def sparse_kernels(sizes: Kernels) -> Events:
    """Kernels whose units are all in use, evaluated as sparse matrices by `compact(..., sparse_above=)`."""

    def forward(params: Any, x: Any) -> Any:
        return x @ params["kernel"]

    rng = np.random.default_rng(0)
    for sparsity in sizes.sparsities:
        kernel = rng.normal(size=(sizes.width, sizes.width)) * (rng.random((sizes.width, sizes.width)) >= sparsity)
        params = {"kernel": kernel.astype(np.float32)}
        for batch in sizes.batches:
            x = rng.normal(size=(batch, sizes.width)).astype(np.float32)
            small = jaxpruner.compact(forward, params, x, sparse_above=0.5, check=False)
            sides = {
                DENSE: functools.partial(jax.jit(forward), jax.device_put(params), jax.device_put(x)),
                "sparse": functools.partial(jax.jit(small.fn), small.params, jax.device_put(x)),
            }
            times = yield from alternate(sides, dict.fromkeys(sides, sizes.repeats))
            config = {"width": sizes.width, "sparsity": sparsity, "batch": batch}
            row = f"{sizes.width}x{sizes.width}, {100 * sparsity:g}% zeros, times {batch}: sparse_above"
            yield timed(row, times, "sparse", DENSE, Reach(), config)
