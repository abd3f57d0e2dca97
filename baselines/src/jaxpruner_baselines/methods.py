"""The methods that a baseline compares, and the config that each is given."""

from __future__ import annotations

from typing import Any

import jaxpruner

DENSE = "dense"
# What later papers compare with.
LATER = (
    "lamp", "movement", "soft_movement", "fisher", "adam_fisher", "acdc", "granet", "mest", "srigl", "sr_ste",
    "top_kast", "snip", "grasp", "synflow",
)  # fmt: skip
# RigL's paper (Evci et al., 2020), and its SET: so much of the weights is replaced every so many optimizer steps, from
# the first of them until this fraction of the training.
GROWS = ("set", "rigl")
GROWTH_DROP_FRACTION, GROWTH_FREQ, GROWTH_END = 0.3, 100, 0.75
_NOT_COMPARED = {"no_prune", "preserve", *LATER}  # the dense run itself; resuming a sparse checkpoint


def is_dense(method: str) -> bool:
    """Whether a method prunes nothing: `dense`, or a baseline's variant of it such as `dense+top_k`."""
    return method.partition("+")[0] == DENSE


def all_methods() -> list[str]:
    """`dense` and every algorithm that the paper compares, and those added by `register_algorithm`."""
    return [DENSE, *(n for n in jaxpruner.all_algorithm_names() if n not in _NOT_COMPARED)]


def sparsify_config(method: str, sparsity: float, steps: int, *, start: float, end: float, freq: int) -> dict[str, Any]:
    """Keyword arguments for `jaxpruner.sparsify`.

    Args:
      method: one of `all_methods()`.
      sparsity: the target, over all pruned weights together.
      steps: optimizer steps of the whole training.
      start: where mask updates start, as a fraction of `steps`.
      end: where they end; the rest of the training fine-tunes with fixed masks.
      freq: steps between mask updates.
    """
    if method == DENSE:
        return {"algorithm": "no_prune"}
    # Mask updates happen on multiples of `freq`, so the end is put on one: the target is then reached.
    first, last = (freq * round(fraction * steps / freq) for fraction in (start, end))
    return {
        "algorithm": method,
        "sparsity": sparsity,
        "dist_type": "erk",  # of no effect on global methods, whose one threshold distributes
        "update_start_step": first,
        "update_end_step": last,
        "update_freq": freq,
    }
