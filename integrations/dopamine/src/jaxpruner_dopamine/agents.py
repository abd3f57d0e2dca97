"""Dopamine's JAX agents, sparse. Their train steps, networks and replay are the stock ones.

A Dopamine agent makes an optimizer with its networks and hands it, with the parameters, to a jitted train step.
`SparseAgent` puts JaxPruner's transformation around that optimizer, and that is all that makes the agent sparse:
`class SparseMyAgent(SparseAgent, MyAgent)` does it for an agent of yours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from dopamine.jax.agents.dqn import dqn_agent
from dopamine.jax.agents.full_rainbow import full_rainbow_agent
from dopamine.jax.agents.implicit_quantile import implicit_quantile_agent
from dopamine.jax.agents.ppo import ppo_agent
from dopamine.jax.agents.quantile import quantile_agent
from dopamine.jax.agents.rainbow import rainbow_agent
from dopamine.jax.agents.sac import sac_agent
from dopamine.metrics import collector_dispatcher, statistics_instance

import jaxpruner
from jaxpruner.training.projection import pruned_only
from jaxpruner_dopamine.sparsity import Clock, sparsify

# Agents of Dopamine's labs whose own code does not go together with a transformation around their optimizer.
_REFUSED = {
    "SPRAgent": "its train step gives the optimizer no parameters, and pruning needs them",
    "TandemDQNAgent": "its train steps give the optimizer no parameters, and pruning needs them",
    "RecycledDQNAgent": "its recycler reads and resets the state of the bare optimizer",
    "RecycledRainbowAgent": "its recycler reads and resets the state of the bare optimizer",
    "RecycledAtari100kRainbowAgent": "its recycler reads and resets the state of the bare optimizer",
}


class SparseAgent:
    """Mixin that makes a Dopamine agent sparse as `sparsify` says in gin. It comes first among the bases.

    After every train step the parameters lie on their masks exactly, so acting, target networks and checkpoints need
    no change. Bindings of the stock class, such as `JaxDQNAgent.gamma`, hold. With `sparsify.algorithm = 'no_prune'`
    the agent is the stock one.

    A checkpoint of a dense agent may be continued: its optimizer's statistics are kept, and masks start at all ones
    (or as the algorithm initialises them). A sparse checkpoint is refused by a dense agent. Beside what
    Dopamine stores, a checkpoint holds the random state, so that a run that is resumed is the run that went through.
    """

    # Where the stock class keeps them.
    _params_attribute = "online_params"
    _optimizer_attribute = "optimizer"

    updater: jaxpruner.BaseUpdater | None
    """The algorithm; None if the agent is dense."""

    def __init__(self, *args: Any, **kwargs: Any):
        for base in type(self).__mro__:
            if base.__name__ in _REFUSED and base.__module__.startswith("dopamine."):
                raise ValueError(
                    f"{type(self).__name__}: {base.__name__} cannot be sparse, because {_REFUSED[base.__name__]}. "
                    "Use one of the agents of jaxpruner_dopamine.agents, or change its train step in a subclass."
                )
        super().__init__(*args, **kwargs)

    def _clock(self, first: int | None = None) -> Clock:
        """When this agent takes gradient steps; `first` is the agent step that it continues a dense run from."""
        return Clock(max(self.min_replay_history, first or 0), self.update_period)

    def _build_networks_and_optimizer(self) -> None:
        super()._build_networks_and_optimizer()
        self._dense_optimizer = getattr(self, self._optimizer_attribute)
        self._make_updater = sparsify()
        self._make_sparse(self._make_updater(self._clock(), self._seed))

    def _make_sparse(self, updater: jaxpruner.BaseUpdater | None, first: int | None = None) -> None:
        """Puts the transformation around the optimizer, with a new state for the present parameters."""
        self.updater, self._sparse_from = updater, first
        optimizer = self._dense_optimizer if updater is None else jaxpruner.sparsify(self._dense_optimizer, updater)
        setattr(self, self._optimizer_attribute, optimizer)
        self.optimizer_state = optimizer.init(self._params)

    @property
    def _params(self) -> Any:
        return getattr(self, self._params_attribute)

    def sparsity(self) -> dict[str, Any]:
        """The fraction of zeros among the prunable weights, `total` and of each leaf; empty if the agent is dense."""
        if self.updater is None:
            return {}
        summary = jaxpruner.summarize_sparsity(pruned_only(self._params, self.optimizer_state.masks))
        return {"total": summary.pop("_total_sparsity")} | {k: v for k, v in summary.items() if not k.startswith("_")}

    def _train_step(self) -> None:
        step, state = self.training_steps, self.optimizer_state
        super()._train_step()
        trained = self.optimizer_state is not state
        # When the stock agents write their losses.
        if trained and self.summary_writer is not None and step > 0 and step % self.summary_writing_frequency == 0:
            self._write_sparsity(step)

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
        """What the stock agent stores, and the random state, the algorithm and where sparse training began."""
        bundle = super().bundle_and_checkpoint(checkpoint_dir, iteration_number)
        if bundle is not None:
            bundle |= {
                "rng": np.asarray(self._rng),
                "seed": self._seed,
                "algorithm": type(self.updater).__name__,
                "sparse_from": self._sparse_from,
            }
        return bundle

    def unbundle(self, checkpoint_dir: str, iteration_number: int, bundle_dictionary: dict[str, Any] | None) -> bool:
        """Restores a checkpoint, sparse or dense, of this agent.

        Raises:
          ValueError: for the checkpoint of a sparse run where this one is dense, or of another configuration. Nothing
            has been changed then.
        """
        optimizer, fresh_state = getattr(self, self._optimizer_attribute), self.optimizer_state
        bundle = bundle_dictionary or {}
        saved = self._continued(bundle, checkpoint_dir)
        first = bundle.get("sparse_from") if isinstance(saved, jaxpruner.SparseState) else bundle.get("training_steps")
        updater = self._make_updater(self._clock(first), bundle.get("seed", self._seed))

        restored = super().unbundle(checkpoint_dir, iteration_number, bundle_dictionary)
        # Stock PPO and SAC make a new, bare optimizer here, and PPO's does not fit the state that it saved.
        setattr(self, self._optimizer_attribute, optimizer)
        if not restored or bundle_dictionary is None:
            self.optimizer_state = fresh_state
            return restored
        if "rng" in bundle:
            self._rng, self._seed = jnp.asarray(bundle["rng"]), bundle["seed"]
        self._make_sparse(updater, first)
        if (updater is None and saved is not None) or isinstance(saved, jaxpruner.SparseState):
            self.optimizer_state = saved
        elif saved is not None:
            self.optimizer_state = _with_inner(self.optimizer_state, saved)
        return restored

    def _continued(self, bundle: dict[str, Any], checkpoint_dir: str) -> Any:
        """The optimizer state of a checkpoint, which may be none; a ValueError if this agent cannot go on from it."""
        saved = bundle.get("optimizer_state")
        if saved is None:
            return None
        is_sparse = isinstance(saved, jaxpruner.SparseState)
        if is_sparse and self.updater is None:
            raise ValueError(
                f"{checkpoint_dir}: holds a sparse run, and this one is dense (sparsify.algorithm = 'no_prune'). "
                "Continue it with the sparsity that it had, keep its zeros with sparsify.algorithm = 'preserve', or "
                "start in another base_dir."
            )
        preserves = isinstance(self.updater, jaxpruner.PreserveSparsity)
        if preserves and is_sparse and isinstance(saved.inner_state, jaxpruner.StraightThroughState):
            saved = saved._replace(inner_state=saved.inner_state.inner_state)
        expected = self.optimizer_state if is_sparse else self._dense_optimizer.init(self._params)
        same = _layout(saved) == _layout(expected)
        if same and is_sparse and not preserves:
            same = bundle.get("algorithm", type(self.updater).__name__) == type(self.updater).__name__
            targets = zip(
                jax.tree.leaves(saved.target_sparsities), jax.tree.leaves(expected.target_sparsities), strict=True
            )
            same = same and all(np.array_equal(a, b) for a, b in targets)
        if not same:
            raise ValueError(
                f"{checkpoint_dir}: its optimizer state is not one that this run can go on from. Continue with the "
                "algorithm, sparsity, storage of masks, network and optimizer that it was written with, or start in "
                "another base_dir."
            )
        return saved


def _with_inner(state: jaxpruner.SparseState, inner: Any) -> jaxpruner.SparseState:
    """A sparse state around the state of a dense optimizer."""
    if isinstance(state.inner_state, jaxpruner.StraightThroughState):
        inner = state.inner_state._replace(inner_state=inner)
    return state._replace(inner_state=inner)


def _layout(state: Any) -> Any:
    leaves, treedef = jax.tree.flatten(state)
    return treedef, [(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


class SparseJaxDQNAgent(SparseAgent, dqn_agent.JaxDQNAgent):
    """Sparse DQN (Mnih et al., 2015)."""


class SparseJaxRainbowAgent(SparseAgent, rainbow_agent.JaxRainbowAgent):
    """Sparse Rainbow without dueling networks and noise, or C51 (Hessel et al., 2018)."""


class SparseJaxFullRainbowAgent(SparseAgent, full_rainbow_agent.JaxFullRainbowAgent):
    """Sparse Rainbow in full. Of noisy layers, means and deviations are pruned, each as a kernel of its own."""

    def _clock(self, first: int | None = None) -> Clock:
        return dataclasses.replace(super()._clock(first), per_update=self._num_updates_per_train_step)


class SparseJaxQuantileAgent(SparseAgent, quantile_agent.JaxQuantileAgent):
    """Sparse QR-DQN (Dabney et al., 2018)."""


class SparseJaxImplicitQuantileAgent(SparseAgent, implicit_quantile_agent.JaxImplicitQuantileAgent):
    """Sparse IQN (Dabney et al., 2018)."""


class SparseSACAgent(SparseAgent, sac_agent.SACAgent):
    """Sparse soft actor-critic (Haarnoja et al., 2018): actor and critics share one budget; the temperature is dense.

    Its target network is an average of sparse networks, dense wherever one of them was in the past.
    """

    _params_attribute = "network_params"
    _optimizer_attribute = "network_optimizer"


class SparsePPOAgent(SparseAgent, ppo_agent.PPOAgent):
    """Sparse PPO (Schulman et al., 2017): actor and critic share one budget."""

    _params_attribute = "network_params"
    _optimizer_attribute = "network_optimizer"

    def _clock(self, first: int | None = None) -> Clock:
        # Passes over `update_period` transitions, in batches. The first steps after that give none yet.
        period = self.update_period + self.update_horizon
        return Clock(max(period, first or 0), period, self.num_epochs * (self.update_period // self.batch_size))
