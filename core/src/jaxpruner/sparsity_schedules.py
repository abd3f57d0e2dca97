"""Schedules: at which steps masks are made, and how sparse they are then.

A step is the number of updates that the transformation has seen. Every method takes a Python or a
traced integer.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    Step = int | Int[Array, ""]
    Decision = bool | Bool[Array, ""]
    Sparsity = float | Float[Array, ""]


class Schedule:
    """When masks are made and how sparse they are then; the final sparsity unless overridden.

    Your own schedule overrides `should_update_mask`, or `is_mask_update_iter`, its name in scripts for the paper's
    library.
    """

    def should_update_mask(self, step: Step) -> Decision:
        """Whether masks are made at `step`."""
        if type(self).is_mask_update_iter is Schedule.is_mask_update_iter:
            raise NotImplementedError(f"{type(self).__name__} does not override should_update_mask.")
        return self.is_mask_update_iter(step)

    def is_mask_update_iter(self, step: Step) -> Decision:
        """The same, by another name."""
        return self.should_update_mask(step)

    def get_sparsity_at_step(self, target_sparsities: Any, step: Step) -> Any:
        """The sparsities of masks made at `step`, given the final ones: a number, or a tree of them and None."""
        return jax.tree.map(lambda target: self._sparsity(target, step), target_sparsities)

    def _sparsity(self, target: Sparsity, step: Step) -> Sparsity:
        del step
        return target

    @property
    def num_updates(self) -> int | None:
        """How often masks are made; None if that is not known or has no end."""
        return None

    @property
    def start_step(self) -> int | None:
        """Where the schedule begins; None if it is not known. Straight-through methods make masks from there on."""
        return None

    @property
    def first_update_step(self) -> int | None:
        """The step of the first masks; None if it is not known or there is none."""
        return None

    @property
    def last_update_step(self) -> int | None:
        """The step of the last masks; None if it is not known or there is none."""
        return None


@dataclasses.dataclass(frozen=True)
class NoUpdateSchedule(Schedule):
    """Masks stay as they were initialised."""

    def should_update_mask(self, step: Step) -> Decision:
        del step
        return False

    @property
    def num_updates(self) -> int | None:
        return 0


@dataclasses.dataclass(frozen=True)
class OneShotSchedule(Schedule):
    """Masks are made once, at `target_step`, at the final sparsity."""

    target_step: int = 0

    def __post_init__(self) -> None:
        _check_step("target_step", self.target_step)

    def should_update_mask(self, step: Step) -> Decision:
        return step == self.target_step

    @property
    def num_updates(self) -> int | None:
        return 1

    @property
    def start_step(self) -> int | None:
        return self.target_step

    @property
    def first_update_step(self) -> int | None:
        return self.target_step

    @property
    def last_update_step(self) -> int | None:
        return self.target_step


@dataclasses.dataclass(frozen=True)
class PeriodicSchedule(Schedule):
    """Masks are made on steps with `step % update_freq == 0` and `start <= step <= end`.

    They have the final sparsity from the first update on. A bound that is None is ignored.
    """

    update_freq: int = 1
    update_start_step: int | None = None
    update_end_step: int | None = None

    def __post_init__(self) -> None:
        check_period(self.update_freq)
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

    @property
    def num_updates(self) -> int | None:
        if self.update_end_step is None:
            return None
        return max(0, self.update_end_step // self.update_freq - self._first // self.update_freq + 1)

    @property
    def start_step(self) -> int:
        return self.update_start_step or 0

    @property
    def first_update_step(self) -> int | None:
        return None if self.num_updates == 0 else self._first

    @property
    def last_update_step(self) -> int | None:
        if self.update_end_step is None or not self.num_updates:
            return None
        return self.update_end_step // self.update_freq * self.update_freq

    @property
    def _first(self) -> int:
        return -(-self.start_step // self.update_freq) * self.update_freq


@dataclasses.dataclass(frozen=True)
class PolynomialSchedule(PeriodicSchedule):
    r"""Sparsity rises to the final one along a polynomial (Zhu & Gupta, 2017).

    .. math:: s(t) = s_i + (s_f - s_i) \, (1 - (1 - p)^{power}), \quad
              p = \mathrm{clip}(t + 1 - start,\, 0,\, end - start) / (end - start)

    with the initial sparsity :math:`s_i`, at most :math:`s_f`. The last update, at the largest multiple of
    `update_freq` that is not after the end, has the final sparsity exactly. If start and end are the same step, pruning
    happens once.

    Examples:
      >>> schedule = PolynomialSchedule(update_freq=10, update_start_step=0, update_end_step=30)
      >>> [round(float(schedule.get_sparsity_at_step(0.8, step)), 3) for step in (0, 10, 20, 30)]
      [0.077, 0.597, 0.778, 0.8]
    """

    update_start_step: int = 0
    update_end_step: int = None  # type: ignore[assignment]  # has to be given, see below
    power: float = 3
    initial_sparsity: float = 0.0

    def __post_init__(self) -> None:
        if self.update_end_step is None:
            raise ValueError("update_end_step: missing; give the step at which the final sparsity is reached.")
        if not isinstance(self.initial_sparsity, numbers.Real) or not 0 <= self.initial_sparsity < 1:
            raise ValueError(
                f"initial_sparsity: {self.initial_sparsity!r} is outside [0, 1); it is the share of zeros at the start."
            )
        super().__post_init__()

    def _sparsity(self, target: Sparsity, step: Step) -> Sparsity:
        length = self.update_end_step - self.update_start_step
        if length == 0:
            return target
        progress = jnp.clip(step + 1 - self.update_start_step, 0, length) / length
        risen = 1.0 - (1.0 - progress) ** self.power
        initial = jnp.minimum(self.initial_sparsity, target) if self.initial_sparsity else 0.0
        sparsity = initial + (target - initial) * risen
        last = self.update_end_step if self.last_update_step is None else self.last_update_step
        return jnp.where(step >= last, target, sparsity)


@dataclasses.dataclass(frozen=True)
class AlternatingSchedule(PeriodicSchedule):
    """Sparse and dense phases in turn, each of `update_freq` steps; the last one is sparse (Peste et al., 2021).

    A phase begins at each update, at the final sparsity or at 0. Counted backwards from the last update, every second
    phase is dense. So with an even number of updates, the first begins a dense phase, which changes nothing if training
    is dense before.
    """

    update_start_step: int = 0
    update_end_step: int = None  # type: ignore[assignment]  # has to be given, see below

    def __post_init__(self) -> None:
        if self.update_end_step is None:
            raise ValueError("update_end_step: missing; give the step at which the last phase, a sparse one, begins.")
        super().__post_init__()

    def _sparsity(self, target: Sparsity, step: Step) -> Sparsity:
        last = self.update_end_step if self.last_update_step is None else self.last_update_step
        phases_left = -((jnp.minimum(step, last) - last) // self.update_freq)
        return jnp.where(phases_left % 2 == 0, target, 0.0)


@dataclasses.dataclass(frozen=True)
class CosineDecay:
    r"""The share of active weights that SET and RigL replace (Evci et al., 2020).

    .. math:: f(t) = \frac{f_0}{2} (1 + \cos(\pi \min(t, end) / end))

    and always :math:`f_0` if there is no end.
    """

    drop_fraction: float = 0.1
    end_step: int = 0

    def __call__(self, step: Step) -> Float[Array, ""]:
        if not self.end_step:
            return jnp.asarray(self.drop_fraction, jnp.float32)
        progress = jnp.minimum(step, self.end_step) / self.end_step
        return self.drop_fraction * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def check_period(update_freq: int) -> None:
    """Raises a ValueError for what is not a number of steps."""
    if not isinstance(update_freq, numbers.Integral) or update_freq < 1:
        raise ValueError(f"update_freq: {update_freq!r} is not a number of steps; give 1 or more.")


def _check_step(name: str, step: int) -> None:
    if not isinstance(step, numbers.Integral):
        raise ValueError(f"{name}: {step!r} is not a step; give an integer of 0 or more.")
    if step < 0:
        raise ValueError(f"{name}: {step} is before the first step; give 0 or more.")
