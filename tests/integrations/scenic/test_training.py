"""The stock trainers, sparse: every algorithm, devices, kill and resume, transfer, plain ViT, frozen parameters."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import scenic_cases as cases
from absl import logging
from scenic.dataset_lib import datasets

from jaxpruner_scenic.configs import sparsity
from jaxpruner_scenic.sparse import sparsity_logs

pytestmark = cases.quiet
HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_every_algorithm_is_exactly_sparse_after_20_steps(algorithm, tmp_path):
    packed = cases.ALGORITHMS.index(algorithm) % 2 == 0
    c = cases.config(algorithm, dataset_name="digits", sparsity_use_packed_masks=packed)
    state, writer = cases.run(c, tmp_path)
    assert int(state.global_step) == cases.STEPS
    cases.assert_exactly_sparse(state, packed)
    logged = writer.scalars["sparsity"]
    assert logged[-1][0] == cases.STEPS
    assert logged[-1][1] == pytest.approx(0.8, abs=0.03)


@pytest.mark.slow
def test_positions_and_class_token_of_a_vit_stay_dense_and_what_is_excluded_by_name(tmp_path):
    state, _ = cases.run(cases.vit("global_magnitude", sparsity_exclude_reg_exp="^embedding"), tmp_path)
    cases.assert_exactly_sparse(state)
    found = cases.sparsities(state.params)
    assert found["cls"] == 0
    assert found["embedding/kernel"] == 0
    assert found["Transformer/posembed_input/pos_embedding"] == 0
    assert found["Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"] > 0.3


def test_frozen_parameters_are_left_as_they_were(tmp_path):
    c = cases.config("magnitude", sparsity_dist_type="uniform")
    c.optimizer_configs.freeze_params_reg_exp = "Dense_0|fc_0|hidden_0|_0/"
    state, _ = cases.run(c, tmp_path)
    found = cases.sparsities(state.params)
    frozen = [name for name in found if "_0/" in name]
    assert frozen
    assert all(found[name] == 0 for name in frozen if name.endswith("kernel"))
    assert any(value > 0.7 for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "data"), [("rigl", {}), ("movement", {"dataset_name": "digits", "replay_data_on_resume": True})]
)
def test_resumed_is_the_run_that_went_through(algorithm, data, tmp_path, monkeypatch):
    """From the middle of the mask updates; masks packed. And data in their order, where that is asked for."""
    more = {"checkpoint": True, "checkpoint_steps": 9, "sparsity_use_packed_masks": True} | data
    whole, _ = cases.run(cases.config(algorithm, **more), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stock = datasets.get_dataset(more.get("dataset_name", "one_batch"))

        def ends(**arguments):
            dataset = stock(**arguments)
            return dataclasses.replace(dataset, train_iter=itertools.islice(dataset.train_iter, 10))

        patch.setitem(datasets.DatasetRegistry._REGISTRY, more.get("dataset_name", "one_batch"), ends)
        with pytest.raises(StopIteration):
            cases.run(cases.config(algorithm, **more), tmp_path / "parts")
    parts, writer = cases.run(cases.config(algorithm, **more), tmp_path / "parts")
    assert min(step for step, _ in writer.scalars["sparsity"]) > 10
    for field in ("params", "opt_state", "rng", "global_step"):
        cases.assert_same_bits(getattr(parts, field), getattr(whole, field))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Trainings with a checkpoint: one sparse and one dense."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases.run(cases.config("magnitude", checkpoint=True), folder / "sparse")
    state, writer = cases.run(cases.config(None, checkpoint=True), folder / "dense")
    assert not cases.sparse_states(state)
    assert "sparsity" not in writer.scalars
    assert sparsity_logs(state) == {}
    return folder


@pytest.mark.parametrize(
    ("folder", "algorithm", "more", "message"),
    [
        ("sparse", "magnitude", {"sparsity_use_packed_masks": True}, "use_packed_masks: False in the run of .*, True"),
        ("sparse", "set", {}, "algorithm: 'magnitude' in the run of .*, 'set' now"),
        ("sparse", None, {}, "algorithm: 'magnitude' in the run of .*, 'no_prune' now"),
        ("dense", "magnitude", {}, "algorithm: 'no_prune' in the run of .*, 'magnitude' now"),
        ("sparse", "magnitude", {"sparsity_exclude_reg_exp": "_0"}, "exclude_reg_exp: None in the run of .*, '_0' now"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(folders, folder, algorithm, more, message, tmp_path):
    shutil.copytree(folders / folder, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        cases.run(cases.config(algorithm, checkpoint=True, **more), tmp_path / "run")
    if folder == "dense" or algorithm is None:  # which the state tells too, where nothing was kept beside it
        (tmp_path / "run" / "sparsity.json").unlink()
        with pytest.raises(ValueError, match=message.replace("'magnitude' in", "'a sparse one' in")):
            cases.run(cases.config(algorithm, checkpoint=True, **more), tmp_path / "run")


@pytest.mark.slow
def test_another_sparsity_holds_from_here_and_is_told(folders, tmp_path, caplog):
    shutil.copytree(folders / "sparse", tmp_path / "run")
    logging.get_absl_logger().propagate = True
    more = {"sparsity_sparsity": 0.9, "sparsity_update_end_step": 28, "num_training_steps": 30}
    state, _ = cases.run(cases.config(checkpoint=True, **more), tmp_path / "run")
    cases.assert_exactly_sparse(state, sparsity=0.9)
    assert "sparsity_config.sparsity: 0.8 in the run of" in caplog.text
    assert "reached" not in "".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    caplog.clear()
    more |= {"sparsity_sparsity": 0.95, "num_training_steps": 32}  # after the last update
    cases.run(cases.config(checkpoint=True, **more), tmp_path / "run")
    assert caplog.records[-1].getMessage().startswith("sparsity: asked 95.0 %, reached 90")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small", "mnist"])
def test_shipped_configurations_log_their_sparsity(name, tmp_path):
    """With their own learning rates, which are vectors of one number in the logs."""
    if name == "mnist":  # one of Scenic's own
        from scenic.projects.baselines.configs.mnist import mnist_config

        c = mnist_config.get_config()
        c.dataset_name, c.checkpoint, c.xprof = "digits", False, False
        c.sparsity_config = sparsity.parse("magnitude", sparsity=0.8, dist_type="uniform")
    else:
        c = importlib.import_module(f"jaxpruner_scenic.configs.{name}").get_config("magnitude,0.8,digits")
    with c.unlocked():
        c.num_training_epochs, c.checkpoint, c.log_summary_steps, c.batch_size = 1, False, 5, 128
    c.sparsity_config.update_start_step, c.sparsity_config.update_end_step, c.sparsity_config.update_freq = 2, 6, 2
    state, writer = cases.run(c, tmp_path)
    cases.assert_exactly_sparse(state)
    assert writer.scalars["sparsity"][-1][1] == pytest.approx(0.8, abs=0.01)
    assert "learning_rate" in writer.scalars


@pytest.mark.slow
def test_killed_for_good_and_resumed(tmp_path):
    more = {"checkpoint": True, "checkpoint_steps": 4, "num_training_steps": 4000, "log_eval_steps": 4000}
    program = f"""
import sys; sys.path[:] = {[str(HERE), *sys.path]!r}
import scenic_cases as cases
cases.run(cases.config("set", **{more!r}), cases.pathlib.Path({str(tmp_path / "run")!r}))
"""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], stderr=log, stdout=log)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run").glob("checkpoint_[0-9]*")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = cases.checkpoints.restore_checkpoint(str(tmp_path / "run"), None)
    done = int(saved["global_step"])
    assert done < 4000
    state, writer = cases.run(
        cases.config("set", **more | {"num_training_steps": done + 8, "log_eval_steps": 4}), tmp_path / "run"
    )
    assert int(state.global_step) == done + 8
    assert min(step for step, _ in writer.scalars["sparsity"]) > done
    cases.assert_exactly_sparse(state)


@pytest.mark.slow
def test_two_devices_equal_one(tmp_path):
    """For one that grows by gradients; and straight-through, with packed masks."""
    algorithms = {"rigl": {}, "magnitude_ste": {"sparsity_use_packed_masks": True}}
    program = f"""
import sys; sys.path[:] = {[str(HERE), *sys.path]!r}
import scenic_cases as cases, pickle, jax
assert jax.local_device_count() == 2
folder = cases.pathlib.Path({str(tmp_path)!r})
for name, more in {algorithms!r}.items():
    state, _ = cases.run(cases.config(name, **more), folder / "two")
    pickle.dump((state.params, cases.sparse_states(state)[0].masks), open(folder / f"{{name}}.pickle", "wb"))
"""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "NPROC": "16",
        "PJRT_NPROC": "16",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, more in algorithms.items():
        two, masks = pickle.loads((tmp_path / f"{name}.pickle").read_bytes())
        one, _ = cases.run(cases.config(name, **more), tmp_path / "one")
        cases.assert_same_bits(masks, cases.sparse_states(one)[0].masks)
        for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one.params), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude_ste"])
def test_a_dense_checkpoint_is_pruned_by_the_transfer_trainer(algorithm, tmp_path):
    dense, _ = cases.run(cases.vit(None, checkpoint=True), tmp_path / "dense")
    c = cases.vit(
        algorithm,
        trainer_name="transfer_trainer",
        init_from={"checkpoint_path": str(tmp_path / "dense"), "model_config": cases.vit(None)},
    )
    c.lr_configs.base_learning_rate = 0.0
    c.init_from.model_config.restored_positional_embedding = None
    state, _ = cases.run(c, tmp_path / "sparse")
    cases.assert_exactly_sparse(state)
    # Without learning, what is kept is what was restored.
    kernel = state.params["pre_logits"]["kernel"]
    kept = kernel != 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_array_equal(kernel[kept], dense.params["pre_logits"]["kernel"][kept])


def plainvit(**more):
    schedule = {"re": "(.*)", "lr_configs": cases.config().lr_configs.to_dict()}
    model = {
        "hidden_size": 16, "mlp_dim": 32, "num_heads": 2, "num_layers": 1, "patches": {"size": [4, 4]},
        "representation_size": None, "classifier": "map", "dropout_rate": 0.0, "positional_embedding": "learn",
    }  # fmt: skip
    c = cases.config(
        "magnitude", trainer_name="plainvit_trainer", model_name="plainvit", model=model, loss="sigmoid_xent",
        schedule={"all": schedule}, **more,
    )  # fmt: skip
    del c.optimizer
    c.optimizer = {"optax_name": "scale_by_adam", "optax_configs": {}, "max_grad_norm": 1.0, "weight_decay": 1e-4}
    return c


@pytest.mark.slow
def test_plainvit(tmp_path):
    state, writer = cases.run(plainvit(), tmp_path)
    cases.assert_exactly_sparse(state)
    assert writer.scalars["sparsity"][-1][1] == pytest.approx(0.8, abs=0.01)
    found = cases.sparsities(state.params)
    assert found["pos_embedding"] == 0
