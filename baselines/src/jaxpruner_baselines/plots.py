"""The plots of a baseline: the metric against the sparsity, or against what runs cost; a marker per method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from jaxpruner_baselines.baseline import Cost, Curve
from jaxpruner_baselines.measures import measure
from jaxpruner_baselines.methods import is_dense
from jaxpruner_baselines.report import Line

# Paul Tol's "muted" scheme, told apart with any colour vision; markers differ as well.
COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#555555")
MARKERS = "osD^vP*Xph"
DASHES = ("-", "--", ":", "-.")
SPREAD = 0.8  # of the distance between two sparsities, so that error bars do not hide one another


def far_out(means: list[float], lower_is_better: bool) -> float:
    """Tukey's far-out fence: a method worse than it gets an arrow, so that the others can be told apart."""
    low, high = np.percentile(means, [25, 75])
    return high + 3 * (high - low) if lower_is_better else low - 3 * (high - low)


def draw(path: Path, title: str, lines: list[Line], metric: str) -> None:
    """Writes a PNG. The sparsities stand side by side at equal distances, methods spread around them."""
    kind = measure(metric)
    scale = kind.scale
    sparsities = sorted({line.sparsity for line in lines if not is_dense(line.method)})
    methods = list(dict.fromkeys(line.method for line in lines if not is_dense(line.method)))
    fence = far_out([line.mean for line in lines], kind.lower_is_better)
    styles = looks(lines)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    if kind.logarithmic:  # on which all have their place
        fence = np.inf if kind.lower_is_better else -np.inf
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))

    for i, line in enumerate(line for line in lines if is_dense(line.method)):
        axes.axhline(
            scale * line.mean, color="black", linewidth=1, linestyle=DASHES[i % len(DASHES)], label=line.method
        )
        if len(line.seeds) > 1:
            low, high = scale * (line.mean - line.std), scale * (line.mean + line.std)
            axes.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
    for i, method in enumerate(methods):
        own = [line for line in lines if line.method == method]
        offset = SPREAD * ((i + 0.5) / len(methods) - 0.5)
        style = styles[method]
        beyond = [line for line in own if (line.mean > fence if kind.lower_is_better else line.mean < fence)]
        for line in beyond:
            edge, inwards = (1.0, -22) if kind.lower_is_better else (0.0, 22)
            axes.annotate(
                kind.shown(line.mean),
                (sparsities.index(line.sparsity) + offset, edge),
                xytext=(0, inwards),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                arrowprops={"arrowstyle": "->", "color": style["color"]},
                color=style["color"],
                ha="center",
            )
        shown = [line for line in own if line not in beyond]
        axes.errorbar(
            [sparsities.index(line.sparsity) + offset for line in shown],
            [scale * line.mean for line in shown],
            yerr=[scale * np.nan_to_num(line.std) for line in shown],
            label=method,
            **style,
        )
    for boundary in range(1, len(sparsities)):
        axes.axvline(boundary - 0.5, color="0.85", linewidth=1)
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:g} %" for s in sparsities])
    axes.set_xlim(-0.5, max(len(sparsities), 1) - 0.5)
    axes.set_xlabel("sparsity of the prunable weights")
    finish(path, figure, axes, title, metric)


def draw_cost(path: Path, title: str, lines: list[Line], metric: str, cost: Cost) -> None:
    """Writes a PNG of the metric against a cost on a logarithmic axis; cheap and good is top left."""
    scale = measure(metric).scale
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for method, style in looks(lines).items():
        own = [line for line in lines if line.method == method]
        axes.errorbar(
            [line.cost for line in own],
            [scale * line.mean for line in own],
            yerr=[scale * np.nan_to_num(line.std) for line in own],
            label=method,
            **style,
        )
        if len(own) > 1:
            for line in own:
                place = (line.cost, scale * line.mean)
                axes.annotate(f"{100 * line.sparsity:g} %", place, xytext=(6, 6), textcoords="offset points", size=7)
    axes.set_xscale("log")
    for axis_ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis_ticks(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(cost.label)
    finish(path, figure, axes, title, metric)


def draw_curves(path: Path, title: str, lines: list[Line], metric: str, curve: Curve) -> None:
    """Writes a PNG of the metric while training, mean over seeds; a panel for each sparsity, dense in all of them."""
    scale = measure(metric).scale
    styles = looks(lines)
    sparsities = sorted({line.sparsity for line in lines if not is_dense(line.method)}) or [0.0]
    figure, panels = plt.subplots(
        1, len(sparsities), figsize=(4.5 * len(sparsities) + 2, 5), sharey=True, squeeze=False, layout="constrained"
    )
    handles = {}
    for sparsity, axes in zip(sparsities, panels[0], strict=True):
        for line in lines:
            if not (is_dense(line.method) or line.sparsity == sparsity):
                continue
            length = min(map(len, line.curves))
            mean = scale * np.mean([values[:length] for values in line.curves], axis=0)
            steps = line.steps / length * np.arange(1, length + 1)
            look = styles[line.method] | {"linestyle": "-", "markersize": 4, "markevery": max(length // 8, 1)}
            look.pop("capsize")
            (handles[line.method],) = axes.plot(steps, mean, **look, linewidth=1.2)
        axes.set_title("" if sparsity == 0 else f"{100 * sparsity:g} %")
        axes.set_xlabel(curve.unit)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(f"{metric}, mean over seeds")
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    save(path, figure)


def looks(lines: list[Line]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method, the same in all plots of these lines: black where nothing is pruned."""
    methods = list(dict.fromkeys(line.method for line in lines))
    dense = [method for method in methods if is_dense(method)]
    pruned = [method for method in methods if not is_dense(method)]
    return {
        method: look(i) | ({"color": "black"} if method in dense else {})
        for group in (dense, pruned)
        for i, method in enumerate(group)
    }


def look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th method; hollow once all have been used."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "fillstyle": "none" if i // len(COLOURS) % 2 else "full",
        "linestyle": "none",
        "markersize": 7,
        "capsize": 3,
    }


def finish(path: Path, figure: Any, axes: Any, title: str, metric: str) -> None:
    axes.set_ylabel(f"{measure(metric).header}, mean ± std over seeds")
    axes.set_title(title)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    save(path, figure)


def save(path: Path, figure: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
