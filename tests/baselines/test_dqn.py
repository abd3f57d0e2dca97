"""The sparse DQN baseline: runs, curves, resume, and the presets' gin files."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import pathlib
import tomllib

import jax.numpy as jnp
import matplotlib.image
import pytest
from typer.testing import CliRunner

pytest.importorskip("dopamine", reason="Dopamine is not installed; `make setup` installs it")

from jaxpruner_baselines import intervals, registry
from jaxpruner_baselines.baseline import NotReady, Run
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


def evaluated(seed=0, **changes):
    """A run of the smoke preset, in CartPole, whose agent is evaluated after it."""
    from jaxpruner_baselines import dqn

    fields = dataclasses.asdict(baseline().presets["smoke"]) | {"last": 0, "checkpoint_every": 0, "episodes": 9}
    return Run("dqn", "evaluated", dqn.Evaluated(**fields | changes), "magnitude", 0.75, seed)


def test_an_evaluated_run_scores_each_episode(tmp_path):
    *_, outcome = baseline().train(evaluated(), Checkpoint(tmp_path / "run.msgpack"))
    returns = intervals.unpack(outcome.details["examples"])
    assert outcome.value == pytest.approx(returns.mean(), rel=1e-6)
    assert len(returns) == 9
    assert len(set(returns)) > 1
    assert len(outcome.details["returns"]) == 3  # of the training
    *_, again = baseline().train(evaluated(), Checkpoint(tmp_path / "again.msgpack"))
    assert again == outcome


def test_candidates_have_seeds_and_games_of_their_own():
    from jaxpruner_baselines import dqn

    preset = baseline().presets["lunarlander"]
    found = baseline().candidates(preset)
    assert len(found) == 3
    chosen = dqn.gin_config(baseline().run("lunarlander", "dense", 0.98, seed=1))[1]
    assert "JaxDQNAgent.seed = 1" in chosen
    for label, candidate in found.items():
        rate = label.removeprefix("learning rate ").removesuffix(", seeds from 100")
        bindings = dqn.gin_config(Run("dqn", label, candidate, "dense", 0.0, 1))[1]
        assert set(bindings) - set(chosen) == {f"create_optimizer.learning_rate = {rate}", "JaxDQNAgent.seed = 101"}
        assert candidate.first_seed > preset.first_seed + 5
    assert baseline().candidates(baseline().presets["cartpole"]) == {}


def test_lunarlander_has_the_papers_schedule_scaled():
    import jaxpruner_dopamine  # noqa: F401  # isort: skip  (Dopamine can be imported after it)
    import gin
    from dopamine.discrete_domains import run_experiment

    from jaxpruner_baselines import dqn

    preset = baseline().presets["lunarlander"]
    steps = preset.iterations * preset.agent_steps
    names = ("update_start_agent_step", "update_end_agent_step", "update_freq_agent_steps")
    for method in ("magnitude", "set", "rigl"):
        gin.clear_config()
        files, bindings = dqn.gin_config(baseline().run("lunarlander", method, 0.98, seed=0))
        run_experiment.load_gin_configs(files, bindings)
        start, end, freq = (gin.query_parameter(f"sparsify.{name}") for name in names)
        assert gin.query_parameter("sparsify.sparsity") == 0.98
        assert freq >= 20 * gin.query_parameter("JaxDQNAgent.update_period")
        if method == "magnitude":
            assert (start / steps, end / steps) == (0.05, 0.2)
            assert 0.001 <= freq / steps <= 0.005
        else:
            assert (start, end) == (1, steps)
            assert gin.query_parameter("sparsify.drop_fraction") == 0.3


def test_box2d_is_asked_for_by_name(monkeypatch):
    from jaxpruner_baselines import dqn

    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "Box2D" else installed(name))
    with pytest.raises(NotReady, match=r"pip install box2d==(.|\n)*The presets cartpole and acrobot"):
        baseline().prepare(baseline().presets["lunarlander"])
    baseline().prepare(baseline().presets["cartpole"])
    root = pathlib.Path(__file__).parents[2]
    assert dqn.BOX2D in (root / "constraints.txt").read_text().splitlines()
    extras = tomllib.loads((root / "baselines" / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert dqn.BOX2D in extras["lunarlander"]


def test_a_lander_flies(tmp_path):
    pytest.importorskip("Box2D", reason="Box2D is not installed; `make setup` installs it")
    preset = dataclasses.replace(
        baseline().presets["lunarlander"],
        iterations=2,
        agent_steps=200,
        episodes=2,
        bindings=(
            "ClassicControlDQNNetwork.hidden_units = 16",
            "JaxDQNAgent.min_replay_history = 40",
            "ReplayBuffer.batch_size = 8",
            "Runner.max_steps_per_episode = 100",
        ),
        growing=("sparsify.update_end_agent_step = 360", "sparsify.update_freq_agent_steps = 40"),
    )
    run = Run("dqn", "lunarlander", preset, "rigl", 0.75, seed=0)
    *_, outcome = baseline().train(run, Checkpoint(tmp_path / "run.msgpack"))
    assert outcome.sparsity_reached == pytest.approx(0.75, abs=0.01)
    returns = intervals.unpack(outcome.details["examples"])
    assert outcome.value == pytest.approx(returns.mean(), rel=1e-6)


def test_defaults():
    assert (baseline().default_preset, baseline().sparsities) == ("cartpole", (0.9, 0.98))
