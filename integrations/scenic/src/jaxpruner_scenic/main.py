"""Trains with one of Scenic's trainers, sparse as `config.sparsity_config` says, with Scenic's flags.

    python -m jaxpruner_scenic.main --config=integrations/scenic/src/jaxpruner_scenic/configs/vit_small.py:rigl,0.9 \
        --workdir=runs/vit

Besides the names that Scenic's own mains know, `config.trainer_name` may be a module that has `train`, and
`config.model_name` may be a `module:Class`.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from typing import Any

import flax
import jax
import tensorflow as tf
from absl import flags
from flax.training import checkpoints
from scenic.train_lib import train_utils

from jaxpruner_scenic import datasets, sparse, sparse_training  # noqa: F401  (datasets registers)

TRAINERS = {
    "classification_trainer": "scenic.train_lib.classification_trainer",
    "transfer_trainer": "scenic.train_lib.transfer.transfer_trainer",
    "plainvit_trainer": "scenic.projects.baselines.plainvit.trainer",
}
MODELS = {"plainvit": "scenic.projects.baselines.plainvit.plainvit:PlainViT"}


def get_trainer(name: str) -> types.ModuleType:
    """The module of a trainer, imported only when it is asked for, since some need packages that others do not.

    Raises:
      ValueError: if there is no trainer of this name.
    """
    module = TRAINERS.get(name, name)
    try:
        trainer = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"config.trainer_name: {name!r} cannot be imported ({error}). Known: {', '.join(TRAINERS)}; or the name of "
            "a module, such as scenic.projects.matvit.trainer."
        ) from error
    if not hasattr(trainer, "train"):
        raise ValueError(f"config.trainer_name: {module} has no function `train`.")
    return trainer


def get_model(name: str) -> Any:
    """A model class by Scenic's name, or `module:Class`."""
    module, _, attribute = MODELS.get(name, name).partition(":")
    if attribute:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"config.model_name: {name!r} is not to be had ({error}).") from error
    from scenic.model_lib import models

    try:
        return models.get_model_cls(name)
    except ValueError as error:
        raise ValueError(
            f"config.model_name: {name!r} is no model that Scenic knows by name ({error}); give it as 'module:Class', "
            "such as scenic.projects.matvit.matvit:MatViTMultiLabelClassificationModel."
        ) from error


def leave_memory_to_jax() -> None:
    """TensorFlow, which reads the data, sees no GPU, as in `scenic.app`; unless it has taken its devices before."""
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")


def train(rng: Any, config: Any, workdir: str, writer: Any) -> tuple[Any, Any, Any]:
    """Takes data, model and trainer from the config, as Scenic's mains do. Returns what the trainer returns."""
    flax.config.update("flax_use_orbax_checkpointing", False)  # as scenic.app
    leave_memory_to_jax()
    trainer, model_cls = get_trainer(config.trainer_name), get_model(config.model_name)
    data_rng, rng = jax.random.split(rng)
    path = checkpoints.latest_checkpoint(workdir) if config.checkpoint else None
    done = int(train_utils.checkpoint_path_step(path) or 0) if path is not None else 0
    replay = config.get("replay_data_on_resume", False)
    if done and not replay:
        # As in Scenic: a run that is resumed sees its data in a new order.
        data_rng = jax.random.fold_in(data_rng, done)
    service = flags.FLAGS["dataset_service_address"].value if "dataset_service_address" in flags.FLAGS else None
    dataset = train_utils.get_dataset(config, data_rng, dataset_service_address=service)
    for _ in range(done if replay else 0):
        next(dataset.train_iter)
    with sparse_training(config, trainer):
        return trainer.train(
            rng=rng, config=config, model_cls=model_cls, dataset=dataset, workdir=workdir, writer=writer
        )


def main(rng: Any, config: Any, workdir: str, writer: Any) -> None:
    """For `scenic.app.run`."""
    try:
        get_trainer(config.trainer_name)
        get_model(config.model_name)
        if config.get("sparsity_config") is not None:
            sparse.create_updater(config.sparsity_config)
    except ValueError as error:
        raise SystemExit(f"main: {error}") from error
    train(rng, config, workdir, writer)


if __name__ == "__main__":
    from scenic import app  # defines Scenic's flags, two of which are required from then on

    app.run(main)
