"""Training steps compiled without their machine: the parameters, masks and collectives of each host's, the command."""

from __future__ import annotations

import functools
import importlib.util
import math
import tempfile
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

from jaxpruner_baselines import dry_run, registry
from jaxpruner_baselines.cli import app

# Hosts warn of one another's old ways.
pytestmark = pytest.mark.filterwarnings("ignore")

NEEDS = {
    "vit": ("scenic",),
    "resnet": ("scenic",),
    "t5": ("t5x", "airio", "jestimator"),
    "dqn": ("dopamine",),
    "fed_emnist": ("fedjax",),
}
DATA_PARALLEL = ("vit", "resnet", "t5")


def host(name: str, *arguments, slow: bool = False):
    """A parameter of a test that skips where the host of a baseline is missing."""
    packages = NEEDS[name]
    missing = any(importlib.util.find_spec(package) is None for package in packages)
    marks = [pytest.mark.skipif(missing, reason=f"not installed: one of {', '.join(packages)}")]
    return pytest.param(name, *arguments, marks=[*marks, pytest.mark.slow] if slow else marks)


HOSTS = [host(name) for name in NEEDS]
COMPILED = [host(name, slow=name in DATA_PARALLEL) for name in NEEDS]


def invoke(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["run", *arguments, "--dry-run"], env={"COLUMNS": "200"})
    assert result.exit_code == exit_code, result.output
    return result.output


def run_of(name: str, method: str, preset: str = "smoke"):
    return registry.get(name).run(preset, method, 0.8, seed=0)


@functools.cache
def smoke(name: str) -> tuple[dry_run.Compiled, ...]:
    """Dense and magnitude, for 2 devices."""
    return tuple(dry_run.compile_all([run_of(name, method) for method in ("dense", "magnitude")], devices=2))


def initialized(name: str):
    """The parameters of a run as its host makes them."""
    run = run_of(name, "magnitude")
    key = jax.random.PRNGKey(0)
    if name in ("vit", "resnet"):
        from jaxpruner_baselines.scenic_images import _meta_data, scenic_config
        from jaxpruner_scenic import main

        config = scenic_config(run)
        data = _meta_data(config)
        model = main.get_model(config.model_name)(config, data).flax_model
        images = jax.numpy.zeros((1, *data["input_shape"][1:]))
        return jax.jit(lambda key: model.init(key, images, train=False, debug=False))(key)["params"]
    if name == "t5":
        import gin
        from t5x import models

        from jaxpruner_baselines.t5 import gin_config
        from jaxpruner_t5x import launch

        with launch.parsed(*gin_config(run, Path("nowhere"), Path("nowhere"))):
            model = gin.get_configurable(models.EncoderDecoderModel)()
        shapes = dict.fromkeys(("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"), (1, 8))
        return model.get_initial_variables(key, shapes)["params"]
    if name == "dqn":
        from jaxpruner_baselines.dqn import start

        with tempfile.TemporaryDirectory() as folder:
            return start(run, folder).agent.online_params
    return run.preset.make_model().init(key)


@pytest.mark.parametrize("name", HOSTS)
def test_parameters_are_those_of_a_real_initialisation(name):
    step = registry.get(name).abstract(run_of(name, "magnitude"))
    shapes, real = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (step.params, initialized(name))
    )
    assert jax.tree.leaves(shapes) == jax.tree.leaves(real)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(step.params)) or name == "dqn"


@pytest.mark.parametrize("name", COMPILED)
def test_what_is_read(name):
    dense, sparse = smoke(name)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(initialized(name)))
    for one in (dense, sparse):
        assert one.parameters == size
        assert one.parameter_bytes == 4 * size
        assert one.argument_bytes > one.parameter_bytes + one.mask_bytes
        assert min(one.flops, one.touched_bytes, one.temporary_bytes, one.compile_seconds) > 0
        assert one.devices == (2 if name in DATA_PARALLEL else 1)
    assert (dense.pruned, dense.zeros, dense.mask_bytes) == (0, 0, 0)
    assert 0 < sparse.pruned < size
    assert sparse.zeros == pytest.approx(0.8 * sparse.pruned, rel=0.01)
    assert sparse.mask_bytes == sparse.pruned  # a byte a weight
    assert sparse.optimizer_bytes == pytest.approx(dense.optimizer_bytes, abs=500)  # counts and targets
    assert sparse.steps == dense.steps > 0


@pytest.mark.parametrize("name", COMPILED)
def test_devices_exchange_gradients_where_they_share_the_batch(name):
    for one in smoke(name):
        if name not in DATA_PARALLEL:
            assert one.collectives == {}
            continue
        assert set(one.collectives) == {"all-reduce"}
        count, exchanged = one.collectives["all-reduce"]
        assert count > 0
        assert exchanged > 0.99 * one.parameter_bytes  # XLA leaves out what is 0 by itself


def test_hours():
    fields = dict.fromkeys((field.name for field in dry_run.dataclasses.fields(dry_run.Compiled)), 0)
    one = dry_run.Compiled(**fields | {"flops": 2e15, "steps": 3600, "devices": 4})
    assert one.hours(dry_run.Accelerator(peak=100, memory=16), utilisation=0.5) == pytest.approx(10)


@pytest.mark.parametrize("name", [host("fed_emnist")])
def test_the_command_prints_a_table_and_writes_it(name, tmp_path):
    page = tmp_path / "page.md"
    arguments = [name, "--preset", "smoke", "--methods", "dense,rigl+oops", "--markdown", str(page)]
    assert "Unknown method 'rigl+oops'" in invoke(*arguments, exit_code=2)
    arguments[4] = "dense,rigl"
    output = invoke(*arguments, "--utilisation", "0.3")
    for text in ("rigl 0.8", "parameters", "collectives", "none", "rounds", *dry_run.ACCELERATORS, "30%"):
        assert text in output
    before, header, *rest = page.read_text().splitlines()
    assert before == "<!-- dry-run:fed_emnist-smoke -->"
    assert header == "|  | dense | rigl 0.8 |"
    assert sum(line.startswith("| ") for line in rest) == 1 + 14 + len(dry_run.ACCELERATORS)


@pytest.mark.parametrize("name", [host("vit")])
def test_devices_that_cannot_share_the_batch(name):
    output = invoke(name, "--preset", "smoke", "--methods", "dense", "--devices", "3", exit_code=1)
    assert "dense seed 0: ValueError: --devices: the batch, 64 images, cannot be dealt to 3 devices." in output


def test_baselines_without_it():
    output = invoke("digits_vit", "--preset", "smoke", exit_code=2)
    assert "--dry-run: digits_vit does not take it. Those that do: " in output
    able = [name for name, packages in NEEDS.items() if all(importlib.util.find_spec(package) for package in packages)]
    assert all(name in output for name in able)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset", "parameters", "steps"),
    [
        host("vit", "paper", 87_158_248, 28_080),
        host("dqn", "paper_resnet", 2_085_337, 2_495_000),
        host("fed_emnist", "paper", 1_206_590, 1_000),
    ],
)
def test_the_papers_scale(name, preset, parameters, steps):
    (one,) = dry_run.compile_all([run_of(name, "magnitude", preset)], devices=8)
    assert (one.parameters, one.steps) == (parameters, steps)
    assert one.mask_bytes == one.pruned > 0.95 * parameters


@pytest.mark.parametrize("option", [("--devices", "2"), ("--utilisation", "0.5"), ("--markdown", "page.md")])
def test_options_of_the_dry_run_alone(option, tmp_path):
    given = ["run", "digits_vit", "--preset", "smoke", *option, "--results", str(tmp_path)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, result.output
    assert f"{option[0]}: goes with --dry-run alone" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [("--seeds", "5"), ("--results", "elsewhere")])
def test_options_of_trainings_alone(option):
    result = CliRunner().invoke(app, ["run", "digits_vit", "--preset", "smoke", "--dry-run", *option])
    assert result.exit_code == 2, result.output
    assert f"{option[0]}: --dry-run trains nothing" in result.output
