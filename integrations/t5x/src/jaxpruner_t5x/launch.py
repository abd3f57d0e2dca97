"""T5X's commands as functions, for notebooks and baselines; on a terminal `python -m t5x.train` does the same."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import t5x


def train(gin_files: Sequence[str], bindings: Sequence[str] = (), **arguments: Any) -> tuple[int, Any]:
    """`python -m t5x.train --gin_file=... --gin.NAME=VALUE`; returns the last step and the train state.

    Args:
      gin_files: as the flags, in order.
      bindings: `NAME = VALUE`.
      **arguments: of `t5x.train.train`, in place of what gin binds, such as `actions`.
    """
    from t5x import train as script

    return _run(script, script.train, gin_files, bindings, **arguments)


def evaluate(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """`python -m t5x.eval`, in the same way."""
    from t5x import eval as script

    _run(script, script.evaluate, gin_files, bindings)


def infer(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """`python -m t5x.infer`, in the same way."""
    from t5x import infer as script

    _run(script, script.infer, gin_files, bindings)


@contextlib.contextmanager
def parsed(
    gin_files: Sequence[str], bindings: Sequence[str] = (), script: types.ModuleType | None = None
) -> Iterator[None]:
    """Within it, gin holds this configuration of a script, by default that of `t5x.train`."""
    if script is None:
        from t5x import train as script
    gin.clear_config(clear_constants=True)
    gin.add_config_file_search_path(str(pathlib.Path(t5x.__file__).parents[1]))
    main = sys.modules["__main__"]
    try:
        sys.modules["__main__"] = script  # as T5X's gin files call it
        gin.parse_config_files_and_bindings(list(gin_files), list(bindings))
        yield
    finally:
        sys.modules["__main__"] = main
        gin.clear_config(clear_constants=True)


def _run(
    script: types.ModuleType, function: Any, gin_files: Sequence[str], bindings: Sequence[str], **arguments: Any
) -> Any:
    with parsed(gin_files, bindings, script):
        return gin.get_configurable(function)(**arguments)
