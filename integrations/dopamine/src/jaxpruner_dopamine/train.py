"""Trains a sparse agent, with Dopamine's flags.

    python -m jaxpruner_dopamine.train --base_dir=runs/cartpole \
        --gin_files=jaxpruner_dopamine/configs/dqn_cartpole.gin --gin_bindings="sparsify.algorithm='rigl'"

The same command continues from the latest checkpoint in `base_dir`.
"""

from __future__ import annotations

import gymnasium
import tensorflow as tf
from absl import app, flags, logging
from dopamine.discrete_domains import run_experiment

from jaxpruner_dopamine import experiment

FLAGS = flags.FLAGS
# The errors that mistakes in flags, gin files and bindings raise.
_MISTAKES = (ValueError, TypeError, OSError, ImportError, SyntaxError, gymnasium.error.Error)


def define_flags() -> None:
    """Dopamine's flags."""
    flags.DEFINE_string("base_dir", None, "Base directory to host all required sub-directories.", required=True)
    flags.DEFINE_multi_string(
        "gin_files", [], "Gin files, by path or within a package (jaxpruner_dopamine/configs/dqn_cartpole.gin)."
    )
    flags.DEFINE_multi_string(
        "gin_bindings", [], "Gin bindings to override those of the files (\"sparsify.algorithm='rigl'\")."
    )


def create_runner_from_flags(argv: list[str]) -> experiment.Reproducible:
    """The runner that the flags ask for; exits with a message if they cannot be met."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag.")
    tf.config.set_visible_devices([], "GPU")  # TensorFlow writes summaries only; JAX gets the memory
    try:
        run_experiment.load_gin_configs(FLAGS.gin_files, FLAGS.gin_bindings)
        return experiment.create_runner(FLAGS.base_dir)
    except _MISTAKES as error:
        logging.debug("while the runner was made", exc_info=True)  # --verbosity=1 shows it
        raise SystemExit(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The message of an error, without the chain of gin's calls."""
    text = str(error).partition("\n  In call to configurable")[0]
    return " ".join(text.split()) or type(error).__name__


def main(argv: list[str]) -> None:
    """Trains."""
    logging.set_verbosity(logging.INFO)
    # Orbax logs a dozen lines per checkpoint.
    logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    runner = create_runner_from_flags(argv)
    runner.run_experiment()
    for name, value in runner.agent.sparsity().items():
        logging.info("sparsity of %s: %.6f", name, value)
    if shortfall := runner.agent.shortfall():
        logging.warning("%s", shortfall)


if __name__ == "__main__":
    define_flags()
    app.run(main)
