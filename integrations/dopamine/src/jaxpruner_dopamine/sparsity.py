"""Sparsity from gin: an algorithm of JaxPruner whose schedule is given in agent steps."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any

import gin
import jax

import jaxpruner
from jaxpruner.coupled_structures import AllGroups
from jaxpruner.structure_strings import parse_sparsity_type

DENSE = "no_prune"
# A branch of the seed's keys for masks. The agent splits its own keys from the same seed, by small numbers.
_MASKS = 2**31 - 1
# The core's keys, which count gradient steps, and their names here.
_IN_AGENT_STEPS = {
    "update_start_step": "update_start_agent_step",
    "update_end_step": "update_end_agent_step",
    "update_freq": "update_freq_agent_steps",
}


@dataclasses.dataclass(frozen=True)
class Clock:
    """When an agent takes gradient steps. The core's schedules count these.

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
        """The number of gradient steps within these agent steps, rounded; at least 1."""
        return max(1, round(agent_steps * self.per_update / self.period))

    def agent_step(self, gradient_step: int) -> int:
        """The agent step that a gradient step is taken for."""
        return self.first + gradient_step // self.per_update * self.period

    def reachable(self, agent_steps: int) -> int:
        """The gradient steps that a training of this many agent steps surely takes if its episodes are long.

        This is one update less than `gradient_steps`, because more than `first` transitions must be stored.
        """
        return max(0, self.gradient_steps(agent_steps) - self.per_update)


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """What gin asks for. Called with an agent's clock and seed, it returns the updater.

    Attributes:
      config: keys of `jaxpruner.create_updater_from_config`, without its schedule.
      start: the agent step of the first masks.
      end: the agent step by which the last masks are made.
      freq: agent steps from one mask to the next; by default they are made in every gradient step.
    """

    config: Mapping[str, Any]
    start: int | None = None
    end: int | None = None
    freq: int | None = None

    def __call__(
        self, clock: Clock, seed: int, groups: Callable[[], jaxpruner.Groups] | None = None
    ) -> jaxpruner.BaseUpdater | None:
        """The updater, None for `no_prune`. Random masks are drawn from the seed unless there is an `rng_seed`.

        Args:
          clock: the agent's.
          seed: the agent's.
          groups: finds what `sparsity_type='groups'` stands for.

        Raises:
          ValueError: if the configuration is not valid, or would not make the agent sparse.
        """
        if self.config["algorithm"] == DENSE:
            return None
        schedule = self.schedule(clock)
        key = jax.random.fold_in(jax.random.PRNGKey(seed), _MASKS)
        try:
            config = {"rng_seed": key} | dict(self.config) | schedule
            wanted = parse_sparsity_type(config.get("sparsity_type", "unstructured"))
            if groups is not None and isinstance(wanted, AllGroups):
                config["sparsity_type"] = wanted.of(groups())
            updater = jaxpruner.create_updater_from_config(config)
        except ValueError as error:
            raise ValueError(in_gin(error)) from error
        if updater.regrows and updater.skip_gradients and schedule.get("update_freq") == 1 and self.start != self.end:
            one = math.ceil(clock.period / clock.per_update)
            raise ValueError(
                f"sparsify.update_freq_agent_steps: {self.freq or 1} is one gradient step of this agent, and a step in "
                f"which {type(updater).__name__} replaces weights does not train, so that none would; give {2 * one} "
                f"or more, such as {100 * one}."
            )
        try:
            jaxpruner.check_schedule(updater)
        except ValueError as error:
            raise ValueError(f"{in_gin(error)} (Steps in this message are gradient steps.)") from error
        return updater

    def schedule(self, clock: Clock) -> dict[str, int]:
        """The schedule in gradient steps; empty for an algorithm that follows none."""
        algorithm = jaxpruner.ALGORITHM_REGISTRY.get(self.config["algorithm"])
        if not getattr(algorithm, "follows_schedule", True):
            return {}
        return gradient_schedule(clock, self.start, self.end, self.freq)

    def check_length(self, clock: Clock, agent_steps: int) -> None:
        """Raises a ValueError if a training of this many agent steps ends before the last masks."""
        schedule = {} if self.config["algorithm"] == DENSE else self.schedule(clock)
        if not schedule:
            return
        steps, freq = clock.reachable(agent_steps), schedule["update_freq"]
        length = f"this training has {agent_steps} agent steps (Runner.num_iterations x Runner.training_steps)"
        remedy = "train longer"
        if nearest := max(0, steps - 1) // freq * freq:
            remedy = f"let it be {clock.agent_step(nearest)} at most, or {remedy}"
        if schedule["update_start_step"] >= steps:
            raise ValueError(
                f"sparsify.update_start_agent_step: the first masks are made at agent step "
                f"{clock.agent_step(schedule['update_start_step'])}, and {length}, so the agent would stay dense; "
                "let it be earlier, or train longer."
            )
        if schedule["update_end_step"] >= steps:
            raise ValueError(
                f"sparsify.update_end_agent_step: the last masks are made at agent step "
                f"{clock.agent_step(schedule['update_end_step'])}, and {length}, so the final sparsity would not be "
                f"reached; {remedy}."
            )


def in_gin(error: ValueError) -> str:
    """A message of the core, with gin's names for its keys."""
    return re.sub("|".join(rf"\b{name}\b" for name in _IN_AGENT_STEPS), lambda m: _IN_AGENT_STEPS[m[0]], str(error))


@gin.configurable(module="jaxpruner_dopamine")
def sparsify(
    algorithm: str | None = None,
    sparsity: float | None = None,
    dist_type: str | None = None,
    update_start_agent_step: int | None = None,
    update_end_agent_step: int | None = None,
    update_freq_agent_steps: int | None = None,
    **more: Any,
) -> Sparsity:
    """The sparsity that gin asks for.

    Masks are made at multiples of the period, not before the start, and not after the end; the last ones have exactly
    the final sparsity. Agent steps are those of Dopamine's `training_steps`. The network is updated every
    `update_period` of them, once more than `min_replay_history` transitions are stored. So gradient step 0 counts as
    agent step `min_replay_history`. (It is up to one update later, and more if episodes are short: Dopamine stores one
    transition less than an episode has steps.)

    Args:
      algorithm: a name of `jaxpruner.all_algorithm_names()`; `no_prune` leaves the agent dense.
      sparsity: final fraction of zeros over the pruned weights.
      dist_type: `erk` as in the paper's experiments (the default), or `uniform`.
      update_start_agent_step: when the first masks are made. Pruners, RigL and SET need it.
      update_end_agent_step: when the last masks are made; if it equals the start, pruning happens at once.
      update_freq_agent_steps: agent steps from one mask to the next; by default masks are made in every gradient step.
      **more: other keys of `jaxpruner.create_updater_from_config`: `sparsity_type`, which may be
        `'groups'` here (whole units of the agent's network), `drop_fraction`, `custom_sparsity_map`, `filter_fn`,
        `use_packed_masks`, `rng_seed`, ...

    Raises:
      ValueError: if no algorithm is given, or a schedule in gradient steps.

    Examples:
      >>> from jaxpruner_dopamine.sparsity import Clock
      >>> asked = sparsify(
      ...     "magnitude", 0.98, update_start_agent_step=500_000, update_end_agent_step=2_000_000,
      ...     update_freq_agent_steps=1_000,
      ... )
      >>> nature_dqn = Clock(first=20_000, period=4)  # from agent step 20,000 on it trains in one of four
      >>> asked.schedule(nature_dqn)
      {'update_start_step': 120000, 'update_end_step': 495000, 'update_freq': 250}
    """
    if algorithm is None:
        raise ValueError(
            "sparsify.algorithm: missing. Add --gin_files=jaxpruner_dopamine/configs/sparse.gin, or bind "
            "sparsify.algorithm, sparsify.sparsity, and when to prune: sparsify.update_start_agent_step, "
            "sparsify.update_end_agent_step and sparsify.update_freq_agent_steps. sparsify.algorithm = 'no_prune' "
            "trains dense."
        )
    for name, ours in _IN_AGENT_STEPS.items():
        if name in more:
            raise ValueError(f"sparsify.{name}: Dopamine counts agent steps; bind sparsify.{ours}.")
    if dist_type is None and more.get("sparsity_distribution_fn") is None:
        dist_type = "erk"
    config = {"algorithm": algorithm, "sparsity": sparsity, "dist_type": dist_type, **more}
    return Sparsity(config, update_start_agent_step, update_end_agent_step, update_freq_agent_steps)


def gradient_schedule(clock: Clock, start: int | None, end: int | None, freq: int | None) -> dict[str, int]:
    """The core's `update_start_step`, `update_end_step`, `update_freq` for a schedule in agent steps.

    The end is a multiple of the period, so it is the step of the last masks.

    Raises:
      ValueError: for a schedule that lacks a start or an end, ends before it starts, ends before the first gradient
        step, or is gradual and has room for fewer than two masks.
    """
    named = {"update_start_agent_step": start, "update_end_agent_step": end, "update_freq_agent_steps": freq}
    given = {name: value for name, value in named.items() if value is not None}
    for name, value in given.items():
        least = 1 if name == "update_freq_agent_steps" else 0
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"sparsify.{name}: {value!r} is no number of agent steps; give an integer from {least}.")
    if not given:
        return {}
    for name, what in (("update_start_agent_step", "first"), ("update_end_agent_step", "last")):
        if name not in given:
            raise ValueError(
                f"sparsify.{name}: missing, while {', '.join(given)} is given; bind it to the agent step of the {what} "
                "masks (start and end at the same step prune at once)."
            )
    start, end = given["update_start_agent_step"], given["update_end_agent_step"]
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
    if start == end:
        at_once = clock.gradient_steps(start)
        return {"update_start_step": at_once, "update_end_step": at_once, "update_freq": 1}
    period = clock.gradient_period(freq or 1)
    # A start of 1 or more never means the first gradient step, whose masks would come from untrained weights.
    first = math.ceil(max(clock.gradient_steps(start), min(start, 1)) / period) * period
    last = clock.gradient_steps(end) // period * period
    if last <= first:
        nearest = clock.first + math.ceil((first + period) / clock.per_update) * clock.period
        raise ValueError(
            f"sparsify.update_freq_agent_steps: of the gradient steps from update_start_agent_step={start} to "
            f"update_end_agent_step={end}, {'one' if last == first else 'none'} is a multiple of the period, "
            f"{period} (update_freq_agent_steps={freq or 1}), so that masks would not become sparse by degrees; let "
            f"the end be {nearest} or later, or the period shorter. The same start and end prune at once."
        )
    return {"update_start_step": first, "update_end_step": last, "update_freq": period}
