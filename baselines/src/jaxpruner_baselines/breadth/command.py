"""The command that makes the breadth table: prints it, writes the CSV."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jaxpruner_baselines import provenance
from jaxpruner_baselines.breadth import cases, torch_peer
from jaxpruner_baselines.breadth.architectures import ARCHITECTURES
from jaxpruner_baselines.breadth.measure import SEED, SPARSITY, Measured, measure
from jaxpruner_baselines.hush import hushed
from jaxpruner_baselines.report import markdown_table, update_markdown
from jaxpruner_baselines.results import Results, Row

HEADER = (
    "architecture", "groups", "frozen", "units removed", "FLOPs", "parameters", "difference", "gradients", "find",
    "compact", "speed-up",
)  # fmt: skip
PEER_HEADER = (
    "architecture", "ours: groups", "equal outputs", "find", "Torch-Pruning: groups", "pruned by half",
    "equal outputs", "find",
)  # fmt: skip
EQUAL = 1e-4  # of the largest output


def breadth(
    architectures: Annotated[str, typer.Option(help=f"Semicolon-separated, of: {'; '.join(ARCHITECTURES)}.")] = "all",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each side.")] = 11,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it works.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of breadth.csv.")] = Path("runs"),
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables into this file too, between their markers.")
    ] = None,
) -> None:
    """Prune many architectures by half, compact them, and compare; beside them Torch-Pruning, where it is installed."""
    names = list(ARCHITECTURES) if architectures == "all" else [name.strip() for name in architectures.split(";")]
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        typer.echo(f"Unknown architecture {unknown[0]!r}. Valid: {'; '.join(ARCHITECTURES)}.", err=True)
        raise typer.Exit(2)
    console = Console()
    csv = Results(results / "breadth.csv")
    size, preset = (cases.QUICK, "quick") if quick else (cases.Size(), "full")
    ours, missing = _ours(names, size, preset, 1 if quick else repeats, csv, console)
    if torch_peer.is_installed():
        theirs = _theirs(names, size, preset, csv, console)
    else:
        theirs = {}
        console.print(torch_peer.NOT_INSTALLED, markup=False, soft_wrap=True)

    table, peer_table = [cells(name, found) for name, found in ours.items()], _peer_cells(ours, theirs)
    for title, header, lines in (
        ("half of the units", HEADER, table),
        ("beside Torch-Pruning", PEER_HEADER, peer_table),
    ):
        shown = Table(*header, title=f"{title}; {provenance.device()}")
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
    console.print(f"written to {csv.path}", soft_wrap=True)
    if markdown is not None:
        versions = provenance.versions() | (torch_peer.versions() if theirs else {})
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        notes = "".join(f"\n\nNot run: {name} ({why})." for name, why in missing.items())
        text = (
            f"{markdown_table(HEADER, table)}\n\n{markdown_table(PEER_HEADER, peer_table)}{notes}\n\n"
            f"Medians; {provenance.device()}; seed {SEED}; commit {provenance.commit()}; {told}."
        )
        try:
            update_markdown(markdown, "breadth", text)
        except ValueError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None


def _ours(
    names: list[str], size: cases.Size, preset: str, repeats: int, csv: Results, console: Console
) -> tuple[dict[str, Measured], dict[str, str]]:
    found: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    with console.status("") as status:
        for name in names:
            started = time.monotonic()
            try:
                with hushed():
                    case = ARCHITECTURES[name](size)
            except ImportError as error:
                missing[name] = str(error)
                console.print(f"{name}: left out, {error}", markup=False, soft_wrap=True)
                continue
            steps = measure(case, repeats)
            try:
                while True:
                    status.update(f"{name}: {next(steps)}")
            except StopIteration as ended:
                found[name] = ended.value
            except Exception as error:  # the others go on
                missing[name] = f"{type(error).__name__}: {str(error)[:300]}"
                console.print(f"{name}: failed, {missing[name]}", markup=False, soft_wrap=True)
                continue
            seconds = time.monotonic() - started
            csv.append(
                _row(name, preset, "speed-up of the forward pass", found[name].speedup, size, found[name], seconds)
            )
            console.print(f"{name}: {seconds:.0f} s", markup=False)
    return found, missing


def _theirs(
    names: list[str], size: cases.Size, preset: str, csv: Results, console: Console
) -> dict[str, torch_peer.Measured]:
    found = {}
    for name in [name for name in torch_peer.names() if name in names]:
        started = time.monotonic()
        found[name] = one = torch_peer.measure(name, size)
        seconds = time.monotonic() - started
        value = float("nan") if one.difference is None else one.difference
        csv.append(_row(name, preset, "Torch-Pruning: largest difference", value, size, one, seconds))
        console.print(f"{name}, Torch-Pruning: {seconds:.0f} s", markup=False)
    return found


def _row(name: str, preset: str, metric: str, value: float, size: cases.Size, found: Any, seconds: float) -> Row:
    is_ours = isinstance(found, Measured)
    config = {"architecture": name, "size": dataclasses.asdict(size), "library": "ours" if is_ours else "torch-pruning"}
    details = dataclasses.asdict(found) | ({} if is_ours else torch_peer.versions())
    return Row.measured(
        baseline="breadth",
        preset=preset,
        method=name,
        sparsity=SPARSITY,
        sparsity_reached=round(found.units_removed, 6),
        seed=SEED,
        steps=0,
        metric=metric,
        value=value,
        config=config,
        details=details,
        seconds=round(seconds, 3),
    )


def cells(name: str, found: Measured) -> list[str]:
    return [
        name,
        str(found.groups),
        str(found.frozen),
        f"{found.units_removed:.1%}",
        f"{found.flops:.3f}",
        f"{found.params:.3f}",
        f"{found.difference:.0e}",
        "-" if found.gradients is None else f"{found.gradients:.0e}",
        f"{found.find_seconds:.2f} s",
        f"{found.compact_seconds:.2f} s",
        f"{found.speedup:.2f}x",
    ]


def _peer_cells(ours: dict[str, Measured], theirs: dict[str, torch_peer.Measured]) -> list[list[str]]:
    lines = []
    for name, peer in theirs.items():
        mine = ours.get(name)
        equal = "-" if peer.difference is None else _equal(peer.difference)
        worked = "yes" if peer.error is None else f"no: {peer.error}"
        lines.append([
            name,
            *(["-"] * 3 if mine is None else
              [str(mine.groups), _equal(mine.difference), f"{mine.find_seconds:.2f} s"]),
            str(peer.groups), worked, equal, f"{peer.find_seconds:.2f} s",
        ])  # fmt: skip
    return lines


def _equal(difference: float) -> str:
    return "yes" if difference <= EQUAL else f"no ({difference:.0e})"
