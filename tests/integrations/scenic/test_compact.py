"""From a checkpoint to a compact model: trained by groups, weight by weight, and densely."""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest
import scenic_cases as cases
from absl import logging
from scenic.model_lib import models
from scenic.train_lib import optimizers

import jaxpruner_scenic
from jaxpruner.coupled_structures import AllGroups
from jaxpruner_scenic import compact, made
from jaxpruner_scenic.forward import Forward, forward

pytestmark = cases.quiet
GROUPS = {"sparsity_sparsity": 0.5, "sparsity_dist_type": "uniform", "sparsity_sparsity_type": "groups"}
META_DATA = {"num_classes": 10, "target_is_onehot": True}


@pytest.mark.slow
def test_a_training_by_groups_becomes_a_smaller_model(tmp_path, capsys, caplog):
    logging.get_absl_logger().propagate = True
    caplog.set_level("INFO", logger="absl")
    c = cases.vit(checkpoint=True, dataset_name="digits", **GROUPS)
    state, _ = cases.run(c, tmp_path)
    assert "asked 50.0 % of the units, reached 50.0 %" in caplog.text
    small = compact.compact(c, str(tmp_path))
    report = small.report()
    assert len(report.units) == 5
    assert all(after == before // 2 for before, after in report.units.values())
    assert report.params[1] < 0.55 * report.params[0]
    images = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    model = models.get_model_cls(c.model_name)(c, META_DATA).flax_model
    wanted = model.apply({"params": state.params, **state.model_state}, images, train=False, debug=False)
    np.testing.assert_allclose(small.fn(small.params, images), wanted, rtol=1e-5, atol=1e-6)

    folder = tmp_path / "compact"
    told = (folder / compact.REPORT).read_text()
    assert told in capsys.readouterr().out
    assert "Forward pass of 32 images on cpu: dense" in told
    saved = json.loads((folder / compact.DESCRIPTION).read_text())
    assert saved["step"] == cases.STEPS
    assert set(saved["seconds"]) == {"dense", "compact"}
    fn, variables = compact.load_compact(str(folder), c)
    cases.assert_same_bits(variables, jax.device_get(small.params))
    np.testing.assert_array_equal(fn(variables, images), small.fn(small.params, images))

    wider = cases.vit(dataset_name="digits")
    wider.model.mlp_dim = 48
    with pytest.raises(ValueError, match=r"Dense_0/bias is \(32,\), and \(48,\) in this model; give the configuration"):
        compact.compact(wider, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "sparsity"), [("magnitude", 0.98), (None, None)])
def test_networks_that_were_pruned_weight_by_weight_and_dense_ones(algorithm, sparsity, tmp_path, capsys):
    more = {} if algorithm is None else {"sparsity_sparsity": sparsity, "sparsity_dist_type": "uniform"}
    c = cases.config(algorithm, checkpoint=True, **more)
    cases.run(c, tmp_path / "run")
    given = types.SimpleNamespace(config=c, workdir=str(tmp_path / "run"), output=str(tmp_path / "out"), batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact.flags, "FLAGS", given)
        compact.run(None)
    report = json.loads((tmp_path / "out" / compact.DESCRIPTION).read_text())["report"]
    told = capsys.readouterr().out
    before, after = (sum(pair[i] for pair in report["units"].values()) for i in (0, 1))
    assert before == 48
    assert (after < 30) if algorithm else (after == 48)
    assert f"units {before:>63,} {after:>16,}" in told
    assert ("Nothing was removed: no unit is dead." in told) == (algorithm is None)


def test_errors_say_what_to_give(tmp_path, monkeypatch):
    given = types.SimpleNamespace(config=cases.config(), workdir=str(tmp_path), output=None, batch_size=4)
    monkeypatch.setattr(compact.flags, "FLAGS", given)
    with pytest.raises(SystemExit, match=r"compact: --workdir: there is no checkpoint in .*; give the folder"):
        compact.run(None)
    with pytest.raises(ValueError, match=r"there is no compact.json in .*; make it with python -m"):
        compact.load_compact(str(tmp_path), cases.config())


def test_groups_need_a_model_and_one_optimizer():
    adam = optimizers.get_optax_optimizer_config(cases.config())
    with (
        jaxpruner_scenic.sparse_training(cases.config(**GROUPS)),
        pytest.raises(ValueError, match=r"makes its optimizer without train_utils\.initialize_model; find"),
    ):
        optimizers.get_optimizer(adam, 1e-3, params={})
    several = made.Made(cases.config(**GROUPS).sparsity_config)
    several.count = 1
    with pytest.raises(ValueError, match="an optimizer for each group of parameters, and units of sparsity_type"):
        several.sparsify(None, lambda name: False)


def test_groups_leave_out_what_scenic_freezes():
    c = cases.config()
    image = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    _, shapes = compact._model(c, META_DATA, image)
    model = Forward(forward(models.get_model_cls(c.model_name)(c, META_DATA).flax_model), shapes, (image,))
    whole = made._groups(AllGroups(multiple_of=4), lambda name: False, model)
    assert (len(whole.pruned), whole.multiple_of) == (2, 4)
    last = whole.pruned[-1].owner[1]
    left = made._groups(AllGroups(), lambda name: name == f"{last}/bias", model)
    assert [group.owner[1] for group in left.pruned] == [whole.pruned[0].owner[1]]
