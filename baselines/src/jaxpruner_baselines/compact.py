"""compact: pruned units leave, and what a network without them is worth: accuracy against measured speed.

    jaxpruner-baselines run compact --preset vit --seeds 3     # 30 runs; dense: 90.8
    jaxpruner-baselines run compact --preset resnet
    jaxpruner-baselines run compact --preset vit_distil

A dense network is trained, pruned by groups while it goes on training, compacted, and fine-tuned as the small function
with what was left of the optimizer's state. Beside it `from_scratch`: a network of the same smaller sizes that is
trained from the start, for as many steps.

`vit_distil` trains the dense network to its end, prunes it at once, compacts it, and trains the small function on the
dense one's outputs (Muralidharan et al., 2024, "Compact Language Models via Pruning and Knowledge Distillation").
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner
from jaxpruner_baselines import data
from jaxpruner_baselines.baseline import Baseline, Cost, Outcome, Progress, Run
from jaxpruner_baselines.benchmarks.figures import alternate
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.methods import DENSE
from jaxpruner_baselines.vit import ViT

FROM_SCRATCH = "from_scratch"
METHODS = ("magnitude", "global_magnitude")


@dataclasses.dataclass(frozen=True)
class Preset:
    network: str
    dataset: str = "digits"
    epochs: int = 40  # dense, pruned and fine-tuned together
    prune_start: float = 0.4  # fractions of all steps
    prune_end: float = 0.7
    compact_at: float = 0.75
    prune_every: int = 10  # steps
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    timed_images: int = 256
    repeats: int = 21
    validation: bool = False


@dataclasses.dataclass(frozen=True)
class Distilled(Preset):
    """`epochs` train the teacher, which is pruned at once; these come after them."""

    distil_epochs: int = 20


PRESETS = {
    "vit": Preset("vit"),
    "resnet": Preset("resnet", epochs=20),
    "vit_distil": Distilled("vit"),
    "vit_mnist": Preset("vit_mnist", "mnist_5k", epochs=20),
    "short": Preset("vit_short", epochs=30),  # one run of it ends `suite`
    "smoke": Preset("vit_smoke", epochs=4, prune_every=5, timed_images=8, repeats=1),
    "smoke_distil": Distilled("vit_smoke", epochs=2, distil_epochs=2, timed_images=8, repeats=1),
}


class _ResNet(nn.Module):
    """Three stages of basic blocks with group norm, which has no statistics."""

    width: int = 16

    @nn.compact
    def __call__(self, images):
        norm = functools.partial(nn.GroupNorm, num_groups=4)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        x = nn.relu(norm()(conv(self.width)(images)))
        for stage in range(3):
            for block in range(2):
                width, stride = self.width * 2**stage, 2 if stage and not block else 1
                y = nn.relu(norm()(conv(width, strides=stride)(x)))
                y = norm()(conv(width)(y))
                if x.shape != y.shape:
                    x = norm()(conv(width, kernel_size=(1, 1), strides=stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


MODELS: dict[str, nn.Module] = {
    "vit": ViT(patch=2, dim=64, depth=3, heads=4, classes=10),
    "vit_short": ViT(patch=2, dim=64, depth=1, heads=4, classes=10),
    "vit_mnist": ViT(patch=4, dim=64, depth=4, heads=4, classes=10),
    "vit_smoke": ViT(patch=4, dim=8, depth=1, heads=2, classes=10),
    "resnet": _ResNet(),
}


def optimizer(preset: Preset, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, preset.learning_rate, steps // 10, steps)
    return optax.adamw(schedule, weight_decay=preset.weight_decay)


def on_labels(logits: Any, images: Any, labels: Any) -> Any:
    """Cross entropy of each image."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def on_outputs_of(teacher: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """Kullback-Leibler divergence of each image from what a teacher gives."""

    def loss(logits, images, labels):
        return optax.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(teacher(params, images)))

    return loss


def make_epoch(
    forward: Callable[..., Any], tx: optax.GradientTransformation, loss: Callable[..., Any] = on_labels
) -> Callable[..., Any]:
    """`(params, opt_state), images, labels -> (params, opt_state), loss` over batches."""

    def loss_fn(params, images, labels):
        return loss(forward(params, images), images, labels).mean()

    def train_step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state, images, labels):
        state, losses = jax.lax.scan(train_step, state, (images, labels))
        return state, losses.mean()

    return epoch


def smaller(forward: Callable[..., Any], params: Any, example: Any, sparsity: float, seed: int) -> jaxpruner.Compact:
    """A network that is not trained yet, of the sizes that pruning by magnitude leaves; which units is drawn."""
    rng = np.random.default_rng([seed, 1])
    kept = {
        group.name: rng.permutation(group.size)[: max(1, round(group.size * (1 - sparsity)))]
        for group in jaxpruner.find_groups(forward, params, example).removable
    }
    small = jaxpruner.compact(forward, params, example, keep=kept)

    def rescaled(whole, left):
        # Kernels are drawn with a variance of one over what they sum over, which is less now.
        sums = [np.prod(leaf.shape[:-1]) for leaf in (whole, left)]
        return left * np.sqrt(sums[0] / sums[1]).astype(left.dtype) if left.ndim > 1 else left

    return dataclasses.replace(small, params=jax.tree.map(rescaled, params, small.params))


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    preset, is_pruned = run.preset, run.method not in (DENSE, FROM_SCRATCH)
    dataset = data.DATASETS[preset.dataset](validation=preset.validation)
    steps_per_epoch = len(dataset.train) // preset.batch_size
    distils = is_pruned and isinstance(preset, Distilled)
    epochs = preset.epochs + (0 if run.method == DENSE else getattr(preset, "distil_epochs", 0))
    # The teacher's training is whole, and what follows is one of its own.
    first_steps = steps_per_epoch * (preset.epochs if distils else epochs)
    steps = steps_per_epoch * epochs
    model, example = MODELS[preset.network], dataset.train.images[: preset.batch_size]
    dense = jax.jit(model.init)(jax.random.key(run.seed), example)

    small, tx = None, optimizer(preset, first_steps)
    forward, params = model.apply, dense
    if run.method == FROM_SCRATCH:
        small = smaller(forward, dense, example, run.sparsity, run.seed)
        forward, params = small.fn, small.params
    elif is_pruned:
        groups = jaxpruner.find_groups(forward, dense, example)
        pruning = {"algorithm": run.method, "sparsity": run.sparsity, "sparsity_type": groups}
        if not distils:
            first, last = (
                preset.prune_every * round(fraction * steps / preset.prune_every)
                for fraction in (preset.prune_start, preset.prune_end)
            )
            tx = jaxpruner.sparsify(
                tx, **pruning, update_start_step=first, update_end_step=last, update_freq=preset.prune_every
            )
    compacts_at = preset.epochs if distils else round(preset.compact_at * epochs)
    state = _copied((params, jax.jit(tx.init)(params)))
    epoch_of = make_epoch(forward, tx)
    for epoch in range(epochs):
        if is_pruned and epoch == compacts_at:
            params, opt_state = state
            if distils:
                pruned, _ = jaxpruner.create_updater_from_config(pruning).instant_sparsify(params)
                small = jaxpruner.compact(forward, pruned, example)
                tx, loss_of = optimizer(preset, steps - first_steps), on_outputs_of(forward, params)
                state = _copied((small.params, tx.init(small.params)))
            else:
                small = jaxpruner.compact(forward, params, example)
                # From here on nothing is masked: the bare optimizer goes on with the moments of what is left.
                tx, loss_of = optimizer(preset, steps), on_labels
                state = _copied((small.params, small.cut(opt_state).inner_state))
            forward = small.fn
            epoch_of = make_epoch(forward, tx, loss_of)
        # From seed and epoch alone, so that all methods see the same batches.
        order = np.random.default_rng([run.seed, epoch]).permutation(len(dataset.train))
        batches = dataset.train.take(
            order[: steps_per_epoch * preset.batch_size].reshape(steps_per_epoch, preset.batch_size)
        )
        state, loss = epoch_of(state, batches.images, batches.labels)
        yield Progress((epoch + 1) * steps_per_epoch, steps, f"loss {loss:.3f}")

    params, _ = state
    outputs = jax.jit(forward)(params, dataset.test.images)
    times = yield from _timed(
        model.apply, dense, forward, params, dataset.test.images[: preset.timed_images], preset, steps
    )
    report = small and small.report()
    yield Outcome(
        value=float(jnp.mean(outputs.argmax(-1) == dataset.test.labels)),
        sparsity_reached=_units_removed(report) if report else 0.0,
        steps=steps,
        details={
            "train_loss": float(loss),
            "speedup": statistics.median(d / o for d, o in zip(times["dense"], times["this"], strict=True)),
            "milliseconds": statistics.median(times["this"]),
            "dense_milliseconds": statistics.median(times["dense"]),
            "images": preset.timed_images,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "parameters_share": report.params[1] / report.params[0] if report else 1.0,
            "inference_flops_share": report.flops[1] / report.flops[0] if report else 1.0,
        },
    )


def _copied(state: Any) -> Any:
    """For an epoch, which takes its buffers for good."""
    return jax.tree.map(jnp.copy, state)


def _units_removed(report: jaxpruner.Report) -> float:
    before, after = (sum(pair[i] for pair in report.units.values()) for i in range(2))
    return 1 - after / before


def _timed(dense_forward, dense, forward, params, images, preset, steps) -> Any:
    """The times of both forward passes, which take turns; the dense network's weights do not matter."""
    calls = {
        "dense": functools.partial(jax.jit(dense_forward), dense),
        "this": functools.partial(jax.jit(forward), params),
    }
    sides = {name: functools.partial(call, jnp.asarray(images)) for name, call in calls.items()}
    timing = alternate(sides, dict.fromkeys(sides, preset.repeats))
    while True:
        try:
            note = next(timing)
        except StopIteration as ended:
            return ended.value
        yield Progress(steps, steps, note)


BASELINE = Baseline(
    name="compact",
    summary="pruned units leave: accuracy against measured speed, beside smaller networks from scratch",
    metric="accuracy",
    also=("inference_flops_share", "parameters_share"),
    presets=PRESETS,
    train=train,
    only=(DENSE, *METHODS, FROM_SCRATCH),
    cost=Cost("speedup", "measured speed-up of the forward pass over the dense network's", "speed-up"),
    sparsities=(0.25, 0.5, 0.75),
)
