"""Dense checkpoint in, sparse checkpoint out: how a sparse run reads the checkpoints of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from t5x import state_utils

_SPARSE = "state/sparse/"


def dense_or_sparse(allow_missing: bool = False) -> Callable[..., Mapping[str, Any]]:
    """For `utils.RestoreCheckpointConfig.state_transformation_fns`, with `fallback_to_scratch = True`.

    A sparse checkpoint is continued: its masks and counts, towards the sparsity that is asked for now. From a dense one
    come parameters, step and, where the optimizer is the same, its statistics, bit for bit; masks are made as for a new
    training.

    Args:
      allow_missing: whether parameters that the checkpoint lacks are initialised, as `fallback_to_scratch` alone
        would do.

    Raises:
      ValueError: if the checkpoint lacks parameters of the model, or is sparse by an algorithm that keeps another state
        or by another `filter_fn`; and when a run is resumed, if the checkpoint in MODEL_DIR is of a dense run.
    """

    def transform(
        ckpt_optimizer_state: Mapping[str, Any], optimizer_state: Mapping[str, Any], *, is_resuming: bool = False
    ) -> Mapping[str, Any]:
        saved, wanted = _names(ckpt_optimizer_state), _names(optimizer_state)
        missing = wanted - saved
        masks = sorted(name for name in missing if name.startswith(_SPARSE))
        parameters = sorted(name for name in missing if name.startswith("target/"))
        is_dense = not any(name.startswith(_SPARSE) for name in saved)
        where = "MODEL_DIR: its latest checkpoint" if is_resuming else "RestoreCheckpointConfig.path: the checkpoint"
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
        if masks and is_resuming and is_dense:
            raise ValueError(
                f"{where} is of a dense run. Use a new MODEL_DIR, and INITIAL_CHECKPOINT_PATH for that checkpoint."
            )
        if masks and not is_dense:
            raise ValueError(
                f"{where} is sparse by another algorithm or filter_fn: it lacks {masks[0]} and {len(masks) - 1} more. "
                "Use that run's, or start from its plain export: python -m jaxpruner_t5x.export."
            )
        if others := sorted(missing - {*masks, *parameters}):
            logging.warning("What the checkpoint lacks starts anew: %s", ", ".join(others))
        if not is_resuming and not is_dense:
            # What is asked for, and not what was: `fallback_to_scratch` fills it in.
            state = ckpt_optimizer_state["state"]
            sparse = {key: value for key, value in state["sparse"].items() if key != "target_sparsities"}
            return {**ckpt_optimizer_state, "state": {**state, "sparse": sparse}}
        return ckpt_optimizer_state

    return transform


def _names(state: Mapping[str, Any]) -> set[str]:
    return set(state_utils.flatten_state_dict(state))  # which knows how checkpoints name arrays that are elsewhere
