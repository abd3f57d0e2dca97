"""One figure of the benchmark's table, and how two sides are timed against each other."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Reach:
    """What a ratio should reach: `at_least` counts how many times faster, `at_most` how much more."""

    at_least: float | None = None
    at_most: float | None = None

    def met(self, ratio: float) -> bool:
        above = self.at_least is None or ratio >= self.at_least
        return above and (self.at_most is None or ratio <= self.at_most)

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"


@dataclasses.dataclass(frozen=True)
class Figure:
    """`ratio` is peer / ours ("times faster") where `faster`, else ours / peer."""

    row: str
    ours: float
    peer_name: str
    peer: float
    unit: str
    ratio: float
    faster: bool
    reach: Reach
    config: Mapping[str, Any]

    @property
    def met(self) -> str:
        return ("yes" if self.reach.met(self.ratio) else "no") if str(self.reach) else ""


def alternate(
    sides: Mapping[str, Callable[[], Any]], repeats: Mapping[str, int]
) -> Generator[str, None, dict[str, list[float]]]:
    """Times the sides in turn, in milliseconds, after one call of each that is not timed.

    Each round goes through all sides, every other round backwards, so that what slows the machine
    down slows them all; a side drops out after its own number of repeats.

    Yields:
      What it just did.

    Returns:
      The times of each side.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, call in sides.items():
        jax.block_until_ready(call())
        yield f"compiled {name}"
    for i in range(max(repeats.values())):
        for name in list(sides) if i % 2 == 0 else reversed(sides):
            if i < repeats[name]:
                started = time.perf_counter()
                jax.block_until_ready(sides[name]())
                times[name].append(1e3 * (time.perf_counter() - started))
                yield f"{name}: {times[name][-1]:.4g} ms"
    return times


def timed(
    row: str,
    times: Mapping[str, list[float]],
    ours: str,
    peer: str,
    reach: Reach,
    config: Mapping[str, Any],
    faster: bool | None = None,
) -> Figure:
    """A figure of two timed sides: medians, and the median of the ratios within one round.

    Of sides with different repeats it is the ratio of the medians: few rounds have both, and in half of these ours runs
    in the caches and pages that the other side has just left.

    `faster` says which way the ratio is taken; by default it follows from what should be reached.
    """
    pairs = list(zip(times[ours], times[peer], strict=False))
    if len(times[ours]) != len(times[peer]):
        pairs = [(statistics.median(times[ours]), statistics.median(times[peer]))]
    faster = reach.at_most is None if faster is None else faster
    return Figure(
        row=row,
        ours=statistics.median(times[ours]),
        peer_name=peer,
        peer=statistics.median(times[peer]),
        unit="ms",
        ratio=statistics.median(p / o if faster else o / p for o, p in pairs),
        faster=faster,
        reach=reach,
        config={**config, "repeats": [len(times[ours]), len(times[peer])]},
    )
