"""The benchmark's table with tiny sizes. Nothing here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from jaxpruner_baselines.benchmarks import masks
from jaxpruner_baselines.benchmarks.command import GROUPS
from jaxpruner_baselines.benchmarks.figures import Figure, Reach, alternate
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.results import COLUMNS, Results

ROWS = {
    "mask update, 100,000 float32": 4,
    "global mask, 3 leaves of 30,000": 1,
    "2:4 mask, (128, 128)": 1,
    "peak scratch of a mask update (ours)": 1,
    "peak scratch of a mask update (jnp.argsort)": 1,
    "mask memory, packed, worst of 10 algorithms": 1,
    "mask memory, dense, worst of 10 algorithms": 1,
    "training step between updates, dense masks": 1,
    "training step between updates, packed masks": 1,
    "training step, all in, update_freq=100": 1,
    "straight-through step, mask made every step": 1,
}


def test_quick_prints_and_writes_all_rows(tmp_path):
    result = CliRunner().invoke(app, ["bench", "--quick", "--results", str(tmp_path)], env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.output
    table = Results(tmp_path / "benchmarks.csv").read()
    assert list(table.columns) == COLUMNS
    assert table["method"].value_counts().to_dict() == ROWS
    for row, count in ROWS.items():
        assert result.output.count(row) == count
    assert set(table["preset"]) == {"quick"}
    assert (table["value"] > 0).all()
    assert {json.loads(config)["group"] for config in table["config"]} == set(GROUPS)


def test_module_command_with_selected_rows(tmp_path):
    command = [sys.executable, "-m", "jaxpruner_baselines.benchmarks", "--quick", "--rows", "nm_mask", "--repeats", "1"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, check=True)
    assert "2:4 mask" in done.stdout
    assert len(Results(tmp_path / "benchmarks.csv").read()) == 1


def test_packed_masks_take_one_bit_a_weight():
    figures = [event for event in masks.mask_bytes(masks.QUICK) if isinstance(event, Figure)]
    assert [figure.ratio for figure in figures] == [1.0, 8.0]


def test_sides_alternate_and_drop_out():
    called = []
    sides = {name: lambda name=name: called.append(name) for name in "ab"}
    times = {}

    def measure():
        times.update((yield from alternate(sides, {"a": 3, "b": 2})))

    list(measure())
    assert "".join(called) == "ab" + "ab" + "ba" + "a"  # compile, there, back, there
    assert (len(times["a"]), len(times["b"])) == (3, 2)


@pytest.mark.parametrize(
    ("reach", "ratio", "met"),
    [(Reach(at_least=100), 99.0, False), (Reach(at_least=100), 100.0, True), (Reach(at_most=0.5), 0.6, False)],
)
def test_reach(reach, ratio, met):
    assert reach.met(ratio) is met
