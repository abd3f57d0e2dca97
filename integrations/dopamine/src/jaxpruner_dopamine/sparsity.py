"""Sparsity from gin: an algorithm of JaxPruner whose schedule is given in agent steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import gin
import jax

import jaxpruner

DENSE = "no_prune"
# A branch of the seed's keys for masks. The agent splits its own keys from the same seed, by small numbers.
_MASKS = 2**31 - 1
# The core's keys, which count gradient steps, and what they are called here.
_IN_AGENT_STEPS = {
    "update_start_step": "update_start_agent_step",
    "update_end_step": "update_end_agent_step",
    "update_freq": "update_freq_agent_steps",
}


@dataclasses.dataclass(frozen=True)
class Clock:
    """When an agent takes gradient steps, which is what the core's schedules count.

    Attributes:
      first: the agent step of the first gradient step, `min_replay_history` of most agents.
      period: agent steps from one update of the network to the next.
      per_update: gradient steps in each of them.
    """

    first: int
    period: int
    per_update: int = 1

    def gradient_steps(self, agent_step: int) -> int:
        r"""The gradient steps before agent step t: :math:`\lceil (t - first) / period \rceil` updates, at least 0."""
        return max(0, math.ceil((agent_step - self.first) / self.period)) * self.per_update

    def gradient_period(self, agent_steps: int) -> int:
        """As many gradient steps as are taken within these agent steps, to the nearest; at least 1."""
        return max(1, round(agent_steps * self.per_update / self.period))


@gin.configurable(module="jaxpruner_dopamine")
def sparsify(
    algorithm: str | None = None,
    sparsity: float | None = None,
    dist_type: str = "erk",
    update_start_agent_step: int | None = None,
    update_end_agent_step: int | None = None,
    update_freq_agent_steps: int = 1,
    **more: Any,
) -> Callable[[Clock, int], jaxpruner.BaseUpdater | None]:
    """The algorithm that gin asks for, once it is known when the agent takes gradient steps.

    Masks are made at multiples of the period, and start and end are put on such, so that the final sparsity is
    reached. Agent steps are those of Dopamine's `training_steps`: a network update happens every `update_period` of
    them once more than `min_replay_history` transitions are stored, so gradient step 0 is taken for agent step
    `min_replay_history`. (It is up to an update later, and more where episodes are short: Dopamine stores one
    transition less than an episode has steps.)

    Args:
      algorithm: a name of `jaxpruner.all_algorithm_names()`; `no_prune` leaves the agent dense.
      sparsity: final fraction of zeros over the pruned weights.
      dist_type: `erk` as in the paper's experiments, or `uniform`.
      update_start_agent_step: when the first masks are made. Without it, masks stay as they were initialised.
      update_end_agent_step: when the last ones are made; the same as the start prunes at once.
      update_freq_agent_steps: from one mask to the next.
      **more: what `jaxpruner.create_updater_from_config` takes: `sparsity_type`, `drop_fraction`,
        `custom_sparsity_map`, `filter_fn`, `use_packed_masks`, `rng_seed`, ...

    Returns:
      A function of the agent's clock and seed that makes the updater, or None for `no_prune`. Random masks are drawn
      from the seed unless `rng_seed` is given. It raises a ValueError for what is not valid.

    Raises:
      ValueError: if no algorithm is given, or a schedule in gradient steps.
    """
    if algorithm is None:
        raise ValueError(
            "sparsify.algorithm: missing. Add --gin_files=jaxpruner_dopamine/configs/sparse.gin, or bind "
            "sparsify.algorithm and sparsify.sparsity; sparsify.algorithm = 'no_prune' trains dense."
        )
    for name, ours in _IN_AGENT_STEPS.items():
        if name in more:
            raise ValueError(f"sparsify.{name}: Dopamine counts agent steps; bind sparsify.{ours}.")
    config = {"algorithm": algorithm, "sparsity": sparsity, "dist_type": dist_type, **more}

    def make(clock: Clock, seed: int) -> jaxpruner.BaseUpdater | None:
        if algorithm == DENSE:
            return None
        schedule = gradient_schedule(clock, update_start_agent_step, update_end_agent_step, update_freq_agent_steps)
        key = jax.random.fold_in(jax.random.PRNGKey(seed), _MASKS)
        return jaxpruner.create_updater_from_config({"rng_seed": key} | config | schedule)

    return make


def gradient_schedule(clock: Clock, start: int | None, end: int | None, freq: int) -> Mapping[str, int]:
    """The core's `update_start_step`, `update_end_step`, `update_freq` for a schedule in agent steps.

    Raises:
      ValueError: for a schedule that lacks an end, ends before it starts, or is over before the first gradient step.
    """
    if start is None:
        return {}
    if end is None:
        raise ValueError(
            "sparsify.update_end_agent_step: missing; give the agent step of the last mask (the same as "
            "update_start_agent_step prunes at once)."
        )
    if freq < 1:
        raise ValueError(f"sparsify.update_freq_agent_steps: {freq!r} is no number of agent steps; give 1 or more.")
    if end < start:
        raise ValueError(
            f"sparsify.update_end_agent_step: {end} comes before update_start_agent_step={start}; let the end be at "
            "or after the start."
        )
    if end < clock.first and end > 0:
        raise ValueError(
            f"sparsify.update_end_agent_step: {end} is over before the first gradient step of this training, which is "
            f"agent step {clock.first}; let it be later."
        )
    period = clock.gradient_period(freq)
    first, last = clock.gradient_steps(start), clock.gradient_steps(end)
    if first == last:
        return {"update_start_step": first, "update_end_step": first, "update_freq": 1}
    # A start of 1 or more never means the very first gradient step: masks by weights that have not been trained.
    first = max(period * round(first / period), period if start else 0)
    last = max(period * round(last / period), first)
    return {"update_start_step": first, "update_end_step": last, "update_freq": period}
