"""A sparse checkpoint as a plain one: the same names and shapes as of a dense run, zeros where weights are pruned.

    python -m jaxpruner_t5x.export --checkpoint=runs/t5_sparse/checkpoint_2300 --output=runs/t5_plain

T5X's own eval and infer read sparse checkpoints as they are; this is for runs and tools that expect a dense one, such
as stock fine-tuning, and saves the space of the masks.
"""

from __future__ import annotations

import pathlib
from typing import Any

import orbax.checkpoint as ocp
from absl import app, flags


def export(checkpoint: str, output: str) -> str:
    """Writes `output/checkpoint_STEP` without masks and hidden weights; returns its path.

    Args:
      checkpoint: a folder `checkpoint_STEP` of a sparse run.
      output: a folder, made if need be.

    Raises:
      ValueError: if the checkpoint is not one of T5X's, or not sparse, or if the output is there already.
    """
    source, target = (
        pathlib.Path(checkpoint).absolute(),
        pathlib.Path(output).absolute() / pathlib.Path(checkpoint).name,
    )
    if not (source / "state").is_dir():
        raise ValueError(
            f"--checkpoint: {source} is no checkpoint of T5X; give a folder such as runs/x/checkpoint_1000."
        )
    if target.exists():
        raise ValueError(f"--output: {target} is there already; choose another folder.")
    checkpointer = ocp.PyTreeCheckpointer()
    saved = checkpointer.restore(source / "state")
    if "sparse" not in saved["state"]:
        raise ValueError(f"--checkpoint: {source} is of a dense run and needs no export.")
    del saved["state"]["sparse"]
    target.parent.mkdir(parents=True, exist_ok=True)
    checkpointer.save(target / "state", saved)
    return str(target)


def main(_: Any) -> None:
    try:
        print(export(flags.FLAGS.checkpoint, flags.FLAGS.output))
    except ValueError as error:
        raise SystemExit(f"export: {error}") from error


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "The sparse checkpoint, a folder checkpoint_STEP.", required=True)
    flags.DEFINE_string("output", None, "The folder to write the plain one into.", required=True)
    app.run(main)
