"""Breadth, speed rows and the baseline of compaction, with tiny sizes. Nothing here looks at a time."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxpruner_baselines import compact
from jaxpruner_baselines.breadth import cases, torch_peer
from jaxpruner_baselines.breadth.architectures import ARCHITECTURES
from jaxpruner_baselines.breadth.measure import largest_difference
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.results import Results

# Hosts warn of one another's old ways.
pytestmark = pytest.mark.filterwarnings("ignore")


def invoke(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "250"})
    assert result.exit_code == exit_code, result.output
    return result.output


def test_breadth_writes_a_row_and_a_table(tmp_path):
    chosen = ["mixture of experts"]
    page = tmp_path / "page.md"
    output = invoke(
        "breadth", "--quick", "--architectures", ";".join(chosen), "--results", str(tmp_path), "--markdown", str(page)
    )
    rows = Results(tmp_path / "breadth.csv").read()
    ours = rows[rows["metric"] == "speed-up of the forward pass"]
    assert list(ours["method"]) == chosen
    assert len(rows) == len(chosen) * (1 + torch_peer.is_installed())
    for details in map(json.loads, ours["details"]):
        assert details["difference"] < 1e-5
        assert details["gradients"] < 1e-5
        assert details["groups"] >= 1
    np.testing.assert_allclose(ours["sparsity_reached"], 0.5)
    assert "| mixture of experts | 1 |" in page.read_text()
    assert (torch_peer.NOT_INSTALLED in output) == (not torch_peer.is_installed())


def test_an_unknown_architecture_is_told():
    assert "Valid: MLP; ViT" in invoke("breadth", "--architectures", "RNN", exit_code=2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_can_be_made(name):
    def make():  # abstractly: nothing is compiled
        case = ARCHITECTURES[name](cases.QUICK)
        return case.params, case.fn(case.params, *case.args)

    try:
        params, results = jax.eval_shape(make)
    except ImportError as error:
        pytest.skip(str(error))
    assert all(np.issubdtype(leaf.dtype, np.floating) for leaf in jax.tree.leaves(params))
    assert jax.tree.leaves(results)


def test_differences():
    assert largest_difference([np.array([2.0, 4.0])], [np.array([2.0, 5.0])]) == pytest.approx(0.25)
    assert largest_difference([np.array([1, 2])], [np.array([1, 3])]) == 0.5
    assert largest_difference([np.array([1.0])], [np.array([np.nan])]) == np.inf


def test_the_network_from_scratch_has_the_sizes_that_pruning_leaves():
    model = compact.MODELS["vit_smoke"]
    images = np.zeros((2, 8, 8, 1), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)
    small = compact.smaller(model.apply, params, images, 0.5, seed=0)
    before, after = zip(*small.report().units.values(), strict=True)
    assert after == tuple(max(1, round(size / 2)) for size in before)
    kernels = [tree["params"]["block_0"]["mlp_out"]["kernel"] for tree in (params, small.params)]
    assert [kernel.shape[0] for kernel in kernels] == [32, 16]
    assert float(kernels[1].std() / kernels[0].std()) == pytest.approx(2**0.5, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "more_steps"), [("smoke", 1), ("smoke_distil", 2)])
def test_the_baseline_compacts(preset, more_steps, tmp_path):
    output = invoke(
        "run", "compact", "--preset", preset, "--methods", "dense,magnitude,from_scratch", "--sparsities", "0.5",
        "--seeds", "1", "--results", str(tmp_path),
    )  # fmt: skip
    rows = Results(tmp_path / "compact.csv").read()
    assert list(rows["method"]) == ["dense", "magnitude", "from_scratch"]
    assert rows["sparsity_reached"].tolist() == [0.0, 0.5, 0.5]
    sizes = [json.loads(details)["parameters"] for details in rows["details"]]
    assert sizes[0] > sizes[1] == sizes[2]
    assert rows["steps"].tolist() == [rows["steps"][0] * factor for factor in (1, more_steps, more_steps)]
    assert (tmp_path / f"compact-{preset}-speedup.png").exists()
    assert all(json.loads(details)["speedup"] > 0 for details in rows["details"])
    assert "about" in output
