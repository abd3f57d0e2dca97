"""From a sparse server's checkpoint to a compact model: fewer bytes in a round, the same predictions."""

from __future__ import annotations

import json

import federated_cases as cases
import jax
import numpy as np
import pytest
from federated_cases import fedjax

import jaxpruner_fedjax
from jaxpruner.compaction import files
from jaxpruner_fedjax import compact
from jaxpruner_fedjax.compaction import compact_model, example_batch
from jaxpruner_fedjax.experiment import Config, build, run

SETTINGS = {
    "task": "federated_cases:task", "num_rounds": 4, "num_clients_per_round": 3, "batch_size": 16,
    "algorithm": "magnitude", "sparsity": 0.5, "sparsity_type": "groups",
    "update_start_round": 1, "update_end_round": 3, "update_freq": 1, "checkpoint_frequency": 0, "eval_frequency": 0,
}  # fmt: skip
NAME = "linear/w[1]"  # 6 units, each of 784 + 1 + 10 weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The settings of a training that lost three of six units, and the server's state."""
    config = Config(**SETTINGS, root_dir=str(tmp_path_factory.mktemp("trained")))
    return config, run(build(config)).params


@pytest.mark.slow
def test_a_checkpoint_becomes_a_compact_model(trained, capsys):
    config, params = trained
    made = compact.compact(config, rounds=2)
    assert made.small.sizes == {NAME: 3}
    told = json.loads((compact.file_of(config.root_dir).parent / "report.json").read_text())
    left = 3 * 795 + 10
    assert told["report"]["params"] == [6 * 795 + 10, left]
    sent = told["bytes_of_a_round"]
    assert sent["dense"] == {"down": 3 * 4 * (6 * 795 + 10), "up": 3 * 4 * (6 * 795 + 10)}
    assert sent["sparse"] == {"down": 3 * 4 * left, "up": sent["dense"]["up"]}  # stock clients send dense changes
    assert sent["compact"] == {"down": 3 * 4 * left, "up": 3 * 4 * left}
    before, small, further = told["metrics"].values()
    assert small["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert small["accuracy"] == before["accuracy"]
    assert further["loss"] != small["loss"]
    output = capsys.readouterr().out
    assert f"a round of 3 clients, compact: {3 * 4 * left:,} bytes down" in output
    assert "times as fast" in output

    # What was saved is what was trained on.
    batch = example_batch(cases.digits())
    loaded = files.load_compact(compact.file_of(config.root_dir), cases.model().apply_for_eval, params, batch)
    again = compact_model(cases.model(), params, batch, loaded)
    cases.assert_same_bits(again.params, made.params)
    np.testing.assert_array_equal(
        again.model.apply_for_eval(again.params, batch), made.model.apply_for_eval(made.params, batch)
    )


def test_the_compact_model_is_the_masked_one_in_training_too(trained):
    _, params = trained
    batch, key = example_batch(cases.digits()), jax.random.PRNGKey(1)
    made = jaxpruner_fedjax.compact_model(cases.model(), params, batch)
    expected = made.small.cut(fedjax.model_grad(cases.model())(params, batch, key))
    for a, b in zip(
        jax.tree.leaves(fedjax.model_grad(made.model)(made.params, batch, key)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    cases.assert_same_bits(made.model.init(key), made.params)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"root_dir: no checkpoint in .* Train first: python -m jaxpruner_fedjax"):
        compact.compact(Config(**SETTINGS, root_dir=str(tmp_path)))
    made = jaxpruner_fedjax.compact_model(cases.model(), cases.params(), example_batch(cases.digits()))
    assert "Nothing was removed: no unit is dead." in str(made.small.report())
