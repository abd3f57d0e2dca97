"""Small agents of Dopamine, shared by the tests of this folder.

Where Dopamine is not installed, all of them skip here: one line of the closing summary.
"""

from __future__ import annotations

import contextlib
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("dopamine", reason="Dopamine is not installed; `make setup` installs it")
jaxpruner_dopamine = pytest.importorskip("jaxpruner_dopamine")  # Dopamine can be imported after it

import gin  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from absl import flags  # noqa: E402
from dopamine.discrete_domains import gym_lib, run_experiment  # noqa: E402
from dopamine.jax.agents.dqn import dqn_agent  # noqa: E402
from dopamine.metrics import collector, collector_dispatcher  # noqa: E402

import jaxpruner  # noqa: E402

CONFIGS = "jaxpruner_dopamine/configs"
# Those of the paper's library, and `movement`, whose state has all that a state may have: statistics and dense weights.
ALGORITHMS = [
    "magnitude", "random", "saliency", "magnitude_ste", "random_ste", "global_magnitude", "global_saliency",
    "static_sparse", "rigl", "set", "movement",
]  # fmt: skip
# Hosts warn of one another's old ways. What a test is about is never a warning here.
quiet = pytest.mark.filterwarnings("ignore")

CARTPOLE = (
    "ClassicControlDQNNetwork.hidden_units = 32",
    "JaxDQNAgent.seed = 3",
    "JaxDQNAgent.min_replay_history = 20",
    "ReplayBuffer.batch_size = 8",
    "ReplayBuffer.max_capacity = 5000",
    "sparsify.update_start_agent_step = 40",
    "sparsify.update_end_agent_step = 120",
    "sparsify.update_freq_agent_steps = 8",
)
# Trainings of a few seconds.
QUIET = ("create_agent.debug_mode = False", "CollectorDispatcher.collectors = ()")
ITERATIONS = ("Runner.num_iterations = 4", "Runner.training_steps = 60", *QUIET)


def bind(**values: Any) -> list[str]:
    """Bindings of `sparsify`."""
    return [f"sparsify.{name} = {value!r}" for name, value in values.items()]


@contextlib.contextmanager
def configured(files: list[str], bindings: list[str]) -> Iterator[None]:
    """Gin's global configuration, for a while."""
    gin.clear_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_experiment.load_gin_configs([f"{CONFIGS}/{name}" for name in files], bindings)
    try:
        yield
    finally:
        gin.clear_config()


def run(folder: pathlib.Path, files: list[str], bindings: list[str], checkpoint_every: int = 1, stop: int = 0):
    """A training to its end, or until so many iterations are done; the runner after it."""
    with configured(files, bindings):
        runner = jaxpruner_dopamine.create_runner(str(folder))
        for done in runner.iterations(checkpoint_every):
            if done == stop:
                break
    return runner


def arguments(folder: pathlib.Path, bindings: list[str], *more: str) -> list[str]:
    """Flags of the command lines."""
    bound = [f"--gin_bindings={binding}" for binding in bindings]
    return [f"--base_dir={folder}", f"--gin_files={CONFIGS}/dqn_cartpole.gin", *bound, *more]


def parsed(program: str, folder: pathlib.Path, bindings: list[str], *more: str) -> list[str]:
    """What is left of flags that are parsed; `flags_of_play` has to be used."""
    gin.clear_config()
    flags.FLAGS.unparse_flags()
    return flags.FLAGS([program, "--output=unused.gif", *arguments(folder, bindings, *more)])


def cartpole(*bindings: str) -> contextlib.AbstractContextManager[None]:
    return configured(["dqn_cartpole.gin"], [*CARTPOLE, *bindings])


def environment(name: str, version: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gym_lib.create_gym_environment(name, version)


def params_of(agent: Any) -> Any:
    return agent.network_params if hasattr(agent, "network_params") else agent.online_params


def inner(state: Any) -> Any:
    """The stock optimizer's state inside a sparse one."""
    state = state.inner_state
    return state.inner_state if isinstance(state, jaxpruner.StraightThroughState) else state


def assert_exactly_sparse(agent: Any, sparsity: float) -> None:
    """The parameters lie on their masks, and the masks keep what the state's targets say, to the entry."""
    state = agent.optimizer_state
    masks = agent.updater.current_masks(state, params_of(agent))
    pruned = 0
    for param, mask in zip(
        jax.tree.leaves(params_of(agent)), jax.tree.leaves(masks, is_leaf=lambda leaf: leaf is None), strict=True
    ):
        if mask is not None:
            pruned += 1
            assert not np.any(np.asarray(param)[~np.asarray(mask)])
    assert pruned
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
    total = sum(mask.size for mask in jax.tree.leaves(masks))
    assert 1 - kept / total == pytest.approx(sparsity, abs=pruned / total * 1.01)


def assert_same_bits(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def feed(agent: Any, steps: int, seed: int = 0) -> None:
    """One episode of random observations and rewards."""
    rng = np.random.default_rng(seed)
    shape = agent.observation_shape
    agent.begin_episode(rng.normal(size=shape).astype(np.float32))
    for _ in range(steps):
        agent.step(float(rng.normal()), rng.normal(size=shape).astype(np.float32))


@gin.configurable
class CautiousAgent(dqn_agent.JaxDQNAgent):
    """An agent of one's own, which knows nothing of sparsity."""

    def __init__(self, *args, caution: float = 0.0, **kwargs):
        super().__init__(*args, observation_dtype=np.float32, **kwargs)
        self.gamma -= caution


@gin.configurable
def all_but_the_last_layer(path: tuple[str, ...], param: Any) -> bool:
    return param.ndim > 1 and "final_layer" not in path


class Recorder(collector.Collector):
    """A collector of Dopamine that keeps what it gets."""

    written: list[Any] = []  # noqa: RUF012

    def get_name(self) -> str:
        return "recorder"

    def write(self, statistics: Any) -> None:
        self.written.extend(statistics)


def scalars(folder: Any) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar in the event files of a folder."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    return found


__all__ = ["collector_dispatcher", "gin", "jaxpruner_dopamine", "run_experiment"]
