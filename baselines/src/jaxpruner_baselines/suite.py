"""The paper's table with one command: what its rows are at each scale, and how all runs are carried out.

    jaxpruner-baselines suite                 # embedded scale, 3 seeds: hours on 2 cores
    jaxpruner-baselines suite --seeds 1 --jobs 2 --tasks fed_emnist,dqn_cnn
    jaxpruner-baselines suite --scale paper   # weeks, and data that have to be fetched first

Each part of the suite is a process of its own: hosts do not meet, one that crashes takes nothing with it, and several
can run at once, each on its own share of the cores.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import multiprocessing
import os
import queue
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bars

from jaxpruner_baselines import registry, runner
from jaxpruner_baselines.baseline import Baseline, NotReady, Progress, Run
from jaxpruner_baselines.runner import Failure

# The columns of the paper's table.
METHODS = {
    "dense": "dense",
    "random": "random",
    "magnitude": "magnitude",
    "saliency": "saliency",
    "global_magnitude": "global magnitude",
    "magnitude_ste": "STE",
    "static_sparse": "static sparse",
    "set": "SET",
    "rigl": "RigL",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A baseline at one scale. `seconds` is about what a run takes on one core, to tell how long all will take."""

    preset: str
    sparsity: float
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A row of the paper's table."""

    title: str
    baseline: str
    scales: Mapping[str, Setting]


TASKS = {
    "resnet": Task(
        "ResNet-50",
        "resnet",
        {"embedded": Setting("digits", 0.9, 50), "paper": Setting("paper", 0.8), "smoke": Setting("smoke", 0.8, 10)},
    ),
    "vit_90": Task(
        "ViT-B/16, 90 epochs",
        "vit",
        {
            "embedded": Setting("digits_short", 0.98, 10),
            "paper": Setting("paper", 0.8),
            "smoke": Setting("smoke", 0.8, 10),
        },
    ),
    "vit_300": Task(
        "ViT-B/16, 300 epochs", "vit", {"embedded": Setting("digits", 0.98, 20), "paper": Setting("paper_300ep", 0.8)}
    ),
    "fed_emnist": Task(
        "Fed. EMNIST",
        "fed_emnist",
        {"embedded": Setting("digits", 0.8, 30), "paper": Setting("paper", 0.8), "smoke": Setting("smoke", 0.8, 10)},
    ),
    "t5": Task(
        "T5-Base",
        "t5",
        {"embedded": Setting("tiny", 0.8, 150), "paper": Setting("paper", 0.8), "smoke": Setting("smoke", 0.8, 10)},
    ),
    "dqn_cnn": Task(
        "DQN-CNN",
        "dqn",
        {
            "embedded": Setting("cartpole", 0.98, 40),
            "paper": Setting("paper", 0.98),
            "smoke": Setting("smoke", 0.75, 10),
        },
    ),
    "dqn_resnet": Task(
        "DQN-ResNet", "dqn", {"embedded": Setting("acrobot", 0.98, 45), "paper": Setting("paper_resnet", 0.98)}
    ),
}
SCALES = ("embedded", "paper", "smoke")


@dataclasses.dataclass(frozen=True)
class Part:
    """Runs of one task that a process carries out."""

    task: str
    runs: tuple[Run, ...]
    seconds: float


def runs_of(task: Task, scale: str, seeds: Sequence[int]) -> list[Run]:
    setting = task.scales[scale]
    return registry.get(task.baseline).plan(setting.preset, list(METHODS), [setting.sparsity], seeds)


def plan(
    names: Sequence[str], scale: str, seeds: Sequence[int], folder: Path, jobs: int, console: Console
) -> list[Part]:
    """What is left to do, the longest first; says on the console which tasks cannot run here, and why."""
    parts = []
    for name in names:
        task = TASKS[name]
        if scale not in task.scales:
            continue
        try:
            baseline = registry.get(task.baseline)
            baseline.prepare(baseline.presets[task.scales[scale].preset])
        except (ImportError, NotReady) as error:
            console.print(f"[bold]{name}[/] ({task.title}) cannot run here: {error}\n", soft_wrap=True)
            continue
        todo = runner.unfinished(baseline, runs_of(task, scale, seeds), folder)
        each = task.scales[scale].seconds or 0.0
        # Every job has a share of each task: they end at about the same time.
        shares = [todo[i::jobs] for i in range(jobs)]
        parts += [Part(name, tuple(share), each * len(share)) for share in shares if share]
    return sorted(parts, key=lambda part: -part.seconds)


def carry_out(parts: Sequence[Part], folder: Path, jobs: int, console: Console) -> list[str]:
    """Carries out all parts, `jobs` at a time. Returns what failed, a line each."""
    waiting = collections.deque(enumerate(parts))
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used JAX may hang
    heard = context.Queue()
    cores = sorted(os.sched_getaffinity(0))
    places = collections.deque(range(jobs))
    active: dict[int, tuple[Any, int, set[str]]] = {}  # part -> its process, place, and runs that have not ended
    failures: list[str] = []
    total, ended, started = sum(len(part.runs) for part in parts), 0, time.monotonic()
    with Bars(*runner.COLUMNS, console=console, transient=True) as bars:
        whole = bars.add_task("all runs", total=total, note="")
        lines: dict[int, Any] = {}
        try:
            while waiting or active:
                while waiting and places:
                    number, part = waiting.popleft()
                    place = places.popleft()
                    process = context.Process(
                        target=_work, args=(number, part, folder, cores[place::jobs] or cores, heard), daemon=True
                    )
                    process.start()
                    active[number] = process, place, {run.title for run in part.runs}
                    lines[number] = bars.add_task(f"{part.task}: starts", total=None, note="")
                try:
                    number, run, event = heard.get(timeout=0.5)
                except queue.Empty:
                    for number, (process, place, left) in list(active.items()):
                        if not process.is_alive():
                            part = parts[number]
                            failures += [f"{part.task}: {title}: its process ended" for title in sorted(left)]
                            ended += len(left)
                            bars.remove_task(lines[number])
                            places.append(place)
                            del active[number]
                    continue
                task = parts[number].task
                if isinstance(event, Progress):
                    text = f"{task}: {run.title}"
                    bars.update(
                        lines[number], description=text, completed=event.done, total=event.total, note=event.note
                    )
                    continue
                ended += 1
                active[number][2].discard(run.title)
                if isinstance(event, Failure):
                    failures.append(f"{task}: {run.title}: {event.message}")
                left = runner.remaining(time.monotonic() - started, ended, total)
                bars.update(whole, completed=ended, note=f"about {left} left")
                text = f"[{ended}/{total}] {task}: {runner.told(run, event)}; about {left} left"
                bars.console.print(text, highlight=False, soft_wrap=True)
        finally:
            for process, *_ in active.values():
                process.terminate()
            for process, *_ in active.values():
                process.join()
    return failures


def expected(parts: Sequence[Part], jobs: int) -> str:
    """How long it should take, for the console."""
    count = sum(len(part.runs) for part in parts)
    if not all(part.seconds for part in parts):
        return f"{count} runs to do. How long they take depends on the accelerator: days for each."
    seconds = sum(part.seconds for part in parts) / min(jobs, max(len(os.sched_getaffinity(0)), 1))
    return (
        f"{count} runs to do, about {datetime.timedelta(seconds=60 * round(seconds / 60 + 0.5))} with {jobs} at a time."
    )


def _work(number: int, part: Part, folder: Path, cores: Sequence[int], tell: Any) -> None:
    """In a process of its own."""
    os.sched_setaffinity(0, cores)
    baseline: Baseline = registry.get(TASKS[part.task].baseline)
    for run, event in runner.events(baseline, part.runs, folder):
        tell.put((number, run, event))
