"""digits_vit: a small vision transformer on real digits, in a training loop of the reader's own.

    jaxpruner-baselines run digits_vit --preset quick     # 63 runs, 3 to 6 minutes on 2 cores; dense: 92.5
    jaxpruner-baselines run digits_vit --preset full      # about two hours on 2 cores

Flax Linen and optax; JaxPruner is the one line marked below. The model, the loss, the loop and the
evaluation know nothing of it: `params` are exactly sparse after every `optax.apply_updates`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner
from jaxpruner_baselines import data
from jaxpruner_baselines.baseline import Baseline, Outcome, Progress, Run
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.costs import SHARES, costs
from jaxpruner_baselines.methods import sparsify_config
from jaxpruner_baselines.vit import ViT


@dataclasses.dataclass(frozen=True)
class Preset:
    dataset: str
    epochs: int
    patch: int
    dim: int
    depth: int
    heads: int
    batch_size: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 0.3
    prune_start: float = 0.2  # fractions of all steps, as in the paper
    prune_end: float = 0.75
    prune_every: int = 20  # steps
    checkpoint_every: int = 0  # epochs; 0: a run is so short that it starts anew
    validation: bool = False  # test on training data held out, to choose the numbers above


PRESETS = {
    "quick": Preset(dataset="digits", epochs=60, patch=4, dim=32, depth=2, heads=4),
    "full": Preset(
        dataset="mnist_5k", epochs=60, patch=7, dim=64, depth=4, heads=4, learning_rate=6e-3, checkpoint_every=5
    ),
    "smoke": Preset(dataset="digits", epochs=2, patch=4, dim=8, depth=1, heads=2, prune_every=2, checkpoint_every=1),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """What is fixed while a model trains, and shared by all seeds: they compile once."""

    preset: Preset
    method: str
    sparsity: float
    steps: int

    @property
    def model(self) -> ViT:
        p = self.preset
        return ViT(p.patch, p.dim, p.depth, p.heads, classes=10)

    @property
    def sparsity_config(self) -> dict[str, Any]:
        p = self.preset
        return sparsify_config(
            self.method, self.sparsity, self.steps, start=p.prune_start, end=p.prune_end, freq=p.prune_every
        )

    def optimizer(self, seed: jax.Array) -> optax.GradientTransformation:
        p = self.preset
        schedule = optax.warmup_cosine_decay_schedule(0.0, p.learning_rate, self.steps // 10, self.steps)
        tx = optax.adamw(schedule, weight_decay=p.weight_decay)
        return jaxpruner.sparsify(tx, **self.sparsity_config, rng_seed=jax.random.key(seed))  # the one-line change

    def scored_with(self, loss_fn: Callable[..., Any], batch: tuple[Any, ...]) -> dict[str, Any]:
        """What an update is given beside gradients: nothing; of methods that score with the loss, that."""
        return {}


@functools.partial(jax.jit, static_argnums=0)
def init_params(model: ViT, seed: jax.Array, images: jax.Array) -> Any:
    return model.init(jax.random.key(seed), images)


@functools.partial(jax.jit, static_argnums=0)
def init_optimizer(training: Training, seed: jax.Array, params: Any) -> Any:
    return training.optimizer(seed).init(params)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_epoch(training: Training, state: tuple, seed: jax.Array, images: jax.Array, labels: jax.Array):
    """One pass over batches: images of shape (steps, batch, height, width, channels)."""
    tx = training.optimizer(seed)

    def loss_fn(params, images, labels):
        logits = training.model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train_step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, **training.scored_with(loss_fn, batch))
        return (optax.apply_updates(params, updates), opt_state), loss

    state, losses = jax.lax.scan(train_step, state, (images, labels))
    return state, losses.mean()


@functools.partial(jax.jit, static_argnums=0)
def accuracy(model: ViT, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(model.apply(params, images).argmax(-1) == labels)


def batches_of(examples: Any, seed: int, epoch: int, steps: int, batch_size: int) -> Any:
    """Those of an epoch, from seed and epoch alone, so that a resumed run sees the same."""
    order = np.random.default_rng([seed, epoch]).permutation(len(examples))
    return examples.take(order[: steps * batch_size].reshape(steps, batch_size))


def train(run: Run, checkpoint: Checkpoint, make: Callable[..., Training] = Training) -> Iterator[Progress | Outcome]:
    preset = run.preset
    dataset = data.DATASETS[preset.dataset](validation=preset.validation)
    steps_per_epoch = len(dataset.train) // preset.batch_size
    training = make(preset, run.method, run.sparsity, steps=preset.epochs * steps_per_epoch)

    params = init_params(training.model, run.seed, dataset.train.images[: preset.batch_size])
    state = params, init_optimizer(training, run.seed, params)
    first_epoch, state = checkpoint.load(like=state)
    for epoch in range(first_epoch, preset.epochs):
        batches = batches_of(dataset.train, run.seed, epoch, steps_per_epoch, preset.batch_size)
        state, loss = train_epoch(training, state, run.seed, batches.images, batches.labels)
        done = epoch + 1
        if preset.checkpoint_every and done % preset.checkpoint_every == 0 and done < preset.epochs:
            checkpoint.save(done, state)
        yield Progress(done * steps_per_epoch, training.steps, f"loss {loss:.3f}")

    params, _ = state
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]  # what may be pruned
    yield Outcome(
        value=float(accuracy(training.model, params, dataset.test.images, dataset.test.labels)),
        sparsity_reached=jaxpruner.summarize_sparsity(kernels, only_total_sparsity=True)["_total_sparsity"],
        steps=training.steps,
        details={
            "train_loss": float(loss),
            "prunable_weights": sum(leaf.size for leaf in kernels),
            **costs(
                training.model.apply,
                params,
                dataset.test.images[:1],
                updater=jaxpruner.create_updater_from_config(training.sparsity_config),
                steps=training.steps,
                batch=preset.batch_size,
            ),
        },
    )


BASELINE = Baseline(
    name="digits_vit",
    summary="a small vision transformer on real handwritten digits (Flax Linen, optax)",
    metric="accuracy",
    also=SHARES,
    presets=PRESETS,
    train=train,
)
