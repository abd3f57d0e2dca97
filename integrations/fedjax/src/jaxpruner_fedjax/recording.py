"""What a training leaves behind: `metrics.csv`, TensorBoard events, and checkpoints that are whole or absent."""

from __future__ import annotations

import csv
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tensorboardX

CHECKPOINT = re.compile(r"checkpoint_(\d{8})")


class Saved(NamedTuple):
    """A checkpoint.

    Attributes:
      rounds: how many rounds were done.
      state: the server's state.
      held: `Ledger.held`.
      bytes_total: sent so far, down and up.
    """

    rounds: int
    state: Any
    held: Any
    bytes_total: int


def save_checkpoint(root_dir: str | Path, config: Mapping[str, Any], saved: Saved) -> None:
    """Writes a checkpoint and then removes older ones; an interruption at any time leaves one that is whole."""
    root = Path(root_dir)
    path = root / f"checkpoint_{saved.rounds:08d}"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        pickle.dump({"config": dict(config), "saved": jax.device_get(tuple(saved))}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    for other in _checkpoints(root):
        if other != path:
            other.unlink()


def load_checkpoint(root_dir: str | Path, config: Mapping[str, Any]) -> Saved | None:
    """The last checkpoint, or None if there is none.

    It is a pickle: load none that you did not write.

    Raises:
      ValueError: if it was written with another configuration.
    """
    found = _checkpoints(Path(root_dir))
    if not found:
        return None
    try:
        content = pickle.loads(found[-1].read_bytes())
        saved = Saved(*content["saved"])
        content["config"].items()
    except Exception as error:  # a pickle raises anything
        raise ValueError(
            f"{found[-1]}: cannot be read as a checkpoint ({error!r}); give another root_dir, or remove it and "
            "start anew."
        ) from error
    differ = [name for name in config if content["config"].get(name) != config[name]]
    if differ:
        told = ", ".join(f"{name}={content['config'].get(name)!r} (now {config[name]!r})" for name in differ)
        raise ValueError(f"{found[-1]}: written with {told}; give the same settings, or another root_dir.")
    return saved._replace(state=jax.tree.map(jnp.asarray, saved.state))


def _checkpoints(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("checkpoint_*") if CHECKPOINT.fullmatch(path.name))


class Recorder:
    """Writes a row for each round to `metrics.csv` and to TensorBoard.

    Args:
      root_dir: where to.
      columns: names of the scalars; a row may leave some out.
      rounds: how many were done. Rows of later rounds, written before an interruption, are dropped, and the events
        of the rows that are kept are written again.
    """

    def __init__(self, root_dir: str | Path, columns: Sequence[str], rounds: int):
        root = Path(root_dir)
        root.mkdir(parents=True, exist_ok=True)
        path = root / "metrics.csv"
        header = ",".join(["round", *columns])
        lines = path.read_text().splitlines()[1:] if rounds and path.exists() else []
        kept = [line for line in lines if line.partition(",")[0].isdecimal() and int(line.partition(",")[0]) <= rounds]
        partial = path.with_suffix(".partial")
        partial.write_text("\n".join([header, *kept]) + "\n")
        os.replace(partial, path)
        self._file = path.open("a", newline="")
        self._rows = csv.DictWriter(self._file, ["round", *columns], lineterminator="\n")
        # tensorboardX writes from a thread, so a kill loses events of rounds that have a checkpoint. The rows do not
        # get lost: TensorBoard drops all older events (from step 1), and gets those of the rows anew.
        self._events = tensorboardX.SummaryWriter(str(root), purge_step=1)
        for row in csv.DictReader([header, *kept]):
            round_num = int(row.pop("round"))
            self._add_events(round_num, {name: float(value) for name, value in row.items() if value})

    def write(self, round_num: int, row: Mapping[str, float]) -> None:
        """Writes the scalars of a round, which counts from 1."""
        self._rows.writerow({"round": round_num, **row})
        self._file.flush()
        self._add_events(round_num, row)

    def _add_events(self, round_num: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._events.add_scalar(name, value, round_num)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()
        self._events.close()
