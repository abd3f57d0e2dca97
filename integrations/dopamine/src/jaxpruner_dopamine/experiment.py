"""Agents and runners by the names that Dopamine's gin files use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gin
import gymnasium
import numpy as np
import tensorflow as tf
from dopamine.discrete_domains import run_experiment

from jaxpruner_dopamine import agents

_DISCRETE = {
    "jax_dqn": agents.SparseJaxDQNAgent,
    "jax_quantile": agents.SparseJaxQuantileAgent,
    "jax_rainbow": agents.SparseJaxRainbowAgent,
    "full_rainbow": agents.SparseJaxFullRainbowAgent,
    "jax_implicit_quantile": agents.SparseJaxImplicitQuantileAgent,
}


@gin.configurable(module="jaxpruner_dopamine")
def create_sparse_agent(
    environment: Any,
    summary_writer: Any = None,
    agent_name: str | None = None,
    debug_mode: bool | None = None,
) -> agents.SparseAgent:
    """Makes the sparse version of an agent of Dopamine.

    Args:
      environment: a Dopamine environment.
      summary_writer: a folder or a writer, for TensorBoard.
      agent_name: one of Dopamine's names: `jax_dqn`, `jax_rainbow`, `full_rainbow`, `jax_quantile`,
        `jax_implicit_quantile`, `ppo`, `sac`. By default what gin binds to the stock `create_agent.agent_name`.
      debug_mode: whether to write losses and sparsity while training; by default `create_agent.debug_mode`.

    Raises:
      ValueError: for an agent that is not known, or does not fit the environment's actions.
    """
    agent_name = agent_name or bound("create_agent.agent_name") or bound("create_continuous_agent.agent_name")
    if debug_mode is None:
        debug_mode = bound("create_agent.debug_mode") or bound("create_continuous_agent.agent_name") is not None
    writer = summary_writer if debug_mode else None
    continuous = isinstance(environment.action_space, gymnasium.spaces.Box)
    if agent_name in _DISCRETE and not continuous:
        return _DISCRETE[agent_name](num_actions=environment.action_space.n, summary_writer=writer)
    if agent_name == "ppo" and not continuous:
        # Dopamine's own function leaves out `action_limits`, without which PPO does not start.
        return agents.SparsePPOAgent(
            action_shape=int(environment.action_space.n),
            observation_shape=agents.dqn_agent.NATURE_DQN_OBSERVATION_SHAPE,
            action_limits=None,
            stack_size=agents.dqn_agent.NATURE_DQN_STACK_SIZE,
            summary_writer=writer,
        )
    if agent_name in ("ppo", "sac") and continuous:
        space = environment.action_space
        shapes = {
            "action_shape": space.shape,
            "action_limits": (space.low, space.high),
            "observation_shape": environment.observation_space.shape,
        }
        if agent_name == "ppo":
            return agents.SparsePPOAgent(**shapes, summary_writer=writer)
        return agents.SparseSACAgent(
            **shapes,
            action_dtype=space.dtype,
            observation_dtype=environment.observation_space.dtype,
            summary_writer=ScalarWriter(writer) if isinstance(writer, str) else writer,
        )
    if agent_name in (*_DISCRETE, "ppo", "sac"):
        raise ValueError(
            f"agent_name: {agent_name!r} does not take the actions of this environment, {environment.action_space}."
        )
    raise ValueError(
        f"agent_name: {agent_name!r} is no JAX agent that can be sparse; bind create_sparse_agent.agent_name (or "
        f"Dopamine's create_agent.agent_name) to one of {', '.join([*_DISCRETE, 'ppo', 'sac'])}."
    )


class ScalarWriter:
    """A TensorBoard writer that both Dopamine's runners (`as_default`) and its SAC (`scalar`) can write with."""

    def __init__(self, folder: str):
        self._writer = tf.summary.create_file_writer(folder)
        self.as_default = self._writer.as_default
        self.flush = self._writer.flush

    def scalar(self, name: str, value: Any, step: int) -> None:
        """Writes one scalar."""
        with self._writer.as_default():
            tf.summary.scalar(name, value, step=step)


class Reproducible:
    """Mixin for Dopamine's runners: what an environment draws in an iteration depends on seed and iteration alone.

    Dopamine's checkpoints do not hold the state of the environment's generator. Each iteration begins with a new
    episode, so with this a run that is resumed is the run that went through, and a run with a seed can be repeated.
    Environments that are not gymnasium's stay as they are.
    """

    def _run_one_iteration(self, iteration: int) -> Any:
        if getattr(self, "episode_ended", True):  # else an episode goes on across iterations
            self.seed(iteration)
        return super()._run_one_iteration(iteration)

    def seed(self, *numbers: int) -> None:
        """Seeds the environment by the agent's seed and these numbers."""
        inner = getattr(self._environment, "environment", None)
        if isinstance(inner, gymnasium.Env):
            entropy = np.random.SeedSequence([self._agent._seed, *numbers])
            inner.reset(seed=int(entropy.generate_state(1)[0]))

    @property
    def agent(self) -> agents.SparseAgent:
        """The agent."""
        return self._agent

    @property
    def iterations_done(self) -> int:
        """How many iterations the checkpoint had that this runner continues; 0 without one."""
        return self._start_iteration

    def iterations(self, checkpoint_every: int = 1) -> Iterator[int]:
        """Runs what is left, as `run_experiment` does, with a checkpoint each so many iterations (0: without).

        Yields:
          How many iterations are done.
        """
        for iteration in range(self._start_iteration, self._num_iterations):
            self._log_experiment(iteration, self._run_one_iteration(iteration))
            if checkpoint_every and (iteration + 1) % checkpoint_every == 0:
                self._checkpoint_experiment(iteration)
            yield iteration + 1

    def train_returns(self) -> list[float]:
        """The mean return of the training episodes of each iteration so far, those before a checkpoint included."""
        logs = self._logger.data
        return [float(logs[f"iteration_{i}"]["train_average_return"][0]) for i in range(len(logs))]

    def play(self, number: int = 0, frame: Callable[[Any], None] | None = None) -> float:
        """Plays one episode as in evaluation, without learning.

        Args:
          number: which episode; another one is another game.
          frame: called with the picture of every step, an array of shape (height, width, 3).

        Returns:
          The return of the episode.
        """
        environment, agent = self._environment, self._agent
        agent.eval_mode = True
        # Numbers of iterations are small.
        self.seed(number, 2**31)
        screen = environment.environment.unwrapped
        if frame is not None:
            screen.render_mode = "rgb_array"
        total, steps = 0.0, 0
        action = agent.begin_episode(environment.reset())
        while True:
            observation, reward, terminal, _ = environment.step(action)
            total, steps = total + float(reward), steps + 1
            if frame is not None:
                frame(screen.render())
            if environment.game_over or steps == self._max_steps_per_episode:
                return total
            # As Dopamine's runners: a lost life ends what the agent takes for an episode.
            action = agent.begin_episode(observation) if terminal else agent.step(reward, observation)


class SparseRunner(Reproducible, run_experiment.Runner):
    """Trains and evaluates in turn. Bindings of `Runner` hold."""


class SparseTrainRunner(Reproducible, run_experiment.TrainRunner):
    """Trains. Bindings of `Runner` and `TrainRunner` hold."""


def create_runner(base_dir: str) -> Reproducible:
    """The runner that gin binds to Dopamine's `create_runner.schedule` (or `create_continuous_runner.schedule`).

    It continues the latest checkpoint in `base_dir`.

    Raises:
      ValueError: for an unknown schedule, and for what the agent cannot be.
    """
    schedules: dict[str, type] = {"continuous_train_and_eval": SparseRunner, "continuous_train": SparseTrainRunner}
    create: Callable[..., Any] = lambda _, environment, summary_writer: create_sparse_agent(environment, summary_writer)  # noqa: E731
    schedule = bound("create_runner.schedule")
    if schedule is None and (schedule := bound("create_continuous_runner.schedule")) is not None:
        schedules, create = _continuous_runners(), create_sparse_agent
    schedule = schedule or "continuous_train_and_eval"
    if schedule not in schedules:
        raise ValueError(f"create_runner.schedule: {schedule!r} is not known; use one of {', '.join(schedules)}.")
    return schedules[schedule](base_dir, create)


@functools.cache
def _continuous_runners() -> dict[str, type]:
    """Dopamine's runners of continuous control. They need dm_control; gin files that bind them import it too."""
    from dopamine.continuous_domains import run_experiment as continuous

    train_and_eval = type("SparseContinuousRunner", (Reproducible, continuous.ContinuousRunner), {})
    train = type("SparseContinuousTrainRunner", (Reproducible, continuous.ContinuousTrainRunner), {})
    return {"continuous_train_and_eval": train_and_eval, "continuous_train": train}


def bound(parameter: str) -> Any:
    """The value that gin binds to a parameter of a stock function, or None."""
    try:
        return gin.query_parameter(parameter)
    except ValueError:
        return None
