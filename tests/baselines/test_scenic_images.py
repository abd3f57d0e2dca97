"""The baselines vit and resnet: runs, resume, the presets' configurations, and what is said where Scenic is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import matplotlib.image
import pytest
from typer.testing import CliRunner

from jaxpruner_baselines import intervals, registry
from jaxpruner_baselines.baseline import NotReady
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.results import Results

scenic = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("scenic", "clu")),
    reason="clu is not installed, or Scenic neither, nor its sources in ~/.cache/jaxpruner/frameworks/scenic",
)
# Hosts warn of one another's old ways.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def programs(compiled_in, tmp_path_factory):
    with compiled_in(tmp_path_factory.mktemp("programs")):
        yield


@pytest.mark.slow
@scenic
def test_a_small_grid_from_the_command_line(tmp_path):
    common = ["vit", "--preset", "smoke", "--results", str(tmp_path)]
    arguments = ["run", *common, "--methods", "dense,rigl", "--sparsities", "0.8", "--seeds", "1"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = Results(tmp_path / "vit.csv").read()
    assert list(rows["method"]) == ["dense", "rigl"]
    assert list(rows["steps"]) == [22, 22]
    assert list(rows["sparsity_reached"]) == [0.0, pytest.approx(0.8, abs=2e-3)]
    assert rows["value"].between(0.05, 1).all()
    assert all("scenic" in json.loads(versions) for versions in rows["versions"])
    assert not list((tmp_path / "checkpoints").glob("*"))  # Scenic's own as well
    height, width, _ = matplotlib.image.imread(tmp_path / "vit-smoke.png").shape
    assert width > height > 300


@pytest.mark.slow
@scenic
def test_an_interrupted_run_continues_from_its_checkpoint(tmp_path):
    resnet = registry.get("resnet")
    run = resnet.run("smoke", "magnitude", 0.8, seed=4)
    checkpoint = Checkpoint(tmp_path / "run.msgpack")
    interrupted = resnet.train(run, checkpoint)
    reached = 0
    while reached < 16:  # the checkpoint is of step 11
        reached = next(interrupted).done
    interrupted.close()
    assert [path.name for path in checkpoint.folder.glob("checkpoint_*")] == ["checkpoint_11"]

    start, *progress, outcome = resnet.train(run, checkpoint)
    assert (start.done, start.total) == (0, 22)
    assert min(event.done for event in progress) > 11
    assert outcome.steps == 22
    assert outcome.sparsity_reached == pytest.approx(0.8, abs=2e-3)
    checkpoint.delete()
    assert not checkpoint.folder.exists()


@scenic
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_configurations_of_runs(name):
    from jaxpruner_baselines.scenic_images import scenic_config

    baseline = registry.get(name)
    for preset in baseline.presets:
        dense = scenic_config(baseline.run(preset, "dense", 0.8, seed=3))
        assert dense.sparsity_config is None
        sparse = scenic_config(baseline.run(preset, "rigl", 0.9, seed=3))
        chosen = sparse.sparsity_config
        assert (chosen.algorithm, chosen.sparsity, chosen.rng_seed, sparse.rng_seed) == ("rigl", 0.9, 3, 3)
        assert chosen.dist_type == ("uniform" if name == "resnet" else "erk")
        if preset.startswith("paper"):
            assert sparse.batch_size == 4096
            assert sparse.num_training_epochs == {"paper": 90, "paper_300ep": 300}.get(preset) or name == "resnet"
        else:
            assert not sparse.dataset_configs.validation


@scenic
def test_imagenet_is_asked_for_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    vit = registry.get("vit")
    vit.prepare(vit.presets["digits"])
    with pytest.raises(NotReady, match=r"No ImageNet in .*download_and_prepare.*\nThe presets digits and natural"):
        vit.prepare(vit.presets["paper"])
    (tmp_path / "imagenet2012" / "5.1.0").mkdir(parents=True)
    vit.prepare(vit.presets["paper"])


@pytest.mark.slow
def test_where_scenic_is_missing_the_command_says_how_to_install_it(tmp_path):
    block = "import sys; sys.modules['scenic'] = None; import jaxpruner_baselines.cli as c; c.main()"

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", block, *arguments], capture_output=True, text=True, cwd=tmp_path)

    told = command("run", "resnet", "--preset", "digits")
    assert told.returncode == 2
    assert "resnet needs a package that is not installed (No module named 'scenic'. Install it from its" in told.stderr
    assert "pip install --no-deps 'git+https://github.com/google-research/scenic@" in told.stderr
    assert not list(tmp_path.iterdir())
    listed = command("list")
    assert listed.returncode == 0
    assert "not installed" in listed.stdout
    assert "digits_vit" in listed.stdout


@scenic
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_settings_of_fashion_mnist_are_the_papers(name):
    from jaxpruner_baselines import scenic_images

    baseline = registry.get(name)
    for preset in baseline.presets.values():
        if not isinstance(preset, scenic_images.Scored):
            continue
        steps = dict(preset.overrides)["num_training_steps"]

        def chosen(method, preset=preset):
            run = baseline.run("fashion", method, 0.8, seed=3)
            return scenic_images.scenic_config(dataclasses.replace(run, preset=preset)).sparsity_config

        pruner, grower = chosen("magnitude"), chosen("rigl")
        assert 0.08 < pruner.update_start_step / steps < pruner.update_end_step / steps < 0.82
        assert pruner.update_start_step % pruner.update_freq == pruner.update_end_step % pruner.update_freq == 0
        assert (grower.update_start_step, grower.update_freq, grower.drop_fraction) == (1, 100, 0.3)
        assert grower.update_end_step == pytest.approx(0.75 * steps, abs=1)
        for candidate in baseline.candidates(preset).values():
            assert candidate.validation
            assert not preset.validation


@scenic
def test_what_a_run_tells_of_test_images_is_its_accuracy(tmp_path):
    from jaxpruner_baselines import scenic_images

    run = registry.get("vit").run("smoke", "magnitude", 0.8, seed=0)
    preset = scenic_images.Scored(run.preset.config, run.preset.dataset, run.preset.overrides)
    *_, outcome = scenic_images.train(dataclasses.replace(run, preset=preset), Checkpoint(tmp_path / "run.msgpack"))
    right = intervals.unpack(outcome.details["examples"])
    assert len(right) == 383
    assert outcome.value == pytest.approx(right.mean())


@scenic
def test_fashion_mnist_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    for name in ("vit", "resnet"):
        baseline = registry.get(name)
        with pytest.raises(NotReady, match="apt-get install dataset-fashion-mnist"):
            baseline.prepare(baseline.presets["fashion"])
