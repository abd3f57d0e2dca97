"""Dense checkpoint in, sparse checkpoint out: how a sparse run reads the checkpoints of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from t5x import state_utils

_SPARSE = "state/sparse/"


def dense_or_sparse(allow_missing: bool = False) -> Callable[..., Mapping[str, Any]]:
    """For `utils.RestoreCheckpointConfig.state_transformation_fns`, with `fallback_to_scratch = True`.

    A sparse checkpoint is continued, masks and counts included. From a dense one come parameters, step and, where the
    optimizer is the same, its statistics, bit for bit; masks are made as for a new training.

    Args:
      allow_missing: whether parameters that the checkpoint lacks are initialised, as `fallback_to_scratch` alone
        would do.

    Raises:
      ValueError: if the checkpoint lacks parameters of the model; and when a run is resumed, if the checkpoint in
        MODEL_DIR is of a dense run, or of an algorithm that keeps another state.
    """

    def transform(
        ckpt_optimizer_state: Mapping[str, Any], optimizer_state: Mapping[str, Any], *, is_resuming: bool = False
    ) -> Mapping[str, Any]:
        saved, wanted = _names(ckpt_optimizer_state), _names(optimizer_state)
        missing = wanted - saved
        masks = {name for name in missing if name.startswith(_SPARSE)}
        if is_resuming and masks:
            what = "a dense run" if not any(name.startswith(_SPARSE) for name in saved) else "another algorithm"
            raise ValueError(
                f"MODEL_DIR: its latest checkpoint is of {what} (it lacks {', '.join(sorted(masks)[:3])}, ...). Use a "
                "new MODEL_DIR, and INITIAL_CHECKPOINT_PATH for that checkpoint."
            )
        if (parameters := sorted(name for name in missing if name.startswith("target/"))) and not allow_missing:
            raise ValueError(
                f"RestoreCheckpointConfig.path: the checkpoint lacks {len(parameters)} parameters of this model, "
                f"such as {parameters[0]}. Is it of the same architecture? To initialise what is missing, bind "
                "jaxpruner_t5x.dense_or_sparse.allow_missing = True."
            )
        if slots := sorted(missing - masks - set(parameters)):
            logging.warning("Optimizer statistics that the checkpoint lacks start anew: %s", ", ".join(slots))
        if not is_resuming and masks and len(masks) < sum(name.startswith(_SPARSE) for name in wanted):
            # Masks of one algorithm with hidden weights of none: a new sparse training.
            return {**ckpt_optimizer_state, "state": _without(ckpt_optimizer_state["state"], "sparse")}
        return ckpt_optimizer_state

    return transform


def _names(state: Mapping[str, Any]) -> set[str]:
    return set(state_utils.flatten_state_dict(state))  # which knows how checkpoints name arrays that are elsewhere


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}
