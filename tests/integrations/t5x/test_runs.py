"""Runs of the stock trainer: dense checkpoint in, sparse checkpoint out; resume, evaluation, export, errors, text."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import t5x_cases as cases
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxpruner_t5x import bible, compact, compatibility, dense_or_sparse, export, launch, metrics

pytestmark = cases.quiet


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> pathlib.Path:
    """The last checkpoint of a stock dense run."""
    folder = tmp_path_factory.mktemp("dense")
    step, state = cases.pretrain(folder)
    assert step == cases.DENSE_STEPS
    assert not hasattr(state._optimizer.state, "sparse")
    return folder / f"checkpoint_{cases.DENSE_STEPS}"


@pytest.fixture(scope="session")
def sparse(dense, tmp_path_factory) -> tuple[pathlib.Path, object]:
    """A sparse fine-tuning of 8 steps: its last checkpoint and state."""
    folder = tmp_path_factory.mktemp("sparse")
    _, state = cases.finetune(folder, dense, steps=12)
    return folder / "checkpoint_12", state


@pytest.mark.slow
def test_the_dense_checkpoint_is_restored_to_the_bit(dense, tmp_path):
    """Statistics included; masks start at all ones."""
    _, state = cases.finetune(tmp_path, dense, steps=cases.DENSE_STEPS)  # no step is left to train
    found, wanted = cases.of(state), cases.saved(dense)
    masks = {name for name in found if name.startswith("state/sparse/")}
    assert len(wanted) > 60
    cases.assert_equal({name: found[name] for name in set(found) - masks}, wanted)
    assert all(found[name].all() for name in masks if "/masks/" in name)
    assert found["state/sparse/count"] == 0


@pytest.mark.slow
def test_the_sparsity_is_exact_in_state_checkpoint_and_logs(sparse):
    checkpoint, state = sparse
    found = {name: float(value) for name, value in metrics.sparsities(state).items()}
    kernels = {name for name in cases.of(state) if name.startswith("target/") and name.endswith("/kernel")}
    assert {name.removeprefix("target/") for name in kernels} == set(found) - {"total"}
    entries = sum(cases.of(state)[name].size for name in kernels)
    assert found["total"] == pytest.approx(0.8, abs=len(kernels) / entries)
    saved = cases.saved(checkpoint)
    cases.assert_equal(saved, cases.of(state))
    for name in kernels:
        mask = saved[name.replace("target/", "state/sparse/masks/")]
        np.testing.assert_array_equal(saved[name] != 0, mask, err_msg=name)
    assert saved["state/sparse/count"] == 8
    assert saved["state/step"] == 12

    events = EventAccumulator(str(checkpoint.parent / "train"), size_guidance={"tensors": 0})
    events.Reload()
    logged = {tag for tag in events.Tags()["tensors"] if tag.startswith("sparsity/")}
    assert len(logged) == len(found)


def test_a_resumed_run_is_the_run_that_went_through(dense, tmp_path):
    more = cases.ONE_VERSE | {"CHECKPOINT_PERIOD": 4, "ALGORITHM": "rigl"}
    _, whole = cases.finetune(tmp_path / "whole", dense, steps=12, **more)
    with pytest.raises(ValueError, match="update_end_step: the last mask update is at step 6, and the training has 4"):
        cases.finetune(tmp_path / "parts", dense, steps=8, **more)
    cases.finetune(tmp_path / "parts", dense, steps=8, **more | {"jaxpruner_t5x.SparseOptimizer.plan": None})
    _, resumed = cases.finetune(tmp_path / "parts", dense, steps=12, **more)
    cases.assert_equal(cases.of(resumed), cases.of(whole))


@pytest.mark.slow
def test_a_sparse_checkpoint_is_continued(sparse, tmp_path):
    checkpoint, state = sparse
    _, restored = cases.finetune(tmp_path, checkpoint, steps=12)
    cases.assert_equal(cases.of(restored), cases.of(state))


@pytest.mark.slow
def test_a_sparse_checkpoint_is_continued_to_another_sparsity_but_not_by_another_algorithm(sparse, tmp_path):
    checkpoint, _ = sparse
    more = {"SPARSITY": 0.9, "UPDATE_END_STEP": 10}
    _, state = cases.finetune(tmp_path / "sparser", checkpoint, steps=16, **more)
    assert float(metrics.sparsities(state)["total"]) == pytest.approx(0.9, abs=5e-3)
    with pytest.raises(ValueError, match=r"algorithm: 'magnitude' in the run of .*, 'magnitude_ste' now, which cannot"):
        cases.finetune(tmp_path / "other", checkpoint, steps=16, ALGORITHM="magnitude_ste")
    described = checkpoint.parent / "sparsity.json"
    told = json.loads(described.read_text())
    assert (told["algorithm"], told["sparsity"], told["update_end_step"]) == ("magnitude", 0.8, 6)
    described.rename(tmp_path / "sparsity.json")  # of a checkpoint that was copied, or is from before
    with pytest.raises(ValueError, match="sparse by another algorithm or filter_fn: it lacks state/sparse/inner_st"):
        cases.finetune(tmp_path / "other", checkpoint, steps=16, ALGORITHM="magnitude_ste")
    (tmp_path / "sparsity.json").rename(described)


def test_what_a_run_that_is_resumed_cannot_go_on_with_is_told(sparse, dense):
    """The key, both values and the remedy; in MODEL_DIR."""
    folder = sparse[0].parent
    packed = {"jaxpruner_t5x.create_updater.use_packed_masks": True}
    with pytest.raises(ValueError, match=r"^use_packed_masks: False in the run of MODEL_DIR.*, True now.*Set use_p"):
        cases.finetune(folder, dense, steps=16, **packed)
    with pytest.raises(ValueError, match=r"of a sparse run, and algorithm='no_prune' is asked for. Go on with"):
        cases.finetune(folder, dense, steps=16, ALGORITHM="no_prune")
    states = {"target": {"w": 0}, "state": {"sparse": {"masks": {"w": 1}}}}, {"target": {"w": 0}}
    with pytest.raises(ValueError, match=r"of a sparse run, and this one is dense. Go on with"):
        dense_or_sparse()(*states, is_resuming=True)
    with pytest.raises(ValueError, match=r"^algorithm: 'magnitude' in the run of .*without sparse.gin, 'no_prune' now"):
        cases.finetune(folder, dense, steps=16, sparse=False)
    assert sorted(folder.glob("checkpoint_*"))[-1].name != "checkpoint_16"


@pytest.mark.slow
def test_a_schedule_that_does_not_fit_in_the_run_is_refused(tmp_path, dense):
    """Those of sparse.gin in a short run; at its start, without gin's chain of calls."""
    defaults = {"UPDATE_START_STEP": 25_000, "UPDATE_END_STEP": 75_000, "UPDATE_FREQ": 1000}
    steps = "the first mask update is at step 25000, and the training has {} steps"
    with pytest.raises(ValueError, match=steps.format(12)) as told:
        launch.train([cases.PRETRAIN, cases.SPARSE], cases.bind(**cases.SMALL, MODEL_DIR=str(tmp_path), TRAIN_STEPS=12))
    assert "\n" not in str(told.value)
    assert "In call to configurable" not in str(told.value)
    with pytest.raises(ValueError, match=steps.format(5)):
        cases.finetune(tmp_path, dense, steps=99, TRAIN_STEPS_RELATIVE=5, **defaults)


def test_what_is_misspelled_is_told_in_a_line(tmp_path):
    def train(**bindings):
        given = cases.SMALL | {"MODEL_DIR": str(tmp_path), "TRAIN_STEPS": 8} | cases.MASKS | bindings
        launch.train([cases.PRETRAIN, cases.SPARSE], cases.bind(**given))

    for bindings, match in (
        ({"ALGORITHM": "magnitud"}, r"^algorithm: 'magnitud' is not known"),
        ({"ALGORITM": "rigl"}, r"^ALGORITM: is bound, and nothing uses it. Is ALGORITHM meant\?$"),
        ({"jaxpruner_t5x.create_updater.update_frq": 2}, "update_frq"),
        (
            {"jaxpruner_t5x.create_updater.sparsity_type": "nm_2:4"},
            "sparsity of 0.6.* is asked for, and 2:4 gives 0.5",
        ),
    ):
        with pytest.raises(ValueError, match=match) as told:
            train(**bindings)
        assert "\n" not in str(told.value)


@pytest.mark.slow
def test_scanned_layers_straight_through_with_packed_masks(tmp_path):
    """The scalable T5, from scratch."""
    network = tmp_path / "scanned.gin"
    lines = ["from __gin__ import dynamic_registration", "import t5x_cases", "from t5x import models"]
    network.write_text("\n".join([*lines, "models.EncoderDecoderModel.module = @t5x_cases.scanned()\n"]))
    given = cases.SMALL | cases.MASKS | {
        "ALGORITHM": "magnitude_ste", "jaxpruner_t5x.create_updater.use_packed_masks": True, "MODEL_DIR": str(tmp_path),
        "CHECKPOINT_PERIOD": 4,
    }  # fmt: skip

    def train(steps):
        return launch.train([cases.PRETRAIN, str(network), cases.SPARSE], cases.bind(**given, TRAIN_STEPS=steps))

    _, state = train(8)
    wi = np.asarray(state.params["encoder"]["encoder"]["mlp"]["wi"]["kernel"])
    zeros = (wi == 0).sum(axis=(0, 2))
    assert wi.shape == (16, 2, 32)
    assert zeros[0] == zeros[1] > 0.7 * 16 * 32
    assert float(metrics.sparsities(state)["total"]) == pytest.approx(0.8, abs=5e-3)
    saved = cases.saved(tmp_path / "checkpoint_8")
    assert saved["state/sparse/masks/encoder/encoder/mlp/wi/kernel"].dtype == np.uint8
    hidden = saved["state/sparse/inner_state/weights/decoder/logits_dense/kernel"]
    assert (hidden != 0).all()
    cases.assert_equal(saved, cases.of(state))
    # It goes on from its hidden weights.
    _, resumed = train(12)
    assert resumed._optimizer.state.sparse.count.dtype == np.int32
    assert float(metrics.sparsities(resumed)["total"]) == pytest.approx(0.8, abs=5e-3)


@pytest.mark.slow
def test_stock_evaluation_and_export(sparse, tmp_path):
    """T5X's eval reads a sparse checkpoint, and the export as a dense run's; both say the same."""
    checkpoint, state = sparse
    plain = export.export(str(checkpoint), str(tmp_path / "plain"))
    wanted = {name: leaf for name, leaf in cases.of(state).items() if not name.startswith("state/sparse/")}
    cases.assert_equal(cases.saved(plain), wanted)
    scores = []
    for number, path in enumerate((checkpoint, plain)):
        bindings = cases.SMALL | {
            "CHECKPOINT_PATH": str(path), "EVAL_OUTPUT_DIR": str(tmp_path / f"eval{number}"), "DROPOUT_RATE": 0.0,
            "MIXTURE_OR_TASK_NAME": "kjv_to_web", "seqio.Evaluator.num_examples": 4,
            f"{cases.T5}.dtype": "float32",
        }  # fmt: skip
        for name in ("EVAL_PERIOD", "BATCH_SIZE", "train/utils.DatasetConfig.shuffle"):
            del bindings[name]
        files = ["t5x/examples/t5/t5_1_1/tiny.gin", "t5x/configs/runs/eval.gin", "jaxpruner_t5x/configs/bible.gin"]
        launch.evaluate(files, cases.bind(**bindings))
        (file,) = (tmp_path / f"eval{number}").rglob("kjv_to_web-metrics.jsonl")
        scores.append(file.read_text())
    assert "bleu" in scores[0]
    assert scores[0] == scores[1]
    # It is a dense checkpoint to a stock fine-tuning.
    _, restored = cases.finetune(tmp_path / "stock", plain, steps=12, sparse=False)
    cases.assert_equal(cases.of(restored), wanted)


@pytest.mark.slow
def test_stock_inference_reads_sparse_checkpoints(sparse, tmp_path):
    checkpoint, _ = sparse
    written = []
    for number, path in enumerate((checkpoint, export.export(str(checkpoint), str(tmp_path / "plain")))):
        bindings = cases.MODEL | {
            "CHECKPOINT_PATH": str(path), "INFER_OUTPUT_DIR": str(tmp_path / f"out{number}"), "DROPOUT_RATE": 0.0,
            "MIXTURE_OR_TASK_NAME": "one_verse", "utils.DatasetConfig.split": "validation",
            "utils.DatasetConfig.batch_size": 1, f"{cases.T5}.dtype": "float32",
        }  # fmt: skip
        files = ["t5x/examples/t5/t5_1_1/tiny.gin", "t5x/configs/runs/infer.gin", "jaxpruner_t5x/configs/bible.gin"]
        launch.infer(files, cases.bind(**bindings))
        files = sorted((tmp_path / f"out{number}").glob("*.jsonl*"))
        written.append([(file.name, file.read_text()) for file in files])
    assert "prediction" in str(written[0])
    assert written[0] == written[1]


@pytest.mark.slow
def test_a_decoder_only_model(tmp_path):
    import t5x

    network = {"num_layers": 1, "emb_dim": 16, "head_dim": 8, "num_heads": 2, "mlp_dim": 32, "vocab_size": 4224}
    bindings = {f"network.TransformerConfig.{name}": value for name, value in network.items()} | cases.MASKS | {
        "MODEL_DIR": str(tmp_path), "TRAIN_STEPS": 8, "BATCH_SIZE": 4, "DROPOUT_RATE": 0.0, "RANDOM_SEED": 0,
        "MIXTURE_OR_TASK_NAME": "web_span_corruption", "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 32},
        "network.TransformerConfig.dtype": "float32", "utils.SaveCheckpointConfig.period": 8,
    }  # fmt: skip
    # A folder without __init__.py, which gin cannot find by its name.
    model = pathlib.Path(t5x.__file__).parent / "examples" / "decoder_only" / "models" / "base.gin"
    files = [str(model), "t5x/configs/runs/pretrain.gin"]
    more = ["jaxpruner_t5x/configs/bible.gin", cases.SPARSE]
    _, state = launch.train([*files, *more], cases.bind(**bindings), eval_period=0)
    found = metrics.sparsities(state)
    assert float(found["total"]) == pytest.approx(0.8, abs=5e-3)
    assert any(name.startswith("decoder/layers_0/mlp") for name in found)


@pytest.mark.slow
def test_nothing_of_a_dense_checkpoint_is_dead(dense, tmp_path, capsys):
    small = compact.compact(str(dense), str(tmp_path), batch_size=1)
    assert "Nothing was removed: no unit is dead." in capsys.readouterr().out
    assert small.report["report"]["params"][0] == small.report["report"]["params"][1]


@pytest.mark.slow
def test_export_of_what_is_no_sparse_checkpoint(dense, sparse, tmp_path):
    with pytest.raises(ValueError, match="has no state/sparse, the masks"):
        export.export(str(dense), str(tmp_path))
    with pytest.raises(ValueError, match="is no checkpoint of T5X; give a folder such as"):
        export.export(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "checkpoint_12").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        export.export(str(sparse[0]), str(tmp_path))


@pytest.mark.slow
def test_a_checkpoint_in_the_format_of_the_public_ones(tmp_path):
    """T5X's own, from before Orbax."""
    legacy = tmp_path / "legacy.gin"
    lines = ["from __gin__ import dynamic_registration", "import __main__ as train_script"]
    legacy.write_text("\n".join([*lines, "train_script.train.use_orbax = False\n"]))
    bindings = cases.SMALL | {"MODEL_DIR": str(tmp_path), "TRAIN_STEPS": cases.DENSE_STEPS, "CHECKPOINT_PERIOD": 4}
    _, dense = launch.train([cases.PRETRAIN, str(legacy)], cases.bind(**bindings))
    checkpoint = tmp_path / f"checkpoint_{cases.DENSE_STEPS}"
    assert (checkpoint / "checkpoint").exists()
    given = {
        "MODEL_DIR": str(tmp_path / "sparse"), "INITIAL_CHECKPOINT_PATH": str(checkpoint),
        "TRAIN_STEPS": cases.DENSE_STEPS, "CHECKPOINT_PERIOD": 4,  # no step is left to train
    }  # fmt: skip
    bindings = cases.bind(**cases.SMALL | cases.MASKS | given)
    _, state = launch.train([cases.FINETUNE, cases.SPARSE, str(legacy)], bindings)
    plain = export.export(str(tmp_path / "sparse" / checkpoint.name), str(tmp_path / "plain"))
    cases.assert_equal(cases.saved(plain), cases.of(dense))
    found = {name: leaf for name, leaf in cases.of(state).items() if not name.startswith("state/sparse/")}
    cases.assert_equal(found, cases.of(dense))


def test_constants_of_other_libraries_stay():
    import gin

    gin.constant("jaxpruner_tests.ANSWER", 42)
    for _ in range(2):
        with launch.parsed([], ["MODEL_DIR = %jaxpruner_tests.ANSWER"]):
            assert gin.query_parameter("%MODEL_DIR").scoped_configurable_fn() == 42


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "xl"])
def test_the_papers_configuration(size):
    import gin

    files = [f"t5x/examples/t5/t5_1_1/{size}.gin", "jaxpruner_t5x/configs/c4_pretrain.gin", cases.SPARSE]
    with launch.parsed(files, ["MODEL_DIR = 'x'"]):
        model = gin.query_parameter("%MODEL").scoped_configurable_fn()
        optimizer = model.optimizer_def
        assert type(optimizer).__name__ == "SparseOptimizer"
        scheduler = optimizer.updater.scheduler
        assert (scheduler.update_start_step, scheduler.update_end_step, scheduler.update_freq) == (25_000, 75_000, 1000)
        assert gin.query_parameter("%TRAIN_STEPS") == 100_000
        assert gin.query_parameter("%BATCH_SIZE") == 256
        assert gin.query_parameter("%TASK_FEATURE_LENGTHS") == {"inputs": 512, "targets": 114}
        rate = gin.query_parameter("trainer.Trainer.learning_rate_fn").scoped_configurable_fn()
        assert float(rate(1000)) == pytest.approx(1e-4)
        assert float(rate(100_000)) == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(dense, tmp_path):
    with pytest.raises(ValueError, match=r"the checkpoint lacks \d+ parameters of this model, such as target/"):
        cases.finetune(tmp_path, dense, steps=12, **{f"{cases.T5}.num_decoder_layers": 2})


@pytest.mark.slow
def test_a_checkpoint_of_another_width_is_refused(dense, tmp_path):
    with pytest.raises(ValueError, match=r"^target/.*: is \[.*16.*\] in the checkpoint and \[.*24.*\] in the model."):
        cases.finetune(tmp_path, dense, steps=12, **{f"{cases.T5}.emb_dim": 24})


def test_a_dense_run_is_not_continued_sparse_in_its_own_folder(dense, tmp_path):
    with pytest.raises(ValueError, match=r"is of a dense run, and algorithm='magnitude' is asked for. Use a new MODEL"):
        cases.finetune(dense.parent, dense, steps=12)


@pytest.mark.parametrize("name", ["t5x", "airio", "jestimator"])
def test_what_is_missing_is_named(name, tmp_path):
    block = f"import sys; sys.modules[{name!r}] = None; import jaxpruner_t5x"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, env=environment).stderr
    assert f"No module named {name!r}, which T5X needs and no package registry has" in told
    for repository, commit in compatibility.COMMITS.items():
        assert f"github.com/{repository}@{commit}" in told


def test_the_release_of_jestimator_is_not_the_one(tmp_path, monkeypatch):
    (tmp_path / "jestimator").mkdir()
    (tmp_path / "jestimator" / "__init__.py").touch()
    (tmp_path / "jestimator" / "amos.py").write_text("x = jax.tree_map(f, tree)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    block = "from importlib import util; import jaxpruner_t5x"
    told = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, env=environment).stderr
    assert "is the release on PyPI, which fails on today's JAX. First: pip uninstall jestimator" in told


@pytest.mark.slow
def test_model_parallel_runs_are_the_runs_on_one_device(dense, tmp_path):
    """In a process of two virtual devices, since a process has its number from the start."""
    script = pathlib.Path(__file__).parent / "partitions.py"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        # On few cores, collectives starve XLA's pool of threads otherwise.
        "NPROC": "16", "PJRT_NPROC": "16", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(script), str(dense), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all equal"


def test_verses_and_their_splits():
    assert len(bible.verses("web")) == 31_102
    assert bible.verses("web")[1001003] == 'God said, "Let there be light," and there was light.'
    sizes = {split: len(bible.pairs(split)) for split in bible.SPLITS}
    assert sizes == {"train": 27_907, "validation": 1_530, "test": 1_662}
    texts = {split: set(bible.chapters(split)) for split in bible.SPLITS}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not any("`" in text for text in texts["train"])


def test_the_vocabulary_is_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bible, "chapters", lambda split: ["In the beginning God created the heaven and the earth."] * 9)
    monkeypatch.setattr(bible, "pairs", lambda split: [("And God said, Let there be light", "God said, light")])
    first, second = (pathlib.Path(bible.vocabulary_file(40, str(tmp_path / name))).read_bytes() for name in ("a", "b"))
    assert first == second
