"""The command that runs the benchmarks: prints the table, writes the CSV."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.table import Table

from jaxpruner_baselines import provenance
from jaxpruner_baselines.benchmarks import (
    accelerators,
    agents,
    calibration,
    compaction,
    masks,
    networks,
    overheads,
    peers,
    sharding,
    steps,
)
from jaxpruner_baselines.benchmarks.figures import Figure
from jaxpruner_baselines.report import markdown_table, update_markdown
from jaxpruner_baselines.results import Results, Row

# name -> (the rows, their sizes, their sizes with --quick)
GROUPS: dict[str, tuple[Callable, Any, Any]] = {
    "mask_update": (masks.mask_update, masks.Sizes(), masks.QUICK),
    "drop_and_grow": (masks.drop_and_grow, masks.Sizes(), masks.QUICK),
    "global_mask": (masks.global_mask, masks.Sizes(), masks.QUICK),
    "nm_mask": (masks.nm_mask, masks.Sizes(), masks.QUICK),
    "thresholds": (masks.thresholds, masks.Sizes(), masks.QUICK),
    "peak_memory": (masks.peak_memory, masks.Sizes(), masks.QUICK),
    "mask_bytes": (masks.mask_bytes, masks.Sizes(), masks.QUICK),
    "sharded_update": (sharding.sharded_update, sharding.Sizes(), sharding.QUICK),
    "training_steps": (steps.training_steps, steps.Sizes(), steps.QUICK),
    "vit_steps": (steps.network_steps, steps.Several(), steps.SEVERAL_QUICK),
    "resnet_steps": (steps.network_steps, steps.Several(networks.ResNet(batch=4)), steps.SEVERAL_QUICK),
    "transformer_steps": (steps.network_steps, steps.Several(networks.Transformer()), steps.SEVERAL_QUICK),
    "first_steps": (overheads.first_steps, overheads.Sizes(), overheads.QUICK),
    "eager_steps": (overheads.eager_steps, overheads.Sizes(), overheads.QUICK),
    "compact_speed": (compaction.compact_speed, compaction.Sizes(), compaction.QUICK),
    "sparse_kernels": (compaction.sparse_kernels, compaction.Kernels(), compaction.QUICK_KERNELS),
    "agent_steps": (agents.agent_steps, agents.Sizes(), agents.QUICK),
    "oneshot_layers": (calibration.oneshot_layers, calibration.Sizes(), calibration.QUICK),
    "accelerator_masks": (accelerators.mask_updates, accelerators.Sizes(), accelerators.QUICK),
    "accelerator_steps": (steps.training_steps, steps.VIT_B, steps.VIT_B_QUICK),
}
_NETWORKS = ("vit_steps", "resnet_steps", "transformer_steps")
# Too large for a CPU: left out there, unless they are asked for by name or with --quick.
ACCELERATOR_GROUPS = ("accelerator_masks", "accelerator_steps")
# Steps of a network in several ways, agents at play, and layers of large models: left out unless asked for by name.
LONG_GROUPS = (*_NETWORKS, "agent_steps", "oneshot_layers")

HEADER = ("row", "ours", "peer", "ratio", "reach", "met")


def bench(
    rows: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(GROUPS)}.")] = "all",
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed calls of each side; default: by row.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it works.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of benchmarks.csv.")] = Path("runs"),
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table into this file too, between its markers.")
    ] = None,
) -> None:
    """Time the core against sorts, NumPy, PyTorch and a bare optimizer; read what sharded programs exchange."""
    on_cpu = jax.default_backend() == "cpu" and not quick
    # With --quick all networks are one and the same.
    left_out = (_NETWORKS[1:] if quick else LONG_GROUPS) + (ACCELERATOR_GROUPS if on_cpu else ())
    default = [name for name in GROUPS if name not in left_out]
    names = default if rows == "all" else [name.strip() for name in rows.split(",")]
    if unknown := [name for name in names if name not in GROUPS]:
        typer.echo(f"Unknown row {unknown[0]!r}. Valid: {', '.join(GROUPS)}.", err=True)
        raise typer.Exit(2)
    console = Console()
    if not peers.has_torch():
        console.print(peers.NO_TORCH, markup=False, soft_wrap=True)
    if rows == "all" and on_cpu:
        console.print(f"No accelerator: {', '.join(ACCELERATOR_GROUPS)} are left out.", soft_wrap=True)
    if rows == "all" and not quick:
        console.print(
            f"Left out because they take long, ask for them by name: {', '.join(LONG_GROUPS)}.", soft_wrap=True
        )
    csv = Results(results / "benchmarks.csv")
    figures: list[Figure] = []
    with console.status("") as status:
        for name in names:
            measure, sizes, small = GROUPS[name]
            chosen = small if quick else sizes
            if repeats is not None:
                own = [field.name for field in dataclasses.fields(chosen) if field.name.endswith("repeats")]
                chosen = dataclasses.replace(chosen, **dict.fromkeys(own, repeats))
            started = time.monotonic()
            for event in measure(chosen):
                if isinstance(event, Figure):
                    figures.append(event)
                    csv.append(row_of(name, event, "quick" if quick else "full", time.monotonic() - started))
                else:
                    status.update(f"{name}: {event}")
            console.print(f"{name}: {time.monotonic() - started:.0f} s")
    table = Table(*HEADER, title=f"{provenance.device()}, medians")
    for figure in figures:
        table.add_row(*cells(figure))
    console.print(table)
    console.print(f"written to {csv.path}", soft_wrap=True)
    if markdown is not None:
        shown = markdown_table(HEADER, [cells(figure) for figure in figures])
        versions = ", ".join(f"{name} {version}" for name, version in provenance.versions().items())
        try:
            update_markdown(markdown, "benchmarks", f"{shown}\n\nMedians; {provenance.device()}; {versions}.")
        except ValueError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None


def cells(figure: Figure) -> list[str]:
    return [
        figure.row,
        f"{figure.ours:.4g} {figure.unit}",
        f"{figure.peer:.4g} {figure.unit} ({figure.peer_name})",
        f"{figure.ratio:.3g}x faster" if figure.faster else f"{figure.ratio:.{3 if figure.ratio > 0.01 else 6}f}x",
        str(figure.reach),
        figure.met,
    ]


def row_of(group: str, figure: Figure, preset: str, seconds: float) -> Row:
    details = {"ours": figure.ours, "peer": figure.peer, "unit": figure.unit, "reach": str(figure.reach)}
    config = {"group": group, **figure.config}
    return Row.measured(
        baseline="benchmarks",
        preset=preset,
        method=figure.row,
        sparsity=peers.SPARSITY,
        sparsity_reached=peers.SPARSITY,
        seed=0,
        steps=figure.config.get("repeats", [1])[0],
        metric=f"{figure.peer_name} / ours" if figure.faster else f"ours / {figure.peer_name}",
        value=figure.ratio,
        config=config,
        details=details,
        seconds=round(seconds, 3),
    )
