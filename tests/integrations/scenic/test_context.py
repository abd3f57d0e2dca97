"""The context manager: what it replaces and puts back, and what it refuses; finding Scenic; configurations; data."""

from __future__ import annotations

import gzip
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import flax
import jax
import numpy as np
import optax
import pytest
import scenic_cases as cases
from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags
from optax import MaskedNode
from scenic.dataset_lib import datasets as registry
from scenic.train_lib import classification_trainer, optimizers, train_utils
from scenic.train_lib import optax as scenic_optax
from scenic.train_lib.transfer import linear_probe_utils

import jaxpruner
import jaxpruner_scenic
from jaxpruner import trees
from jaxpruner.training import projection
from jaxpruner_scenic import compatibility, datasets, main, sparse
from jaxpruner_scenic.configs import small, sparsity

pytestmark = cases.quiet
CONFIGS = pathlib.Path(jaxpruner_scenic.__file__).parent / "configs"
ADAM = optimizers.get_optax_optimizer_config(cases.config())
PARAMS = {"a": {"kernel": np.ones((8, 8), np.float32)}, "b": {"kernel": np.ones((8, 8), np.float32)}}


def stock():
    return optimizers.get_optimizer, scenic_optax.make, classification_trainer.train_step


def test_everything_is_put_back():
    before = stock()
    with jaxpruner_scenic.sparse_training(cases.config(), classification_trainer):
        assert all(a is not b for a, b in zip(stock(), before, strict=True))
        optimizers.get_optimizer(ADAM, 1e-3, params=PARAMS)
    assert stock() == before


@pytest.mark.parametrize("name", ["sparsity_configs", "sparsity_cfg", "sparsity", "pruning"])
def test_a_sparsity_config_under_another_name_is_refused(name):
    config = cases.config()
    config[name] = config.sparsity_config
    del config["sparsity_config"]
    with pytest.raises(ValueError, match=rf"^config.{name}: nothing reads it; is config.sparsity_config meant\?"):
        jaxpruner_scenic.sparse_training(config).__enter__()


def test_a_sparsity_config_of_none_is_a_dense_training():
    config = cases.config()
    config.sparsity_config = None
    before = stock()
    with jaxpruner_scenic.sparse_training(config):
        assert stock() == before


def test_flags_may_set_every_plain_key_of_the_core():
    objects = {"filter_fn", "masks", "scheduler", "sparsity_distribution_fn", "drop_fraction_fn", "topk_fn"}
    assert set(sparsity.KEYS) | objects >= set(jaxpruner.config_keys())


def test_everything_is_put_back_after_an_error():
    before = stock()
    with (
        pytest.raises(KeyError),
        jaxpruner_scenic.sparse_training(cases.config(), classification_trainer),
    ):
        raise KeyError("in the trainer")
    assert stock() == before
    with jaxpruner_scenic.sparse_training(cases.config()):  # not active any more
        optimizers.get_optimizer(ADAM, 1e-3, params=PARAMS)


@pytest.mark.parametrize("inner", ["magnitude", None])
def test_no_nesting(inner):
    with (
        pytest.raises(RuntimeError, match="is active already"),
        jaxpruner_scenic.sparse_training(cases.config()),
        jaxpruner_scenic.sparse_training(cases.config(inner)),
    ):
        pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sparsity_algorithm": "magnitud"}, r"jaxpruner.all_algorithm_names\(\)"),
        ({"sparsity_sparsity": 1.5}, "Default sparsity"),
        ({"sparsity_update_end_step": 1}, "end_step"),
        ({"sparsity_colour": 1}, "colour: no such key"),
        ({"sparsity_exclude_reg_exp": "("}, r"exclude_reg_exp: '\(' is no pattern"),
        ({"sparsity_sparsity_distribution_fn": len}, "would prune what Scenic freezes"),
    ],
)
def test_a_bad_configuration_is_told_before_anything_starts(more, message):
    before = stock()
    with pytest.raises(ValueError, match=message), jaxpruner_scenic.sparse_training(cases.config(**more)):
        pass
    assert stock() == before


def test_a_filter_that_leaves_nothing_is_told_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="selects none of the"):
        cases.run(cases.config(sparsity_exclude_reg_exp="."), tmp_path)


def test_a_pattern_that_excludes_nothing_is_told_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"'hiden' is found in no parameter's name; the names are Dense_0/bias, "):
        cases.run(cases.config(sparsity_exclude_reg_exp="hiden"), tmp_path)


def test_groups_are_refused_only_what_they_cannot_share():
    for c, params, message in (
        (cases.config("global_magnitude", sparsity_dist_type="uniform"), PARAMS, "one threshold over all layers"),
        (cases.config(), None, "makes them without params"),
    ):
        with jaxpruner_scenic.sparse_training(c):
            optimizers.get_optimizer(ADAM, 1e-3, params=params)
            with pytest.raises(ValueError, match=f"an optimizer for each group of parameters, and .*{message}"):
                optimizers.get_optimizer(ADAM, 1e-3, params=params)


GROUPED = {
    "a": {"kernel": np.ones((8, 8), np.float32)}, "b": {"kernel": np.ones((32, 64), np.float32)},
    "c": {"kernel": np.ones((32, 64), np.float32)}, "d": {"kernel": np.ones((2, 2), np.float32)},
    "cls": np.ones((8, 8), np.float32),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("magnitude", {"sparsity_dist_type": "uniform"}),
        ("magnitude", {"sparsity_dist_type": "erk"}),
        ("rigl", {"sparsity_dist_type": "erk", "sparsity_use_packed_masks": True}),
        ("magnitude_ste", {"sparsity_custom_sparsity_map": {"c/*": 0.5, "d/*": 0.0}}),
        ("magnitude", {"sparsity_sparsity": 0.5, "sparsity_dist_type": "uniform", "sparsity_sparsity_type": {
            "b/*": "nm_2:4"}}),
    ],
)  # fmt: skip
def test_a_trainer_with_a_learning_rate_for_each_group_of_parameters(algorithm, more):
    """By a helper of one of Scenic's projects: one budget over all groups. A group without kernels is dense."""
    from scenic.projects.unloc import optimizer_utils

    params = flax.core.freeze(GROUPED)
    rates = dict.fromkeys(("a", "c", "d", "cls"), 0.1)
    c = cases.config(algorithm, layer_prefix_to_base_lrs=rates, **more)
    with jaxpruner_scenic.sparse_training(c):
        tx = optimizer_utils.optimizer_with_multi_lrs(c, params)
    whole = sparse.create_updater(c.sparsity_config).init_state(params).target_sparsities
    state, grads = tx.init(params), jax.tree.map(np.ones_like, params)
    step = jax.jit(tx.update)
    for _ in range(14):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    leaves = dict(trees.named_leaves(params))
    assert float((np.asarray(leaves[("cls",)]) == 0).mean()) == 0
    for path, target in trees.named_leaves(whole):
        kept = max(1, round(leaves[path].size * (1 - float(target))))
        assert int(jaxpruner.summarize_sparsity(leaves[path])["_nparams_nnz"]) == kept, path


def test_equal_layers_of_two_groups_get_random_masks_of_their_own():
    with jaxpruner_scenic.sparse_training(cases.config("static_sparse", sparsity_dist_type="uniform")):
        tx = optax.multi_transform(
            {name: optimizers.get_optimizer(ADAM, 1e-3, params=PARAMS) for name in "ab"},
            {name: {"kernel": name} for name in "ab"},
        )
    masks = projection.state_masks(tx.init(PARAMS))
    assert (masks["a", "kernel"] != masks["b", "kernel"]).any()


def test_an_optimizer_of_the_trainers_own_is_told_at_the_end():
    with (
        pytest.raises(RuntimeError, match="the training made its optimizer in a way of its own"),
        jaxpruner_scenic.sparse_training(cases.config(), types.ModuleType("own_trainer")),
    ):
        pass


def test_an_optimizer_of_the_trainers_own_is_told_in_the_first_step():
    trainer = types.ModuleType("own_trainer")
    exec("def train_step(state): return state, {}, {}", vars(trainer))
    with (
        pytest.raises(RuntimeError, match="own_trainer made its optimizer in a way of its own"),
        jaxpruner_scenic.sparse_training(cases.config(), trainer),
    ):
        trainer.train_step(None)


@pytest.mark.parametrize(
    ("rest", "logged"),
    [
        (lambda: ({"loss": (1.0, 1)}, {"lr": np.ones(1), "act": np.ones(4)}), lambda r: r[2]["sparsity"]),
        (lambda: ({"loss": (1.0, 1)}, {"lr": 0.1}, {"image": np.ones((2, 8, 8))}), lambda r: r[2]["sparsity"]),
        (lambda: ({"loss": (1.0, 1)},), lambda r: r[1]["sparsity"][0]),  # objectvivit, owl_vit
        (lambda: ({"loss": (1.0, 1)}, {"image": np.ones((2, 8, 8))}), lambda r: r[1]["sparsity"][0]),  # boundary_att.
        (lambda: (0.1, [np.ones(3)], {"loss": (1.0, 1)}), lambda r: r[3]["sparsity"][0]),  # gerald
        (lambda: ("metrics",), None),
    ],
)
@pytest.mark.parametrize("factory", [False, True])
def test_sparsity_goes_where_a_train_step_logs(rest, logged, factory):
    trainer = types.ModuleType("other_trainer")
    step = lambda state: (state, *rest())  # noqa: E731
    vars(trainer).update({"get_train_step": lambda: step} if factory else {"train_step": step})
    with jaxpruner_scenic.sparse_training(cases.config(), trainer):
        tx = optimizers.get_optimizer(ADAM, 1e-3, params=PARAMS)
        zeros = jax.tree.map(np.zeros_like, PARAMS)
        state = types.SimpleNamespace(params=zeros, opt_state=tx.init(PARAMS))
        result = (trainer.get_train_step() if factory else trainer.train_step)(state)
    assert result[1:] == rest() if logged is None else logged(result) == 1.0


def test_an_optimizer_that_an_attack_makes_in_a_step_is_stock():
    from scenic.projects.adversarialtraining.attacks import attack_compute

    trainer = types.ModuleType("attacking_trainer")
    trainer.train_step = lambda: attack_compute.get_optimizer_def("Adam", 1e-3)().init(PARAMS)
    with jaxpruner_scenic.sparse_training(cases.config(), trainer):
        optimizers.get_optimizer(ADAM, 1e-3, params=PARAMS)
        assert not projection.find_states(trainer.train_step())
        with pytest.raises(ValueError, match="without params"):  # the trainer's own is sparse again
            optimizers.get_optimizer(ADAM, 1e-3)


def clipped(c):
    rate = {"learning_rate_schedule": "compound", "factors": "constant", "base_learning_rate": 1e-3}
    schedule = scenic_optax.make_schedule(ConfigDict({"all": {"re": "(.*)", "lr_configs": rate}}))
    optimizer = {"optax_name": "scale_by_adam", "optax_configs": {}, "max_grad_norm": 1.0}
    optimizer |= {"per_example_clipping": True, "optax_grad_pmean": True}
    with jaxpruner_scenic.sparse_training(c):
        return scenic_optax.make(ConfigDict(optimizer), schedule, PARAMS)[0]


def test_per_example_clipping_is_refused_where_gradients_are_read():
    for algorithm in ("saliency", "global_saliency", "rigl"):
        with pytest.raises(ValueError, match=rf"per_example_clipping: .* {algorithm!r} scores weights by gradients"):
            clipped(cases.config(algorithm))
    with pytest.raises(ValueError, match=r"'set' masks gradients; set sparsity_config.is_sparse_gradients to False"):
        clipped(cases.config("set"))
    for c in (cases.config(), cases.config("set", sparsity_is_sparse_gradients=False)):
        tx, grads = clipped(c), jax.tree.map(lambda x: np.ones((1, 3, *x.shape), np.float32), PARAMS)
        step = jax.pmap(tx.update, axis_name="batch", in_axes=(0, None, None))
        updates, _ = step(grads, tx.init(PARAMS), PARAMS)
        assert updates["a"]["kernel"].shape == (1, 8, 8)


def test_weights_off_their_masks_are_told_at_the_first_evaluation():
    with jaxpruner_scenic.sparse_training(cases.config()):
        tx = optimizers.get_optimizer(ADAM, 1e-3, params=PARAMS)
        state = tx.init(PARAMS)
        masks = jax.tree.map(lambda mask: mask.at[0].set(False), state.masks)
        state = jax.tree.map(lambda x: np.asarray(x)[None], state._replace(masks=masks, count=np.int32(5)))
        replicated = jax.tree.map(lambda x: x[None], PARAMS)
        with pytest.raises(ValueError, match="a/kernel: 8 of the 8 weights that its mask prunes are not zero"):
            train_utils.sync_model_state_across_replicas(
                types.SimpleNamespace(params=replicated, opt_state=state, model_state={})
            )


def test_standardised_weights_are_told_before_the_first_step():
    from scenic.projects.baselines import bit_resnet

    model = bit_resnet.BitResNet(num_outputs=10, num_layers=5, gn_num_groups=4)
    spec = {"input_spec": [((-1, 32, 32, 3), np.float32)], "config": ConfigDict({"batch_size": 2})}
    with jaxpruner_scenic.sparse_training(cases.config()):
        params, *_ = train_utils.initialize_model(model_def=model, rngs=jax.random.PRNGKey(0), **spec)
        with pytest.warns(UserWarning, match="shifts [0-9]+ pruned parameters .*conv1/kernel"):
            optimizers.get_optimizer(ADAM, 1e-3, params=params)


def test_a_schedule_past_the_end_of_the_training_is_refused_at_the_start(tmp_path):
    message = "update_end_step: the last mask update is at step 12, and the training has 12 steps"
    with pytest.raises(ValueError, match=message):
        cases.run(cases.config(num_training_steps=12), tmp_path)


def test_what_a_schedule_of_scenics_optax_freezes_is_not_pruned():
    rate = {"learning_rate_schedule": "compound", "factors": "constant", "base_learning_rate": 1e-3}
    schedule = scenic_optax.make_schedule(
        ConfigDict({"one": {"re": "a/.*", "lr_configs": None}, "two": {"re": "b/.*", "lr_configs": rate}})
    )
    with jaxpruner_scenic.sparse_training(cases.config(sparsity_dist_type="uniform")):
        tx, _ = scenic_optax.make(ConfigDict({"optax_name": "scale_by_adam", "optax_configs": {}}), schedule, PARAMS)
    masks = tx.init(PARAMS).masks
    assert masks["a"]["kernel"] == MaskedNode()
    assert masks["b"]["kernel"].all()


def test_a_linear_probe_is_dense():
    before = linear_probe_utils.optimizers
    with jaxpruner_scenic.sparse_training(cases.config()):
        tx = linear_probe_utils.optimizers.get_optimizer(ADAM, 1e-3)
        assert not isinstance(tx.init(PARAMS), jaxpruner.SparseState)
        optimizers.get_optimizer(ADAM, 1e-3)
    assert linear_probe_utils.optimizers is before


def python(program: str, *path: pathlib.Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    return done.stdout + done.stderr


def test_no_scenic_and_the_wrong_one(tmp_path):
    told = python("import jaxpruner_scenic", tmp_path)
    assert "No module named 'scenic'. Install it from its repository: pip install --no-deps" in told
    assert compatibility.COMMIT in told
    (tmp_path / "scenic").mkdir()
    assert "No module named 'scenic'. Install" in python("import jaxpruner_scenic", tmp_path)  # a folder is no package
    (tmp_path / "scenic" / "__init__.py").touch()
    told = python("import jaxpruner_scenic", tmp_path)
    assert "is PyPI's language for scenarios" in told
    assert "pip uninstall scenic" in told


def test_packages_that_hardly_anyone_uses_raise_on_use():
    from big_vision import utils

    with pytest.raises(ImportError, match="It is for checkpoints of big_vision"):
        utils.load_checkpoint_ts("x")
    assert importlib.util.find_spec("big_vision") is not None
    compatibility.load()  # a second time


def load(name: str, argument: str = ""):
    return config_flags.config_flags._LoadConfigModule("config", str(CONFIGS / name)).get_config(argument)


FILES = sorted(p.name for p in CONFIGS.glob("*.py") if p.name not in ("__init__.py", "sparsity.py", "small.py"))


@pytest.mark.parametrize("name", FILES)
def test_configurations_take_algorithm_and_sparsity(name):
    assert load(name).sparsity_config.algorithm == "magnitude"
    c = load(name, "rigl,0.9")
    assert (c.sparsity_config.algorithm, c.sparsity_config.sparsity) == ("rigl", 0.9)
    assert load(name, "dense").sparsity_config is None
    assert hasattr(main.get_trainer(c.trainer_name), "train")
    assert main.get_model(c.model_name) is not None
    sparse.create_updater(c.sparsity_config)
    for wrong in ("rigl,much", "dense,0.9", "rigl,0.9,digits,validation,more"):
        with pytest.raises(ValueError, match="--config: "):
            load(name, wrong)


def test_flags_set_what_a_configuration_leaves_out(monkeypatch):
    flags = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=flags)
    given = {"sparsity_type": "nm_2:4", "use_packed_masks": "true", "dist_type": "uniform", "initial_sparsity": "0.3"}
    arguments = [f"--config.sparsity_config.{key}={value}" for key, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["main", f"--config={CONFIGS / 'vit_small.py'}:magnitude,0.5", *arguments])
    flags(sys.argv)
    updater = sparse.create_updater(flags.config.sparsity_config)
    assert (updater.sparsity_type, updater.use_packed_masks) == (jaxpruner.sparsity_types.NByM(2, 4), True)
    assert updater.scheduler.initial_sparsity == 0.3


def test_the_papers_configurations():
    for name, epochs in (("vit_b16_imagenet.py", 90), ("vit_b16_300ep_imagenet.py", 300)):
        c = load(name)
        assert (c.num_training_epochs, c.batch_size, c.max_grad_norm, c.model.dropout_rate) == (epochs, 4096, 1.0, 0.1)
        assert (c.lr_configs.base_learning_rate, c.lr_configs.warmup_steps) == (3e-3, 10_000)
        assert c.lr_configs.steps_per_cycle == epochs * 312
        assert c.optimizer_configs.weight_decay == 0.3
        assert {key: value for key, value in c.sparsity_config.items() if value is not None} == {
            "algorithm": "magnitude", "sparsity": 0.8, "dist_type": "erk", "update_start_step": 10_000,
            "update_end_step": 20_000, "update_freq": 1_000,
        }  # fmt: skip
    c = load("resnet50_imagenet.py")
    assert (c.num_layers, c.num_training_epochs, c.l2_decay_factor, c.lr_configs.base_learning_rate) == (
        50,
        100,
        1e-4,
        1.6,
    )
    assert c.lr_configs.warmup_steps == 5 * 312
    assert {key: value for key, value in c.sparsity_config.items() if value is not None} == {
        "algorithm": "magnitude", "sparsity": 0.8, "dist_type": "uniform", "exclude_reg_exp": "stem_conv",
        "update_start_step": 10_000, "update_end_step": 25_000, "update_freq": 1_000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"), [("vit_small.py", "dataset 'cats' is not known"), ("resnet_small.py", "dataset 'cats'")]
)
def test_an_unknown_dataset_of_a_small_configuration(name, message):
    with pytest.raises(ValueError, match=message):
        load(name, "rigl,0.9,cats")


@pytest.mark.parametrize("argument", ["rigl,0.9,{}", "rigl,0.9,{},validation"])
@pytest.mark.parametrize("dataset", datasets.SOURCES)
@pytest.mark.parametrize("name", ["vit_small.py", "resnet_small.py"])
def test_masks_are_final_before_the_training_ends(name, dataset, argument):
    c = load(name, argument.format(dataset))
    examples = small.TRAIN_EXAMPLES[dataset][c.dataset_configs.validation]
    steps = c.num_training_epochs * (examples // c.batch_size)
    assert steps == c.lr_configs.steps_per_cycle
    assert 0.6 * steps < c.sparsity_config.update_end_step < 0.9 * steps


def test_an_unknown_trainer():
    with pytest.raises(ValueError, match=r"config.trainer_name: 'no_trainer' cannot be imported"):
        main.get_trainer("no_trainer")
    with pytest.raises(ValueError, match="has no function `train`"):
        main.get_trainer("scenic.train_lib.optimizers")
    assert main.get_trainer("scenic.projects.matvit.trainer").train  # the example of README.md and of the error
    assert main.get_model("scenic.projects.matvit.matvit:MatViTMultiLabelClassificationModel")
    with pytest.raises(ValueError, match=r"config.model_name: 'scenic.no:Model' is not to be had"):
        main.get_model("scenic.no:Model")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"trainer_name": "no_trainer"}, "main: config.trainer_name: 'no_trainer'"),
        ({"sparsity_algorithm": "rgl"}, "main: algorithm: 'rgl' is not known"),
        ({"model_name": "vit"}, "main: config.model_name: 'vit' is no model .* give it as 'module:Class', such as "),
    ],
)
def test_main_tells_a_bad_configuration_in_one_line(more, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main.main(jax.random.PRNGKey(0), cases.config(**more), str(tmp_path), None)


def test_a_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="2048 images are more than the 1414 to train on"):
        registry.get_dataset("digits")(batch_size=2048, eval_batch_size=128, num_shards=1)


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [("digits", (8, 8, 1), (1414, 383)), ("mnist_5k", (28, 28, 1), (4000, 1000)), ("natural_crops", (32, 32, 3), None)],
)
def test_datasets_are_registered_and_real(name, shape, sizes):
    build = registry.get_dataset(name)
    arguments = {"batch_size": 32, "eval_batch_size": 128, "num_shards": 2, "rng": np.array([1, 2])}
    data = build(**arguments)
    meta = data.meta_data
    if sizes is not None:
        assert (meta["num_train_examples"], meta["num_eval_examples"]) == sizes
    assert meta["num_train_examples"] == small.TRAIN_EXAMPLES[name][0]
    assert meta["input_shape"] == (-1, *shape)
    batch = next(data.train_iter)
    assert batch["inputs"].shape == (2, 16, *shape)
    assert batch["label"].shape == (2, 16, meta["num_classes"])
    assert 0 <= batch["inputs"].min() < batch["inputs"].max() <= 1
    steps = -(-meta["num_eval_examples"] // 128)
    masks = [next(data.valid_iter)["batch_mask"].sum() for _ in range(steps)]
    assert sum(masks) == meta["num_eval_examples"]
    again = build(**arguments)
    np.testing.assert_array_equal(next(again.train_iter)["inputs"], batch["inputs"])
    other = build(**arguments | {"rng": np.array([1, 3])})
    assert (next(other.train_iter)["inputs"] != batch["inputs"]).any()


def write_idx(folder, name, content):
    """A file as of the MNIST family: a magic number, the shape in big endian, and the bytes."""
    header = bytes([0, 0, 8, content.ndim]) + np.asarray(content.shape, ">u4").tobytes()
    (folder / f"{name}-idx{content.ndim}-ubyte.gz").write_bytes(gzip.compress(header + content.tobytes()))


def test_fashion_mnist_is_read_from_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv(datasets.FASHION_MNIST_DIR, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"No train-images-idx3-ubyte.gz in .*apt-get install dataset-fashion"):
        registry.get_dataset("fashion_mnist")(batch_size=8, eval_batch_size=8, num_shards=1)
    generator = np.random.default_rng(0)
    written = {"train": 10_050, "t10k": 30}
    for name, count in written.items():
        write_idx(tmp_path, f"{name}-images", generator.integers(0, 256, (count, 3, 2), np.uint8))
        write_idx(tmp_path, f"{name}-labels", (np.arange(count) % 10).astype(np.uint8))
    whole, held_out = datasets.fashion_mnist(False), datasets.fashion_mnist(True)
    assert [len(split[1]) for split in (*whole, *held_out)] == [10_050, 30, 50, 10_000]
    assert whole.test[0].shape == (30, 3, 2, 1)
    assert 0 <= whole.train[0].min() < whole.train[0].max() == 1
    np.testing.assert_array_equal(whole.test[1], np.arange(30) % 10)
    np.testing.assert_array_equal(np.concatenate([held_out.train[0], held_out.test[0]]), whole.train[0])


@pytest.mark.parametrize("name", sorted(set(datasets.SOURCES) - {"fashion_mnist"}))
def test_test_images_are_nobodys_else(name):
    """No test image stands among those to train on, with and without `validation`, nor in the other test."""
    whole, held_out = datasets.SOURCES[name](False), datasets.SOURCES[name](True)
    keys = [{image.tobytes() for image in images} for images in (whole.train[0], whole.test[0], held_out.test[0])]
    assert not keys[0] & keys[1] or name == "natural_crops"  # black sky is everywhere
    assert len(keys[0] & keys[1]) < 0.03 * len(keys[1])
    assert len(held_out.train[1]) + len(held_out.test[1]) == len(whole.train[1])
    assert (len(whole.train[1]), len(held_out.train[1])) == small.TRAIN_EXAMPLES[name]


def test_tensorflow_leaves_the_accelerator_to_jax(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(main.tf.config, "set_visible_devices", lambda *arguments: calls.append(arguments))
    with pytest.raises(ValueError, match=r"config\.trainer_name"):
        main.train(None, cases.config(trainer_name="nothing"), str(tmp_path), None)
    assert calls == [([], "GPU")]
