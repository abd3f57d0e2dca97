"""Sparse versions of Dopamine's JAX agents, and a function that makes your own agent sparse."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from dopamine.jax.agents.dqn import dqn_agent
from dopamine.jax.agents.full_rainbow import full_rainbow_agent
from dopamine.jax.agents.implicit_quantile import implicit_quantile_agent
from dopamine.jax.agents.ppo import ppo_agent
from dopamine.jax.agents.quantile import quantile_agent
from dopamine.jax.agents.rainbow import rainbow_agent
from dopamine.jax.agents.sac import sac_agent

from jaxpruner_dopamine.mixin import SparseAgent
from jaxpruner_dopamine.sparsity import Clock


class SparseJaxDQNAgent(SparseAgent, dqn_agent.JaxDQNAgent):
    """Sparse DQN (Mnih et al., 2015).

    Examples:
      >>> import gin
      >>> _ = gin.parse_config_file("jaxpruner_dopamine/configs/dqn_cartpole.gin")
      >>> agent = SparseJaxDQNAgent(num_actions=2)
      >>> sparsities = agent.optimizer_state.target_sparsities["params"]
      >>> {name: round(float(layer["kernel"]), 3) for name, layer in sparsities.items()}
      {'final_layer': 0.0, 'layers_0': 0.0, 'layers_1': 0.911}
    """


class SparseJaxRainbowAgent(SparseAgent, rainbow_agent.JaxRainbowAgent):
    """Sparse Rainbow without dueling networks and noise, or C51 (Hessel et al., 2018).

    Examples:
      >>> import gin
      >>> from jaxpruner_dopamine import sparsify
      >>> _ = gin.parse_config_file("jaxpruner_dopamine/configs/rainbow_mspacman.gin")
      >>> gin.query_parameter("create_agent.agent_name"), gin.query_parameter("JaxRainbowAgent.num_atoms")
      ('jax_rainbow', 51)
      >>> sparsify().config["sparsity"], sparsify().start, sparsify().end
      (0.98, 500000, 2000000)
    """

    def _arguments(self) -> dict[str, Any]:
        return {"support": self._support}


class SparseJaxFullRainbowAgent(SparseAgent, full_rainbow_agent.JaxFullRainbowAgent):
    """Sparse full Rainbow. In noisy layers, means and deviations are pruned, each as its own kernel.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from dopamine.jax import networks
      >>> from jaxpruner.sparsity_distributions import erk
      >>> network = networks.FullRainbowNetwork(num_actions=6, num_atoms=51)
      >>> shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((84, 84, 4)), jnp.zeros(51))
      >>> layer = erk(shapes, sparsity=0.9)["params"]["NoisyNetwork_0"]
      >>> {name: layer[name] and round(layer[name], 3) for name in sorted(layer)}
      {'bias_mu': None, 'bias_sigma': None, 'kernel_mu': 0.911, 'kernel_sigma': 0.911}
    """

    def _clock(self, first: int | None = None) -> Clock:
        return dataclasses.replace(super()._clock(first), per_update=self._num_updates_per_train_step)

    def _arguments(self) -> dict[str, Any]:
        return {"support": self._support, "key": self._rng}

    def _acting(self) -> dict[str, Any]:
        # Without noise, as in evaluation.
        return self._arguments() | {"eval_mode": True}


class SparseJaxQuantileAgent(SparseAgent, quantile_agent.JaxQuantileAgent):
    """Sparse QR-DQN (Dabney et al., 2018). Its last layer is a large one, which ERK prunes, too.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from dopamine.jax import networks
      >>> from jaxpruner.sparsity_distributions import erk
      >>> network = networks.QuantileNetwork(num_actions=6, num_atoms=200)
      >>> shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((84, 84, 4)))
      >>> {name: round(layer["kernel"], 2) for name, layer in sorted(erk(shapes, sparsity=0.9)["params"].items())}
      {'Conv_0': 0.71, 'Conv_1': 0.86, 'Conv_2': 0.83, 'Dense_0': 0.91, 'Dense_1': 0.87}
    """


class SparseJaxImplicitQuantileAgent(SparseAgent, implicit_quantile_agent.JaxImplicitQuantileAgent):
    """Sparse IQN (Dabney et al., 2018).

    Examples:
      >>> from dopamine.jax.agents.implicit_quantile import implicit_quantile_agent
      >>> class MyAgent(implicit_quantile_agent.JaxImplicitQuantileAgent):
      ...     "What it changes, it changes of the sparse agent, too."
      >>> [base.__name__ for base in sparse_agent(MyAgent).__bases__]
      ['SparseJaxImplicitQuantileAgent', 'MyAgent']
    """

    def _arguments(self) -> dict[str, Any]:
        return {"num_quantiles": self.num_tau_samples, "rng": self._rng}


class _SparseActorCritic(SparseAgent):
    """Shared by agents with continuous actions: one network, whose actor chooses the actions."""

    _params_attribute = "network_params"
    _optimizer_attribute = "network_optimizer"

    def _arguments(self) -> dict[str, Any]:
        return {"key": self._rng}

    def _seen(self, state: Any) -> Any:
        return jnp.asarray(state)

    def _acting(self) -> dict[str, Any]:
        return self._arguments() | {"method": self.network_def.actor}


class SparseSACAgent(_SparseActorCritic, sac_agent.SACAgent):
    """Sparse soft actor-critic (Haarnoja et al., 2018): actor and critics share one budget; the temperature is dense.

    It acts with the sparse network. Its target network is an average of past sparse networks, as in soft actor-critic,
    so it is dense wherever one of them was. It only serves for targets. To use it elsewhere:
    `jaxpruner.apply_state_masks(agent.target_params, agent.optimizer_state)`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from dopamine.jax import continuous_networks
      >>> from jaxpruner.sparsity_distributions import erk
      >>> network = continuous_networks.ActorCriticNetwork(action_shape=(6,), num_layers=2, hidden_units=256)
      >>> shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(17), jax.random.key(1))
      >>> parts = erk(shapes, sparsity=0.9)["params"]
      >>> {name: round(parts[name]["Dense_1"]["kernel"], 3) for name in sorted(parts)}
      {'_actor': 0.937, '_critic1': 0.937, '_critic2': 0.937}
    """


class SparsePPOAgent(_SparseActorCritic, ppo_agent.PPOAgent):
    """Sparse PPO (Schulman et al., 2017): actor and critic share one budget.

    Examples:
      >>> import gin
      >>> import numpy as np
      >>> _ = gin.parse_config_file("jaxpruner_dopamine/configs/sparse.gin")
      >>> _ = gin.parse_config(["ReplayBuffer.batch_size = 2048", "ReplayBuffer.max_capacity = 2048"])
      >>> low = np.full(1, -2, np.float32)
      >>> agent = SparsePPOAgent(action_shape=(1,), action_limits=(low, -low), observation_shape=(3,))
      >>> agent.updater.scheduler.update_start_step  # in batches, for 500_000 agent steps in the file
      78156
    """

    def _clock(self, first: int | None = None) -> Clock:
        # Passes over `update_period` transitions, in batches. The first steps after that give none yet.
        period = self.update_period + self.update_horizon
        return Clock(max(period, first or 0), period, self.num_epochs * (self.update_period // self.batch_size))


_SPARSE = {
    agent.__bases__[-1]: agent
    for agent in (
        SparseJaxDQNAgent,
        SparseJaxRainbowAgent,
        SparseJaxFullRainbowAgent,
        SparseJaxQuantileAgent,
        SparseJaxImplicitQuantileAgent,
        SparseSACAgent,
        SparsePPOAgent,
    )
}


@functools.cache
def sparse_agent(agent: type) -> type[SparseAgent]:
    """A sparse subclass of a JAX agent, Dopamine's or your own.

    Raises:
      ValueError: for a class that is not a JAX agent.

    Examples:
      >>> from dopamine.jax.agents.dqn import dqn_agent
      >>> class MyAgent(dqn_agent.JaxDQNAgent):
      ...     "It knows nothing of sparsity."
      >>> sparse_agent(MyAgent).__name__, issubclass(sparse_agent(MyAgent), MyAgent)
      ('SparseMyAgent', True)
      >>> sparse_agent(dqn_agent.JaxDQNAgent).__name__
      'SparseJaxDQNAgent'
    """
    if issubclass(agent, SparseAgent):
        return agent
    base = next((base for base in agent.__mro__ if base in _SPARSE), None)
    if base is None:
        raise ValueError(
            f"agent_name: {agent.__module__}.{agent.__qualname__} is no JAX agent of Dopamine; derive it from one, "
            "such as dopamine.jax.agents.dqn.dqn_agent.JaxDQNAgent."
        )
    ours = _SPARSE[base]
    if agent is base:
        return ours
    kind: Any = type(agent)
    return kind(f"Sparse{agent.__name__}", (ours, agent), {"__module__": agent.__module__})
