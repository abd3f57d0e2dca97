"""The paper's table with one command: what its rows are at each scale, and how all runs are carried out.

    jaxpruner-baselines suite                 # embedded scale, 3 seeds: hours on 2 cores
    jaxpruner-baselines suite --seeds 1 --jobs 2 --tasks fed_emnist,dqn_cnn
    jaxpruner-baselines suite --methods later # the same rows with what later papers compare with
    jaxpruner-baselines suite --scale wide --seeds 5   # larger networks and data, which tell methods apart
    jaxpruner-baselines suite --scale wide --sparser   # and some of its rows once more, at higher sparsities
    jaxpruner-baselines suite --scale paper   # weeks, and data that have to be fetched first

Each part of the suite is a process of its own: hosts do not meet, one that crashes takes nothing with it, and several
can run at once, each on its own share of the cores.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bars

from jaxpruner_baselines import registry, runner
from jaxpruner_baselines.baseline import Baseline, NotReady, Progress, Run
from jaxpruner_baselines.hush import hushed
from jaxpruner_baselines.methods import LATER
from jaxpruner_baselines.results import Row
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
# Further columns: what later papers compare with, but for what scores with a loss, which no stock trainer hands over.
LATER_METHODS = tuple(method for method in LATER if method not in ("grasp", "synflow"))
COLUMNS = {"paper": tuple(METHODS), "later": LATER_METHODS}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A baseline at one scale. `seconds` is about what a run takes on one core, to tell how long all will take.

    `sparser` are higher sparsities, of rows that the paper's table does not have.
    """

    preset: str
    sparsity: float
    seconds: float | None = None
    sparser: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """A row of the paper's table; `without` are methods that need what its trainer lacks."""

    title: str
    baseline: str
    scales: Mapping[str, Setting]
    without: tuple[str, ...] = ()


SPARSER = (0.9, 0.95)
# Scenic's ViT starts with a last layer of zeros, behind which all scores of the first step are 0.
_HIDDEN = ("snip",)
TASKS = {
    "resnet": Task(
        "ResNet-50",
        "resnet",
        {
            "embedded": Setting("digits", 0.9, 50),
            "wide": Setting("fashion", 0.8, 90, SPARSER),
            "paper": Setting("paper", 0.8),
            "smoke": Setting("smoke", 0.8, 10),
        },
        without=("adam_fisher",),  # trained by SGD, which has no second moment
    ),
    "vit_90": Task(
        "ViT-B/16, 90 epochs",
        "vit",
        {
            "embedded": Setting("digits_short", 0.98, 10),
            "wide": Setting("fashion_short", 0.8, 60, SPARSER),
            "paper": Setting("paper", 0.8),
            "smoke": Setting("smoke", 0.8, 10),
        },
        without=_HIDDEN,
    ),
    "vit_300": Task(
        "ViT-B/16, 300 epochs",
        "vit",
        {
            "embedded": Setting("digits", 0.98, 20),
            "wide": Setting("fashion", 0.8, 200),
            "paper": Setting("paper_300ep", 0.8),
        },
        without=_HIDDEN,
    ),
    "fed_emnist": Task(
        "Fed. EMNIST",
        "fed_emnist",
        {
            "embedded": Setting("digits", 0.8, 30),
            "wide": Setting("shakespeare", 0.8, 90),
            "paper": Setting("paper", 0.8),
            "smoke": Setting("smoke", 0.8, 10),
        },
    ),
    "t5": Task(
        "T5-Base",
        "t5",
        {
            "embedded": Setting("tiny", 0.8, 150),
            "wide": Setting("texts", 0.8, 150),
            "paper": Setting("paper", 0.8),
            "smoke": Setting("smoke", 0.8, 10),
        },
    ),
    "dqn_cnn": Task(
        "DQN-CNN",
        "dqn",
        {
            "embedded": Setting("cartpole", 0.98, 40),
            "wide": Setting("lunarlander", 0.98, 130),
            "paper": Setting("paper", 0.98),
            "smoke": Setting("smoke", 0.75, 10),
        },
    ),
    "dqn_resnet": Task(
        "DQN-ResNet", "dqn", {"embedded": Setting("acrobot", 0.98, 45), "paper": Setting("paper_resnet", 0.98)}
    ),
}
SCALES = ("embedded", "wide", "paper", "smoke")


def at_scale(scale: str) -> dict[str, Task]:
    return {name: task for name, task in TASKS.items() if scale in task.scales}


def absent(scale: str) -> dict[str, ImportError]:
    """Why tasks cannot even be looked at here, by their titles: their host is missing."""
    found = {}
    for task in at_scale(scale).values():
        try:
            registry.get(task.baseline)
        except ImportError as error:
            found[task.title] = error
    return found


def sparsity_of(baseline: Baseline, preset: str) -> float:
    """The sparsity of a baseline's preset in the table; of one that is not in it, the baseline's first."""
    settings = (
        setting for task in TASKS.values() if task.baseline == baseline.name for setting in task.scales.values()
    )
    return next((setting.sparsity for setting in settings if setting.preset == preset), baseline.sparsities[0])


@dataclasses.dataclass(frozen=True)
class Part:
    """Runs of one task that a process carries out; each takes about `each` seconds, None where nobody knows."""

    task: str
    runs: tuple[Run, ...]
    each: float | None

    @property
    def weight(self) -> float:
        """The share of the work that a run is, beside those of other parts."""
        return self.each or 1.0

    @property
    def seconds(self) -> float:
        return (self.each or 0.0) * len(self.runs)


def runs_of(
    task: Task, scale: str, seeds: Sequence[int], methods: Sequence[str] = COLUMNS["paper"], sparser: bool = False
) -> list[Run]:
    setting = task.scales[scale]
    methods = [method for method in methods if method not in task.without]
    sparsities = [setting.sparsity, *(setting.sparser if sparser else ())]
    return registry.get(task.baseline).plan(setting.preset, methods, sparsities, seeds)


def plan(
    names: Sequence[str],
    scale: str,
    seeds: Sequence[int],
    folder: Path,
    jobs: int,
    console: Console,
    methods: Sequence[str] = COLUMNS["paper"],
    sparser: bool = False,
) -> list[Part]:
    """What is left to do, the longest first; says on the console which tasks cannot run here, and why."""
    parts = []
    for name in names:
        task = TASKS[name]
        try:
            baseline = registry.get(task.baseline)
            baseline.prepare(baseline.presets[task.scales[scale].preset])
        except Exception as error:  # of one host; the others go on
            why = str(error) if isinstance(error, ImportError | NotReady) else f"{type(error).__name__}: {error}"
            console.print(f"[bold]{name}[/] ({task.title}) cannot run here: {escape(why)}\n", soft_wrap=True)
            continue
        todo = runner.unfinished(baseline, runs_of(task, scale, seeds, methods, sparser), folder)
        # Every job has a share of each task: they end at about the same time.
        shares = [todo[i::jobs] for i in range(jobs)]
        parts += [Part(name, tuple(share), task.scales[scale].seconds) for share in shares if share]
    return sorted(parts, key=lambda part: -part.seconds)


def carry_out(parts: Sequence[Part], folder: Path, jobs: int, console: Console) -> list[str]:
    """Carries out all parts, `jobs` at a time. Returns what failed, a line each."""
    waiting, places = collections.deque(parts), collections.deque(range(jobs))
    workers: dict[Any, _Worker] = {}  # by the pipe that each talks through
    failures: list[str] = []
    total, ended, started = sum(len(part.runs) for part in parts), 0, time.monotonic()
    work, done = sum(part.weight * len(part.runs) for part in parts), 0.0
    with Bars(*runner.COLUMNS, console=console, transient=True) as bars:
        whole = bars.add_task("all runs", total=total, note="")

        def end(part: Part, run: Run, event: Row | Failure) -> None:
            nonlocal ended, done
            ended, done = ended + 1, done + part.weight
            if isinstance(event, Failure):
                failures.append(f"{part.task}: {run.title}: {event.message}")
            left = runner.remaining(time.monotonic() - started, done, work)
            bars.update(whole, completed=ended, note=f"about {left} left")
            text = f"[{ended}/{total}] {part.task}: {runner.told(run, event)}; about {left} left"
            bars.console.print(text, highlight=False, soft_wrap=True)

        try:
            while waiting or workers:
                while waiting and places:
                    part, place = waiting.popleft(), places.popleft()
                    pipe, worker = _Worker.start(part, place, folder, jobs)
                    workers[pipe] = worker
                    worker.line = bars.add_task(f"{part.task}: starts", total=None, note="")
                for pipe in multiprocessing.connection.wait(list(workers)):
                    worker = workers[pipe]
                    task = worker.part.task
                    try:
                        event = pipe.recv()
                    except EOFError:  # the process has ended
                        worker.process.join()
                        bars.remove_task(worker.line)
                        places.append(worker.place)
                        del workers[pipe]
                        if worker.left:
                            crashed = Failure(f"its process ended with {worker.process.exitcode}")
                            end(worker.part, worker.left.popleft(), crashed)
                        if worker.left:
                            waiting.appendleft(dataclasses.replace(worker.part, runs=tuple(worker.left)))
                        continue
                    run = worker.left[0]
                    if isinstance(event, Progress):
                        text = f"{task}: {run.title}"
                        bars.update(
                            worker.line, description=text, completed=event.done, total=event.total, note=event.note
                        )
                    else:
                        end(worker.part, worker.left.popleft(), event)
        finally:
            for worker in workers.values():
                worker.process.terminate()
            for worker in workers.values():
                worker.process.join(10)
                worker.process.kill()
    return failures


@dataclasses.dataclass
class _Worker:
    """A process that carries out a part, and the runs that it has not ended, in order."""

    part: Part
    process: Any
    place: int
    left: collections.deque[Run]
    line: Any = None

    @classmethod
    def start(cls, part: Part, place: int, folder: Path, jobs: int) -> tuple[Any, _Worker]:
        context = multiprocessing.get_context("spawn")  # a fork of a process that has used JAX may hang
        here, there = context.Pipe(duplex=False)
        cores = sorted(os.sched_getaffinity(0))
        process = context.Process(
            target=_work,
            # The runs are packed, so that their host is not imported before the process is ready for it.
            args=(there, part.task, pickle.dumps(part.runs), folder, cores[place::jobs] or cores),
            daemon=True,
        )
        process.start()
        there.close()  # the process has the only other end, so that the pipe ends with it
        return here, cls(part, process, place, collections.deque(part.runs))


def _work(pipe: Any, task: str, packed: bytes, folder: Path, cores: Sequence[int]) -> None:
    """In a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it stops it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.sched_setaffinity(0, cores)
    try:
        with hushed():
            runs = pickle.loads(packed)
        baseline = registry.get(TASKS[task].baseline)
    except Exception as error:
        pipe.send(Failure(f"{type(error).__name__}: {error}"))
        raise
    for _, event in runner.events(baseline, runs, folder):
        pipe.send(event)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def expected(parts: Sequence[Part], jobs: int) -> str:
    """How long it should take, for the console."""
    count = sum(len(part.runs) for part in parts)
    if not all(part.seconds for part in parts):
        return f"{count} runs to do. How long they take depends on the accelerator: days for each."
    seconds = sum(part.seconds for part in parts) / min(jobs, max(len(os.sched_getaffinity(0)), 1))
    return (
        f"{count} runs to do, about {datetime.timedelta(seconds=60 * round(seconds / 60 + 0.5))} with {jobs} at a time."
    )
