"""Keeps the finished layers of a calibration in a folder, so that an interrupted one can continue."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpruner import trees


class Finished:
    """Layers that are done, one file each.

    Args:
      folder: where they are; it is created if needed. None keeps nothing.
      describe: describes the calibration; an equal description may continue. It is not called without a folder,
        because it reads all parameters.

    Raises:
      ValueError: if the folder is of another calibration.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, describe: Callable[[], Mapping[str, Any]]):
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        description = describe()
        file = self._folder / "calibration.json"
        if file.exists():
            before = json.loads(file.read_text())
            differing = sorted(key for key in {*before, *description} if before.get(key) != description.get(key))
            if differing:
                raise ValueError(
                    f"checkpoint: {self._folder} is of another calibration: {', '.join(differing)} differ; give an "
                    "empty folder, or what it was begun with."
                )
        else:
            _write(file, json.dumps(dict(description), indent=1).encode())

    def __contains__(self, number: int) -> bool:
        return self._folder is not None and self._file(number).exists()

    def read(self, number: int) -> tuple[Any | None, Any]:
        """The matrices of a layer, None if no weight changed, and which of their entries stay."""
        with np.load(self._file(number)) as file:
            shape = tuple(file["shape"])
            kept = np.unpackbits(file["kept"], count=int(np.prod(shape))).reshape(shape).astype(bool)
            return file.get("weights"), kept

    def write(self, number: int, weights: Any | None, kept: Any) -> None:
        """Keeps a layer; whole or absent however the program ends."""
        if self._folder is None:
            return
        file = self._file(number)
        partial = file.with_suffix(".partial")
        with open(partial, "wb") as opened:
            changed: dict[str, Any] = {} if weights is None else {"weights": np.asarray(weights)}
            np.savez(opened, kept=np.packbits(np.asarray(kept)), shape=kept.shape, **changed)
        os.replace(partial, file)

    def _file(self, number: int) -> Path:
        assert self._folder is not None  # nothing is kept, or in it, without one
        return self._folder / f"layer_{number:05d}.npz"


def _write(file: Path, content: bytes) -> None:
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, file)


def checksum(tree: Any) -> int:
    """Of all entries of the arrays of a tree."""
    total = 0
    for leaf in jax.tree.leaves(trees.numbers_only(tree)):
        total = zlib.crc32(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8).data, total)
    return total
