"""The federated baseline: its data, its presets, resuming, and accuracy against megabytes."""

from __future__ import annotations

import dataclasses

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("fedjax", reason="FedJAX is not installed; `make setup` installs it")

from jaxpruner_baselines import data, federated_data, plots, registry, report
from jaxpruner_baselines.baseline import Outcome
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.methods import all_methods
from jaxpruner_baselines.results import Results, Row

BASELINE = registry.get("fed_emnist")


def invoke(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "250"})
    assert result.exit_code == exit_code, result.output
    return result.output


def rows(clients) -> dict[bytes, dict[str, np.ndarray]]:
    return {client_id: dataset.all_examples() for client_id, dataset in clients.clients()}


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(
    ("name", "clients", "test_clients", "examples"),
    [("digits", (11, 9), (3, 2), 1797), ("mnist5k", (60, 60), (1, 1), 5000)],
)
def test_clients(name, clients, test_clients, examples, validation):
    federated = federated_data.DATASETS[name](validation=validation)
    train, test = rows(federated.train), rows(federated.test)
    assert (len(train), len(test)) == (clients[validation], test_clients[validation])
    assert not set(train) & set(test)
    for client in (*train.values(), *test.values()):
        assert client["x"].shape == (len(client["y"]), 28, 28, 1)
        assert client["x"].dtype == np.float32
        assert client["x"].min() >= 0
        assert 0.9 < client["x"].max() <= 1
    if not validation:
        assert sum(len(client["y"]) for client in (*train.values(), *test.values())) == examples
    pictures = {picture.tobytes() for client in train.values() for picture in client["x"]}
    assert not pictures & {picture.tobytes() for client in test.values() for picture in client["x"]}


def test_writers_of_the_test_digits_write_no_others():
    forms = {int(client_id[1:5]) for client_id in federated_data.digits().test.client_ids()}
    assert forms == set(data.DIGITS_TEST_FORMS)
    assert not forms & {int(client_id[1:5]) for client_id in federated_data.digits().train.client_ids()}


def test_artificial_clients_differ_in_their_labels():
    train = rows(federated_data.mnist5k().train)
    shares = np.array([np.bincount(client["y"], minlength=10) / len(client["y"]) for client in train.values()])
    assert np.median(shares.max(1)) > 0.25  # 0.1 if all were alike
    assert sum(len(client["y"]) for client in train.values()) == 4000


def test_the_paper_preset_is_the_papers():
    assert dataclasses.asdict(BASELINE.presets["paper"]) == {
        "dataset": "emnist", "model": "conv", "rounds": 1000, "clients": 50, "batch_size": 32, "client_epochs": 1,
        "client_learning_rate": 10**-1.5, "server_learning_rate": 10**-2.5, "server_b1": 0.9, "server_b2": 0.999,
        "server_eps": 1e-4, "prune_start": 0.25, "prune_end": 0.75, "prune_every": 10, "top_k": 0.05,
        "checkpoint_every": 10, "validation": False,
    }  # fmt: skip


def test_the_paper_preset_says_what_to_download_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no network
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    told = invoke("run", "fed_emnist", "--preset", "paper", "--results", str(tmp_path / "runs"), exit_code=2)
    for name in ("train", "test"):
        assert f"https://storage.googleapis.com/gresearch/fedjax/emnist/federated_emnist_{name}.sqlite" in told
    assert f"put them into {tmp_path / '.cache' / 'fedjax'} under the same names" in told
    assert "The presets digits and mnist5k need no download." in told
    assert not list(tmp_path.iterdir())


def test_presets_and_sparsities_of_its_own(tmp_path):
    assert (BASELINE.default_preset, BASELINE.sparsities) == ("digits", (0.8,))
    told = invoke("table", "fed_emnist", "--results", str(tmp_path), exit_code=2)
    assert "has no results of preset digits. First: jaxpruner-baselines run fed_emnist --preset digits" in told
    common = ["fed_emnist", "--preset", "smoke", "--methods", "magnitude", "--seeds", "1", "--results", str(tmp_path)]
    invoke("run", *common)
    assert list(Results(tmp_path / "fed_emnist.csv").read()["sparsity"]) == [0.8]


def test_variants_of_methods():
    assert BASELINE.methods[: len(all_methods())] == all_methods()
    assert "magnitude+masked+top_k" in BASELINE.methods
    (dense,) = BASELINE.plan("digits", ["dense+top_k"], [0.8, 0.95], [0])
    assert (dense.sparsity, dense.title) == (0.0, "dense+top_k seed 0")
    assert "magnitude+masked" in invoke("list")
    told = invoke("run", "fed_emnist", "--preset", "smoke", "--methods", "rigl+masked", exit_code=2)
    assert "Unknown method 'rigl+masked'" in told
    assert "Unknown method" in invoke("run", "digits_vit", "--methods", "magnitude+masked", exit_code=2)


@pytest.mark.slow
def test_a_run_resumes_to_the_bit(tmp_path):
    run = BASELINE.run("smoke", "magnitude+masked+top_k", 0.8, seed=0)
    *_, whole = BASELINE.train(run, Checkpoint(tmp_path / "whole"))
    assert whole.sparsity_reached == pytest.approx(0.8, abs=1e-4)
    assert whole.details["megabytes"] == whole.details["megabytes_down"] + whole.details["megabytes_up"]
    assert whole.details["megabytes_up"] < whole.details["megabytes_down"]

    checkpoint = Checkpoint(tmp_path / "interrupted")
    interrupted = BASELINE.train(run, checkpoint)
    next(interrupted)
    interrupted.close()
    *progress, resumed = BASELINE.train(run, checkpoint)
    assert [event.done for event in progress] == [2, 3, 4]
    assert resumed == whole


def test_a_method_looks_the_same_in_both_plots(tmp_path, monkeypatch):
    lines = [
        report.Line(method, 0.8, 0.8, 24, 0.8 + 0.01 * i, float("nan"), (0,), cost=10.0 * (i + 1))
        for i, method in enumerate(["dense", "dense+top_k", "magnitude", "rigl", "set"])
    ]
    drawn = []

    def note(path, figure, axes, title, metric):
        handles, labels = axes.get_legend_handles_labels()
        shown = zip(handles, labels, strict=True)
        drawn.append({name: (h[0].get_color(), h[0].get_marker()) for h, name in shown if hasattr(h, "lines")})

    monkeypatch.setattr(plots, "finish", note)
    plots.draw(tmp_path / "a.png", "", lines, "accuracy")
    plots.draw_cost(tmp_path / "b.png", "", lines, "accuracy", BASELINE.cost)
    by_sparsity, by_cost = drawn
    assert set(by_sparsity) == {"magnitude", "rigl", "set"}
    assert by_sparsity == {name: by_cost[name] for name in by_sparsity}
    assert len(set(by_cost.values())) == 5


def test_accuracy_against_megabytes(tmp_path):
    results = Results(tmp_path / "fed_emnist.csv")
    measured = [("dense", 0.9, 100.0), ("dense+top_k", 0.8, 50.0), ("magnitude", 0.85, 60.0), ("magnitude", 0.87, 80.0)]
    for seed, (method, value, megabytes) in enumerate(measured):
        run = BASELINE.run("digits", method, 0.8, seed)
        outcome = Outcome(value, run.sparsity, steps=24, details={"megabytes": megabytes})
        results.append(Row.of(run, "accuracy", outcome, 1.0))
    common = ["fed_emnist", "--preset", "digits", "--results", str(tmp_path)]
    page = tmp_path / "README.md"
    page.write_text("<!-- results:fed_emnist-digits -->\n<!-- /results:fed_emnist-digits -->\n")
    invoke("table", *common, "--markdown", str(page))
    lines = page.read_text().splitlines()
    assert lines[1].endswith("| seeds | megabytes sent, mean |")
    assert lines[3] == "| dense | - | 0.00 % | 24 | 90.0 | 1 | 100.0 |"
    assert lines[4] == "| dense+top_k | - | 0.00 % | 24 | 80.0 | 1 | 50.0 |"
    assert lines[5] == "| magnitude | 80 % | 80.00 % | 24 | 86.0 ± 1.4 | 2 | 70.0 |"
    page.write_text("no place\n")
    told = invoke("table", *common, "--markdown", str(page), exit_code=2)
    assert "README.md: no place for the table. Add the lines <!-- results:fed_emnist -->" in told
    assert page.read_text() == "no place\n"
    invoke("plot", *common)
    for name in ("fed_emnist-digits.png", "fed_emnist-digits-megabytes.png"):
        height, width, _ = matplotlib.image.imread(tmp_path / name).shape
        assert width > height > 300
