"""The table and the figure of a suite: ours beside the paper's, and whether the methods come in the same order."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.resources
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table
from scipy import stats

from jaxpruner_baselines import intervals, plots, registry, report, runner
from jaxpruner_baselines.costs import SHARES
from jaxpruner_baselines.measures import Measure, measure
from jaxpruner_baselines.methods import DENSE
from jaxpruner_baselines.report import Line
from jaxpruner_baselines.suite import LATER_METHODS, METHODS, Task, at_scale

SIGNIFICANT = 0.05


@dataclasses.dataclass(frozen=True)
class RowOfSuite:
    """One task: our lines and the paper's numbers by method, and Spearman's rank correlation of the pruned ones.

    A row at a higher sparsity than the table's (`sparser`) has no numbers of the paper, and the dense line of its task.
    `later` has our lines of methods that the paper does not compare.
    """

    task: Task
    preset: str
    sparsity: float
    kind: Measure
    ours: dict[str, Line]
    later: dict[str, Line]
    paper: dict[str, float]
    correlation: float
    p_value: float
    sparser: bool = False

    @property
    def title(self) -> str:
        return f"{self.task.title} at {100 * self.sparsity:g} %" if self.sparser else self.task.title

    @functools.cached_property
    def drawn(self) -> dict[str, np.ndarray]:
        """Means by method in draws of seeds and test examples; see `intervals`.

        Empty unless all methods have the same seeds, and their runs tell what they scored on each example. Methods that
        diverged in a seed are left out.
        """
        drawn = intervals.resampled_means({m: line.examples for m, line in self.ours.items() if line.examples})
        return {method: draws for method, draws in drawn.items() if method not in self.diverged}

    @property
    def diverged(self) -> list[str]:
        """Methods with a seed whose metric is no number: they have no place in the order, and the verdict says so."""
        return [method for method, line in self.ours.items() if not math.isfinite(line.mean)]

    @property
    def verdict(self) -> str:
        """Whether the order of the methods is the paper's."""
        without = ", ".join(METHODS[method] for method in self.diverged)
        return f"{self._verdict}; diverged and left out: {without}" if without else self._verdict

    @property
    def _verdict(self) -> str:
        if not self.paper:
            return "no numbers of the paper"
        if math.isnan(self.correlation):
            return "no order: too few methods, or all are equal"
        if self.drawn:
            low, high = intervals.rank_correlation_bounds(_pruned(self.drawn), self.paper)
            return f"{self.correlation:+.2f} [{low:+.2f}, {high:+.2f}]"
        if any(len(line.seeds) == 1 for line in self.ours.values()):
            return f"{self.correlation:+.2f} (one seed)"
        chance = f"{self.correlation:+.2f} (p {self.p_value:.3f})"
        if self.p_value < SIGNIFICANT:
            return f"{chance}: the order holds"
        return f"{chance}: {'the other way round' if self.p_value > 1 - SIGNIFICANT else 'may be chance'}"


@functools.cache
def _published() -> pd.DataFrame:
    """The paper's numbers (Lee et al., 2024, table of baselines as published with the library), in our schema."""
    with importlib.resources.files("jaxpruner_baselines").joinpath("paper.csv").open() as file:
        return pd.read_csv(file)


def summarize(scale: str, folder: Path) -> list[RowOfSuite]:
    """The tasks that have results in a folder, each followed by its rows at higher sparsities."""
    rows = []
    for task in at_scale(scale).values():
        setting = task.scales[scale]
        try:
            baseline = registry.get(task.baseline)
        except ImportError:  # its host is missing, and so it has no presets
            continue
        lines, _ = report.summarize(baseline, setting.preset, runner.results_of(baseline, folder))
        for sparsity in (setting.sparsity, *setting.sparser):
            row = _row(task, scale, sparsity, [line for line in lines if line.sparsity in (0.0, sparsity)])
            if row.ours and (not row.sparser or _pruned(row.ours)):
                rows.append(row)
    return rows


def _row(task: Task, scale: str, sparsity: float, lines: Sequence[Line]) -> RowOfSuite:
    setting, of_suite = task.scales[scale], {line.method: line for line in lines}
    ours, later = ({m: of_suite[m] for m in methods if m in of_suite} for methods in (METHODS, LATER_METHODS))
    sparser = sparsity != setting.sparsity
    paper = {} if sparser else _paper(task)
    return RowOfSuite(
        task,
        setting.preset,
        sparsity,
        measure(registry.get(task.baseline).metric),
        ours,
        later,
        paper,
        *_spearman({method: line.mean for method, line in ours.items()}, paper),
        sparser,
    )


def _paper(task: Task) -> dict[str, float]:
    published = _published()
    mine = published[(published["baseline"] == task.baseline) & (published["preset"] == task.scales["paper"].preset)]
    return dict(zip(mine["method"], mine["value"], strict=True))


def _pruned(by_method: Mapping[str, Any]) -> dict[str, Any]:
    return {method: value for method, value in by_method.items() if method != DENSE}


def sentence(row: RowOfSuite) -> str:
    """The order of the methods, where it is told apart, and which of the paper's comparisons hold."""
    best_first = sorted(row.drawn, key=lambda method: row.ours[method].mean, reverse=not row.kind.lower_is_better)
    order = METHODS[best_first[0]]
    for before, method in itertools.pairwise(best_first):
        order += f" {'>' if _is_better(row, before, method) else '≈'} {METHODS[method]}"
    text = f"{row.title}, `{row.task.baseline} {row.preset}`, {len(row.ours[best_first[0]].seeds)} seeds: {order}."
    published = [method for method in _pruned(row.drawn) if method in row.paper]
    verdicts = collections.Counter(
        None if higher is None else higher == (row.paper[a] > row.paper[b])
        for a, b in itertools.combinations(published, 2)
        if row.paper[a] != row.paper[b]
        for higher in (intervals.is_higher(row.drawn[a], row.drawn[b]),)
    )
    if not verdicts:
        return text
    return (
        f"{text} Of the {verdicts.total()} pairs of pruned methods that the paper orders: {verdicts[True]} as in the "
        f"paper, {verdicts[False]} the other way round, {verdicts[None]} not told apart (at 95 % each: of equal ones "
        "about one pair in twenty is told apart by chance)."
    )


def _is_better(row: RowOfSuite, one: str, other: str) -> bool:
    """Whether two methods are told apart, and the first is the better one."""
    high, low = (other, one) if row.kind.lower_is_better else (one, other)
    return intervals.is_higher(row.drawn[high], row.drawn[low]) is True


def better_cells(row: RowOfSuite) -> list[str]:
    """For each method, all others that it is told apart from and better than."""
    of_methods = [
        ", ".join(METHODS[other] for other in METHODS if other in row.drawn and _is_better(row, method, other))
        if method in row.drawn
        else ""
        for method in METHODS
    ]
    return [row.title, *(others or "-" for others in of_methods)]


def _spearman(ours: dict[str, float], paper: dict[str, float]) -> tuple[float, float]:
    """Rank correlation over the pruned methods that both have, and the exact probability of one so high by chance.

    NaN where fewer than four have numbers, or all have the same.
    """
    both = [m for m in ours if m in paper and m != DENSE and math.isfinite(ours[m])]
    mine, published = (stats.rankdata([means[m] for m in both]) for means in (ours, paper))
    if len(both) < 4 or np.ptp(mine) == 0:
        return math.nan, math.nan
    # With the ranks given, the correlation grows with the sum of their products.
    found = stats.permutation_test(
        (mine,),
        lambda ranks, axis: (ranks * published).sum(axis=axis),
        permutation_type="pairings",
        alternative="greater",
        vectorized=True,
        n_resamples=math.inf,
    )
    return float(np.corrcoef(mine, published)[0, 1]), float(found.pvalue)


def header() -> list[str]:
    return ["", *METHODS.values(), "Spearman"]


def cells(row: RowOfSuite) -> list[list[str]]:
    """Two lines: ours and the paper's, each with its gap to dense; ours alone where the paper has no such row."""
    if row.sparser:
        return [_our_cells(row)]
    return [
        _our_cells(row),
        [
            f"paper, {row.kind.header}",
            *(
                "-" if method not in row.paper else _with_gap(row.kind, row.paper[method], row.paper, method)
                for method in METHODS
            ),
            "",
        ],
    ]


def _our_cells(row: RowOfSuite) -> list[str]:
    return [
        f"{row.task.title}: {row.task.baseline} {row.preset}, {100 * row.sparsity:g} %, {row.kind.header}",
        *(_cell(row.kind, row.ours, method, row.drawn) for method in METHODS),
        row.verdict,
    ]


def later_cells(rows: Sequence[RowOfSuite]) -> list[list[str]]:
    """A line for each later method that was run, after those of dense and magnitude."""
    run = [method for method in LATER_METHODS if any(method in row.later for row in rows)]
    methods = {DENSE: METHODS[DENSE], "magnitude": METHODS["magnitude"], **{method: method for method in run}}
    return [
        [name, *(_cell(row.kind, {**row.ours, **row.later}, method) for row in rows)]
        for method, name in methods.items()
    ]


def _cell(kind: Measure, ours: dict[str, Line], method: str, drawn: Mapping[str, np.ndarray] | None = None) -> str:
    """Mean and standard deviation, or its interval where there are draws; and the gap to dense."""
    if method not in ours:
        return "-"
    line = ours[method]
    means = {name: other.mean for name, other in ours.items()}
    if not drawn or method not in drawn:
        return _with_gap(kind, line.mean, means, method, line.std)
    low, high = (kind.shown(end) for end in intervals.interval(drawn[method]))
    mean, _, gap = _with_gap(kind, line.mean, means, method).partition(" ")
    return " ".join(filter(None, (mean, f"[{low}, {high}]", gap)))


def _with_gap(kind: Measure, mean: float, means: dict[str, float], method: str, std: float = math.nan) -> str:
    shown = kind.shown(mean, std)
    if method == DENSE or not math.isfinite(mean - means.get(DENSE, math.nan)):
        return shown
    return f"{shown} ({kind.scale * (mean - means[DENSE]):+,.{kind.decimals}f})"


def cost_cells(row: RowOfSuite) -> list[list[str]]:
    """What each method costs beside dense: inference, then training."""
    baseline = registry.get(row.task.baseline)
    shown = []
    for name, what in zip(SHARES, ("inference", "training"), strict=True):
        place = baseline.also.index(name)
        kind = measure(name)
        shares = [kind.shown(row.ours[m].also[place][0]) if m in row.ours else "-" for m in METHODS]
        shown.append([f"{row.title}: {what}", *shares])
    return shown


def terminal(title: str, rows: Sequence[RowOfSuite]) -> Table:
    """One task a block, for narrow terminals: methods down, ours and the paper's across."""
    table = Table(title=title)
    for name in ("task", "method", "ours, mean ± std or [interval] (to dense)", "paper (to dense)"):
        table.add_column(escape(name), justify="left", overflow="fold")
    for row in rows:
        mine, *others = cells(row)
        (published,) = others or [[""] * len(mine)]
        for i, method in enumerate(METHODS.values(), start=1):
            table.add_row(mine[0] if i == 1 else "", method, escape(mine[i]), published[i])
        for method in row.later:
            table.add_row("", method, _cell(row.kind, {**row.ours, **row.later}, method), "")
        table.add_row("", "[bold]Spearman[/]", escape(row.verdict), "")
        table.add_section()
    return table


def markdown(rows: Sequence[RowOfSuite]) -> str:
    results = report.markdown_table(header(), [line for row in rows for line in cells(row)])
    costs = report.markdown_table(
        ["FLOPs, % of dense", *METHODS.values()], [line for row in rows for line in cost_cells(row)]
    )
    if certain := [row for row in rows if row.drawn]:
        results += "\n\n" + "\n".join(f"- {sentence(row)}" for row in certain)
        pairs = report.markdown_table(
            ["told apart, and better than", *METHODS.values()], [better_cells(row) for row in certain]
        )
        results += f"\n\n{pairs}"
    results += f"\n\n{duration(rows)}"
    if not any(row.later for row in rows):
        return f"{results}\n\n{costs}"
    titles = [f"{row.title}, {row.kind.header}" for row in rows]
    later = report.markdown_table(["of later papers", *titles], later_cells(rows))
    return f"{results}\n\n{later}\n\n{costs}"


def duration(rows: Sequence[RowOfSuite]) -> str:
    """How many runs the table is made of, and how long they took one after another."""
    lines = [
        line
        for row in rows
        for method, line in {**row.ours, **row.later}.items()
        if not (row.sparser and method == DENSE)  # counted in the row of the table
    ]
    hours = sum(line.seconds for line in lines) / 3600
    return f"These are {sum(len(line.seeds) for line in lines)} runs, which took {hours:.1f} hours, added up."


def draw(path: Path, title: str, rows: Sequence[RowOfSuite]) -> None:
    """Writes a PNG: a panel for each task, ours against the paper's, better is up and right."""
    shown = [row for row in rows if row.paper]
    columns = min(len(shown), 3) or 1
    figure, panels = plt.subplots(
        math.ceil(max(len(shown), 1) / columns),
        columns,
        figsize=(4.2 * columns + 2, 3.8 * math.ceil(max(len(shown), 1) / columns)),
        squeeze=False,
        layout="constrained",
    )
    looks = {method: plots.look(i) for i, method in enumerate(m for m in METHODS if m != DENSE)}
    looks[DENSE] = plots.look(0) | {"color": "black", "marker": "*", "markersize": 11}
    handles = {}
    for row, axes in zip(shown, panels.flat, strict=False):
        scale = row.kind.scale
        for method, name in METHODS.items():
            if method in row.ours and method in row.paper:
                line = row.ours[method]
                spread = np.full((2, 1), np.nan_to_num(line.std))
                if method in row.drawn:
                    low, high = intervals.interval(row.drawn[method])
                    spread = np.array([[line.mean - low], [high - line.mean]]).clip(0)
                handles[name] = axes.errorbar(
                    scale * row.paper[method], scale * line.mean, yerr=scale * spread, **looks[method]
                )
        if row.kind.lower_is_better:
            axes.invert_xaxis()
            axes.invert_yaxis()
        rho = "" if math.isnan(row.correlation) else f", Spearman {row.correlation:+.2f}"
        axes.set_title(f"{row.task.title}{rho}", size=10)
        axes.set_xlabel(f"paper: {row.kind.header}")
        axes.set_ylabel(f"{row.preset}, {100 * row.sparsity:g} %: {row.kind.header}")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    plots.save(path, figure)
