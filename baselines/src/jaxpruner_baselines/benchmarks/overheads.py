"""What sparse training costs beside its arithmetic: seconds until the first step, and steps outside of `jit`."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner
from jaxpruner_baselines.benchmarks.figures import Figure, Reach, alternate
from jaxpruner_baselines.benchmarks.masks import Events
from jaxpruner_baselines.benchmarks.steps import BARE
from jaxpruner_baselines.methods import DENSE, all_methods

SHAPES = ((256, 256), (256, 1024), (1024, 256), (256, 768), (512, 256), (3, 3, 64, 64))
# Seconds that a first step may take beyond that of the bare optimizer, at LIMITED_KERNELS.
LIMITS = {"magnitude": 8.0, "global_magnitude": 12.0, "rigl": 12.0}
LIMITED_KERNELS = 200


@dataclasses.dataclass(frozen=True)
class Sizes:
    kernels: tuple[int, ...] = (50, LIMITED_KERNELS)
    eager: tuple[int, int] = (16, 32)
    algorithms: tuple[str, ...] = tuple(method for method in all_methods() if method != DENSE)
    repeats: int = 3
    eager_repeats: int = 45
    is_fresh: bool = True


QUICK = Sizes(kernels=(3,), algorithms=("magnitude", "magnitude_ste"), repeats=1, eager_repeats=2, is_fresh=False)


def first_step(kernels: int, algorithm: str | None) -> float:
    """Seconds to trace and compile a training step with so many kernels, of six shapes."""
    params = {f"kernel_{i}": jax.ShapeDtypeStruct(SHAPES[i % len(SHAPES)], jnp.float32) for i in range(kernels)}
    tx = optax.adam(1e-3)
    if algorithm is not None:
        tx = jaxpruner.sparsify(
            tx, algorithm=algorithm, sparsity=0.8, update_start_step=10, update_end_step=1000, update_freq=100
        )

    def step(params, opt_state):
        grads = jax.grad(lambda params: sum(jnp.sum(kernel**3) for kernel in params.values()))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    started = time.perf_counter()
    jax.jit(step).lower(params, opt_state).compile()
    return time.perf_counter() - started


def fresh_first_step(kernels: int, algorithm: str | None) -> float:
    """The same in a process of its own, as a training's first step is, without what others left in this one."""
    with multiprocessing.get_context("spawn").Pool(1, _take_no_memory_ahead) as pool:
        return pool.apply(first_step, (kernels, algorithm))


def _take_no_memory_ahead() -> None:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # of an accelerator: the parent has it


def first_steps(sizes: Sizes) -> Events:
    """Tracing and compiling a step, by the number of kernels and the algorithm."""
    measure = fresh_first_step if sizes.is_fresh else first_step
    for kernels in sizes.kernels:
        seconds: dict[str | None, list[float]] = {name: [] for name in (None, *LIMITS)}
        for i in range(sizes.repeats):
            for name in seconds:
                yield f"{kernels} kernels, {name or BARE}, {i + 1} of {sizes.repeats}"
                seconds[name].append(measure(kernels, name))
        bare = statistics.median(seconds[None])
        for name, limit in LIMITS.items():
            row, ours = f"trace and compile, {kernels} kernels, {name}", statistics.median(seconds[name])
            config = {"kernels": kernels, "shapes": SHAPES, "repeats": [sizes.repeats] * 2}
            yield Figure(row, ours, BARE, bare, "s", ours / bare, False, Reach(), config)
            if kernels == LIMITED_KERNELS:
                added = ours - bare
                yield Figure(
                    f"{row}, added", added, "limit", limit, "s", added / limit, False, Reach(at_most=1), config
                )


def eager_step(shape: tuple[int, int], algorithm: str | None, is_packed: bool) -> Callable[[], Any]:
    """A call that takes two steps of two kernels outside of `jit`, with masks made as often as the algorithm can."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name in ("in", "out")}
    tx = optax.adam(1e-3)
    if algorithm is not None:
        # Dropping and growing takes the place of a step, so that every second one is an ordinary one.
        freq = 2 if algorithm in ("rigl", "set") else 1
        tx = jaxpruner.sparsify(
            tx, algorithm=algorithm, sparsity=0.5, use_packed_masks=is_packed,
            update_start_step=0, update_end_step=10**6, update_freq=freq,
        )  # fmt: skip
    state, grads = (params, tx.init(params)), jax.tree.map(jnp.ones_like, params)

    def call():
        nonlocal state
        for _ in range(2):
            updates, opt_state = tx.update(grads, state[1], state[0])
            state = optax.apply_updates(state[0], updates), opt_state
        return state

    for _ in range(2):  # all that the first steps compile
        call()
    return call


def eager_steps(sizes: Sizes) -> Events:
    """A step outside of `jit`, the slowest of all algorithms."""
    methods = sizes.algorithms
    for is_packed, name in ((False, "dense"), (True, "packed")):
        make = functools.partial(eager_step, sizes.eager, is_packed=is_packed)
        sides = {BARE: make(None), **{method: make(method) for method in methods}}
        times = yield from alternate(sides, dict.fromkeys(sides, sizes.eager_repeats))
        medians = {side: statistics.median(own) / 2 for side, own in times.items()}
        worst = max(methods, key=medians.get)
        ratios = {method: medians[method] / medians[BARE] for method in methods}
        yield Figure(
            f"eager step, {name} masks, worst of {len(methods)} algorithms", medians[worst], BARE,
            medians[BARE], "ms", ratios[worst], False, Reach(at_most=3),
            {"shape": sizes.eager, "worst": worst, "ratios": ratios, "repeats": [sizes.eager_repeats] * 2},
        )  # fmt: skip
