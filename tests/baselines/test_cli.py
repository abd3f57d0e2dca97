"""The command line on a tiny preset, from `list` to the plot, with interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
from typer.testing import CliRunner

from jaxpruner_baselines import registry
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.methods import all_methods
from jaxpruner_baselines.results import Results

TINY = ["run", "digits_vit", "--preset", "smoke", "--methods", "dense,rigl", "--sparsities", "0.8", "--seeds", "2"]
MEASURED = ["method", "sparsity", "sparsity_reached", "seed", "steps", "value", "config_hash", "details"]


def invoke(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    invoke(*TINY, "--results", str(folder))
    return folder


def test_defaults_are_the_baselines_own():
    vit = registry.get("digits_vit")
    assert (vit.default_preset, vit.sparsities) == ("quick", (0.8, 0.95))


def test_list():
    output = invoke("list")
    assert "digits_vit" in output
    assert "quick, full, smoke" in output
    assert all(method in output for method in all_methods())


def test_methods_are_all_algorithms():
    assert all_methods()[0] == "dense"
    assert {"magnitude", "rigl", "global_saliency", "random_ste"} <= set(all_methods())
    assert not {"no_prune", "preserve"} & set(all_methods())


def test_run_reaches_the_sparsity_and_leaves_no_checkpoint(finished):
    rows = Results(finished / "digits_vit.csv").read()
    assert list(rows["method"]) == ["dense", "dense", "rigl", "rigl"]
    assert list(rows["seed"]) == [0, 1, 0, 1]
    assert list(rows["sparsity_reached"][:2]) == [0.0, 0.0]
    assert rows["sparsity_reached"][2:].between(0.795, 0.805).all()
    assert not list((finished / "checkpoints").glob("*"))


def test_second_run_skips_what_is_finished(finished):
    before = (finished / "digits_vit.csv").read_bytes()
    output = invoke(*TINY, "--results", str(finished))
    assert output.count("skipped") == 4
    assert "0 runs done, 4 finished before." in output
    assert (finished / "digits_vit.csv").read_bytes() == before


def test_table_and_plot(finished, tmp_path):
    common = ["digits_vit", "--preset", "smoke", "--results", str(finished)]
    readme, png = tmp_path / "table.md", tmp_path / "plot.png"
    output = invoke("table", *common, "--markdown", str(readme))
    assert "rigl" in output
    assert "80 %" in output
    assert readme.read_text().startswith("<!-- results:digits_vit -->\n| method |")
    assert str(png) in invoke("plot", *common, "--output", str(png))
    height, width, _ = matplotlib.image.imread(png).shape
    assert width > height > 300


@pytest.mark.slow
def test_killed_run_continues_to_the_same_rows(finished, tmp_path):
    """Killed for good while a run is under way and its checkpoint has been written."""
    command = [sys.executable, "-m", "jaxpruner_baselines", *TINY, "--results", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=os.environ)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "checkpoints").glob("*.msgpack")):
        assert process.poll() is None, "ended before it wrote a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(Results(tmp_path / "digits_vit.csv").read()) < 4

    invoke(*TINY, "--results", str(tmp_path))
    resumed, whole = (Results(folder / "digits_vit.csv").read()[MEASURED] for folder in (tmp_path, finished))
    assert resumed.equals(whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "magnitude_ste", "rigl", "global_saliency"])
def test_resuming_within_a_run_is_bit_exact(method, tmp_path):
    baseline = registry.get("digits_vit")
    run = baseline.run("smoke", method, 0.8, seed=0)
    *_, whole = baseline.train(run, Checkpoint(tmp_path / "whole"))

    checkpoint = Checkpoint(tmp_path / "interrupted")
    interrupted = baseline.train(run, checkpoint)
    first = next(interrupted)
    interrupted.close()
    assert checkpoint.path.exists()
    *progress, resumed = baseline.train(run, checkpoint)
    assert progress[0].done == 2 * first.done
    assert resumed == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digit_vit"], "Unknown baseline 'digit_vit'. Valid: digits_vit"),
        (["run", "digits_vit", "--preset", "big"], "Unknown preset of digits_vit 'big'. Valid: quick, full, smoke."),
        (["run", "digits_vit", "--methods", "dense,rgl"], "Unknown method 'rgl'. Valid: dense, "),
        (["run", "digits_vit", "--sparsities", "80"], "'80' is not a number between 0 and 1"),
        (["run", "digits_vit", "--sparsities", "0.8,nan"], "'nan' is not a number between 0 and 1"),
        (["run", "digits_vit", "--seeds", "0"], "'0' is neither a count (3) nor a list (0,4,7)"),
        (["run", "digits_vit", "--seeds", "1,x"], "'1,x' is neither a count"),
        (
            ["run", "oneshot", "--preset", "smollm", "--methods", "wanda", "--sparsities", "0.8"],
            "oneshot: nothing to run of wanda, 0.8 in preset smollm. Valid: dense; magnitude 0.5, 0.6; wanda 0.5, 0.6;",
        ),
        (
            ["run", "oneshot", "--preset", "smollm_short", "--methods", "dense,wanda,flap+heads"],
            "nothing to run of flap+heads in preset smollm_short. Valid: dense; magnitude 0.5; wanda 0.5; ",
        ),
        (
            ["run", "oneshot", "--preset", "smollm_short", "--sparsities", "0.5,0.7"],
            "nothing to run of 0.7 in preset smollm_short. Valid: dense; ",
        ),
        (["table", "digits_vit"], "has no results of preset quick. First: jaxpruner-baselines run digits_vit"),
        (["plot", "digits_vit", "--preset", "big"], "Unknown preset"),
        (["bench", "--rows", "speed"], "Unknown row 'speed'. Valid: mask_update, "),
    ],
)
def test_bad_input_is_told_before_anything_starts(arguments, message, tmp_path):
    folder = tmp_path / "results"
    assert message in invoke(*arguments, "--results", str(folder), exit_code=2)
    assert not folder.exists()


def test_seeds_can_be_listed(tmp_path):
    arguments = ["--preset", "smoke", "--methods", "dense", "--seeds", "5,", "--results", str(tmp_path)]
    invoke("run", "digits_vit", *arguments)
    assert list(Results(tmp_path / "digits_vit.csv").read()["seed"]) == [5]
