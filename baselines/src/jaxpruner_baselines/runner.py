"""Carries out a plan of runs: skips what is finished, shows progress, appends a row per run."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from jaxpruner_baselines.background import release_programs
from jaxpruner_baselines.baseline import Baseline, Outcome, Progress, Run
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.results import SETTINGS, Results, Row

COLUMNS = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that raised."""

    message: str


def results_of(baseline: Baseline, folder: Path) -> Results:
    return Results(folder / f"{baseline.name}.csv")


def unfinished(baseline: Baseline, runs: Sequence[Run], folder: Path) -> list[Run]:
    """Those that have no row yet, or one of other settings."""
    finished = results_of(baseline, folder).finished()
    return [
        run
        for run in runs
        if run.config_hash not in finished or finished[run.config_hash] not in (None, baseline.digest(run))
    ]


def events(baseline: Baseline, runs: Sequence[Run], folder: Path) -> Iterator[tuple[Run, Progress | Row | Failure]]:
    """Carries out runs one after the other, and says how far each is; the last of a run is its row or its failure."""
    _compile_once(folder / "compiled")
    for run in runs:
        # A run that was stopped does not go on with other settings.
        name = "-".join(filter(None, (baseline.name, run.config_hash, baseline.digest(run))))
        checkpoint = Checkpoint(folder / "checkpoints" / f"{name}.msgpack")
        started = time.monotonic()
        try:
            for event in baseline.train(run, checkpoint):
                if isinstance(event, Outcome):
                    event = _with_digest(event, baseline.digest(run))
                    row = Row.of(run, baseline.metric, event, time.monotonic() - started)
                    break
                yield run, event
            else:
                raise RuntimeError(f"{baseline.name}: train() ended without an Outcome. Yield one as the last thing.")
        except Exception as error:  # of a host; the other runs go on
            yield run, Failure(f"{type(error).__name__}: {error}")
            continue
        results_of(baseline, folder).append(row)
        checkpoint.delete()
        if baseline.compiles_anew:
            release_programs()
        yield run, row


def _with_digest(outcome: Outcome, digest: str | None) -> Outcome:
    if digest is None:
        return outcome
    return dataclasses.replace(outcome, details={**outcome.details, SETTINGS: digest})


def carry_out(baseline: Baseline, runs: Sequence[Run], folder: Path, console: Console) -> tuple[int, int]:
    """Carries out those of `runs` that have no row yet. Returns how many were done, and how many failed."""
    todo = unfinished(baseline, runs, folder)
    for run in runs:
        if run not in todo:
            path = results_of(baseline, folder).path
            console.print(f"skipped [bold]{run.title}[/]: finished before, in {path}", soft_wrap=True)
    for preset in {run.preset_name: run.preset for run in todo}.values():
        baseline.prepare(preset)
    done = failed = 0
    if not todo:
        return done, failed
    with Bars(*COLUMNS, console=console, transient=True) as bars:
        whole = bars.add_task("all runs", total=len(todo), note="")
        current = bars.add_task("", total=1, note="")
        started = time.monotonic()
        for run, event in events(baseline, todo, folder):
            if isinstance(event, Progress):
                bars.update(current, description=run.title, completed=event.done, total=event.total, note=event.note)
                continue
            done, failed = (done, failed + 1) if isinstance(event, Failure) else (done + 1, failed)
            number = done + failed
            left = remaining(time.monotonic() - started, number, len(todo))
            bars.update(whole, completed=number, note=f"about {left} left")
            bars.console.print(
                f"[{number}/{len(todo)}] {told(run, event)}; about {left} left", highlight=False, soft_wrap=True
            )
    return done, failed


def told(run: Run, event: Row | Failure) -> str:
    """How a run ended, for the console."""
    if isinstance(event, Failure):
        return f"{run.title}: [red]failed[/], {escape(event.message)}"
    return (
        f"{run.title}: {event.metric} [bold]{event.value:.4f}[/], sparsity {event.sparsity_reached:.4f}, "
        f"{event.seconds:.1f} s"
    )


def remaining(seconds: float, done: float, total: float) -> datetime.timedelta:
    """How long the rest takes if it goes on like what is done."""
    return datetime.timedelta(seconds=round(seconds / done * (total - done)))


def _compile_once(folder: Path) -> None:
    """Keeps compiled programs on disk: the same method at another sparsity often is the same program."""
    if jax.config.jax_compilation_cache_dir is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        jax.config.update("jax_compilation_cache_dir", str(folder))
