"""later_methods: what papers after the paper's compare with, on the vision transformer of digits_vit.

    jaxpruner-baselines run later_methods --preset quick --seeds 5     # 275 runs, half an hour on 2 cores; dense: 92.4

The model, the data and the loop are those of `digits_vit`, beside three of its methods. None is tuned here: all have
the schedule of the others and their papers' defaults. `lottery_ticket` trains many times; see `rewinding`.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from jaxpruner_baselines import digits_vit, rewinding
from jaxpruner_baselines.baseline import Outcome, Progress, Run
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.methods import DENSE, LATER

BEFORE = ("magnitude", "magnitude_ste", "rigl")


class Training(digits_vit.Training):
    """Gives the loss to the methods that score with it."""

    def scored_with(self, loss_fn: Callable[..., Any], batch: tuple[Any, ...]) -> dict[str, Any]:
        """The loss of the first batch; for SynFlow the sum of the outputs for an image of ones."""
        if self.method == "grasp":
            return {"loss_fn": lambda params, batch: loss_fn(params, *batch), "batches": [batch]}
        if self.method == "synflow":
            ones = jnp.ones((1, *batch[0].shape[1:]))
            return {"loss_fn": lambda params: self.model.apply(params, ones).sum()}
        return {}


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    """That of `digits_vit`, with the time of a step."""
    times, done, before = [], 0, time.perf_counter()
    is_ticket = run.method == rewinding.METHOD
    events = rewinding.train(run, checkpoint) if is_ticket else digits_vit.train(run, checkpoint, make=Training)
    for event in events:
        if isinstance(event, Progress):
            times.append(1e3 * (time.perf_counter() - before) / max(event.done - done, 1))
            done = event.done
            yield event
            before = time.perf_counter()
        else:
            yield dataclasses.replace(event, details={**event.details, "step_milliseconds": statistics.median(times)})


BASELINE = dataclasses.replace(
    digits_vit.BASELINE,
    name="later_methods",
    summary="methods of later papers on the vision transformer of digits_vit",
    train=train,
    only=(DENSE, *BEFORE, *LATER, rewinding.METHOD),
    also=("step_milliseconds", *digits_vit.BASELINE.also),
    sparsities=(0.9, 0.95, 0.98),
)
