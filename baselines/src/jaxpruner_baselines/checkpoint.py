"""The state of a run that was interrupted, in one file that is replaced atomically."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from flax import serialization


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where one run keeps its state; the baseline decides how often it saves.

    What is saved continues bit for bit, provided that everything random later on is derived from the
    run's seed and the number of the epoch (or round), and not from a generator that has been used.
    """

    path: Path

    def load(self, like: Any) -> tuple[int, Any]:
        """Returns (how many are done, the state), or (0, `like`) where nothing was saved."""
        if not self.path.exists():
            return 0, like
        saved = serialization.from_bytes({"done": 0, "state": like}, self.path.read_bytes())
        return saved["done"], saved["state"]

    def save(self, done: int, state: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_bytes(serialization.to_bytes({"done": done, "state": jax.device_get(state)}))
        os.replace(partial, self.path)

    @property
    def folder(self) -> Path:
        """Where a run keeps what its host saves in ways of its own; absolute, as Orbax wants it."""
        return self.path.with_suffix("").absolute()

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in (self.path, self.path.with_suffix(".partial")):
            path.unlink(missing_ok=True)
