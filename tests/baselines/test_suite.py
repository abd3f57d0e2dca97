"""The suite: its plan, a run of it in processes, what fails or is missing, and the paper's numbers beside ours."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jaxpruner_baselines import intervals, registry, suite, suite_report
from jaxpruner_baselines.baseline import Outcome
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.costs import SHARES
from jaxpruner_baselines.measures import measure
from jaxpruner_baselines.results import Results, Row
from jaxpruner_baselines.suite import METHODS, TASKS

# Hosts warn of one another's old ways.
pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("fedjax", reason="FedJAX is not installed; `make setup` installs it")
FED = registry.get("fed_emnist")


def invoke(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result.output


def test_the_tasks_are_the_rows_of_the_paper():
    titles = [task.title for task in TASKS.values()]
    assert titles == [
        "ResNet-50", "ViT-B/16, 90 epochs", "ViT-B/16, 300 epochs", "Fed. EMNIST", "T5-Base", "DQN-CNN", "DQN-ResNet",
    ]  # fmt: skip
    assert len(METHODS) == 9
    for task in TASKS.values():
        try:
            baseline = registry.get(task.baseline)
        except ImportError:  # its host is missing
            continue
        for scale, setting in task.scales.items():
            assert setting.preset in baseline.presets, (task, scale)
            assert setting.preset.startswith("paper") == (scale == "paper")
        assert set(METHODS) <= set(baseline.methods)


@pytest.mark.slow
def test_a_suite_from_the_command_line(tmp_path):
    common = ["--scale", "smoke", "--tasks", "fed_emnist", "--jobs", "2", "--results", str(tmp_path)]
    output = invoke("suite", *common, "--seeds", "1")
    rows = Results(tmp_path / "fed_emnist.csv").read()
    assert sorted(rows["method"]) == sorted(METHODS)
    assert "9 runs to do" in output
    assert "[9/9] fed_emnist: " in output
    assert "Spearman" in output
    height, width, _ = matplotlib.image.imread(tmp_path / "suite-smoke.png").shape
    assert min(width, height) > 300
    # What is finished is not done again.
    before = (tmp_path / "fed_emnist.csv").read_bytes()
    assert "runs to do" not in invoke("suite", *common, "--seeds", "1")
    assert (tmp_path / "fed_emnist.csv").read_bytes() == before


@dataclasses.dataclass(frozen=True)
class Bomb:
    """A preset that ends the process of its run, as a crash in a host would."""

    dataset: str = "digits"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        os._exit(9)


@pytest.mark.slow
def test_what_fails_or_crashes_loses_nothing_else(tmp_path):
    good, wrong, last = (FED.run("smoke", m, 0.8, seed=0) for m in ("magnitude", "[no_such_method]", "rigl"))
    crash = dataclasses.replace(good, preset=Bomb())
    parts = [suite.Part("fed_emnist", (crash, wrong, good), 1.0), suite.Part("fed_emnist", (last,), 1.0)]
    told = io.StringIO()
    failures = suite.carry_out(parts, tmp_path, 1, Console(file=told, width=200))
    assert len(failures) == 2
    assert failures[0] == "fed_emnist: magnitude 0.8 seed 0: its process ended with 9"
    assert failures[1].startswith("fed_emnist: [no_such_method] 0.8 seed 0: ValueError")
    assert list(Results(tmp_path / "fed_emnist.csv").read()["method"]) == ["magnitude", "rigl"]
    assert "[4/4] fed_emnist: rigl 0.8 seed 0: accuracy" in told.getvalue()


@pytest.mark.slow
def test_missing_hosts_are_named_and_the_rest_goes_on(tmp_path):
    block = """
        import sys
        sys.modules['scenic'] = sys.modules['t5x'] = None
        import jaxpruner_baselines.cli as c
        from jaxpruner_baselines import suite
        if __name__ == '__main__':
            suite.carry_out = lambda *_: []
            c.main()
    """.replace("\n        ", "\n")
    command = [sys.executable, "-c", block, "suite", "--seeds", "1", "--results", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    for task, repository in {"resnet": "scenic", "vit_90": "scenic", "vit_300": "scenic", "t5": "t5x"}.items():
        assert f"{task} ({TASKS[task].title}) cannot run here: No module named" in told.stdout
        assert f"github.com/google-research/{repository}@" in told.stdout
    assert "27 runs to do, about " in told.stdout  # fed_emnist and twice dqn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite", "--scale", "tiny"], "Unknown scale 'tiny'. Valid: embedded, wide, paper, smoke."),
        (["suite", "--tasks", "fed,t5"], "Unknown task of embedded scale 'fed'. Valid: resnet, vit_90, "),
        (["suite", "--scale", "wide", "--tasks", "dqn_resnet"], "Unknown task of wide scale 'dqn_resnet'. Valid: "),
        (["choose", "--scale", "smoke", "--tasks", "vit_300"], "Unknown task of smoke scale 'vit_300'. Valid: "),
        (["suite", "--methods", "newer"], "Unknown group of methods 'newer'. Valid: paper, later."),
        (["suite", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["table", "suite"], "has no results of the suite at embedded scale. First: jaxpruner-baselines suite --scale"),
        (["plot", "suite", "--preset", "big"], "Unknown scale 'big'"),
    ],
)
def test_bad_input_is_told_before_anything_starts(arguments, message, tmp_path):
    folder = tmp_path / "results"
    assert message in invoke(*arguments, "--results", str(folder), exit_code=2)
    assert not folder.exists()


def test_a_table_says_which_rows_are_left_out_for_want_of_a_host(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}\nInstall it from its repository.")

    monkeypatch.setattr(registry, "get", missing)
    told = invoke("table", "suite", "--results", str(tmp_path), exit_code=2)
    assert "ResNet-50 is left out, since what it needs is not installed: No module named 'resnet'\n" in told


def record(folder, values, seeds=(0, 1), sparsity=0.8):
    results = Results(folder / "fed_emnist.csv")
    for method, value in values.items():
        for seed in seeds:
            run = FED.run("digits", method, sparsity, seed)
            details = {"megabytes": 1.0, "inference_flops_share": 0.3, "training_flops_share": 0.5}
            results.append(Row.of(run, "accuracy", Outcome(value + 0.01 * seed, run.sparsity, 36, details), 1.0))


def test_ours_beside_the_papers(tmp_path):
    paper = {"random": 83.53, "magnitude": 85.74, "saliency": 85.60, "global_magnitude": 86.01, "rigl": 84.64}
    record(tmp_path, {"dense": 0.9, "granet": 0.85} | {method: (value - 10) / 100 for method, value in paper.items()})
    (row,) = suite_report.summarize("embedded", tmp_path)
    assert row.paper["dense"] == pytest.approx(0.8621)
    assert {method: row.paper[method] for method in paper} == pytest.approx({m: v / 100 for m, v in paper.items()})
    assert row.correlation == pytest.approx(1)
    assert row.verdict.startswith("+1.00 (p 0.0")
    assert row.verdict.endswith("the order holds")
    mine, published = suite_report.cells(row)
    places = {method: i for i, method in enumerate(METHODS, start=1)}
    assert mine[0] == "Fed. EMNIST: fed_emnist digits, 80 %, accuracy (%)"
    assert mine[places["dense"]] == "90.5 ± 0.7"
    assert mine[places["random"]] == "74.0 ± 0.7 (-16.5)"
    assert published[places["random"]] == "83.5 (-2.7)"
    assert (mine[places["set"]], published[places["set"]]) == ("-", "84.2 (-2.0)")
    inference, training = suite_report.cost_cells(row)
    assert (inference[places["rigl"]], training[places["rigl"]]) == ("30.0", "50.0")

    page = tmp_path / "README.md"
    page.write_text("<!-- results:suite-embedded -->\n<!-- /results:suite-embedded -->\n")
    invoke("table", "suite", "--results", str(tmp_path), "--markdown", str(page))
    assert "| paper, accuracy (%) | 86.2 | 83.5 (-2.7) |" in page.read_text()
    assert "| FLOPs, % of dense |" in page.read_text()
    assert "| of later papers | Fed. EMNIST, accuracy (%) |" in page.read_text()
    assert "| granet | 85.5 ± 0.7 (-5.0) |" in page.read_text()
    invoke("plot", "suite", "--results", str(tmp_path))
    assert (tmp_path / "suite-embedded.png").exists()


@pytest.mark.parametrize("values", [{"random": 0.9, "rigl": 0.8}, dict.fromkeys(METHODS, 0.9)])
def test_no_order(values, tmp_path):
    record(tmp_path, {"dense": 0.9} | values)
    (row,) = suite_report.summarize("embedded", tmp_path)
    assert row.verdict == "no order: too few methods, or all are equal"


@pytest.mark.parametrize(
    ("values", "seeds", "verdict"),
    [
        ({"random": 0.9, "magnitude": 0.7, "saliency": 0.72, "global_magnitude": 0.6, "rigl": 0.8}, (0, 1), "round"),
        ({"random": 0.8, "magnitude": 0.7, "saliency": 0.72, "global_magnitude": 0.9, "rigl": 0.6}, (0, 1), "chance"),
        ({"random": 0.6, "magnitude": 0.8, "saliency": 0.7, "global_magnitude": 0.9, "rigl": 0.65}, (0,), "(one seed)"),
    ],
)
def test_an_order_that_is_not_shown_is_not_claimed(values, seeds, verdict, tmp_path):
    record(tmp_path, {"dense": 0.9} | values, seeds)
    (row,) = suite_report.summarize("embedded", tmp_path)
    assert row.verdict.endswith(verdict)


def test_a_seed_that_diverged_is_no_seed_left_out(tmp_path):
    record(tmp_path, {"dense": 0.9, "rigl": 0.8})
    record(tmp_path, {"rigl": math.nan}, seeds=(2,))
    (row,) = suite_report.summarize("embedded", tmp_path)
    assert math.isnan(row.ours["rigl"].mean)
    assert row.ours["rigl"].seeds == (0, 1, 2)
    mine, _ = suite_report.cells(row)
    assert mine[1 + list(METHODS).index("rigl")] == "-"
    assert row.verdict.endswith("; diverged and left out: RigL")


def test_what_is_certain_is_told_in_a_sentence(tmp_path, monkeypatch):
    """Two methods on the same examples, and one that cannot be told apart from another."""
    setting = dataclasses.replace(TASKS["fed_emnist"].scales["embedded"])
    monkeypatch.setitem(TASKS, "fed_emnist", dataclasses.replace(TASKS["fed_emnist"], scales={
        "wide": setting, "paper": TASKS["fed_emnist"].scales["paper"],
    }))  # fmt: skip
    values = {"dense": 0.9, "random": 0.5, "magnitude": 0.7, "saliency": 0.8, "global_magnitude": 0.85, "rigl": 0.701}
    hard = np.random.default_rng(0).random(1000)
    results = Results(tmp_path / "fed_emnist.csv")
    for method, value in values.items():
        for seed in range(3):
            run = FED.run("digits", method, 0.8, seed)
            right = hard < value
            details = {"megabytes": 1.0, "examples": intervals.pack(right)} | dict.fromkeys(SHARES, 0.5)
            results.append(Row.of(run, "accuracy", Outcome(float(right.mean()), run.sparsity, 36, details), 1.0))
    (row,) = suite_report.summarize("wide", tmp_path)
    told = suite_report.sentence(row)
    assert told.startswith(
        "Fed. EMNIST, `fed_emnist digits`, 3 seeds: dense > global magnitude > saliency > magnitude ≈ RigL > random."
    )
    # The paper has magnitude above saliency above RigL.
    assert "Of the 10 pairs of pruned methods that the paper orders: 8 as in the paper, 1 the other way round" in told
    assert row.verdict.startswith("+0.")
    assert "[" in row.verdict
    mine, _ = suite_report.cells(row)
    assert re.fullmatch(r"\d\d\.\d \[\d\d\.\d, \d\d\.\d\] \(-\d\d\.\d\)", mine[3])
    lines = row.ours | {"saliency": dataclasses.replace(row.ours["saliency"], mean=math.nan)}
    diverged = dataclasses.replace(row, ours=lines)
    assert "dense > global magnitude > magnitude ≈ RigL > random." in suite_report.sentence(diverged)
    assert diverged.verdict.endswith("; diverged and left out: saliency")
    page = tmp_path / "README.md"
    page.write_text("<!-- results:suite-wide -->\n<!-- /results:suite-wide -->\n")
    invoke("table", "suite", "--preset", "wide", "--results", str(tmp_path), "--markdown", str(page))
    assert f"- {told}" in page.read_text()
    better = {
        "dense": "random, magnitude, saliency, global magnitude, RigL",
        "magnitude": "random",  # and not RigL
        "saliency": "random, magnitude, RigL",
        "global_magnitude": "random, magnitude, saliency, RigL",
        "rigl": "random",
    }
    cells = ["Fed. EMNIST", *(better.get(method, "-") for method in METHODS)]
    assert f"| {' | '.join(cells)} |" in page.read_text()
    of_losses = suite_report.better_cells(dataclasses.replace(row, kind=measure("loss")))
    assert of_losses[1 + list(METHODS).index("rigl")] == "dense, saliency, global magnitude"
    invoke("plot", "suite", "--preset", "wide", "--results", str(tmp_path))


def test_higher_sparsities_are_rows_of_their_own(tmp_path, monkeypatch):
    setting = dataclasses.replace(TASKS["fed_emnist"].scales["embedded"], sparser=(0.9, 0.95))
    scales = {"wide": setting, "paper": TASKS["fed_emnist"].scales["paper"]}
    monkeypatch.setitem(TASKS, "fed_emnist", dataclasses.replace(TASKS["fed_emnist"], scales=scales))
    asked = {
        sparser: {run.sparsity for run in suite.runs_of(TASKS["fed_emnist"], "wide", [0], sparser=sparser)}
        for sparser in (False, True)
    }
    assert asked == {False: {0.0, 0.8}, True: {0.0, 0.8, 0.9, 0.95}}
    values = {"random": 0.5, "magnitude": 0.7, "saliency": 0.8, "global_magnitude": 0.85}
    record(tmp_path, {"dense": 0.9} | values)
    record(tmp_path, {"random": 0.3, "magnitude": 0.2}, sparsity=0.9)
    rows = suite_report.summarize("wide", tmp_path)
    assert [row.title for row in rows] == ["Fed. EMNIST", "Fed. EMNIST at 90 %"]  # nothing ran at 95 %
    assert rows[1].ours["magnitude"].mean == pytest.approx(0.205)
    assert rows[1].ours["dense"] == rows[0].ours["dense"]
    assert rows[1].paper == {}
    ((*shown, verdict),) = suite_report.cells(rows[1])
    assert shown[0] == "Fed. EMNIST: fed_emnist digits, 90 %, accuracy (%)"
    assert shown[3].endswith("(-70.0)")
    assert verdict == "no numbers of the paper"
    assert suite_report.duration(rows).startswith("These are 14 runs")  # the two dense ones once
    output = invoke("table", "suite", "--preset", "wide", "--results", str(tmp_path))
    assert "90 %" in output
    assert "[interval]" in output
    invoke("plot", "suite", "--preset", "wide", "--results", str(tmp_path))


def test_higher_sparsities_that_no_row_has_are_refused(tmp_path):
    output = invoke("suite", "--tasks", "fed_emnist", "--sparser", "--results", str(tmp_path), exit_code=2)
    assert "--sparser: none of fed_emnist has higher sparsities at embedded scale." in " ".join(output.split())


def test_candidates_are_tried_on_held_out_data(tmp_path, monkeypatch):
    smoke = FED.presets["smoke"]

    def candidates(preset):
        return {f"rate {rate:g}": dataclasses.replace(preset, client_learning_rate=rate, validation=True)
                for rate in (0.1, 1e-6)}  # fmt: skip

    fed = dataclasses.replace(FED, candidates=candidates)
    monkeypatch.setattr(registry, "get", lambda name: fed)
    page = tmp_path / "wide.md"
    page.write_text("<!-- choices:smoke -->\n<!-- /choices:smoke -->\n")
    arguments = ["choose", "--scale", "smoke", "--tasks", "fed_emnist", "--results", str(tmp_path)]
    invoke(*arguments, "--seeds", "2", "--markdown", str(page))
    rows = Results(tmp_path / "fed_emnist.csv").read()
    presets = ["smoke, held out, rate 0.1", "smoke, held out, rate 1e-06"]
    assert list(zip(rows["preset"], rows["seed"], strict=True)) == [
        (preset, seed) for seed in (100, 101) for preset in presets
    ]
    assert set(rows["method"]) == {"dense"}
    assert smoke.validation is False
    lines = [line for line in page.read_text().splitlines() if "Fed. EMNIST" in line]
    assert all("| 100 to 101 |" in line for line in lines)
    assert [line.endswith("| best |") for line in lines] == [True, False]
    # Rows of candidates that have changed since count for nothing.
    changed = dataclasses.replace(fed, candidates=lambda _: candidates(dataclasses.replace(smoke, batch_size=11)))
    monkeypatch.setattr(registry, "get", lambda name: changed)
    invoke(*arguments, "--markdown", str(page))
    lines = [line for line in page.read_text().splitlines() if "Fed. EMNIST" in line]
    assert all("| 100 |" in line for line in lines)


def test_where_nothing_is_chosen_it_is_told(tmp_path):
    arguments = ["choose", "--scale", "smoke", "--tasks", "fed_emnist", "--results", str(tmp_path)]
    assert "Nothing is chosen at smoke scale" in invoke(*arguments, exit_code=2)
