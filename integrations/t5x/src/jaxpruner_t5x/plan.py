"""What gin binds for T5X's `train`: how long it trains, and where its checkpoints are."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import gin
from t5x import utils

import jaxpruner

# What sparse.gin lets the command line choose.
MACROS = ("ALGORITHM", "SPARSITY", "UPDATE_START_STEP", "UPDATE_END_STEP", "UPDATE_FREQ")


class Plan(NamedTuple):
    """Arguments of `t5x.train.train`; None where they are not known.

    Attributes:
      total_steps: the step at which training ends, including those of an initial checkpoint.
      relative_steps: how many steps are trained from wherever it starts; if given, `total_steps` has no meaning.
      model_dir: the folder of its checkpoints.
      initial_checkpoint: the checkpoint that it starts from.
    """

    total_steps: int | None = None
    relative_steps: int | None = None
    model_dir: str | None = None
    initial_checkpoint: str | None = None

    def last_step(self, start: int) -> int | None:
        """The training step at which a run from `start` ends."""
        return start + self.relative_steps if self.relative_steps else self.total_steps

    def sparse_steps(self, step: int, count: int) -> int | None:
        """Steps of sparse training at the end, given a state that has made `count` of them by training step `step`."""
        last = self.last_step(step)
        return None if last is None else count + last - step


def planned() -> Plan:
    """The plan of the script that gin configures; empty if that is not T5X's `train`.

    Raises:
      ValueError: for a macro that nothing uses and whose name is almost one of sparse.gin's.

    Examples:
      >>> from jaxpruner_t5x import launch
      >>> files = ["t5x/examples/t5/byt5/base.gin", "t5x/configs/runs/pretrain.gin"]
      >>> bindings = ["MIXTURE_OR_TASK_NAME = 'mine'", "TASK_FEATURE_LENGTHS = {}", "DROPOUT_RATE = 0.0"]
      >>> with launch.parsed(files, [*bindings, "TRAIN_STEPS = 100_000", "MODEL_DIR = 'runs/mine'"]):
      ...     planned()
      Plan(total_steps=100000, relative_steps=None, model_dir='runs/mine', initial_checkpoint=None)
    """
    refuse_misspelled(gin.config_str())
    train = _bindings(getattr(sys.modules["__main__"], "train", None))
    start = _value(_bindings(utils.RestoreCheckpointConfig).get("path"))
    total, relative, folder = (_value(train.get(name)) for name in ("total_steps", "relative_steps", "model_dir"))
    return Plan(total, relative, folder, initial_checkpoint=start if isinstance(start, str) else None)


def configured_model() -> Any:
    """The model that gin gives the script; made anew, without parameters.

    Raises:
      ValueError: if the script is not T5X's `train`, or gin gives it no model.

    Examples:
      >>> from jaxpruner_t5x import launch
      >>> run = ["t5x/examples/t5/byt5/base.gin", "t5x/configs/runs/pretrain.gin", "jaxpruner_t5x/configs/sparse.gin"]
      >>> bindings = ["MIXTURE_OR_TASK_NAME = 'mine'", "TASK_FEATURE_LENGTHS = {}", "DROPOUT_RATE = 0.0"]
      >>> with launch.parsed(run, [*bindings, "TRAIN_STEPS = 100_000", "MODEL_DIR = 'runs/mine'"]):
      ...     model = configured_model()
      >>> type(model).__name__, type(model.optimizer_def).__name__, model.module.config.num_encoder_layers
      ('EncoderDecoderModel', 'SparseOptimizer', 18)
    """
    bound = _bindings(getattr(sys.modules["__main__"], "train", None)).get("model")
    if bound is None:
        raise ValueError(
            "jaxpruner_t5x.configured_model: gin binds no train_script.train.model; give the gin files of the run, or "
            "bind jaxpruner_t5x.SparseOptimizer.model to a function that makes the model."
        )
    return _value(bound)


def configured_dataset() -> Any:
    """The `DatasetConfig` of the evaluation that gin gives the script, or of its training."""
    train = _bindings(getattr(sys.modules["__main__"], "train", None))
    return next(filter(None, (_value(train.get(f"train_{kind}dataset_cfg")) for kind in ("eval_", ""))))


def _bindings(configurable: Any) -> Mapping[str, Any]:
    try:
        return gin.get_bindings(configurable, resolve_references=False)
    except (TypeError, ValueError):  # no function, or none that gin knows
        return {}


def refuse_misspelled(config: str) -> None:
    """Refuses macros that nothing uses and that are meant for us: gin takes any, so they would silently do nothing."""
    for name in re.findall(r"^(\w+) =", config, re.MULTILINE):
        if name in MACROS or f"%{name}" in config:
            continue
        if name.isupper() and name.lower() in jaxpruner.config_keys():
            raise ValueError(
                f"{name}: is bound, and nothing uses it. Bind jaxpruner_t5x.create_updater.{name.lower()}."
            )
        if like := difflib.get_close_matches(name, MACROS, n=1, cutoff=0.7):
            raise ValueError(f"{name}: is bound, and nothing uses it. Is {like[0]} meant?")


def _value(bound: Any) -> Any:
    return bound.scoped_configurable_fn() if hasattr(bound, "scoped_configurable_fn") else bound
