"""The CSV: its schema, a half-written last line, and what the table makes of the rows."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxpruner_baselines import registry, report, runner
from jaxpruner_baselines.baseline import Outcome, Progress, Run
from jaxpruner_baselines.results import COLUMNS, Results, ResultsError, Row

BASELINE = registry.get("digits_vit")


def row(method="magnitude", sparsity=0.8, seed=0, value=0.9) -> Row:
    run = BASELINE.run("smoke", method, sparsity, seed)
    details = {"note": 'a, "b"', "inference_flops_share": 0.3}
    return Row.of(run, "accuracy", Outcome(value, run.sparsity, steps=7, details=details), seconds=1.5)


def test_schema(tmp_path):
    results = Results(tmp_path / "new" / "r.csv")
    results.append(row())
    assert results.path.read_text().splitlines()[0].split(",") == [
        "baseline", "preset", "method", "sparsity", "sparsity_reached", "seed", "steps", "metric", "value",
        "source", "config_hash", "config", "details", "commit", "versions", "device", "seconds", "date",
    ]  # fmt: skip
    table = results.read()
    assert list(table.columns) == COLUMNS
    only = table.iloc[0]
    assert only["source"] == "ours"
    assert only["value"] == 0.9
    assert json.loads(only["details"])["note"] == 'a, "b"'
    assert json.loads(only["config"])["preset"]["dataset"] == "digits"
    assert set(json.loads(only["versions"])) >= {
        "python",
        "jaxpruner",
        "jax",
        "flax",
        "optax",
        "numpy",
    }  # and hosts that were used


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_half_written_last_line_is_ignored_and_then_removed(tmp_path, cut):
    results = Results(tmp_path / "r.csv")
    results.append(row(seed=0))
    results.append(row(seed=1))
    results.path.write_bytes(results.path.read_bytes()[:-cut])
    assert list(results.read()["seed"]) == [0]
    results.append(row(seed=2))
    assert list(results.read()["seed"]) == [0, 2]
    assert results.path.read_bytes().endswith(b"\n")


def test_half_written_header(tmp_path):
    results = Results(tmp_path / "r.csv")
    results.path.write_text("baseline,pre")
    assert not results.finished()
    results.append(row())
    assert len(results.read()) == 1


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ResultsError, match="its columns are a, b; expected baseline"):
        Results(path).read()


def test_summary_means_over_seeds_dense_first(tmp_path):
    results = Results(tmp_path / "r.csv")
    for method, sparsity, values in [
        ("rigl", 0.95, [0.5]),
        ("magnitude", 0.8, [0.7, 0.9]),
        ("dense", 0.0, [0.9, 0.98, 1.0]),
    ]:
        for seed, value in enumerate(values):
            results.append(row(method, sparsity, seed, value))
    lines, left_out = report.summarize(BASELINE, "smoke", results)
    assert left_out == 0
    assert [(line.method, line.seeds) for line in lines] == [
        ("dense", (0, 1, 2)),
        ("magnitude", (0, 1)),
        ("rigl", (0,)),
    ]
    assert lines[0].mean == pytest.approx(0.96)
    assert lines[0].std == pytest.approx(math.sqrt((0.06**2 + 0.02**2 + 0.04**2) / 2))
    assert math.isnan(lines[2].std)
    shown = report.markdown(BASELINE, lines).splitlines()
    assert shown[0] == (
        "| method | sparsity asked | sparsity reached | steps | accuracy (%), mean ± std | seeds | "
        "inference FLOPs (% of dense) |"
    )
    assert shown[2] == "| dense | - | 0.00 % | 7 | 96.0 ± 5.3 | 3 | 30.0 |"
    assert shown[4] == "| rigl | 95 % | 95.00 % | 7 | 50.0 | 1 | 30.0 |"


def test_rows_of_a_changed_preset_and_repeated_rows_are_left_out(tmp_path):
    results = Results(tmp_path / "r.csv")
    changed = Run("digits_vit", "smoke", BASELINE.presets["full"], "magnitude", 0.8, 0)
    results.append(Row.of(changed, "accuracy", Outcome(0.1, 0.8, 7), 1.0))
    results.append(row(value=0.2))
    results.append(row(value=0.3))
    (line,), left_out = report.summarize(BASELINE, "smoke", results)
    assert (line.mean, len(line.seeds), left_out) == (0.3, 1, 2)


def test_rows_of_other_settings_are_run_again(tmp_path):
    """Settings are what decides the numbers beside the preset, as a file of gin that it names."""

    def trained(run, checkpoint):
        yield Outcome(0.5, run.sparsity, 7)

    def baseline(settings):
        return dataclasses.replace(BASELINE, train=trained, settings=settings, also=(), cost=None, curve=None)

    before, after = baseline(lambda run: "rate = 0.1"), baseline(lambda run: f"rate = 0.3 {run.method}")
    runs = BASELINE.plan("smoke", ["magnitude", "rigl"], [0.8], [0])
    results = Results(tmp_path / "digits_vit.csv")
    results.append(row(seed=3))  # of code that told no settings: it counts
    for _ in runner.events(before, runs, tmp_path):
        pass
    assert runner.unfinished(before, runs, tmp_path) == []
    assert len(report.summarize(before, "smoke", results)[0]) == 2
    assert runner.unfinished(after, runs, tmp_path) == runs
    (line,), left_out = report.summarize(after, "smoke", results)
    assert (line.seeds, left_out) == ((3,), 2)
    for _ in runner.events(after, runs, tmp_path):
        pass
    assert runner.unfinished(after, runs, tmp_path) == []


def test_a_run_that_was_stopped_does_not_go_on_with_other_settings(tmp_path):
    """As one whose gin file was changed while it was stopped."""

    def train(run, checkpoint):
        before, state = checkpoint.load(np.zeros(1))
        checkpoint.save(before + 1, state)
        yield Progress(before + 1, 2)
        yield Outcome(float(before), run.sparsity, 2)

    before, after = (dataclasses.replace(BASELINE, train=train, settings=lambda _, text=text: text) for text in "ab")
    runs = BASELINE.plan("smoke", ["magnitude"], [0.8], [0])
    next(runner.events(before, runs, tmp_path))
    for baseline, resumed_at in ((after, 0), (before, 1)):
        *_, (_, found) = runner.events(baseline, runs, tmp_path)
        assert found.value == resumed_at


@pytest.mark.parametrize(
    ("name", "preset", "text"),
    [
        ("dqn", "lunarlander", "create_optimizer.learning_rate = 0.003\n"),
        ("t5", "tiny", "jaxpruner_t5x/configs/bible.gin"),
        ("vit", "fashion", '"base_learning_rate": 0.001'),
    ],
)
def test_settings_of_hosts_are_those_of_their_files(name, preset, text):
    try:
        baseline = registry.get(name)
    except ImportError as error:
        pytest.skip(str(error))
    run = baseline.run(preset, "magnitude", 0.8, 0)
    told = baseline.settings(run)
    assert (text in told) == (name != "t5")  # an included file is told by what is in it
    assert "#" not in told
    assert baseline.digest(run) == baseline.digest(run)
    if name == "dqn":  # with a file more for these
        assert "sparsify.drop_fraction = 0.3" in baseline.settings(baseline.run(preset, "rigl", 0.8, 0))


def test_markdown_between_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:x -->\nold\n<!-- /results:x -->\nafter\n")
    report.update_markdown(path, "results:x", "new")
    assert path.read_text() == "before\n<!-- results:x -->\nnew\n<!-- /results:x -->\nafter\n"
    with pytest.raises(ValueError, match=r"no place for the table\. Add the lines <!-- results:y -->"):
        report.update_markdown(path, "results:y", "new")
