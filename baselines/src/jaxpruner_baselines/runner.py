"""Carries out a plan of runs: skips what is finished, shows progress, appends a row per run."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from jaxpruner_baselines.baseline import Baseline, Outcome, Run
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.results import Results, Row


def results_of(baseline: Baseline, folder: Path) -> Results:
    return Results(folder / f"{baseline.name}.csv")


def carry_out(baseline: Baseline, runs: Sequence[Run], folder: Path, console: Console) -> int:
    """Carries out those of `runs` that have no row yet. Returns how many that were."""
    results = results_of(baseline, folder)
    finished = results.finished()
    todo = []
    for run in runs:
        if run.config_hash in finished:
            console.print(f"skipped [bold]{run.title}[/]: finished before, in {results.path}", soft_wrap=True)
        else:
            todo.append(run)

    for preset in {run.preset_name: run.preset for run in todo}.values():
        baseline.prepare(preset)
    if todo:
        _compile_once(folder / "compiled")
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("all runs", total=len(todo), note="")
        current = progress.add_task("", total=1, note="")
        started = time.monotonic()
        for number, run in enumerate(todo, start=1):
            progress.update(current, description=run.title)
            run_started = time.monotonic()
            checkpoint = Checkpoint(folder / "checkpoints" / f"{baseline.name}-{run.config_hash}.msgpack")
            outcome = _follow(baseline, run, checkpoint, progress, current)
            seconds = time.monotonic() - run_started
            results.append(Row.of(run, baseline.metric, outcome, seconds))
            checkpoint.delete()
            per_run = (time.monotonic() - started) / number
            left = datetime.timedelta(seconds=round(per_run * (len(todo) - number)))
            progress.update(whole, completed=number, note=f"about {left} left")
            progress.console.print(
                f"[{number}/{len(todo)}] {run.title}: {baseline.metric} [bold]{outcome.value:.4f}[/], "
                f"sparsity {outcome.sparsity_reached:.4f}, {seconds:.1f} s; about {left} left",
                highlight=False,
                soft_wrap=True,
            )
    return len(todo)


def _follow(baseline: Baseline, run: Run, checkpoint: Checkpoint, progress: Progress, task: TaskID) -> Outcome:
    for event in baseline.train(run, checkpoint):
        if isinstance(event, Outcome):
            return event
        progress.update(task, completed=event.done, total=event.total, note=event.note)
    raise RuntimeError(f"{baseline.name}: train() ended without an Outcome. Yield one as the last thing.")


def _compile_once(folder: Path) -> None:
    """Keeps compiled programs on disk: the same method at another sparsity often is the same program."""
    if jax.config.jax_compilation_cache_dir is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        jax.config.update("jax_compilation_cache_dir", str(folder))
