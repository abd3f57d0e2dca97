"""From a sparse checkpoint to compact functions, decoding with its cache included."""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest
import t5x_cases as cases
from jax.sharding import PartitionSpec
from t5x import decoding, models, optimizers

import jaxpruner_t5x
from jaxpruner.coupled_structures import AllGroups
from jaxpruner_t5x import compact, functions, launch, tasks

pytestmark = cases.quiet
UPDATER = "jaxpruner_t5x.create_updater"
GROUPS = {"SPARSITY": 0.5, f"{UPDATER}.sparsity_type": "groups", f"{UPDATER}.dist_type": "uniform"}
STEPS = 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that was trained by groups, its checkpoint and its parameters."""
    folder = tmp_path_factory.mktemp("groups")
    given = {"MODEL_DIR": str(folder), "TRAIN_STEPS": STEPS, "CHECKPOINT_PERIOD": STEPS}
    bindings = cases.bind(**cases.SMALL | cases.MASKS | GROUPS | given)
    _, state = launch.train([cases.PRETRAIN, cases.SPARSE], bindings)
    return folder / f"checkpoint_{STEPS}", state


@pytest.mark.slow
def test_a_training_by_groups_becomes_a_smaller_model(trained, capsys):
    checkpoint, state = trained
    small = compact.compact(str(checkpoint), batch_size=2)
    units = small.report["report"]["units"]
    assert len(units) == 11  # MLPs, and of three kinds of attention heads, widths of keys and of values
    assert all(after == before // 2 for before, after in units.values())
    told = capsys.readouterr().out
    assert "Decoding of 2 examples on cpu: dense" in told
    assert "Tokens a second: dense" in told
    assert small.report["same_tokens"] == 1.0

    folder = checkpoint.parent / "compact"
    assert (folder / compact.REPORT).read_text() in told
    saved = json.loads((folder / compact.DESCRIPTION).read_text())
    assert saved == json.loads(json.dumps(small.report))
    again = compact.load_compact(str(folder))
    for one, other in zip(jax.tree.leaves(again.params), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_array_equal(one, other)

    params = jax.tree.map(np.asarray, state.params)
    with launch.parsed([str(folder / compact.CONFIG)]):
        model = compact._model()
    tokens = np.random.default_rng(0).integers(2, 4000, (3, 12))
    batch = {f"{name}_tokens": tokens for name in ("encoder_input", "decoder_input", "decoder_target")}
    logits = jax.jit(functions.forward(model))(params, batch)
    np.testing.assert_allclose(jax.jit(again.forward)(again.params, batch), logits, rtol=1e-4, atol=1e-5)
    decoded = jax.jit(functions.predict(model))(params, batch)
    assert decoded.shape == (3, 12)
    np.testing.assert_array_equal(jax.jit(again.predict)(again.params, batch), decoded)


def test_masks_of_groups_are_a_bit_an_entry_of_each_axis(trained):
    checkpoint, state = trained
    saved = cases.saved(checkpoint)
    cases.assert_equal(saved, cases.of(state))
    mask = saved["state/sparse/masks/encoder/layers_0/mlp/wi_0/kernel"]
    assert (mask.dtype, mask.shape) == (np.uint8, ((16 + 32) // 8,))
    axes = jaxpruner_t5x.partition_rules._mask_axes(PartitionSpec("embed", "mlp"), mask)
    assert axes == PartitionSpec(None)
    told = json.loads((checkpoint.parent / "sparsity.json").read_text())
    assert told["sparsity_type"] == repr(AllGroups())


def test_scanned_layers_have_groups_and_scanned_decoders_too(tmp_path):
    """One group a stack, in each of whose layers the same number of the unit leaves."""
    vocabulary = tasks.vocabulary()
    model = models.EncoderDecoderModel(
        cases.scanned(), vocabulary, vocabulary, None, decode_fn=decoding.temperature_sample
    )
    found = functions.groups_of(model, AllGroups(("*mlp/wi*",)))
    assert [(group.name, group.size) for group in found.pruned] == [
        ("decoder/decoder/mlp/wi/kernel[2]", 32), ("encoder/encoder/mlp/wi/kernel[2]", 32)
    ]  # fmt: skip
    updater = jaxpruner_t5x.create_updater("magnitude", 0.5, sparsity_type="groups", update_start_step=0,
                                           update_end_step=0)  # fmt: skip
    chosen = jaxpruner_t5x.SparseOptimizer(optimizers.adamw(1e-2), updater, model=lambda: model)
    shapes = functions.shapes(model, functions.example(model))
    jax.eval_shape(chosen.init_state, shapes)
    assert chosen.updater.sparsity_type.removable
    without = jaxpruner_t5x.SparseOptimizer(optimizers.adamw(1e-2), updater)
    with pytest.raises(ValueError, match=r"groups = jaxpruner\.find_groups"):
        jax.eval_shape(without.init_state, shapes)


def test_errors_say_what_to_give(trained, tmp_path, monkeypatch):
    checkpoint, _ = trained
    other = cases.bind(**cases.SMALL | {"MODEL_DIR": str(tmp_path), "TRAIN_STEPS": 1, f"{cases.T5}.mlp_dim": 48})
    with pytest.raises(ValueError, match=r"--gin_file: is not that of the checkpoint, where .*, 48\) in this model"):
        compact.compact(str(checkpoint), str(tmp_path), [cases.PRETRAIN], other)
    given = types.SimpleNamespace(checkpoint=str(tmp_path), output=None, gin_file=[], gin_bindings=[], batch_size=2)
    monkeypatch.setattr(compact.flags, "FLAGS", given)
    with pytest.raises(SystemExit, match=r"compact: --checkpoint: .* is no checkpoint of T5X"):
        compact.run(None)
    with pytest.raises(ValueError, match=r"there is no .*config.gin; give the gin files of the run"):
        compact._configuration(tmp_path / "checkpoint_1")
    with pytest.raises(ValueError, match=r"there is no compact.json in .*; make it with python -m"):
        compact.load_compact(str(tmp_path))
    with pytest.raises(ValueError, match=r"gin binds no train_script.train.model"):
        jaxpruner_t5x.configured_model()
