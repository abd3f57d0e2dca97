"""A run's training step without its machine: compiled for virtual devices with shapes in place of arrays, and read.

    jaxpruner-baselines run vit --preset paper --dry-run --devices 8

Nothing is trained, no data of the paper's presets are read and nothing of the size of the parameters is allocated, so
that a step of a network that needs a slice of TPUs compiles on a laptop. That needs a process of its own, since XLA
takes the number of virtual devices when it starts.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from jaxpruner import trees
from jaxpruner.training.projection import find_states
from jaxpruner_baselines import registry
from jaxpruner_baselines.background import release_programs
from jaxpruner_baselines.baseline import Run, TrainStep
from jaxpruner_baselines.benchmarks import hlo
from jaxpruner_baselines.hush import hushed
from jaxpruner_baselines.methods import is_dense


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What JAX calls a device: published peak of dense bfloat16 products, in TFLOP/s, and memory in GB."""

    peak: float
    memory: int


ACCELERATORS = {
    "TPU v3 cores": Accelerator(61.5, 16),
    "TPU v4": Accelerator(275, 32),
    "TPU v5e": Accelerator(197, 16),
    "A100": Accelerator(312, 80),
    "H100": Accelerator(989, 80),
}
DEFAULT_METHODS = ("dense", "magnitude")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What was read of a run's compiled step. Bytes are those of a device; `flops` those of all devices together.

    Of several programs the largest counts in arguments and in temporaries. `collectives` has for each kind how many a
    step takes, and their bytes.
    """

    parameters: int
    pruned: int
    zeros: int
    parameter_bytes: int
    optimizer_bytes: int
    mask_bytes: int
    argument_bytes: int
    temporary_bytes: int
    flops: float
    touched_bytes: float
    collectives: Mapping[str, Sequence[float]]
    compile_seconds: float
    steps: int
    unit: str
    devices: int

    def hours(self, accelerator: Accelerator, utilisation: float) -> float:
        """Of the whole run, were each device kept busy so."""
        return self.steps * self.flops / (self.devices * accelerator.peak * 1e12 * utilisation) / 3600


def compile_all(runs: Sequence[Run], devices: int) -> Iterator[Compiled | str]:
    """Compiles a step of each run, of one baseline, in a process of its own. What fails is told in its place."""
    asked = [(run.baseline, run.preset_name, run.method, run.sparsity, run.seed) for run in runs]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(asked)],
        # Packages are found where they are here: some hosts are no more than folders on the path.
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            told = json.loads(line)
            yield told if isinstance(told, str) else Compiled(**told)
        if process.wait():
            yield f"the compiling process ended with {process.returncode}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def compiled(step: TrainStep) -> Compiled:
    """Compiles a step's programs and reads them."""
    started = time.monotonic()
    programs = [(program.lowered.compile(), program.times) for program in step.programs]
    seconds = time.monotonic() - started
    memory = [program.memory_analysis() for program, _ in programs]
    collectives = collections.defaultdict(lambda: [0, 0])
    for program, times in programs:
        for one in hlo.collectives(program.as_text()):
            collectives[one.kind][0] += times * one.times
            collectives[one.kind][1] += times * one.times * one.bytes
    sizes = {path: math.prod(leaf.shape) for path, leaf in trees.named_leaves(step.params)}
    targets = {} if step.updater is None else dict(trees.named_leaves(step.updater.get_target_sparsities(step.params)))
    masks = _bytes([state.masks for state in find_states(step.opt_state)])
    return Compiled(
        parameters=sum(sizes.values()),
        pruned=sum(sizes[path] for path in targets),
        zeros=round(sum(float(target) * sizes[path] for path, target in targets.items())),
        parameter_bytes=_bytes(step.params),
        optimizer_bytes=_bytes(step.opt_state) - masks,
        mask_bytes=masks,
        argument_bytes=max(plan.argument_size_in_bytes for plan in memory),
        temporary_bytes=max(plan.temp_size_in_bytes for plan in memory),
        flops=step.devices * sum(times * _analysis(program, "flops") for program, times in programs),
        touched_bytes=sum(times * _analysis(program, "bytes accessed") for program, times in programs),
        collectives=dict(collectives),
        compile_seconds=seconds,
        steps=step.steps,
        unit=step.unit,
        devices=step.devices,
    )


def _bytes(tree: Any) -> int:
    """What one device has of it."""
    return sum(math.prod(_shard(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _shard(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def _analysis(program: Any, key: str) -> float:
    """Of one device, as XLA estimates it: the body of a loop once."""
    analysis = program.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis).get(key, 0.0))


def table_of(runs: Sequence[Run], found: Sequence[Compiled], utilisation: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows; a column for each run, and in brackets what it adds to the dense one, where there is one."""
    dense = next((one for run, one in zip(runs, found, strict=True) if is_dense(run.method)), None)

    def plain(name: str, shown: Callable[[Compiled], str]) -> list[str]:
        return [name, *map(shown, found)]

    def counted(name: str, field: str, unit: str) -> list[str]:
        return plain(name, lambda one: _short(getattr(one, field), unit) + _added(field, one, dense))

    unit, devices = found[0].unit, found[0].devices
    return ["", *(f"{run.method} {run.sparsity:.4g}" if run.sparsity else run.method for run in runs)], [
        plain("parameters", lambda one: f"{one.parameters:,}"),
        plain("in pruned kernels", lambda one: f"{one.pruned:,}"),
        plain("zeros at the end", lambda one: f"{one.zeros:,} ({one.zeros / max(1, one.pruned):.1%})"),
        plain("devices", lambda one: f"{one.devices}"),
        counted("a device: parameters", "parameter_bytes", "B"),
        counted("a device: optimizer's state", "optimizer_bytes", "B"),
        counted("a device: masks", "mask_bytes", "B"),
        counted("a device: all arguments", "argument_bytes", "B"),
        counted("a device: temporaries", "temporary_bytes", "B"),
        counted("a device: reads and writes", "touched_bytes", "B"),
        plain("a device: collectives", _told),
        counted("all devices: FLOPs", "flops", "FLOP"),
        counted("compile", "compile_seconds", "s"),
        plain(unit, lambda one: f"{one.steps:,}"),
        *(
            plain(
                f"hours on {devices} {name} of {chip.memory} GB",
                lambda one, chip=chip: f"{one.hours(chip, utilisation):,.3g}",
            )
            for name, chip in ACCELERATORS.items()
        ),
    ]


def terminal(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _added(field: str, one: Compiled, dense: Compiled | None) -> str:
    value, before = getattr(one, field), getattr(dense, field, 0)
    if not before or abs(value / before - 1) < 5e-5:
        return ""
    return f" ({100 * (value / before - 1):+.2f} %)" if value < 10 * before else f" ({value / before:,.0f} times)"


def _told(one: Compiled) -> str:
    each = (f"{count:g} {kind}, {_short(size, 'B')}" for kind, (count, size) in sorted(one.collectives.items()))
    return "; ".join(each) or "none"


def _short(value: float, unit: str) -> str:
    """Three digits or more, such as 435.6 TFLOP."""
    power = min(max(0, math.floor(math.log10(value) / 3)) if value else 0, 5)
    return f"{value / 1000**power:.4g} {' kMGTP'[power].strip()}{unit}"


def note(utilisation: float) -> str:
    """What the table's numbers are."""
    peaks = ", ".join(f"{name} {chip.peak:g}" for name, chip in ACCELERATORS.items())
    return (
        "Compiled by XLA for virtual CPU devices; nothing was run. FLOPs, reads and writes are XLA's counts of the "
        "compiled programs: a step that makes masks, the bodies of loops once. Temporaries are the CPU's plan; "
        "accelerators fuse more, and hold bfloat16 as such. Hours are an estimate from these FLOPs alone, at "
        f"{utilisation:.0%} of the published peak of dense bfloat16 products ({peaks} TFLOP/s a device); data, "
        "evaluation and checkpoints come on top."
    )


def main(asked: str) -> None:
    """In a process of its own: prints a line of JSON for each run."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # hosts print as well
    for name, *chosen in json.loads(asked):
        baseline = registry.get(name)
        try:
            with hushed():
                told = dataclasses.asdict(compiled(baseline.abstract(baseline.run(*chosen))))
        except Exception as error:  # of a host; the other runs go on
            told = f"{type(error).__name__}: {error}"
        print(json.dumps(told), file=lines, flush=True)
        release_programs()


if __name__ == "__main__":
    main(sys.argv[1])
