"""The sparse DQN baseline: runs, curves, resume, and the presets' gin files."""

from __future__ import annotations

import functools
import json

import jax.numpy as jnp
import matplotlib.image
import pytest
from typer.testing import CliRunner

pytest.importorskip("dopamine", reason="Dopamine is not installed; `make setup` installs it")

from jaxpruner_baselines import registry
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.costs import dead_units
from jaxpruner_baselines.results import Results

# Hosts warn of one another's old ways.
pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def baseline():
    return registry.get("dqn")


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_small_grid_from_the_command_line(tmp_path):
    common = ["dqn", "--preset", "smoke", "--results", str(tmp_path)]
    output = invoke("run", *common, "--methods", "dense,rigl", "--sparsities", "0.75", "--seeds", "1")
    rows = Results(tmp_path / "dqn.csv").read()
    assert list(rows["method"]) == ["dense", "rigl"]
    assert list(rows["metric"]) == ["return", "return"]
    assert rows["sparsity_reached"][0] == 0.0
    assert rows["sparsity_reached"][1] == pytest.approx(0.75, abs=0.01)
    returns = [json.loads(details)["returns"] for details in rows["details"]]
    assert [len(curve) for curve in returns] == [3, 3]
    assert list(rows["value"]) == pytest.approx([curve[-1] for curve in returns], abs=1e-3)
    dead = [json.loads(details)["dead_units"] for details in rows["details"]]
    assert dead[0] == 0 <= dead[1] < json.loads(rows["details"][1])["units"] == 32
    assert not list((tmp_path / "checkpoints").glob("*"))  # Dopamine's own as well
    for name in ("dqn-smoke.png", "dqn-smoke-returns.png"):
        assert name in output
        height, width, _ = matplotlib.image.imread(tmp_path / name).shape
        assert width > height > 300


def test_dead_units_are_counted():
    params = {"up": jnp.ones((4, 8)).at[:, :5].set(0), "down": jnp.ones((8, 2)).at[6].set(0)}
    counted = dead_units(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((1, 4)))
    assert counted == {"units": 8, "dead_units": 6, "dead_units_share": 0.75, "parameters_compact": 2 * (4 + 2)}


def test_a_run_resumes_to_the_bit(tmp_path):
    run = baseline().run("smoke", "magnitude_ste", 0.75, seed=4)
    *_, whole = baseline().train(run, Checkpoint(tmp_path / "whole.msgpack"))
    checkpoint = Checkpoint(tmp_path / "interrupted.msgpack")
    interrupted = baseline().train(run, checkpoint)
    assert [next(interrupted).done for _ in range(3)] == [0, 100, 200]
    interrupted.close()
    start, *progress, resumed = baseline().train(run, checkpoint)
    assert [event.done for event in (start, *progress)] == [0, 300]
    assert resumed == whole
    checkpoint.delete()
    assert not checkpoint.folder.exists()


@pytest.mark.parametrize(("preset", "steps"), [("paper", 10_000_000), ("paper_resnet", 10_000_000)])
def test_the_paper_presets_are_the_papers(preset, steps):
    from jaxpruner_baselines import dqn

    p = baseline().presets[preset]
    assert p.iterations * p.agent_steps == steps
    for method, dynamic in (("magnitude", False), ("rigl", True), ("set", True)):
        files, bindings = dqn.gin_config(baseline().run(preset, method, 0.98, seed=1))
        assert files[0].endswith("dqn_resnet_mspacman.gin" if "resnet" in preset else "dqn_mspacman.gin")
        assert any(name.endswith("sparse_dynamic.gin") for name in files) == dynamic
        assert {f"sparsify.algorithm = '{method}'", "sparsify.sparsity = 0.98", "JaxDQNAgent.seed = 1"} <= set(bindings)
        assert not any("update" in binding for binding in bindings)  # the gin files say it


def test_defaults():
    assert (baseline().default_preset, baseline().sparsities) == ("cartpole", (0.9, 0.98))
