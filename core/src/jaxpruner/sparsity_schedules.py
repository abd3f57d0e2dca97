"""Schedules: at which steps masks are made, and how sparse they are then.

A step is the number of updates that the transformation has seen. Every method takes a Python
integer or a traced one.
"""

from __future__ import annotations

import abc
import dataclasses
import numbers
from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    Step = int | Int[Array, ""]
    Decision = bool | Bool[Array, ""]
    Sparsity = float | Float[Array, ""]


class Schedule(abc.ABC):
    """When masks are made and how sparse they are then; the final sparsity unless overridden."""

    @abc.abstractmethod
    def should_update_mask(self, step: Step) -> Decision:
        """Whether masks are made at `step`."""

    def get_sparsity_at_step(self, target_sp: Sparsity, step: Step) -> Sparsity:
        """The sparsity of masks made at `step`, given the final one."""
        del step
        return target_sp


@dataclasses.dataclass(frozen=True)
class NoUpdateSchedule(Schedule):
    """Masks stay as they were initialised."""

    def should_update_mask(self, step: Step) -> Decision:
        del step
        return False


@dataclasses.dataclass(frozen=True)
class OneShotSchedule(Schedule):
    """Masks are made once, at `target_step`, at the final sparsity."""

    target_step: int = 0

    def __post_init__(self):
        _check_step("target_step", self.target_step)

    def should_update_mask(self, step: Step) -> Decision:
        return step == self.target_step


@dataclasses.dataclass(frozen=True)
class PeriodicSchedule(Schedule):
    """Masks are made on steps with `step % update_freq == 0` and `start <= step <= end`.

    They have the final sparsity from the first update on. A bound that is None does not bind.
    """

    update_freq: int = 1
    update_start_step: int | None = None
    update_end_step: int | None = None

    def __post_init__(self):
        if not isinstance(self.update_freq, numbers.Integral) or self.update_freq < 1:
            raise ValueError(f"update_freq: {self.update_freq!r} is not a number of steps; give 1 or more.")
        for name in ("update_start_step", "update_end_step"):
            if getattr(self, name) is not None:
                _check_step(name, getattr(self, name))
        if self.update_end_step is not None and self.update_end_step < (self.update_start_step or 0):
            raise ValueError(
                f"update_end_step: {self.update_end_step} comes before update_start_step="
                f"{self.update_start_step}, so masks would never be made; let the end be at or "
                "after the start."
            )

    def should_update_mask(self, step: Step) -> Decision:
        due = step % self.update_freq == 0
        if self.update_start_step is not None:
            due &= step >= self.update_start_step
        if self.update_end_step is not None:
            due &= step <= self.update_end_step
        return due


@dataclasses.dataclass(frozen=True)
class PolynomialSchedule(PeriodicSchedule):
    r"""Sparsity rises from 0 to the final one along a polynomial (Zhu & Gupta, 2017).

    .. math:: s(t) = s_f \, (1 - (1 - p)^{power}), \quad
              p = \mathrm{clip}(t + 1 - start,\, 0,\, end - start) / (end - start)

    The final sparsity is reached by an update at or after step `end - 1`: let `update_freq` divide
    `update_end_step`. Start and end may be the same step, which makes it one shot.
    """

    update_start_step: int = 0
    update_end_step: int | None = None
    power: float = 3

    def __post_init__(self):
        if self.update_end_step is None:
            raise ValueError("update_end_step: missing; give the step at which the final sparsity is reached.")
        super().__post_init__()

    def get_sparsity_at_step(self, target_sp: Sparsity, step: Step) -> Sparsity:
        length = self.update_end_step - self.update_start_step
        if length == 0:
            return target_sp
        progress = jnp.clip(step + 1 - self.update_start_step, 0, length) / length
        return target_sp * (1.0 - (1.0 - progress) ** self.power)


def _check_step(name: str, step: int) -> None:
    if not isinstance(step, numbers.Integral):
        raise ValueError(f"{name}: {step!r} is not a step; give an integer of 0 or more.")
    if step < 0:
        raise ValueError(f"{name}: {step} is before the first step; give 0 or more.")
