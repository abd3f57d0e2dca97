"""Keeps a sparse run's configuration next to its checkpoints, so that a run that continues them learns what differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

import jaxpruner
from jaxpruner_t5x.plan import Plan

FILE = "sparsity.json"


def described(updater: jaxpruner.BaseUpdater, plan: Plan) -> Callable[[Any, Any], tuple[Any, Any]]:
    """For `utils.SaveCheckpointConfig.state_transformation_fns`: writes sparsity.json into MODEL_DIR.

    Checkpoints themselves stay as they are.

    Examples:
      >>> import tempfile
      >>> from jaxpruner_t5x import create_updater, description, plan
      >>> updater = create_updater("set", sparsity=0.8, update_start_step=0, update_end_step=100, update_freq=10)
      >>> with tempfile.TemporaryDirectory() as model_dir:
      ...     _ = described(updater, plan.Plan(model_dir=model_dir))({}, None)  # as T5X with each checkpoint
      ...     written = description.read(model_dir)
      >>> written["algorithm"], written["sparsity"], written["update_freq"]
      ('set', 0.8, 10)
    """

    def transform(state_dict: Any, parameter_infos: Any) -> tuple[Any, Any]:
        if plan.model_dir and jax.process_index() == 0:
            file = epath.Path(plan.model_dir) / FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(jaxpruner.describe(updater), indent=2) + "\n")
        return state_dict, parameter_infos

    return transform


def read(model_dir: str | None) -> Mapping[str, Any] | None:
    """The description of the run that wrote the checkpoints in a folder; None if there is none."""
    if not model_dir:
        return None
    file = epath.Path(model_dir) / FILE
    return json.loads(file.read_text()) if file.exists() else None
