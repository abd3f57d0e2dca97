"""What a run's network costs: parameters, and FLOPs of inference and training, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxpruner

# Measures of the table, fractions of the dense cost.
SHARES = ("inference_flops_share", "training_flops_share")
# Another, of networks whose dead units are counted.
DEAD = "dead_units_share"


def costs(
    forward: Callable[..., Any], params: Any, *example: Any, updater: Any, steps: int, batch: int
) -> dict[str, Any]:
    """For `Outcome.details`.

    Args:
      forward: `forward(params, *example)`, for one example.
      params: the trained parameters, zeros in place.
      *example: arrays or their shapes.
      updater: the algorithm of the run; None if dense.
      steps: of the training.
      batch: examples of a step.
    """
    counted = jaxpruner.summarize_flops(forward, params, *example, updater=updater, steps=steps)
    inference, training = counted["_inference_flops"], counted["_training_flops"]
    return {
        "parameters": counted["_nparams"],
        "parameters_nonzero": counted["_nparams_nnz"],
        "inference_flops": inference,
        "inference_flops_share": round(counted["_inference_flops_nnz"] / inference, 6),
        "training_flops": batch * training,
        "training_flops_share": round(counted["_training_flops_nnz"] / training, 6),
    }


def dead_units(forward: Callable[..., Any], params: Any, *example: Any) -> dict[str, Any]:
    """For `Outcome.details`: how many units of hidden layers are dead, so that `jaxpruner.compact` removes them.

    Args:
      forward: `forward(params, *example)`, for one example.
      params: the trained parameters, zeros in place.
      *example: arrays or their shapes.
    """
    small = jaxpruner.compact(forward, params, *example, check=False)
    report = small.report()
    units, left = (sum(each) for each in zip(*report.units.values(), strict=True))
    return {
        "units": units,
        "dead_units": units - left,
        DEAD: round((units - left) / units, 6),
        "parameters_compact": report.params[1],
    }
