"""The trainers of others, sparse: each from the command line, exactly as sparse as asked."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from jaxpruner_baselines.cli import app
from jaxpruner_baselines.results import Results

pytestmark = pytest.mark.filterwarnings("ignore")  # they use old names of JAX and Orbax

pytest.importorskip("keras", reason="Keras is not installed; `make setup` installs it")
pytest.importorskip("tunix", reason="Tunix is not installed; `make setup` installs it")


@pytest.mark.slow
def test_each_trainer_from_the_command_line(tmp_path):
    methods = "rigl+keras,magnitude+nnx,magnitude+tunix"
    command = ["run", "stock_trainers", "--preset", "smoke", "--seeds", "1", "--methods", methods]
    result = CliRunner().invoke(app, [*command, "--results", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = Results(tmp_path / "stock_trainers.csv").read().set_index("method")
    kernels = 64 * 16 + 16 * 10
    for method in methods.split(","):
        assert rows["sparsity_reached"][method] == pytest.approx(0.9, abs=1 / kernels)
        assert f"│ {method} " in result.output
    # The same network, batches and optimizer.
    assert rows["value"]["magnitude+nnx"] == rows["value"]["magnitude+tunix"]
