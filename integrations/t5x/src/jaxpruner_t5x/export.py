"""Exports a sparse checkpoint as a plain one, with the names and shapes of a dense run and zeros for pruned weights.

    python -m jaxpruner_t5x.export --checkpoint=runs/t5_sparse/checkpoint_2300 --output=runs/t5_plain

T5X's own eval and infer read sparse checkpoints as they are. This is for runs and tools that expect a dense one, such
as stock fine-tuning. It also saves the space of the masks.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags
from etils import epath


class ExportError(ValueError):
    """The checkpoint cannot be exported; the message says why."""


def export(checkpoint: str, output: str) -> str:
    """Writes `output/checkpoint_STEP` without masks and hidden weights; returns its path.

    Args:
      checkpoint: a folder `checkpoint_STEP` of a sparse run, made on any number of devices, in Orbax's format or, with
        `use_orbax = False`, in T5X's own.
      output: a folder, created if needed; the result is in Orbax's format. Both may be in a bucket, `gs://...`.

    Raises:
      ExportError: if the checkpoint is not one of T5X, or has no masks of a `SparseOptimizer`, or if the output
        already exists.
    """
    source, target = absolute(checkpoint), absolute(output) / epath.Path(checkpoint).name
    if target.exists():
        raise ExportError(f"--output: {target} is there already; choose another folder.")
    saved = read(source)
    if "sparse" not in saved["state"]:
        raise ExportError(f"--checkpoint: {source} has no state/sparse, the masks of a SparseOptimizer.")
    del saved["state"]["sparse"]
    target.parent.mkdir(parents=True, exist_ok=True)
    ocp.PyTreeCheckpointer().save(target / "state", saved)
    return str(target)


def read(source: epath.Path) -> Any:
    """The state of a T5X checkpoint as NumPy arrays, whatever devices it was saved from.

    Raises:
      ExportError: if it is not one.
    """
    if (source / "state").is_dir():
        checkpointer = ocp.PyTreeCheckpointer()
        names = checkpointer.metadata(source / "state").item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        return checkpointer.restore(source / "state", restore_args=restore_args)
    if (source / "checkpoint").exists():  # T5X's own format, of use_orbax = False
        from t5x import checkpoints

        return checkpoints.load_t5x_checkpoint(str(source))
    raise ExportError(f"--checkpoint: {source} is no checkpoint of T5X; give a folder such as runs/x/checkpoint_1000.")


def absolute(path: str) -> epath.Path:
    return epath.Path(path) if "://" in path else epath.Path(path).absolute()


def main(_: Any) -> None:
    try:
        print(export(flags.FLAGS.checkpoint, flags.FLAGS.output))
    except ExportError as error:
        raise SystemExit(f"export: {error}") from error


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "The sparse checkpoint, a folder checkpoint_STEP.", required=True)
    flags.DEFINE_string("output", None, "The folder to write the plain one into.", required=True)
    app.run(main)
