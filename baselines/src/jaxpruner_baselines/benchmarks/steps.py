"""A whole training step of a vision transformer, sparse against the bare optimizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner
from jaxpruner_baselines.benchmarks.figures import Reach, alternate, timed
from jaxpruner_baselines.benchmarks.masks import Events
from jaxpruner_baselines.vit import ViT

UPDATE_FREQ = 100
BARE = "bare optimizer"
AGAIN = "bare optimizer again"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A ViT, by default ViT-S/16 on 224x224 images: 196 tokens."""

    image: int = 224
    patch: int = 16
    dim: int = 384
    depth: int = 12
    heads: int = 6
    classes: int = 1000
    batch: int = 8
    dtype: str = "float32"  # of activations; parameters are float32
    starts: int = 6
    repeats: int = 3  # from each start


QUICK = Sizes(image=32, patch=8, dim=32, depth=1, heads=2, classes=10, batch=2, starts=2, repeats=2)
VIT_B = Sizes(dim=768, heads=12, batch=256, dtype="bfloat16")
VIT_B_QUICK = dataclasses.replace(QUICK, dtype="bfloat16")

# From count 1 on no mask is made before count 100; with a frequency of 1 every step makes one.
_ALWAYS = {"update_start_step": 0, "update_end_step": 10**6}
_PRUNER = _ALWAYS | {"algorithm": "magnitude"}
SIDES: dict[str, dict[str, Any] | None] = {
    BARE: None,
    AGAIN: None,  # what a ratio of 1 measures here
    "dense masks": _PRUNER | {"update_freq": UPDATE_FREQ},
    "packed masks": _PRUNER | {"update_freq": UPDATE_FREQ, "use_packed_masks": True},
    "mask made": _PRUNER | {"update_freq": 1},
    "straight-through": _ALWAYS | {"algorithm": "magnitude_ste", "update_freq": 1},
}


def training_step(sizes: Sizes, config: dict[str, Any] | None) -> Callable[[], Callable[[], Any]]:
    """Starts a training: gives a call that takes one step from where the last call ended, all buffers donated."""
    model = ViT(sizes.patch, sizes.dim, sizes.depth, sizes.heads, sizes.classes, jnp.dtype(sizes.dtype))
    tx = optax.adamw(1e-3)
    if config is not None:
        tx = jaxpruner.sparsify(tx, sparsity=0.8, **config)
    rng = np.random.default_rng(0)
    images = jax.device_put(rng.standard_normal((sizes.batch, sizes.image, sizes.image, 3), dtype=np.float32))
    labels = jax.device_put(rng.integers(0, sizes.classes, sizes.batch))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, labels):
        params, opt_state = state

        def loss_fn(params):
            logits = model.apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        grads = jax.grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def init(images):
        params = model.init(jax.random.key(0), images)
        return params, tx.init(params)

    def start():
        state = init(images)

        def call():
            nonlocal state
            state = step(state, images, labels)
            return state

        return call

    return start


def training_steps(sizes: Sizes) -> Events:
    """A step between mask updates, all in, and with a mask made every step."""
    trainings = {name: training_step(sizes, config) for name, config in SIDES.items()}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for i in range(sizes.starts):
        yield f"start {i + 1} of {sizes.starts}"
        # Where its buffers lie makes a side some percent faster or slower, for as long as it keeps them.
        sides = {name: start() for name, start in trainings.items()}
        found = yield from alternate(sides, dict.fromkeys(sides, sizes.repeats))
        for name, own in found.items():
            times[name] += own
    times["all in"] = [  # computed from the two kinds of step, not from 100 steps
        ((UPDATE_FREQ - 1) * between + made) / UPDATE_FREQ
        for between, made in zip(times["dense masks"], times["mask made"], strict=True)
    ]
    config = dataclasses.asdict(sizes)
    for row, side, reach in (
        ("training step between updates, dense masks", "dense masks", Reach(at_most=1.02)),
        ("training step between updates, packed masks", "packed masks", Reach(at_most=1.04)),
        (f"training step, all in, update_freq={UPDATE_FREQ}", "all in", Reach(at_most=1.03)),
        ("straight-through step, mask made every step", "straight-through", Reach(at_most=1.25)),
        ("the bare step against itself: the noise of these rows", AGAIN, Reach()),
    ):
        yield timed(row, times, side, BARE, reach, config, faster=False)
