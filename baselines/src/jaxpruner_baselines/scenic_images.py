"""vit and resnet: image classification with Scenic, the vision rows of the paper.

    jaxpruner-baselines run vit --preset digits       # 63 runs, about 20 minutes on one core; dense: 91.6
    jaxpruner-baselines run resnet --preset digits    # 63 runs, about 50 minutes on one busy core; dense: 91.5
    jaxpruner-baselines run vit --preset natural --sparsities 0.95    # 33 runs of 3 to 7 minutes; dense: 93.8
    jaxpruner-baselines run vit --preset paper --sparsities 0.8    # a day on a slice of TPUs; needs ImageNet

Scenic's own models and its classification trainer, unedited, with the configurations of jaxpruner_scenic; a run chooses
the algorithm and the sparsity as the part of `--config` after the colon does.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging

import jaxpruner_scenic
from jaxpruner_baselines.background import Report, follow
from jaxpruner_baselines.baseline import Baseline, NotReady, Outcome, Progress, Run
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.costs import DEAD, SHARES, costs, dead_units
from jaxpruner_baselines.hush import hushed
from jaxpruner_baselines.methods import is_dense

ACCURACY = ("accuracy", "prec@1")  # as the models call it
_SPARSITY = "sparsity_config."


@dataclasses.dataclass(frozen=True)
class Preset:
    config: str  # of jaxpruner_scenic.configs
    dataset: str = ""  # for the small configurations; the others are for ImageNet
    overrides: tuple[tuple[str, Any], ...] = ()  # keys of the configuration, as `--config.KEY=VALUE` sets them
    validation: bool = False  # test on training data held out, to choose the numbers


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
    "paper": Preset("vit_b16_imagenet"),
    "paper_300ep": Preset("vit_b16_300ep_imagenet"),
    "smoke": Preset("vit_small", "digits", (*_SMOKE, ("model.num_layers", 1))),
}
RESNET_PRESETS = {
    "digits": Preset("resnet_small", "digits", _NO_CHECKPOINT),
    "natural": Preset("resnet_small", "natural_crops"),
    "paper": Preset("resnet50_imagenet"),
    "smoke": Preset("resnet_small", "digits", (*_SMOKE, ("num_layers", 9), ("num_filters", 4))),
}


def prepare(preset: Preset) -> None:
    """Says how to prepare ImageNet where it is missing."""
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
    logging.set_verbosity(logging.ERROR)

    def work(report: Report) -> tuple[Any, Any, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of donated buffers, about what Scenic calls
            return main.train(jax.random.PRNGKey(run.seed), config, str(checkpoint.folder), _reporter(report, total))

    replicated, training, test = yield from follow(work)
    state = jax_utils.unreplicate(jax.device_get(replicated))
    yield Outcome(
        value=_accuracy(test),
        sparsity_reached=float(jaxpruner_scenic.sparsity_logs(state).get("sparsity", 0.0)),
        steps=int(state.global_step),
        details={
            "test_loss": round(float(test["loss"]), 4),
            "train_loss": round(float(training["loss"]), 4),
            **_costs(config, state),
        },
    )


def _costs(config: ml_collections.ConfigDict, state: Any) -> dict[str, Any]:
    from scenic.train_lib import train_utils

    from jaxpruner_scenic import main, sparse

    data = train_utils.get_dataset(config, jax.random.PRNGKey(0)).meta_data
    model = main.get_model(config.model_name)(config, data).flax_model
    image = jax.ShapeDtypeStruct((1, *data["input_shape"][1:]), jnp.float32)
    chosen = config.sparsity_config
    variables = {"params": state.params, **(state.model_state or {})}

    def forward(variables, image):
        return model.apply(variables, image, train=False)

    return dead_units(forward, variables, image) | costs(
        lambda params, image: forward({**variables, "params": params}, image),
        state.params,
        image,
        updater=None if chosen is None else sparse.create_updater(chosen),
        steps=int(state.global_step),
        batch=config.batch_size,
    )


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


VIT = Baseline(
    name="vit",
    summary="a vision transformer on digits, natural images or ImageNet (Scenic)",
    metric="accuracy",
    also=(*SHARES, DEAD),
    presets=VIT_PRESETS,
    train=train,
    prepare=prepare,
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
    compiles_anew=True,
    sparsities=(0.8, 0.9),  # at 95 % of every layer the small one learns nothing
)
