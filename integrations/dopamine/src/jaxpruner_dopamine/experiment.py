"""Agents and runners by the names that Dopamine's gin files use."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gin
import gymnasium
import jax
import numpy as np
import tensorflow as tf
from dopamine.discrete_domains import checkpointer, run_experiment
from dopamine.jax.agents.ppo import ppo_agent
from dopamine.jax.agents.sac import sac_agent

from jaxpruner_dopamine import agents

_AGENTS = {
    "jax_dqn": agents.SparseJaxDQNAgent,
    "jax_quantile": agents.SparseJaxQuantileAgent,
    "jax_rainbow": agents.SparseJaxRainbowAgent,
    "full_rainbow": agents.SparseJaxFullRainbowAgent,
    "jax_implicit_quantile": agents.SparseJaxImplicitQuantileAgent,
    "ppo": agents.SparsePPOAgent,
    "sac": agents.SparseSACAgent,
}


@gin.configurable(module="jaxpruner_dopamine")
def create_sparse_agent(
    environment: Any,
    summary_writer: Any = None,
    agent_name: str | type | None = None,
    debug_mode: bool | None = None,
) -> agents.SparseAgent:
    """Makes the sparse version of a Dopamine agent.

    Args:
      environment: a Dopamine environment.
      summary_writer: a folder or a writer, for TensorBoard.
      agent_name: one of Dopamine's names: `jax_dqn`, `jax_rainbow`, `full_rainbow`, `jax_quantile`,
        `jax_implicit_quantile`, `ppo`, `sac`; or your own agent, as `"module:Class"` or as the class (`@MyAgent` in
        gin), which need not be sparse itself. By default what gin binds to the stock `create_agent.agent_name`.
      debug_mode: whether to write losses and sparsity while training; by default `create_agent.debug_mode`.

    Raises:
      ValueError: for an unknown agent, or one that does not fit the environment's actions.

    Examples:
      >>> import gin
      >>> from dopamine.discrete_domains import gym_lib
      >>> _ = gin.parse_config_file("jaxpruner_dopamine/configs/dqn_cartpole.gin")
      >>> agent = create_sparse_agent(gym_lib.create_gym_environment("CartPole", "v1"))
      >>> type(agent).__name__, agent.updater.scheduler.update_freq  # in gradient steps; the file has agent steps
      ('SparseJaxDQNAgent', 50)
    """
    stock = gin.get_bindings(run_experiment.create_agent)
    stock_continuous = _continuous_bindings("create_continuous_agent")
    agent_name = agent_name or stock.get("agent_name") or stock_continuous.get("agent_name")
    if debug_mode is None:
        debug_mode = stock.get("debug_mode") or bool(stock_continuous)
    writer = summary_writer if debug_mode else None
    agent = _agent(agent_name)
    return agent(**_arguments(agent, agent_name, environment), summary_writer=_writer(agent, writer))


def _agent(name: Any) -> type[agents.SparseAgent]:
    """The sparse agent that a name stands for."""
    if isinstance(name, type):
        return agents.sparse_agent(name)
    if isinstance(name, str) and ":" in name:
        module, _, attribute = name.partition(":")
        try:
            with gin.unlock_config():  # it may have configurables
                found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"agent_name: {name!r} cannot be imported ({error}); give 'module:Class' of a module on the path."
            ) from error
        if not isinstance(found, type):
            raise ValueError(f"agent_name: {name!r} is no class; give 'module:Class'.")
        return agents.sparse_agent(found)
    if not isinstance(name, str) or name not in _AGENTS:
        raise ValueError(
            f"agent_name: {name!r} is no JAX agent that can be sparse; bind create_sparse_agent.agent_name (or "
            f"Dopamine's create_agent.agent_name) to one of {', '.join(_AGENTS)}, or to an agent of yours, "
            "'module:Class'."
        )
    return _AGENTS[name]


def _arguments(agent: type, name: Any, environment: Any) -> dict[str, Any]:
    """What the agent has to know about its environment."""
    space = environment.action_space
    acts_continuously = issubclass(agent, ppo_agent.PPOAgent | sac_agent.SACAgent)
    if acts_continuously != isinstance(space, gymnasium.spaces.Box):
        raise ValueError(
            f"agent_name: {name!r} does not take the actions of this environment, {space}. (Dopamine's PPO takes "
            "continuous actions only: its network for discrete ones fails in 4.1.)"
        )
    if not acts_continuously:
        return {"num_actions": space.n}
    arguments = {
        "action_shape": space.shape,
        "action_limits": (space.low, space.high),
        "observation_shape": environment.observation_space.shape,
    }
    if issubclass(agent, sac_agent.SACAgent):
        arguments |= {"action_dtype": space.dtype, "observation_dtype": environment.observation_space.dtype}
    return arguments


def _writer(agent: type, writer: Any) -> Any:
    return ScalarWriter(writer) if issubclass(agent, sac_agent.SACAgent) and isinstance(writer, str) else writer


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


# The class that it is mixed into has the rest; this tells the type checker so.
_Runner: Any = object


class Reproducible(_Runner):
    """Mixin for Dopamine's runners: an environment's draws in an iteration depend only on seed and iteration.

    Dopamine's checkpoints do not hold the state of the environment's generator. Each iteration begins with a new
    episode. So with this mixin, a resumed run equals an uninterrupted one, and a run with a seed can be repeated.
    Environments that are not gymnasium's stay as they are.

    A training that ends before the schedule of its masks is refused, and so is a checkpoint that is not sparse.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._require_resumed()
        self.agent.check_length(self.agent_steps)
        if self.iterations_done:
            self.agent.check_sparse()

    def _require_resumed(self) -> None:
        """Raises a ValueError if there is a checkpoint and the training would start anew, over it."""
        latest = checkpointer.get_latest_checkpoint_number(self._checkpoint_dir)
        if latest >= 0 and not self.iterations_done:
            raise ValueError(
                f"base_dir: the checkpoint of iteration {latest} in {self._checkpoint_dir} cannot be continued without "
                "its replay buffer, which is not there. Bring it back, continue with an empty one "
                "(JaxDQNAgent.allow_partial_reload = True, of your agent's class), or start in another base_dir."
            )

    def _run_one_iteration(self, iteration: int) -> Any:
        if getattr(self, "episode_ended", True):  # else an episode goes on across iterations
            self.seed(iteration)
        return super()._run_one_iteration(iteration)

    def seed(self, *numbers: int, first: int | None = None) -> None:
        """Seeds the environment by `first`, by default the agent's seed, and these numbers."""
        inner = getattr(self._environment, "environment", None)
        if isinstance(inner, gymnasium.Env):
            entropy = np.random.SeedSequence([self._agent._seed if first is None else first, *numbers])
            inner.reset(seed=int(entropy.generate_state(1)[0]))

    @property
    def agent(self) -> agents.SparseAgent:
        """The agent."""
        return self._agent

    @property
    def agent_steps(self) -> int:
        """How many agent steps the whole training has."""
        return self._num_iterations * self._training_steps

    @property
    def iterations_done(self) -> int:
        """How many iterations the continued checkpoint had; 0 without a checkpoint."""
        return self._start_iteration

    def iterations(self, checkpoint_every: int = 1) -> Iterator[int]:
        """Runs the remaining iterations, as `run_experiment` does, with a checkpoint every so many (0: none).

        Yields:
          How many iterations are done.
        """
        for iteration in range(self._start_iteration, self._num_iterations):
            self._log_experiment(iteration, self._run_one_iteration(iteration))
            if checkpoint_every and (iteration + 1) % checkpoint_every == 0:
                self._checkpoint_experiment(iteration)
            self._collector_dispatcher.flush()
            yield iteration + 1

    def train_returns(self) -> list[float]:
        """The mean return of the training episodes of each iteration so far, including those before a checkpoint."""
        logs = self._logger.data
        return [float(logs[f"iteration_{i}"]["train_average_return"][0]) for i in range(len(logs))]

    def close(self) -> None:
        """Closes logs, and releases the replay buffer, which Dopamine's cache of checkpoint managers keeps."""
        self._collector_dispatcher.close()
        self._agent._replay.clear()

    def play(self, number: int = 0, frame: Callable[[Any], None] | None = None, seed: int | None = None) -> float:
        """Plays one episode as in evaluation, without learning.

        Args:
          number: which episode; another number gives another game.
          frame: called with the picture of every step, an array of shape (height, width, 3).
          seed: if given, the game and the agent's draws depend only on it and on `number`, so that agents with
            different seeds play the same games.

        Returns:
          The return of the episode.
        """
        screen = self._environment.environment.unwrapped
        if frame is not None:
            screen.render_mode = "rgb_array"
        total = 0.0
        for _, reward in self.moves(number, seed):
            total += reward
            if frame is not None:
                frame(screen.render())
        return total

    def moves(self, number: int = 0, seed: int | None = None) -> Iterator[tuple[Any, float]]:
        """The actions and rewards of one episode, played as in evaluation, without learning. Arguments are `play`'s."""
        environment, agent = self._environment, self._agent
        before = {name: getattr(agent, name) for name in ("eval_mode", "_rng", "state")}
        agent.eval_mode, agent.state = True, agent.state.copy()
        try:
            self.seed(number, 2**31, first=seed)  # numbers of iterations are small: no game is one of the training
            if seed is not None:
                agent._rng = jax.random.fold_in(jax.random.PRNGKey(seed), number)
            action = agent.begin_episode(environment.reset())
            for steps in itertools.count(1):
                observation, reward, terminal, _ = environment.step(action)
                yield action, float(reward)
                if environment.game_over or steps == self._max_steps_per_episode:
                    break
                # As Dopamine's runners: a lost life ends what the agent takes for an episode.
                action = agent.begin_episode(observation) if terminal else agent.step(reward, observation)
        finally:
            for name, value in before.items():  # training goes on from here as if nobody had played
                setattr(agent, name, value)


class SparseRunner(Reproducible, run_experiment.Runner):
    """Trains and evaluates in turn. Bindings of `Runner` hold."""


class SparseTrainRunner(Reproducible, run_experiment.TrainRunner):
    """Trains. Bindings of `Runner` and `TrainRunner` hold."""


def create_runner(base_dir: str) -> Reproducible:
    """The runner that gin binds to Dopamine's `create_runner.schedule` (or `create_continuous_runner.schedule`).

    It continues the latest checkpoint in `base_dir`.

    Raises:
      ValueError: for an unknown schedule, for an agent that cannot be made, and for a training that is too short for
        the schedule of its masks.

    Examples:
      >>> import gin, tempfile
      >>> _ = gin.parse_config_file("jaxpruner_dopamine/configs/dqn_cartpole.gin")
      >>> with tempfile.TemporaryDirectory() as base_dir:
      ...     runner = create_runner(base_dir)
      ...     runner.close()  # `for done in runner.iterations(): ...` before it trains
      >>> runner.agent_steps, runner.iterations_done, type(runner.agent).__name__
      (20000, 0, 'SparseJaxDQNAgent')
    """
    schedules: dict[str, type] = {"continuous_train_and_eval": SparseRunner, "continuous_train": SparseTrainRunner}
    schedule = gin.get_bindings(run_experiment.create_runner).get("schedule")
    continuous = _continuous_bindings("create_continuous_runner")
    if schedule is None and continuous:
        schedules, schedule = _continuous_runners(), continuous.get("schedule")
    schedule = schedule or "continuous_train_and_eval"
    if schedule not in schedules:
        raise ValueError(f"create_runner.schedule: {schedule!r} is not known; use one of {', '.join(schedules)}.")
    return schedules[schedule](base_dir, _create)


def _create(*arguments: Any, summary_writer: Any) -> agents.SparseAgent:
    """Called as Dopamine's runners do: with a session that is None and the environment, or with the environment."""
    return create_sparse_agent(arguments[-1], summary_writer)


def _continuous_runners() -> dict[str, type]:
    """Dopamine's runners of continuous control. They need dm_control; gin files that bind them import it too."""
    from dopamine.continuous_domains import run_experiment as continuous

    class SparseContinuousRunner(Reproducible, continuous.ContinuousRunner):
        """Trains and evaluates in turn."""

    class SparseContinuousTrainRunner(Reproducible, continuous.ContinuousTrainRunner):
        """Trains."""

    return {"continuous_train_and_eval": SparseContinuousRunner, "continuous_train": SparseContinuousTrainRunner}


def _continuous_bindings(name: str) -> dict[str, Any]:
    """What gin binds to a function of continuous control; nothing if no gin file imports it."""
    module = sys.modules.get("dopamine.continuous_domains.run_experiment")
    return {} if module is None else gin.get_bindings(getattr(module, name))
