"""What is chosen before any method runs: dense runs of candidates, on data held out of the training data.

    jaxpruner-baselines choose --results baselines/results --markdown baselines/docs/wide.md

The best candidate's numbers are then written into the preset by hand.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxpruner_baselines import registry, report, runner
from jaxpruner_baselines.baseline import Baseline, Run
from jaxpruner_baselines.measures import measure
from jaxpruner_baselines.methods import DENSE
from jaxpruner_baselines.suite import TASKS, Task

SEED = 100  # which no reported run has
HEADER = ("row", "preset", "candidate", "seed", "on held-out data, dense", "")


def candidates(task: Task, scale: str) -> tuple[Baseline, list[Run]]:
    """The baseline of a task with its candidates for presets, and their runs; none where nothing is chosen."""
    baseline, name = registry.get(task.baseline), task.scales[scale].preset
    found = baseline.candidates(baseline.presets[name]) if baseline.candidates else {}
    presets = {f"{name}, held out, {label}": preset for label, preset in found.items()}
    baseline = dataclasses.replace(baseline, presets=presets)
    return baseline, [baseline.run(candidate, DENSE, 0.0, SEED) for candidate in presets]


def table_of(scale: str, folder: Path) -> list[list[str]]:
    """A line for each candidate that has run, the best of a task marked once all have."""
    rows = []
    for task in TASKS.values():
        if scale not in task.scales:
            continue
        try:
            baseline, runs = candidates(task, scale)
        except ImportError:  # its host is missing
            continue
        results = runner.results_of(baseline, folder)
        values = {
            run.preset_name: line.mean
            for run in runs
            for line in report.summarize(baseline, run.preset_name, results)[0]
        }
        kind = measure(baseline.metric)
        best = (min if kind.lower_is_better else max)(values.values(), default=None)
        for name, value in values.items():
            preset, _, label = name.split(", ", 2)
            mark = "best" if value == best and len(values) == len(runs) else ""
            rows.append([task.title, preset, label, str(SEED), f"{kind.header}: {kind.shown(value)}", mark])
    return rows
