"""Dense checkpoint in, sparse checkpoint out: how a sparse run reads the checkpoints of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from t5x import state_utils

import jaxpruner
from jaxpruner_t5x import description
from jaxpruner_t5x.plan import Plan

_SPARSE = "state/sparse/"
_MASKS = f"{_SPARSE}masks/"


def dense_or_sparse(
    allow_missing: bool = False, updater: jaxpruner.BaseUpdater | None = None, plan: Plan | None = None
) -> Callable[..., Mapping[str, Any]]:
    """For `utils.RestoreCheckpointConfig.state_transformation_fns`, with `fallback_to_scratch = True`.

    A sparse checkpoint is continued with its masks and counts, towards the sparsity of the current configuration. A
    dense one supplies parameters, step and, if the optimizer is the same, its statistics, bit for bit; masks are made
    as for a new training.

    Args:
      allow_missing: whether parameters that the checkpoint lacks are initialised, as `fallback_to_scratch` alone
        would do.
      updater: the current algorithm, from `create_updater`.
      plan: where the checkpoints are, from `planned`; sparsity.json next to them has their configuration.

    Raises:
      ValueError: if the checkpoint lacks parameters of the model, or its run had a configuration that cannot be
        continued, such as another algorithm; and when a run is resumed, if the checkpoint in MODEL_DIR is sparse and
        the current configuration is dense, or the reverse.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpruner_t5x import SparseOptimizer, create_updater
      >>> from t5x import optimizers
      >>> dense = optimizers.adamw(1e-2)
      >>> sparse = SparseOptimizer(dense, create_updater("static_sparse", sparsity=0.5))
      >>> params = {"wi": {"kernel": jnp.ones((2, 4))}}
      >>> saved, wanted = (optimizer.create(params).state_dict() for optimizer in (dense, sparse))
      >>> dense_or_sparse()(saved, wanted) is saved  # T5X takes from it what is there, and the masks start anew
      True
    """
    plan = plan or Plan()

    def transform(
        ckpt_optimizer_state: Mapping[str, Any], optimizer_state: Mapping[str, Any], *, is_resuming: bool = False
    ) -> Mapping[str, Any]:
        saved, wanted = _names(ckpt_optimizer_state), _names(optimizer_state)
        was_sparse, is_sparse = (any(name.startswith(_MASKS) for name in names) for names in (saved, wanted))
        where = "MODEL_DIR: its latest checkpoint" if is_resuming else "RestoreCheckpointConfig.path: the checkpoint"
        missing = wanted - saved
        parameters = sorted(name for name in missing if name.startswith("target/"))
        if parameters and (is_resuming or not allow_missing):
            remedy = (
                "Use a new MODEL_DIR."
                if is_resuming
                else "To initialise what is missing, bind jaxpruner_t5x.dense_or_sparse.allow_missing = True."
            )
            raise ValueError(
                f"{where} lacks {len(parameters)} parameters of this model, such as {parameters[0]}. Is it of the same "
                f"architecture? {remedy}"
            )
        if is_resuming and was_sparse != is_sparse:
            raise ValueError(_other_kind(where, was_sparse, updater))
        if was_sparse and is_sparse:
            folder = plan.model_dir if is_resuming else _folder_of(plan.initial_checkpoint or "")
            before = description.read(folder)
            if before and updater:
                for line in jaxpruner.check_resumed(before, updater, where):
                    logging.warning("%s", line)
            if masks := sorted(name for name in missing if name.startswith(_SPARSE)):
                raise ValueError(
                    f"{where} is sparse by another algorithm or filter_fn: it lacks {masks[0]} and {len(masks) - 1} "
                    "more. Use that run's, or start from its plain export: python -m jaxpruner_t5x.export."
                )
        elif was_sparse:
            logging.warning("%s is sparse, and algorithm='no_prune' trains its zeros as well.", where)
        if others := sorted(name for name in missing if not name.startswith(("target/", _SPARSE))):
            logging.warning("What the checkpoint lacks starts anew: %s", ", ".join(others))
        return ckpt_optimizer_state

    return transform


def _folder_of(path: str) -> str:
    """The MODEL_DIR of an initial checkpoint, which is given by itself or, to take the latest, by that folder."""
    head, tail = os.path.split(path.rstrip("/"))
    return head if tail.startswith("checkpoint_") else path


def _other_kind(where: str, was_sparse: bool, updater: jaxpruner.BaseUpdater | None) -> str:
    asked = f"algorithm={jaxpruner.describe(updater)['algorithm']!r} is asked for" if updater else ""
    if was_sparse:
        return (
            f"{where} is of a sparse run, and {asked or 'this one is dense'}. Go on with that run's algorithm, or "
            "train densely in a new MODEL_DIR, with INITIAL_CHECKPOINT_PATH for that checkpoint."
        )
    return (
        f"{where} is of a dense run, and {asked or 'this one is sparse'}. Use a new MODEL_DIR, and "
        "INITIAL_CHECKPOINT_PATH for that checkpoint. (If the run was sparse, it was last continued without "
        "sparse.gin.)"
    )


def _names(state: Mapping[str, Any]) -> set[str]:
    return set(state_utils.flatten_state_dict(state))  # which knows how checkpoints name arrays that are elsewhere
