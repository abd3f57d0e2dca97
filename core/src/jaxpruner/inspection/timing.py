"""How long functions take, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def alternate(functions: Mapping[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """The median seconds of each function. They are called in turn, so that other load affects all of them alike.

    Args:
      functions: what to time; each is called once before, to be compiled.
      repeats: how often each is timed.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}
