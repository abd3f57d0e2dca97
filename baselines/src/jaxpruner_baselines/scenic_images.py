"""vit and resnet: image classification with Scenic, the vision rows of the paper.

    jaxpruner-baselines run vit --preset digits       # 63 runs, about 20 minutes on one core; dense: 91.6
    jaxpruner-baselines run resnet --preset digits    # 63 runs, about 50 minutes on one busy core; dense: 91.5
    jaxpruner-baselines run vit --preset fashion --sparsities 0.8     # Fashion-MNIST, 33 runs of two minutes
    jaxpruner-baselines run vit --preset natural --sparsities 0.95    # 33 runs of 3 to 7 minutes; dense: 93.8
    jaxpruner-baselines run vit --preset paper --sparsities 0.8    # a day on a slice of TPUs; needs ImageNet

Scenic's own models and its classification trainer, unedited, with the configurations of jaxpruner_scenic; a run chooses
the algorithm and the sparsity as the part of `--config` after the colon does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

import jaxpruner_scenic
from jaxpruner_baselines import intervals
from jaxpruner_baselines.background import Report, follow
from jaxpruner_baselines.baseline import Baseline, NotReady, Outcome, Program, Progress, Run, TrainStep
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.costs import DEAD, SHARES, costs, dead_units
from jaxpruner_baselines.hush import hushed
from jaxpruner_baselines.methods import GROWS, GROWTH_DROP_FRACTION, GROWTH_END, GROWTH_FREQ, is_dense

ACCURACY = ("accuracy", "prec@1")  # as the models call it
_SPARSITY = "sparsity_config."


@dataclasses.dataclass(frozen=True)
class Preset:
    config: str  # of jaxpruner_scenic.configs
    dataset: str = ""  # for the small configurations; the others are for ImageNet
    overrides: tuple[tuple[str, Any], ...] = ()  # keys of the configuration, as `--config.KEY=VALUE` sets them
    validation: bool = False  # test on training data held out, to choose the numbers


@dataclasses.dataclass(frozen=True)
class Scored(Preset):
    """One whose runs tell which test images they got right.

    `growing` are more keys, for methods that replace weights.
    """

    growing: tuple[tuple[str, Any], ...] = ()


_SMOKE = (
    ("num_training_epochs", 1),  # 22 steps
    ("lr_configs.steps_per_cycle", 22),
    ("log_summary_steps", 5),
    ("checkpoint", True),
    ("checkpoint_steps", 10),
    ("sparsity_config.update_start_step", 5),
    ("sparsity_config.update_end_step", 15),
    ("sparsity_config.update_freq", 5),
)
_NO_CHECKPOINT = (("checkpoint", False),)  # a run is so short that it starts anew
# A third as long as `digits`, as 90 epochs are of 300.
_SHORT = (
    ("num_training_epochs", 18),  # 396 steps
    ("lr_configs.total_steps", 396),
    ("lr_configs.steps_per_cycle", 396),
    ("lr_configs.warmup_steps", 39),
    ("log_eval_steps", 396),
    ("log_summary_steps", 19),
    ("sparsity_config.update_start_step", 80),
    ("sparsity_config.update_end_step", 300),
)


def _fashion(config: str, learning_rate: float, steps: int, shortening: int, first: int, last: int) -> Scored:
    """A training on Fashion-MNIST, with the paper's schedule of masks.

    Args:
      config: of jaxpruner_scenic.configs.
      learning_rate: after the warmup.
      steps: of the training.
      shortening: how many steps of the paper's training are one.
      first: the paper's first step that makes masks.
      last: its last one; it makes them every 1,000.
    """
    freq = round(1_000 / shortening)
    return Scored(
        config,
        "fashion_mnist",
        (
            *_NO_CHECKPOINT,
            ("num_training_epochs", None),
            ("num_training_steps", steps),
            ("lr_configs.base_learning_rate", learning_rate),
            ("lr_configs.total_steps", steps),
            ("lr_configs.steps_per_cycle", steps),
            ("lr_configs.warmup_steps", steps // 10),
            ("log_eval_steps", steps),
            ("log_summary_steps", steps // 20),
            ("sparsity_config.update_start_step", first // 1_000 * freq),
            ("sparsity_config.update_end_step", last // 1_000 * freq),
            ("sparsity_config.update_freq", freq),
        ),
        growing=(
            ("sparsity_config.update_start_step", 1),
            ("sparsity_config.update_end_step", round(GROWTH_END * steps)),
            ("sparsity_config.update_freq", GROWTH_FREQ),
            ("sparsity_config.drop_fraction", GROWTH_DROP_FRACTION),
        ),
    )


VIT_PRESETS = {
    "digits": Preset("vit_small", "digits", _NO_CHECKPOINT),
    "digits_short": Preset("vit_small", "digits", (*_NO_CHECKPOINT, *_SHORT)),
    # 16 patches and four layers of 64 in place of the 64 patches and twelve layers of 192 of ViT-Ti.
    "natural": Preset(
        "vit_small",
        "natural_crops",
        (
            ("model.patches.size", (8, 8)),
            ("model.hidden_size", 64),
            ("model.mlp_dim", 256),
            ("model.num_heads", 4),
            ("model.num_layers", 4),
            ("model.representation_size", 64),
        ),
    ),
    "fashion_short": _fashion("vit_small", 3e-3, 936, 30, 10_000, 20_000),
    "fashion": _fashion("vit_small", 1e-3, 3_120, 30, 10_000, 20_000),
    "paper": Preset("vit_b16_imagenet"),
    "paper_300ep": Preset("vit_b16_300ep_imagenet"),
    "smoke": Preset("vit_small", "digits", (*_SMOKE, ("model.num_layers", 1))),
}
RESNET_PRESETS = {
    "digits": Preset("resnet_small", "digits", _NO_CHECKPOINT),
    "natural": Preset("resnet_small", "natural_crops"),
    "fashion": _fashion("resnet_small", 0.1, 1_404, 22, 10_000, 25_000),
    "paper": Preset("resnet50_imagenet"),
    "smoke": Preset("resnet_small", "digits", (*_SMOKE, ("num_layers", 9), ("num_filters", 4))),
}


def candidates(rates: Sequence[float], preset: Preset) -> dict[str, Preset]:
    """Learning rates, tried on held-out data, of presets whose runs tell what they got right."""
    if not isinstance(preset, Scored):
        return {}
    key = "lr_configs.base_learning_rate"
    return {
        f"learning rate {rate:g}": dataclasses.replace(
            preset, validation=True, overrides=tuple((dict(preset.overrides) | {key: rate}).items())
        )
        for rate in rates
    }


def prepare(preset: Preset) -> None:
    """Says how to get the data where they are missing."""
    if preset.dataset == "fashion_mnist":
        from jaxpruner_scenic import datasets

        try:
            datasets.fashion_mnist_files()
        except FileNotFoundError as error:
            raise NotReady(f"{error}\nThe presets digits and natural need no more than PyPI.") from error
    folder = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not preset.dataset and not list(folder.glob("imagenet2012/5.*")):
        raise NotReady(
            f"No ImageNet in {folder} (TFDS_DATA_DIR names another folder). Put ILSVRC2012_img_train.tar and "
            "ILSVRC2012_img_val.tar, for which image-net.org asks to register, into "
            f"{folder / 'downloads' / 'manual'}; then: python -c "
            "\"import tensorflow_datasets as tfds; tfds.builder('imagenet2012').download_and_prepare()\"\n"
            "The presets digits and natural need no download."
        )


def scenic_config(run: Run) -> ml_collections.ConfigDict:
    """Scenic's configuration of a run."""
    preset = run.preset
    argument = "dense" if is_dense(run.method) else f"{run.method},{run.sparsity}"
    if preset.dataset:
        held_out = ",validation" if preset.validation else ""
        argument = f"{argument}{',' if is_dense(run.method) else ''},{preset.dataset}{held_out}"
    config = importlib.import_module(f"jaxpruner_scenic.configs.{preset.config}").get_config(argument)
    config.rng_seed = run.seed
    overrides = dict(preset.overrides)
    if isinstance(preset, Scored) and run.method in GROWS:
        overrides |= dict(preset.growing)
    if config.sparsity_config is None:
        overrides = {key: value for key, value in overrides.items() if not key.startswith(_SPARSITY)}
    else:
        config.sparsity_config.rng_seed = run.seed
    config.update_from_flattened_dict(overrides)
    return config


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    config = scenic_config(run)
    total = int(config.lr_configs.steps_per_cycle)
    yield Progress(0, total)
    with hushed():
        from flax import jax_utils

        from jaxpruner_scenic import main

        main.get_trainer(config.trainer_name)  # imports TensorFlow
        main.leave_memory_to_jax()
    logging.set_verbosity(logging.ERROR)

    def work(report: Report) -> tuple[Any, Any, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of donated buffers, about what Scenic calls
            return main.train(jax.random.PRNGKey(run.seed), config, str(checkpoint.folder), _reporter(report, total))

    replicated, training, test = yield from follow(work)
    state = jax_utils.unreplicate(jax.device_get(replicated))
    network = _forward(config, state)
    scored = {"examples": intervals.pack(_are_right(config, *network[:2]))} if isinstance(run.preset, Scored) else {}
    yield Outcome(
        value=_accuracy(test),
        sparsity_reached=float(jaxpruner_scenic.sparsity_logs(state).get("sparsity", 0.0)),
        steps=int(state.global_step),
        details={
            "test_loss": round(float(test["loss"]), 4),
            "train_loss": round(float(training["loss"]), 4),
            **_costs(config, state, *network),
            **scored,
        },
    )


def _are_right(config: ml_collections.ConfigDict, forward: Any, variables: Any) -> np.ndarray:
    """Of each test image whether the model tells its class."""
    from jaxpruner_scenic import datasets

    images, labels = datasets.SOURCES[config.dataset_name](config.dataset_configs.validation).test
    classify = jax.jit(lambda images: forward(variables, images).argmax(-1))
    batches = range(0, len(labels), config.eval_batch_size)
    return np.concatenate([classify(images[i : i + config.eval_batch_size]) for i in batches]) == labels


def _forward(config: ml_collections.ConfigDict, state: Any) -> tuple[Any, Any, Any]:
    """The model as a function of its variables and images, the variables, and the shape of an image."""
    from scenic.train_lib import train_utils

    from jaxpruner_scenic import main

    data = train_utils.get_dataset(config, jax.random.PRNGKey(0)).meta_data
    model = main.get_model(config.model_name)(config, data).flax_model
    image = jax.ShapeDtypeStruct((1, *data["input_shape"][1:]), jnp.float32)
    variables = {"params": state.params, **(state.model_state or {})}
    return lambda variables, images: model.apply(variables, images, train=False), variables, image


def _costs(config: ml_collections.ConfigDict, state: Any, forward: Any, variables: Any, image: Any) -> dict[str, Any]:
    from jaxpruner_scenic import sparse

    chosen = config.sparsity_config
    return dead_units(forward, variables, image) | costs(
        lambda params, image: forward({**variables, "params": params}, image),
        state.params,
        image,
        updater=None if chosen is None else sparse.create_updater(chosen),
        steps=int(state.global_step),
        batch=config.batch_size,
    )


def abstract(run: Run) -> TrainStep:
    """The step that Scenic's trainer makes before its loop: its own `train_step`, under `pmap`."""
    config = scenic_config(run)
    with hushed():
        import flax
        from scenic.train_lib import lr_schedules, optimizers, train_utils

        from jaxpruner_scenic import main, sparse

        trainer = main.get_trainer(config.trainer_name)  # imports TensorFlow
    logging.set_verbosity(logging.ERROR)
    devices = jax.device_count()
    if config.batch_size % devices:
        raise ValueError(f"--devices: the batch, {config.batch_size} images, cannot be dealt to {devices} devices.")
    data = _meta_data(config)
    model = main.get_model(config.model_name)(config, data)
    image = jax.ShapeDtypeStruct((1, *data["input_shape"][1:]), data["input_dtype"])
    shapes = jax.eval_shape(
        lambda image: model.flax_model.init(jax.random.PRNGKey(0), image, train=False, debug=False), image
    )
    model_state, params = flax.core.pop(flax.core.freeze(shapes), "params")

    def on_each(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices, *shape), dtype)

    batch = (config.batch_size // devices,)
    with jaxpruner_scenic.sparse_training(config, trainer):
        lr_fn = lr_schedules.get_learning_rate_fn(config)
        tx = optimizers.get_optimizer(optimizers.get_optax_optimizer_config(config), lr_fn, params=params)
        state = train_utils.TrainState(
            global_step=0,
            opt_state=jax.eval_shape(tx.init, params),
            tx=tx,
            params=params,
            model_state=model_state,
            rng=jax.random.PRNGKey(0),
            metadata={},
        )
        step = functools.partial(
            trainer.train_step,
            flax_model=model.flax_model,
            loss_fn=model.loss_function,
            lr_fn=lr_fn,
            metrics_fn=model.get_metrics_fn("train"),
            config=config,
            debug=config.debug_train,
        )
        lowered = jax.pmap(step, axis_name="batch", donate_argnums=(0, 1)).lower(
            jax.tree.map(lambda leaf: on_each(jnp.shape(leaf), jnp.result_type(leaf)), state),
            {
                "inputs": on_each(batch + image.shape[1:], image.dtype),
                "label": on_each((*batch, data["num_classes"]), jnp.float32)
                if data["target_is_onehot"]
                else on_each(batch, jnp.int32),
                "batch_mask": on_each(batch, jnp.float32),
            },
        )
        steps, _ = train_utils.get_num_training_steps(config, data)
    chosen = config.sparsity_config
    updater = None if chosen is None else sparse.create_updater(chosen)
    return TrainStep([Program(lowered)], params, state.opt_state, updater, steps, devices)


def _meta_data(config: ml_collections.ConfigDict) -> Mapping[str, Any]:
    """What a data set of Scenic tells of itself; ImageNet's without its data."""
    from scenic.dataset_lib import imagenet_dataset as imagenet
    from scenic.train_lib import train_utils

    if config.dataset_name != "imagenet":
        return train_utils.get_dataset(config, jax.random.PRNGKey(0)).meta_data
    return {
        "num_classes": imagenet.NUM_CLASSES,
        "input_shape": (-1, imagenet.IMAGE_SIZE, imagenet.IMAGE_SIZE, 3),
        "num_train_examples": imagenet.TRAIN_IMAGES,
        "num_eval_examples": imagenet.EVAL_IMAGES,
        "input_dtype": getattr(jnp, config.data_dtype_str),
        "target_is_onehot": config.dataset_configs.get("onehot_labels", False),
    }


def _accuracy(summary: Mapping[str, Any]) -> float:
    return next(float(summary[key]) for key in ACCURACY if key in summary)


def _reporter(report: Report, total: int) -> Any:
    """A metric writer for Scenic that reports instead."""
    from clu import metric_writers

    class Reporter(metric_writers.MultiWriter):
        def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
            loss = scalars.get("train_loss")
            report(Progress(step, total, "" if loss is None else f"loss {float(loss):.3f}"))

    return Reporter([])


def settings(run: Run) -> str:
    """What of Scenic's configuration of a run is set."""
    return json.dumps(_set(scenic_config(run).to_dict()), sort_keys=True, default=str)


def _set(value: Any) -> Any:
    return {k: _set(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


VIT = Baseline(
    name="vit",
    summary="a vision transformer on digits, natural images or ImageNet (Scenic)",
    metric="accuracy",
    also=(*SHARES, DEAD),
    presets=VIT_PRESETS,
    train=train,
    prepare=prepare,
    abstract=abstract,
    candidates=functools.partial(candidates, (1e-3, 3e-3, 1e-2)),
    settings=settings,
    compiles_anew=True,
)
RESNET = Baseline(
    name="resnet",
    summary="a residual network on digits, natural images or ImageNet (Scenic)",
    metric="accuracy",
    also=(*SHARES, DEAD),
    presets=RESNET_PRESETS,
    train=train,
    prepare=prepare,
    abstract=abstract,
    candidates=functools.partial(candidates, (0.03, 0.1, 0.3)),
    settings=settings,
    compiles_anew=True,
    sparsities=(0.8, 0.9),  # at 95 % of every layer the small one learns nothing
)
