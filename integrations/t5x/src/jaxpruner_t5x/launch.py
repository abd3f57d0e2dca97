"""T5X's commands as functions, for notebooks and baselines; on a terminal `python -m t5x.train` does the same."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import t5x
import tensorflow as tf

import jaxpruner
from jaxpruner_t5x import description, metrics
from jaxpruner_t5x.optimizer import SparseOptimizer
from jaxpruner_t5x.plan import planned


def train(gin_files: Sequence[str], bindings: Sequence[str] = (), **arguments: Any) -> tuple[int, Any]:
    """`python -m t5x.train --gin_file=... --gin.NAME=VALUE`; returns the last step and the train state.

    Args:
      gin_files: like the flags, in order.
      bindings: `NAME = VALUE`.
      **arguments: arguments of `t5x.train.train`, in place of what gin binds, such as `actions`.

    Raises:
      ValueError: if something is not valid, without the chain of gin's calls; also if the checkpoints in MODEL_DIR are
        sparse and the gin files are not.
    """
    from t5x import train as script

    step, state = _run(script, script.train, gin_files, bindings, **arguments)
    optimizer = state._optimizer
    if isinstance(optimizer.optimizer_def, SparseOptimizer):
        metrics.log_reached(optimizer.optimizer_def.updater, optimizer.target, optimizer.state)
    return step, state


def evaluate(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """`python -m t5x.eval`, in the same way."""
    from t5x import eval as script

    _run(script, script.evaluate, gin_files, bindings)


def infer(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """`python -m t5x.infer`, in the same way."""
    from t5x import infer as script

    _run(script, script.infer, gin_files, bindings)


def leave_memory_to_jax() -> None:
    """TensorFlow, which reads the data, sees no GPU, as in T5X's scripts; unless it has taken its devices before."""
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")


@contextlib.contextmanager
def parsed(
    gin_files: Sequence[str], bindings: Sequence[str] = (), script: types.ModuleType | None = None
) -> Iterator[None]:
    """Within this context, gin holds this configuration of a script, by default that of `t5x.train`."""
    if script is None:
        from t5x import train

        script = train
    leave_memory_to_jax()
    gin.clear_config()  # constants are of modules, which are imported once
    gin.add_config_file_search_path(str(pathlib.Path(t5x.__file__).parents[1]))
    main = sys.modules["__main__"]
    try:
        sys.modules["__main__"] = script  # as T5X's gin files call it
        gin.parse_config_files_and_bindings(list(gin_files), list(bindings))
        yield
    finally:
        sys.modules["__main__"] = main
        gin.clear_config()  # constants are of modules, which are imported once


def _run(
    script: types.ModuleType, function: Any, gin_files: Sequence[str], bindings: Sequence[str], **arguments: Any
) -> Any:
    with parsed(gin_files, bindings, script):
        try:
            _refuse_sparse_as_dense()
            return gin.get_configurable(function)(**arguments)
        except ValueError as error:
            if not _is_ours(error):
                raise
            # Gin adds the chain of its calls, a line or two each.
            told = str(error).partition("\n  In call to configurable")[0]
        raise ValueError(told)


def _refuse_sparse_as_dense() -> None:
    """T5X takes a sparse checkpoint for a dense one, and trains its zeros, if sparse.gin is forgotten."""
    plan = planned()
    before = description.read(plan.model_dir)
    if before and "SparseOptimizer" not in gin.config_str():
        jaxpruner.check_resumed(before, None, f"MODEL_DIR {plan.model_dir}, without sparse.gin")


def _is_ours(error: ValueError) -> bool:
    """Whether the error was raised here or in the core, so that its message says everything."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].partition(".")[0] in ("jaxpruner", "jaxpruner_t5x")
