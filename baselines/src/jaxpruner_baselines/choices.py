"""What is chosen before any method runs: dense runs of candidates, on data held out of the training data.

    jaxpruner-baselines choose --results baselines/results --markdown baselines/docs/wide.md

The best candidate's numbers are then written into the preset by hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from jaxpruner_baselines import registry, report, runner
from jaxpruner_baselines.baseline import Baseline, Run
from jaxpruner_baselines.measures import measure
from jaxpruner_baselines.methods import DENSE
from jaxpruner_baselines.suite import Task, at_scale

FIRST_SEED = 100  # no reported run has it, or a later one
HEADER = ("row", "preset", "candidate", "seeds", "on held-out data, dense", "")


def candidates(task: Task, scale: str, seeds: int = 1) -> tuple[Baseline, list[Run]]:
    """The baseline of a task with its candidates for presets, and their runs; none where nothing is chosen."""
    baseline, name = registry.get(task.baseline), task.scales[scale].preset
    found = baseline.candidates(baseline.presets[name]) if baseline.candidates else {}
    presets = {f"{name}, held out, {label}": preset for label, preset in found.items()}
    baseline = dataclasses.replace(baseline, presets=presets)
    every = range(FIRST_SEED, FIRST_SEED + seeds)
    return baseline, [baseline.run(candidate, DENSE, 0.0, seed) for seed in every for candidate in presets]


def table_of(scale: str, folder: Path) -> list[list[str]]:
    """A line for each candidate that has run, the best of a task marked once all have, on as many seeds."""
    rows = []
    for task in at_scale(scale).values():
        try:
            baseline, _ = candidates(task, scale)
        except ImportError:  # its host is missing
            continue
        results = runner.results_of(baseline, folder)
        lines = {preset: line for preset in baseline.presets for line in report.summarize(baseline, preset, results)[0]}
        kind = measure(baseline.metric)
        finite = [line.mean for line in lines.values() if math.isfinite(line.mean)]  # others have diverged
        best = (min if kind.lower_is_better else max)(finite, default=None)
        comparable = len(lines) == len(baseline.presets) and len({line.seeds for line in lines.values()}) == 1
        for name, line in lines.items():
            preset, _, label = name.split(", ", 2)
            mark = "best" if comparable and line.mean == best else ""
            rows.append([task.title, preset, label, _told(line.seeds), f"{kind.header}: {kind.shown(line.mean)}", mark])
    return rows


def _told(seeds: Sequence[int]) -> str:
    is_row = len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if is_row else ", ".join(map(str, seeds))
