"""The table of a baseline: a row per method and sparsity, mean and standard deviation over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from jaxpruner_baselines import intervals
from jaxpruner_baselines.baseline import Baseline
from jaxpruner_baselines.measures import measure
from jaxpruner_baselines.methods import is_dense
from jaxpruner_baselines.results import Results, digest_of

HEADER = ("method", "sparsity asked", "sparsity reached", "steps", "", "seeds")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table; `std` is NaN for a single seed.

    `also` has mean and standard deviation of the baseline's further measures. `cost` is a mean, where the baseline
    counts one; `curves` are those of the seeds, where runs have one. `seconds` is how long all its runs took, added up.
    `examples` are what the run of a seed scored on each test example, where runs tell it.
    """

    method: str
    sparsity: float
    sparsity_reached: float
    steps: int
    mean: float
    std: float
    seeds: tuple[int, ...]
    also: tuple[tuple[float, float], ...] = ()
    cost: float | None = None
    curves: tuple[tuple[float, ...], ...] = ()
    seconds: float = 0.0
    examples: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)


def summarize(baseline: Baseline, preset: str, results: Results) -> tuple[list[Line], int]:
    """Returns the lines, dense first, and how many rows were left out.

    Only rows of the preset and the settings as they are now count, the latest where one was measured twice.
    """
    rows = results.read()
    rows = rows[(rows["preset"] == preset) & (rows["source"] == "ours")]
    runs = [
        baseline.run(preset, method, float(sparsity), int(seed))
        for method, sparsity, seed in zip(rows["method"], rows["sparsity"], rows["seed"], strict=True)
    ]
    counts = [
        run.config_hash == found and (digest := digest_of(details)) in (None, digest and baseline.digest(run))
        for run, found, details in zip(runs, rows["config_hash"], rows["details"], strict=True)
    ]
    kept = rows[np.array(counts, bool)]
    kept = kept.drop_duplicates("config_hash", keep="last")
    lines = [
        Line(
            method=str(method),
            sparsity=float(sparsity),
            sparsity_reached=group["sparsity_reached"].mean(),
            steps=int(group["steps"].iloc[-1]),
            mean=group["value"].mean(skipna=False),  # NaN where one seed has diverged
            std=group["value"].std(skipna=False),
            seeds=tuple(sorted(map(int, group["seed"]))),
            also=tuple(_mean_and_std(group, name) for name in baseline.also),
            cost=baseline.cost and float(np.mean(_details(group, baseline.cost.key))),
            curves=tuple(map(tuple, _details(group, baseline.curve.key))) if baseline.curve else (),
            seconds=group["seconds"].sum(),
            examples={
                int(seed): intervals.unpack(details["examples"])
                for seed, details in zip(group["seed"], map(json.loads, group["details"]), strict=True)
                if "examples" in details
            },
        )
        for (method, sparsity), group in kept.groupby(["method", "sparsity"])
    ]
    order = {method: i for i, method in enumerate(baseline.methods)}
    lines.sort(key=lambda line: (line.sparsity, order.get(line.method, len(order)), line.method))
    return lines, len(rows) - len(kept)


def _details(rows: pd.DataFrame, key: str) -> list[Any]:
    return [json.loads(text)[key] for text in rows["details"]]


def _mean_and_std(rows: pd.DataFrame, key: str) -> tuple[float, float]:
    """Over the rows that have it, since those of older code may lack a measure; NaN where none has."""
    values = [details[key] for details in map(json.loads, rows["details"]) if key in details]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)) if values else math.nan, std


def table_of(baseline: Baseline, lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Header and rows. A further measure that no run has, as of older code, gets no column."""
    measured = [i for i in range(len(baseline.also)) if any(not math.isnan(line.also[i][0]) for line in lines)]
    header = [
        *(name or f"{measure(baseline.metric).header}, mean ± std" for name in HEADER),
        *(measure(baseline.also[i]).header for i in measured),
        *([baseline.cost.header] if baseline.cost else []),
    ]
    rows = [
        [
            line.method,
            "-" if is_dense(line.method) else f"{100 * line.sparsity:g} %",
            f"{100 * line.sparsity_reached:.2f} %",
            str(line.steps),
            measure(baseline.metric).shown(line.mean, line.std),
            str(len(line.seeds)),
            *(measure(baseline.also[i]).shown(*line.also[i]) for i in measured),
            *([] if line.cost is None else [f"{line.cost:,.1f}"]),
        ]
        for line in lines
    ]
    return header, rows


def terminal(title: str, baseline: Baseline, lines: list[Line]) -> Table:
    header, rows = table_of(baseline, lines)
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    previous = None
    for line, row in zip(lines, rows, strict=True):
        if previous is not None and line.sparsity != previous:
            table.add_section()
        table.add_row(*row)
        previous = line.sparsity
    return table


def markdown(baseline: Baseline, lines: list[Line]) -> str:
    return markdown_table(*table_of(baseline, lines))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def update_markdown(path: Path, marker: str, text: str) -> None:
    """Puts `text` between `<!-- marker -->` and `<!-- /marker -->`; a new file is written whole."""
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    block = f"{opening}\n{text}\n{closing}"
    if not path.exists():
        path.write_text(block + "\n")
        return
    before, found, rest = (content := path.read_text()).partition(opening)
    _, closed, after = rest.partition(closing)
    if not (found and closed):
        raise ValueError(f"{path}: no place for the table. Add the lines {opening} and {closing} where it belongs.")
    if content != before + block + after:
        path.write_text(before + block + after)
