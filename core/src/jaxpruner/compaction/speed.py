"""The speed of functions beside each other: measured in turn, so that what else a machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds_in_turn(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 7, at_least: float = 0.02
) -> dict[str, float]:
    """The seconds of one call of each, the median over rounds in which they take turns.

    Args:
      functions: what to call; results are waited for. The first call, which compiles, is not counted.
      rounds: how often each is measured.
      at_least: seconds of one measurement; short functions are called more often in it.

    Examples:
      >>> sorted(seconds_in_turn({"dense": lambda: None, "compact": lambda: None}, rounds=1, at_least=0))
      ['compact', 'dense']
    """
    calls = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        calls[name] = max(1, round(at_least / max(_seconds(function, 1), 1e-7)))
    measured: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            measured[name].append(_seconds(function, calls[name]))
    return {name: statistics.median(each) for name, each in measured.items()}


def _seconds(function: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (time.perf_counter() - started) / calls
