"""Whole training steps, sparse against the bare optimizer, and what its state takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

import jaxpruner
from jaxpruner_baselines.benchmarks import networks
from jaxpruner_baselines.benchmarks.figures import Figure, Reach, alternate, timed
from jaxpruner_baselines.benchmarks.masks import Events

UPDATE_FREQ = 100
BARE = "bare optimizer"
AGAIN = "bare optimizer again"


@dataclasses.dataclass(frozen=True)
class Sizes:
    network: networks.Network = networks.VisionTransformer()
    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"
    starts: int = 6
    repeats: int = 3  # from each start


SMALL_VIT = networks.VisionTransformer(image=32, patch=8, dim=32, depth=1, heads=2, classes=10, batch=2)
QUICK = Sizes(SMALL_VIT, starts=2, repeats=2)
VIT_B = Sizes(networks.VisionTransformer(dim=768, heads=12, batch=256), dtype="bfloat16")
VIT_B_QUICK = dataclasses.replace(QUICK, dtype="bfloat16")


# From count 1 on no mask is made before count 100; with a frequency of 1 every step makes one.
_ALWAYS = {"update_start_step": 0, "update_end_step": 10**6}
_PRUNER = _ALWAYS | {"algorithm": "magnitude"}
# With a frequency of 2 every second step drops and grows weights, from the first that is timed on.
_RIGL = {"algorithm": "rigl", "update_freq": 2, "update_start_step": 1, "update_end_step": 10**6}
SIDES: dict[str, dict[str, Any] | None] = {
    BARE: None,
    AGAIN: None,  # what a ratio of 1 measures here
    "dense masks": _PRUNER | {"update_freq": UPDATE_FREQ},
    "packed masks": _PRUNER | {"update_freq": UPDATE_FREQ, "use_packed_masks": True},
    "mask made": _PRUNER | {"update_freq": 1},
    "straight-through": _ALWAYS | {"algorithm": "magnitude_ste", "update_freq": 1},
}


@dataclasses.dataclass(frozen=True)
class Several:
    """The same rows for several dtypes of parameters."""

    network: networks.Network = networks.VisionTransformer()
    param_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    sides: tuple[str, ...] = (*SIDES, "RigL")
    starts: int = 3
    repeats: int = 3


SEVERAL_QUICK = Several(
    networks.Transformer(vocabulary=64, dim=32, depth=2, heads=2, tokens=8, batch=2),
    ("bfloat16",),
    (BARE, AGAIN, "dense masks", "RigL"),
    starts=1,
    repeats=2,
)


def optimizer(config: dict[str, Any] | None) -> optax.GradientTransformation:
    tx = optax.adamw(1e-3)
    return tx if config is None else jaxpruner.sparsify(tx, sparsity=0.8, **config)


def training_step(
    problem: networks.Problem, param_dtype: str, config: dict[str, Any] | None
) -> Callable[[], Callable[[], Any]]:
    """Starts a training: gives a call that takes one step from where the last call ended, all buffers donated."""
    tx = optimizer(config)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, opt_state = state
        grads = jax.grad(problem.loss)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def init(key):
        params = jax.tree.map(lambda p: p.astype(param_dtype), problem.init(key))
        return params, tx.init(params)

    def start():
        state = init(jax.random.key(0))

        def call():
            nonlocal state
            state = step(state, problem.batch)
            return state

        return call

    return start


def training_steps(sizes: Sizes) -> Events:
    """A step between mask updates, all in, and with a mask made every step."""
    yield from _steps(sizes, SIDES, "")


def network_steps(sizes: Several) -> Events:
    """The same of a network and several dtypes of parameters, RigL's too, and the bytes of the optimizer's state."""
    for param_dtype in sizes.param_dtypes:
        one = Sizes(
            sizes.network, param_dtype=param_dtype, dtype=param_dtype, starts=sizes.starts, repeats=sizes.repeats
        )
        name = f"{type(sizes.network).__name__}, {param_dtype}: "
        configs = {side: (SIDES | {"RigL": _RIGL})[side] for side in sizes.sides}
        yield from _steps(one, configs, name)
        yield from _state_bytes(one, name)


def _steps(sizes: Sizes, configs: dict[str, dict[str, Any] | None], prefix: str) -> Events:
    problem = sizes.network.problem(sizes.dtype)
    trainings = {name: training_step(problem, sizes.param_dtype, config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for i in range(sizes.starts):
        yield f"{prefix}start {i + 1} of {sizes.starts}"
        # Where its buffers lie makes a side some percent faster or slower, for as long as it keeps them.
        sides = {name: start() for name, start in trainings.items()}
        found = yield from alternate(sides, {name: max(sizes.repeats, 1 + (name == "RigL")) for name in sides})
        for name, own in found.items():
            times[name] += own[1::2] if name == "RigL" else own  # of RigL those that drop and grow

    def all_in(made: str) -> list[float]:  # computed from the two kinds of step, not from 100 steps
        pairs = zip(times["dense masks"], times[made], strict=False)
        return [((UPDATE_FREQ - 1) * between + own) / UPDATE_FREQ for between, own in pairs]

    for name, made in (("all in", "mask made"), ("RigL, all in", "RigL")):
        if made in times:
            times[name] = all_in(made)
    rows = [
        ("training step between updates, dense masks", "dense masks", Reach(at_most=1.02)),
        ("training step between updates, packed masks", "packed masks", Reach(at_most=1.04)),
        (f"training step, all in, update_freq={UPDATE_FREQ}", "all in", Reach(at_most=1.03)),
        (f"RigL's step, all in, update_freq={UPDATE_FREQ}", "RigL, all in", Reach(at_most=1.03)),
        ("straight-through step, mask made every step", "straight-through", Reach(at_most=1.25)),
        ("the bare step against itself: the noise of these rows", AGAIN, Reach()),
    ]
    for row, side, reach in rows:
        if side in times:
            yield timed(f"{prefix}{row}", times, side, BARE, reach, dataclasses.asdict(sizes), faster=False)


def _state_bytes(sizes: Sizes, prefix: str) -> Events:
    """What the optimizer keeps, against what it keeps of a dense training."""
    params = jax.eval_shape(sizes.network.problem(sizes.dtype).init, jax.random.key(0))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, sizes.param_dtype), params)

    def megabytes(config):
        leaves = jax.tree.leaves(jax.eval_shape(optimizer(config).init, params))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 1e6

    bare = megabytes(None)
    packed_ste = SIDES["straight-through"] | {"use_packed_masks": True}
    for name, config in (("dense masks", SIDES["dense masks"]), ("packed masks", SIDES["packed masks"]),
                         ("straight-through, packed masks", packed_ste)):  # fmt: skip
        ours = megabytes(config)
        yield Figure(
            f"{prefix}state of AdamW, {name}", ours, BARE, bare, "MB", ours / bare, False, Reach(),
            dataclasses.asdict(sizes) | {"repeats": [1, 1]},
        )  # fmt: skip
