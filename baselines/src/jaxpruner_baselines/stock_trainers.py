"""stock_trainers: the trainers that people have, sparse and unmodified, on real digits.

    jaxpruner-baselines run stock_trainers --preset digits     # 27 runs, a minute; dense: 90.9

One multilayer perceptron, one set of digits and one schedule, trained by `fit` of Keras 3, by a loop around
`flax.nnx.Optimizer` and by Tunix's `PeftTrainer`. Each gets a sparse optimizer, and nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import jaxpruner
from jaxpruner_baselines import data
from jaxpruner_baselines.baseline import Baseline, NotReady, Outcome, Progress, Run
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.digits_vit import batches_of
from jaxpruner_baselines.methods import DENSE, sparsify_config

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Preset:
    epochs: int
    widths: tuple[int, ...]
    batch_size: int = 64
    learning_rate: float = 3e-3
    prune_start: float = 0.2  # fractions of all steps, as in the paper
    prune_end: float = 0.75
    prune_every: int = 10  # steps


PRESETS = {"digits": Preset(epochs=40, widths=(256, 256)), "smoke": Preset(epochs=2, widths=(16,), prune_every=2)}


@dataclasses.dataclass(frozen=True)
class Task:
    """What a trainer is given."""

    preset: Preset
    config: dict[str, Any]
    seed: int
    dataset: data.Dataset
    steps_an_epoch: int

    def epochs(self) -> Iterator[Any]:
        """The batches of each epoch."""
        for epoch in range(self.preset.epochs):
            yield batches_of(self.dataset.train, self.seed, epoch, self.steps_an_epoch, self.preset.batch_size)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a trainer made of it: logits of images, the kernels, and the seconds of each step."""

    logits: Callable[[Any], Any]
    kernels: list[Any]
    seconds: list[float]


def by_keras(task: Task) -> Iterator[Progress | Trained]:
    """`compile` and `fit`."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras
    from jaxpruner_keras import SparseOptimizer

    keras.utils.set_random_seed(task.seed)
    layers = [keras.layers.Dense(width, activation="relu") for width in task.preset.widths]
    shape = task.dataset.train.images.shape[1:]
    model = keras.Sequential([keras.Input(shape), keras.layers.Flatten(), *layers, keras.layers.Dense(CLASSES)])
    optimizer = SparseOptimizer(keras.optimizers.Adam(task.preset.learning_rate), task.config)  # the one-line change
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    marks = [time.perf_counter()]
    timer = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: marks.append(time.perf_counter()))
    p, train = task.preset, task.dataset.train
    rows = task.steps_an_epoch * p.batch_size  # whole batches
    model.fit(
        train.images[:rows], train.labels[:rows], batch_size=p.batch_size, epochs=p.epochs, verbose=0, callbacks=[timer]
    )
    yield Progress(p.epochs * task.steps_an_epoch, p.epochs * task.steps_an_epoch)
    kernels = [np.asarray(variable.value) for variable in model.trainable_variables if variable.ndim > 1]
    yield Trained(model.predict_on_batch, kernels, list(np.diff(marks) / task.steps_an_epoch))


class Mlp(nnx.Module):
    """The same network of Flax NNX."""

    def __init__(self, inputs: int, widths: tuple[int, ...], rngs: nnx.Rngs):
        sizes = (inputs, *widths)
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.out = nnx.Linear(sizes[-1], CLASSES, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        x = images.reshape(len(images), -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.out(x)


def loss_of(model: Mlp, images: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def _nnx_parts(task: Task) -> tuple[Mlp, optax.GradientTransformation]:
    inputs = int(np.prod(task.dataset.train.images.shape[1:]))
    tx = jaxpruner.sparsify(optax.adam(task.preset.learning_rate), task.config)  # the one-line change
    return Mlp(inputs, task.preset.widths, nnx.Rngs(task.seed)), tx


def _kernels(model: Mlp) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)) if leaf.ndim > 1]


def by_nnx(task: Task) -> Iterator[Progress | Trained]:
    """A loop around `nnx.Optimizer`."""
    model, tx = _nnx_parts(task)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, images, labels):
        optimizer.update(model, nnx.grad(loss_of)(model, images, labels))

    seconds = []
    for epoch, batches in enumerate(task.epochs()):
        started = time.perf_counter()
        for images, labels in zip(batches.images, batches.labels, strict=True):
            train_step(model, optimizer, images, labels)
        jax.block_until_ready(nnx.state(model))
        seconds.append((time.perf_counter() - started) / task.steps_an_epoch)
        yield Progress((epoch + 1) * task.steps_an_epoch, task.preset.epochs * task.steps_an_epoch)
    yield Trained(model, _kernels(model), seconds)


def by_tunix(task: Task) -> Iterator[Progress | Trained]:
    """Tunix's `PeftTrainer`."""
    from tunix.sft import peft_trainer

    model, tx = _nnx_parts(task)
    steps = task.preset.epochs * task.steps_an_epoch
    fetched = []

    def batches():
        for epoch in task.epochs():
            for images, labels in zip(epoch.images, epoch.labels, strict=True):
                fetched.append(time.perf_counter())
                yield peft_trainer.TrainingInput(images, labels)

    config = peft_trainer.TrainingConfig(eval_every_n_steps=steps + 1, max_steps=steps, pbar_description=None)
    trainer = peft_trainer.PeftTrainer(model, tx, config)
    trainer = trainer.with_loss_fn(loss_of).with_gen_model_input_fn(
        lambda batch: {"images": batch.input_tokens, "labels": batch.input_mask}
    )
    trainer.train(batches())
    trainer.close()
    yield Progress(steps, steps)
    yield Trained(model, _kernels(model), list(np.diff(fetched)))


TRAINERS = {"keras": by_keras, "nnx": by_nnx, "tunix": by_tunix}


def prepare(preset: Any) -> None:
    """Raises if a trainer is not installed, or Keras runs on another backend already."""
    del preset
    if missing := [name for name in ("keras", "tunix") if importlib.util.find_spec(name) is None]:
        raise NotReady(f"stock_trainers needs {missing[0]}; `make setup` installs it.")
    if "keras" in sys.modules and sys.modules["keras"].backend.backend() != "jax":
        raise NotReady("stock_trainers needs Keras on JAX; set KERAS_BACKEND=jax in the environment.")


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    del checkpoint  # a run is so short that it starts anew
    preset = run.preset
    method, _, trainer = run.method.partition("+")
    dataset = data.DATASETS["digits"]()
    steps_an_epoch = len(dataset.train) // preset.batch_size
    steps = preset.epochs * steps_an_epoch
    config = sparsify_config(
        method, run.sparsity, steps, start=preset.prune_start, end=preset.prune_end, freq=preset.prune_every
    )
    config = {**config, "rng_seed": run.seed} if method != DENSE else config
    for event in TRAINERS[trainer](Task(preset, config, run.seed, dataset, steps_an_epoch)):
        if isinstance(event, Progress):
            yield event
            continue
        predicted = np.asarray(event.logits(dataset.test.images)).argmax(-1)
        later = event.seconds[len(event.seconds) // 4 :]  # without what compiles
        yield Outcome(
            value=float(np.mean(predicted == np.asarray(dataset.test.labels))),
            sparsity_reached=float(
                jaxpruner.summarize_sparsity(event.kernels, only_total_sparsity=True)["_total_sparsity"]
            ),
            steps=steps,
            details={"step_milliseconds": 1e3 * statistics.median(later)},
        )


BASELINE = Baseline(
    name="stock_trainers",
    summary="the trainers of Keras 3, Flax NNX and Tunix, sparse and unmodified, on digits",
    metric="accuracy",
    presets=PRESETS,
    train=train,
    prepare=prepare,
    only=tuple(f"{method}+{trainer}" for trainer in TRAINERS for method in (DENSE, "magnitude", "rigl")),
    also=("step_milliseconds",),
    sparsities=(0.9,),
)
