"""Keeps a training's configuration next to its checkpoints, and refuses to resume it with one that does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from flax.training import checkpoints
from tensorflow.io import gfile

import jaxpruner

FILE = "sparsity.json"
# Which parameters have masks is part of the state, as the keys that `jaxpruner.check_resumed` refuses.
_SELECTION = ("filter_fn", "exclude_reg_exp")


def check(workdir: str, updater: jaxpruner.BaseUpdater | None, description: Mapping[str, Any]) -> None:
    """Compares the checkpoints of a folder, if there are any, with the current configuration, and keeps the latter.

    Args:
      workdir: the folder of the training.
      updater: the current algorithm; None if the training is dense.
      description: what to keep of it.

    Raises:
      ValueError: if the training cannot continue from the checkpoint. It names the key, both values and the remedy.
    """
    path = os.path.join(workdir, FILE)
    checkpoint = checkpoints.latest_checkpoint(workdir)
    if checkpoint is not None:
        saved = _read(path) if gfile.exists(path) else _of_state(workdir, updater)
        where = str(checkpoint)
        for key in _SELECTION:
            if key in saved and key in description and saved[key] != description[key]:
                raise ValueError(
                    f"sparsity_config.{key}: {saved[key]!r} in the run of {where}, {description[key]!r} now, which "
                    f"would prune other parameters. Set it to {saved[key]!r} to continue, or start in a new folder."
                )
        try:
            lines = jaxpruner.check_resumed(saved, updater, where)
        except ValueError as error:
            raise ValueError(f"sparsity_config.{error}") from error
        for line in lines:
            if not line.startswith(_SELECTION):
                logging.warning("sparsity_config.%s", line)
    if jax.process_index() == 0:
        gfile.makedirs(workdir)
        with gfile.GFile(path, "w") as file:
            file.write(json.dumps(description, indent=1, sort_keys=True) + "\n")


def _read(path: str) -> dict[str, Any]:
    with gfile.GFile(path, "r") as file:
        return json.loads(file.read())


def _of_state(workdir: str, updater: jaxpruner.BaseUpdater | None) -> dict[str, Any]:
    """Whether checkpoints without a kept description are sparse or dense."""
    is_sparse = _holds_masks(checkpoints.restore_checkpoint(workdir, target=None))
    if is_sparse and updater is not None:
        return jaxpruner.describe(updater)  # nothing shows a difference
    return {"algorithm": "a sparse one" if is_sparse else "no_prune"}


def _holds_masks(tree: Any) -> bool:
    if not isinstance(tree, Mapping):
        return False
    return set(jaxpruner.SparseState._fields) <= set(tree) or any(map(_holds_masks, tree.values()))
