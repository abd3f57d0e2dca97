"""The mixin that makes a Dopamine JAX agent sparse. Its train step, networks and replay are the stock ones.

A Dopamine agent makes an optimizer with its networks and passes it, with the parameters, to a jitted train step.
`SparseAgent` puts JaxPruner's transformation around that optimizer. Nothing else makes the agent sparse.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from absl import logging
from dopamine.jax.replay_memory import samplers
from dopamine.metrics import collector_dispatcher, statistics_instance

import jaxpruner
from jaxpruner.inspection import checks
from jaxpruner.training.projection import pruned_only
from jaxpruner_dopamine import checkpoints
from jaxpruner_dopamine.sparsity import Clock, in_gin, sparsify

# Agents of Dopamine's labs whose own code does not work with a transformation around their optimizer.
_REFUSED = {
    "SPRAgent": "its train step gives the optimizer no parameters, and pruning needs them",
    "TandemDQNAgent": "its train steps give the optimizer no parameters, and pruning needs them",
    "RecycledDQNAgent": "its recycler reads and resets the state of the bare optimizer",
    "RecycledRainbowAgent": "its recycler reads and resets the state of the bare optimizer",
    "RecycledAtari100kRainbowAgent": "its recycler reads and resets the state of the bare optimizer",
}


# The class that it is mixed into has the rest; this tells the type checker so.
_Agent: Any = object


class SparseAgent(_Agent):
    """Mixin that makes a Dopamine agent sparse as gin's `sparsify` says. It comes first among the bases.

    After every train step the parameters lie exactly on their masks, so acting, target networks and checkpoints need
    no change. Bindings of the stock class, such as `JaxDQNAgent.gamma`, hold. With `sparsify.algorithm = 'no_prune'`
    the agent is the stock one.

    A checkpoint of a dense agent may be continued: its optimizer's statistics are kept, and masks start at all ones
    (or as the algorithm initialises them). A dense agent refuses a sparse checkpoint. Besides what Dopamine stores, a
    checkpoint holds the random state, so that a resumed run equals an uninterrupted one.

    Examples:
      >>> import gin
      >>> from dopamine.jax.agents.dqn import dqn_agent
      >>> class MyAgent(SparseAgent, dqn_agent.JaxDQNAgent):
      ...     "Any agent whose train step passes `params` to its optimizer."
      >>> _ = gin.parse_config_file("jaxpruner_dopamine/configs/dqn_cartpole.gin")
      >>> agent = MyAgent(num_actions=2)
      >>> list(agent.sparsity())
      ['total', 'params/final_layer/kernel', 'params/layers_0/kernel', 'params/layers_1/kernel']
    """

    # Where the stock class keeps them.
    _params_attribute = "online_params"
    _optimizer_attribute = "optimizer"

    updater: jaxpruner.BaseUpdater | None
    """The algorithm; None if the agent is dense."""

    _seed: int

    def __init__(self, *args: Any, **kwargs: Any):
        for base in type(self).__mro__:
            if base.__name__ in _REFUSED and base.__module__.startswith("dopamine."):
                raise ValueError(
                    f"{type(self).__name__}: {base.__name__} cannot be sparse, because {_REFUSED[base.__name__]}. "
                    "Use one of the agents of jaxpruner_dopamine.agents, or change its train step in a subclass."
                )
        super().__init__(*args, **kwargs)
        self._tell_of_uniform_replay()

    def _clock(self, first: int | None = None) -> Clock:
        """When this agent takes gradient steps; `first` is the agent step that it continues a dense run from."""
        return Clock(max(self.min_replay_history, first or 0), self.update_period)

    def _build_networks_and_optimizer(self) -> None:
        super()._build_networks_and_optimizer()
        self._dense_optimizer = getattr(self, self._optimizer_attribute)
        self._asked = sparsify()
        self._make_sparse(self._asked(self._clock(), self._seed, self.groups))
        self._tell_of_shifted()

    def _make_sparse(self, updater: jaxpruner.BaseUpdater | None, first: int | None = None) -> None:
        """Puts the transformation around the optimizer, with a new state for the present parameters."""
        if updater is not None:
            checks.check_trainer(updater)
        self.updater, self._sparse_from = updater, first
        optimizer = self._dense_optimizer if updater is None else jaxpruner.sparsify(self._dense_optimizer, updater)
        setattr(self, self._optimizer_attribute, optimizer)
        self.optimizer_state = optimizer.init(self._params)
        self._is_checked = self._is_clock_checked = updater is None

    @property
    def _params(self) -> Any:
        return getattr(self, self._params_attribute)

    def sparsity(self) -> dict[str, Any]:
        """The fraction of zeros among the prunable weights, `total` and of each leaf; empty if the agent is dense."""
        if self.updater is None:
            return {}
        summary = jaxpruner.summarize_sparsity(pruned_only(self._params, self.optimizer_state.masks))
        return {"total": summary.pop("_total_sparsity")} | {k: v for k, v in summary.items() if not k.startswith("_")}

    def check_length(self, agent_steps: int) -> None:
        """Raises a ValueError if a training of this many agent steps ends before the schedule of the masks."""
        self._asked.check_length(self._clock(self._sparse_from), agent_steps)

    def check_sparse(self) -> None:
        """Raises a ValueError if pruned weights are not zero, or masks are not what was asked for."""
        if self.updater is not None:
            try:
                jaxpruner.check_sparse(self._params, self.optimizer_state, self.updater)
            except ValueError as error:
                raise ValueError(in_gin(error)) from error

    def shortfall(self) -> str | None:
        """A message if the agent has not become as sparse as asked; None if it has."""
        try:
            self.check_sparse()
        except ValueError as error:
            return str(error)
        if self.updater is None or not (self.updater.follows_schedule and self.updater.starts_dense):
            return None
        last, count = self.updater.scheduler.last_update_step, int(self.optimizer_state.count)
        if last is None or count > last:
            return None
        asked, reached, _ = checks.shares_pruned(self._params, self.optimizer_state, self.updater)
        return (
            f"sparsity: asked {asked:.1%}, reached {reached:.1%}, for "
            f"the training ended after {count} gradient steps, and the last masks are made at gradient step {last}. "
            "Let sparsify.update_end_agent_step be earlier, or train longer; where episodes are short, gradient steps "
            "begin later than min_replay_history says."
        )

    def groups(self) -> jaxpruner.Groups:
        """The units of the network that can be pruned whole: `sparsify.sparsity_type = 'groups'`."""
        return jaxpruner.find_groups(self._forward, self._params, self._seen(self.state))

    def _acting(self) -> dict[str, Any]:
        """What the network is given besides a state, when the agent acts."""
        return self._arguments()

    def _arguments(self) -> dict[str, Any]:
        """What the network is given besides a state, in training."""
        return {}

    def _seen(self, state: Any) -> Any:
        """A state as the network is given it."""
        return jnp.asarray(self.preprocess_fn(state))

    def _forward(self, params: Any, state: Any) -> Any:
        """The network's outputs for one state; they show how it uses its parameters."""
        return self.network_def.apply(params, state, **self._arguments())

    def _tell_of_shifted(self) -> None:
        """Warns of pruned parameters whose zeros are no longer zero when the network multiplies with them."""
        if self.updater is None:
            return
        try:
            shifted = jaxpruner.shifted_parameters(self._forward, self._params, self._seen(self.state))
        except Exception:  # a custom agent, whose network takes other arguments
            logging.debug("parameters that are shifted are not told", exc_info=True)
            return
        if names := [name for name in shifted if name in self.sparsity()]:
            logging.warning(
                "%s: the network shifts these pruned parameters before it multiplies with them (weight "
                "standardisation), so that their zeros save nothing; keep them dense with sparsify.custom_sparsity_map "
                "or sparsify.filter_fn.",
                ", ".join(names),
            )

    def _train_step(self) -> None:
        step, state = self.training_steps, self.optimizer_state
        super()._train_step()
        # When the stock agents write their losses.
        if self.optimizer_state is state or step == 0 or step % self.summary_writing_frequency:
            return
        if not self._is_clock_checked:
            self._is_clock_checked = True
            self._check_clock(int(self.optimizer_state.count) - int(state.count))
        first = self.updater and self.updater.scheduler.first_update_step
        if not self._is_checked and int(self.optimizer_state.count) > (first or 0):
            self._is_checked = True
            self.check_sparse()
        if self.summary_writer is not None:
            self._write_sparsity(step)

    def _check_clock(self, taken: int) -> None:
        """Raises a ValueError if the schedule was made for another number of gradient steps a train step."""
        if taken != (expected := self._clock().per_update):
            raise ValueError(
                f"{type(self).__name__}: it took {taken} gradient steps in a train step, and the schedule of its masks "
                f"was made for {expected}, so that it would end {'early' if taken > expected else 'late'}. Tell it in "
                "your agent: def _clock(self, first=None): return dataclasses.replace(super()._clock(first), "
                f"per_update={taken})."
            )

    def _tell_of_uniform_replay(self) -> None:
        """Warns where Dopamine's own agent has a prioritized buffer, and leaves all priorities at 1."""
        distribution = getattr(self._replay, "_sampling_distribution", None)
        if isinstance(distribution, samplers.PrioritizedSamplingDistribution) and self._replay_scheme == "uniform":
            logging.warning(
                "%s: the replay buffer is prioritized, and the agent gives all transitions priority 1, so that they "
                "are sampled uniformly. (Some of Dopamine's agents do so whatever their replay_scheme.)",
                type(self).__name__,
            )

    def _write_sparsity(self, step: int) -> None:
        scalars = {f"Sparsity/{name}": value for name, value in self.sparsity().items()}
        if not scalars:
            return
        if hasattr(self.summary_writer, "scalar"):  # flax's, which continuous agents get
            for name, value in scalars.items():
                self.summary_writer.scalar(name, value, step)
        else:
            with self.summary_writer.as_default():
                for name, value in scalars.items():
                    tf.summary.scalar(name, value, step=step)
        self.summary_writer.flush()
        # The collector of TensorBoard writes into the same folder.
        allowed = self._collector_allowlist or collector_dispatcher.AVAILABLE_COLLECTORS
        others = {allowed} if isinstance(allowed, str) else set(allowed)
        others.discard("tensorboard")
        if others and hasattr(self, "collector_dispatcher"):
            self.collector_dispatcher.write(
                [statistics_instance.StatisticsInstance(name, value, step=step) for name, value in scalars.items()],
                collector_allowlist=sorted(others),
            )

    def bundle_and_checkpoint(self, checkpoint_dir: str, iteration_number: int) -> dict[str, Any] | None:
        """What the stock agent stores, and what it lacks to go on as if nothing had happened.

        That is the random state, the configuration, where sparse training began and the last observation, which PPO
        reads at the start of an episode.
        """
        bundle = super().bundle_and_checkpoint(checkpoint_dir, iteration_number)
        if bundle is not None:
            bundle |= {
                "rng": np.asarray(self._rng),
                "seed": self._seed,
                "sparsify": jaxpruner.describe(self.updater),
                "sparse_from": self._sparse_from,
                "last_observation": self._last_observation,
            }
        return bundle

    def unbundle(self, checkpoint_dir: str, iteration_number: int, bundle_dictionary: dict[str, Any] | None) -> bool:
        """Restores a checkpoint, sparse or dense, of this agent.

        If a sparse checkpoint has another configuration, the current one holds from here, if it can continue the state.

        Raises:
          ValueError: for the checkpoint of a sparse run if this one is dense, or of another algorithm, storage of
            masks, network or optimizer; it names what differs. Nothing has been changed then.
        """
        optimizer, fresh_state = getattr(self, self._optimizer_attribute), self.optimizer_state
        bundle = bundle_dictionary or {}
        saved: Any = bundle.get("optimizer_state")
        is_sparse = isinstance(saved, jaxpruner.SparseState)
        first = bundle.get("sparse_from") if is_sparse else bundle.get("training_steps")
        updater = self._asked(self._clock(first), bundle.get("seed", self._seed), self.groups)
        changes: list[str] = []
        if is_sparse:
            saved, changes = checkpoints.continued(
                saved, bundle.get("sparsify"), updater, self.optimizer_state, checkpoint_dir
            )
        elif saved is not None:
            checkpoints.require_same_layout(saved, self._dense_optimizer.init(self._params), checkpoint_dir)

        restored = super().unbundle(checkpoint_dir, iteration_number, bundle_dictionary)
        # Stock PPO and SAC make a new, bare optimizer here, and PPO's does not fit the state that it saved.
        setattr(self, self._optimizer_attribute, optimizer)
        if not restored or bundle_dictionary is None:
            self.optimizer_state = fresh_state
            return restored
        for change in changes:
            logging.warning("%s", change)
        if "rng" in bundle:
            self._rng, self._seed = jnp.asarray(bundle["rng"]), bundle["seed"]
            self._last_observation = bundle.get("last_observation")
        self._make_sparse(updater, first)
        if is_sparse:
            self.optimizer_state = saved._replace(target_sparsities=self.optimizer_state.target_sparsities)
        elif saved is not None:
            self.optimizer_state = saved if updater is None else checkpoints.with_inner(self.optimizer_state, saved)
        return restored
