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
    """Sparse DQN (Mnih et al., 2015)."""


class SparseJaxRainbowAgent(SparseAgent, rainbow_agent.JaxRainbowAgent):
    """Sparse Rainbow without dueling networks and noise, or C51 (Hessel et al., 2018)."""

    def _arguments(self) -> dict[str, Any]:
        return {"support": self._support}


class SparseJaxFullRainbowAgent(SparseAgent, full_rainbow_agent.JaxFullRainbowAgent):
    """Sparse full Rainbow. In noisy layers, means and deviations are pruned, each as its own kernel."""

    def _clock(self, first: int | None = None) -> Clock:
        return dataclasses.replace(super()._clock(first), per_update=self._num_updates_per_train_step)

    def _arguments(self) -> dict[str, Any]:
        return {"support": self._support, "key": self._rng}

    def _acting(self) -> dict[str, Any]:
        # Without noise, as in evaluation.
        return self._arguments() | {"eval_mode": True}


class SparseJaxQuantileAgent(SparseAgent, quantile_agent.JaxQuantileAgent):
    """Sparse QR-DQN (Dabney et al., 2018)."""


class SparseJaxImplicitQuantileAgent(SparseAgent, implicit_quantile_agent.JaxImplicitQuantileAgent):
    """Sparse IQN (Dabney et al., 2018)."""

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
    """


class SparsePPOAgent(_SparseActorCritic, ppo_agent.PPOAgent):
    """Sparse PPO (Schulman et al., 2017): actor and critic share one budget."""

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
