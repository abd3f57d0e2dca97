"""What a baseline is: a name, presets, and a function that carries out one run.

The runner knows nothing else, so a federated simulation or a reinforcement learning loop fits as well
as supervised training: `train` is a generator that says how far it is and ends with what it measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.methods import all_methods, is_dense


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, which becomes one row of the results. `preset` is the baseline's own frozen dataclass."""

    baseline: str
    preset_name: str
    preset: Any
    method: str
    sparsity: float
    seed: int

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the numbers, ready for JSON."""
        return {
            "baseline": self.baseline,
            "method": self.method,
            "sparsity": self.sparsity,
            "seed": self.seed,
            "preset": dataclasses.asdict(self.preset),
        }

    @property
    def config_hash(self) -> str:
        return hash_of(self.config)

    @property
    def title(self) -> str:
        how_sparse = "" if is_dense(self.method) else f" {self.sparsity:.4g}"
        return f"{self.method}{how_sparse} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is. `total` is in the baseline's own unit: steps, rounds, frames."""

    done: int
    total: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run measured: the last thing that `train` yields."""

    value: float
    sparsity_reached: float
    steps: int
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a baseline's runs spend: a number in `Outcome.details`, for a column and a plot of its own.

    `header` names the column, `label` the axis of the plot.
    """

    key: str
    label: str
    header: str


@dataclasses.dataclass(frozen=True)
class Curve:
    """The metric as a run goes on: a list of numbers in `Outcome.details`, at equal distances, for a plot of its own.

    `unit` is what `Outcome.steps` counts, on the axis of the plot.
    """

    key: str
    unit: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a training step, traced with shapes in place of arrays: `jax.stages.Lowered`.

    `times` is how often a step runs it.
    """

    lowered: Any
    times: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A step of a run as its host makes it, for `--dry-run`: nothing is computed.

    `params` and `opt_state` are shapes, with their shardings where a device has not all of them. `updater` is the
    algorithm, None if dense; `steps` those of the whole run, and `unit` what one is.
    """

    programs: Sequence[Program]
    params: Any
    opt_state: Any
    updater: Any
    steps: int
    devices: int
    unit: str = "steps"


class NotReady(Exception):  # noqa: N818  (no error of the program: something has to be done first)
    """What a baseline needs is not there; the message says what to do."""


def nothing(preset: Any) -> None:
    """The preparation of a baseline that needs none."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A baseline. Make one in a module of its own and name that module in `registry.py`."""

    name: str
    summary: str
    metric: str
    presets: Mapping[str, Any]
    train: Callable[[Run, Checkpoint], Iterator[Progress | Outcome]]
    """Carries out one run: yields `Progress` now and then, and one `Outcome` at the end."""
    prepare: Callable[[Any], None] = nothing
    """Called with the preset before the first run; raises `NotReady` where something is missing."""
    abstract: Callable[[Run], TrainStep] | None = None
    """Makes a step of a run for the devices at hand without computing anything, where its host lets one."""
    candidates: Callable[[Any], Mapping[str, Any]] | None = None
    """Presets, by what tells them apart, of which one is chosen by dense runs on data held out of the training data."""
    settings: Callable[[Run], str] | None = None
    """What else decides the numbers of a run, where its preset names files of the host, such as those of gin."""
    variants: tuple[str, ...] = ()
    """Methods of its own beside the common ones, as `method+option`."""
    only: tuple[str, ...] = ()
    """The methods that it has, where they are not the common ones."""
    also: tuple[str, ...] = ()
    """Further measures: numbers in `Outcome.details`, a column each."""
    cost: Cost | None = None
    curve: Curve | None = None
    compiles_anew: bool = False
    """Whether its host compiles for each run, so that programs are of no use to the next one."""
    sparsities: tuple[float, ...] = (0.8, 0.95)
    """Those that are run unless others are asked for."""

    @property
    def default_preset(self) -> str:
        """The first one."""
        return next(iter(self.presets))

    @property
    def methods(self) -> list[str]:
        return [*(self.only or all_methods()), *self.variants]

    def run(self, preset: str, method: str, sparsity: float, seed: int) -> Run:
        sparsity = 0.0 if is_dense(method) else sparsity
        return Run(self.name, preset, self.presets[preset], method, sparsity, seed)

    def digest(self, run: Run) -> str | None:
        """Of the settings beside the preset, if there are any: rows from before one changed do not count."""
        return None if self.settings is None else hashlib.sha256(self.settings(run).encode()).hexdigest()[:12]

    def plan(self, preset: str, methods: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]) -> list[Run]:
        """All runs, those that differ only by their seed side by side: they share one compilation."""
        return [
            self.run(preset, method, sparsity, seed)
            for method in methods
            for sparsity in ([0.0] if is_dense(method) else sparsities)
            for seed in seeds
        ]


def to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def hash_of(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:12]
