"""Keras's own `compile`, `fit`, files and callbacks, with a sparse optimizer."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner

keras = pytest.importorskip("keras", reason="Keras is not installed; `make setup` installs it")

from jaxpruner_keras import SparseOptimizer, SparsityLogger, parameters, pure_function, weights_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 12)).astype(np.float32)
Y = (X[:, :3].argmax(1)).astype(np.int32)
SCHEDULE = {"update_start_step": 2, "update_end_step": 6, "update_freq": 2}
# They score with the loss, which no stock trainer hands over.
WITH_LOSS = ("grasp", "synflow")
ALGORITHMS = [name for name in jaxpruner.all_algorithm_names() if name not in ("no_prune", *WITH_LOSS)]


def config_of(algorithm: str, **more) -> dict:
    config = {"algorithm": algorithm, "sparsity": 0.5, **SCHEDULE, **more}
    if algorithm in ("static_sparse", "snip"):
        config = {key: value for key, value in config.items() if not key.startswith("update_")}
    if algorithm == "preserve":
        config = {"algorithm": "preserve"}
    return config


def model_of(seed: int = 0, width: int = 16) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(width, activation="relu", name="hidden"),
            keras.layers.Dense(3, name="out"),
        ],
        name="net",
    )


def compiled(optimizer, model=None, **kwargs):
    model = model or model_of()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, **kwargs)
    return model


def fit(model, epochs=2, **kwargs):
    kwargs = {"batch_size": 16, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(X, Y, epochs=epochs, **kwargs)


def zeros_of(model) -> dict[str, int]:
    """By the last two names: a Sequential model that is read from a file has lost its own."""
    kernels = [v for v in model.trainable_variables if v.ndim > 1]
    return {"/".join(v.path.split("/")[-2:]): int((np.asarray(v.value) == 0).sum()) for v in kernels}


def values_of(model) -> list[np.ndarray]:
    return [np.asarray(v.value) for v in [*model.trainable_variables, *model.optimizer.variables]]


def adam():
    return keras.optimizers.Adam(1e-2)


HALF = {"hidden/kernel": 96, "out/kernel": 24}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_exactly_sparse_under_fit(algorithm):
    model = model_of()
    if algorithm == "preserve":
        for v in model.trainable_variables:
            v.assign(
                jnp.where(jnp.arange(v.value.size).reshape(v.shape) % 2 == 0, v.value, 0) if v.ndim > 1 else v.value
            )
    optimizer = SparseOptimizer(
        adam(), config_of(algorithm, use_packed_masks=algorithm in ("magnitude", "rigl", "set"))
    )
    fit(compiled(optimizer, model))
    zeros = zeros_of(model)
    masks = {path.removeprefix("net/"): np.asarray(mask) for path, mask in optimizer.masks().items()}
    assert set(masks) == set(zeros)
    for v in model.trainable_variables:
        if v.ndim > 1:
            assert not np.asarray(v.value)[~masks[v.path.removeprefix("net/")]].any()
    pruned = {path: int((~mask).sum()) for path, mask in masks.items()}
    assert sum(pruned.values()) == pytest.approx(120, abs=12)
    if not optimizer.updater.is_global and algorithm != "srigl":
        assert pruned == HALF
    assert np.isfinite(model.evaluate(X, Y, verbose=0))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "magnitude_ste", "saliency"])
def test_the_steps_are_those_of_optax(algorithm):
    """Masks and weights of the core's own transformation around the same optimizer, momentum included."""
    config = config_of(algorithm)
    model = model_of()
    variables = model.trainable_variables
    optimizer = SparseOptimizer(keras.optimizers.SGD(0.05, momentum=0.9), config)
    optimizer.build(variables)
    tx = jaxpruner.sparsify(optax.sgd(0.05, momentum=0.9), config)
    params = {v.path: jnp.array(v.value) for v in variables}
    state = tx.init(params)
    values, own = [jnp.array(v.value) for v in variables], [v.value for v in optimizer.variables]
    step = jax.jit(optimizer.stateless_apply)
    sparse = jax.jit(lambda grads, state, params: tx.update(grads, state, params))
    for i in range(10):
        grads = {path: jnp.sin(7.0 * value + i) for path, value in params.items()}
        values, own = step(own, [grads[v.path] for v in variables], values)
        updates, state = sparse(grads, state, params)
        params = optax.apply_updates(params, updates)
        for v, value in zip(variables, values, strict=True):
            np.testing.assert_allclose(value, params[v.path], atol=1e-6)
            np.testing.assert_array_equal(value == 0, params[v.path] == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipnorm": 0.1, "weight_decay": 0.01},
        {"use_ema": True, "ema_momentum": 0.9},
        {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "use_ema": True, "ema_overwrite_frequency": 2},
        {"loss_scale_factor": 8.0},
    ],
    ids=str,
)
def test_without_pruning_it_is_the_stock_optimizer(options):
    stock, ours = compiled(keras.optimizers.Adam(1e-2, **options)), model_of()
    compiled(SparseOptimizer(keras.optimizers.Adam(1e-2, **options), algorithm="no_prune"), ours)
    for model in (stock, ours):
        fit(model, epochs=3)
    for a, b in zip(stock.trainable_variables, ours.trainable_variables, strict=True):
        np.testing.assert_allclose(a.value, b.value, rtol=1e-5, atol=1e-7)
    assert int(stock.optimizer.iterations) == int(ours.optimizer.iterations)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "magnitude_ste", "fisher"])
def test_a_keras_file_goes_on_bit_for_bit(algorithm, tmp_path):
    def new():
        config = config_of(algorithm, use_packed_masks=algorithm == "rigl")
        return compiled(SparseOptimizer(keras.optimizers.Adam(1e-2, use_ema=True), config))

    whole, first = new(), new()
    fit(whole, epochs=4)
    fit(first, epochs=1)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    assert second.optimizer.updater == first.optimizer.updater
    for a, b in zip(values_of(first), values_of(second), strict=True):
        np.testing.assert_array_equal(a, b)
    # `fit` ends with averages in place of weights, so the whole training is compared from there.
    again = new()
    fit(again, epochs=1)
    for model in (second, again):
        fit(model, epochs=4, initial_epoch=1)
    for a, b in zip(values_of(second), values_of(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert zeros_of(second) == zeros_of(whole) == HALF


def test_a_file_of_weights_goes_on_bit_for_bit(tmp_path):
    one, other = (compiled(SparseOptimizer(adam(), config_of("rigl"))) for _ in range(2))
    fit(one, epochs=1)
    one.save_weights(tmp_path / "model.weights.h5")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    for model in (one, other):
        fit(model, epochs=3, initial_epoch=1)
    for a, b in zip(values_of(one), values_of(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_of_other_parameters_is_refused(tmp_path):
    model = compiled(SparseOptimizer(adam(), config_of("magnitude")))
    fit(model, epochs=1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = compiled(SparseOptimizer(adam(), config_of("magnitude", filter_fn=lambda path, p: p.size > 100)))
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match="saved with another configuration"):
        other.load_weights(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("algorithm", ["random", "saliency", "static_sparse", "magnitude_ste"])
def test_a_file_of_another_algorithm_is_refused_by_name(algorithm, tmp_path):
    """Also where both have as many variables."""
    model = compiled(SparseOptimizer(adam(), config_of("magnitude")))
    fit(model, epochs=1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = compiled(SparseOptimizer(adam(), config_of(algorithm)))
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match=f"algorithm: 'magnitude' in the run of the file, '{algorithm}' now"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_a_higher_sparsity_than_that_of_a_file_is_reached_or_refused(tmp_path):
    model = compiled(SparseOptimizer(adam(), config_of("magnitude")))
    fit(model)
    model.save_weights(tmp_path / "model.weights.h5")

    def continued(**options):
        other = compiled(SparseOptimizer(adam(), config_of("magnitude", sparsity=0.75, **options)))
        other.optimizer.build(other.trainable_variables)
        with pytest.warns(UserWarning, match=r"sparsity: 0.5 in the run of the file, 0.75 now"):
            other.load_weights(tmp_path / "model.weights.h5")
        fit(other, epochs=4, initial_epoch=2, callbacks=[SparsityLogger(verbose=False)])
        return other

    with pytest.raises(ValueError, match=r"asked 75.0%, masks hold 50.0%, and the schedule is over"):
        continued()
    assert zeros_of(continued(update_end_step=12)) == {"hidden/kernel": 144, "out/kernel": 36}


def test_what_a_file_cannot_hold_is_told_when_it_is_read(tmp_path):
    model = compiled(SparseOptimizer(adam(), config_of("magnitude", filter_fn=lambda path, p: p.size > 100)))
    fit(model)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="cannot hold filter_fn; load the model with compile=False"):
        keras.models.load_model(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert zeros_of(loaded) == zeros_of(model) == HALF | {"out/kernel": 0}
    # As the message says, it goes on with the masks of the file, before a schedule that has not begun.
    later = {"update_start_step": 40, "update_end_step": 44}
    optimizer = SparseOptimizer(adam(), config_of("magnitude", filter_fn=lambda path, p: p.size > 100, **later))
    loaded.compile(optimizer, loss=model.loss)
    loaded.optimizer.build(loaded.trainable_variables)
    with pytest.warns(UserWarning, match="update_start_step"):
        loaded.load_weights(tmp_path / "model.keras")
    fit(loaded, epochs=1)
    assert zeros_of(loaded) == zeros_of(model)


def test_mixed_precision_nests(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = compiled(SparseOptimizer(adam(), config_of("rigl")))
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        history = fit(model, epochs=4, callbacks=[SparsityLogger(verbose=False)])
        assert zeros_of(model) == HALF
        assert history.history["sparsity"] == [0.5] * 4
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        for a, b in zip(values_of(model), values_of(loaded), strict=True):
            np.testing.assert_array_equal(a, b)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "magnitude_ste"])
def test_accumulated_gradients_are_one_step(algorithm):
    """Four batches of 4, accumulated, are one of 16: masks follow steps of the optimizer, not batches."""
    small = compiled(
        SparseOptimizer(keras.optimizers.SGD(0.05, momentum=0.9, gradient_accumulation_steps=4), config_of(algorithm))
    )
    large = compiled(SparseOptimizer(keras.optimizers.SGD(0.05, momentum=0.9), config_of(algorithm)))
    fit(small, batch_size=4)
    fit(large, batch_size=16)
    for a, b in zip(small.trainable_variables, large.trainable_variables, strict=True):
        np.testing.assert_allclose(a.value, b.value, atol=1e-5)
    assert small.optimizer.count == large.optimizer.count == 8
    assert int(small.optimizer.iterations) == 8


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "magnitude_ste"])
@pytest.mark.parametrize("every", [None, 2])
def test_averages_of_weights_are_sparse(algorithm, every):
    inner = keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=every)
    model = compiled(SparseOptimizer(inner, config_of(algorithm)))
    fit(model, epochs=3)  # which puts the averages in place of the weights
    assert zeros_of(model) == HALF


def test_weights_that_grow_again_have_fresh_moments():
    optimizer = SparseOptimizer(adam(), config_of("set", sparsity=0.5, update_start_step=2, update_end_step=20))
    model = model_of()
    optimizer.build(model.trainable_variables)
    step = jax.jit(optimizer.stateless_apply)
    values, own = [v.value for v in model.trainable_variables], [v.value for v in optimizer.variables]
    names = [v.path for v in optimizer.variables]
    grown = 0
    for i in range(5):
        before = np.asarray(values[0]) != 0
        values, own = step(own, [jnp.ones_like(value) for value in values], values)
        moments = [value for name, value in zip(names, own, strict=True) if "hidden_kernel_velocity" in name]
        assert len(moments) == 1
        if i == 2:  # masks are made, and no step is taken
            new = (
                np.asarray(own[names.index(next(n for n in names if n.endswith("masks_net_hidden_kernel")))]) & ~before
            )
            grown = int(new.sum())
            assert not np.asarray(moments[0])[new].any()
    assert grown


def test_adam_fisher_reads_the_second_moments_of_keras():
    model = compiled(SparseOptimizer(adam(), config_of("adam_fisher")))
    fit(model)
    assert zeros_of(model) == HALF
    with pytest.raises(ValueError, match="second moment"):
        SparseOptimizer(keras.optimizers.SGD(0.1), config_of("adam_fisher")).build(model_of().trainable_variables)


def test_a_loop_of_ones_own():
    model = model_of()
    optimizer = SparseOptimizer(adam(), config_of("magnitude"))
    for _ in range(8):
        optimizer.apply([jnp.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)
    assert zeros_of(model) == HALF
    assert optimizer.count == int(optimizer.iterations) == 8
    with pytest.raises(ValueError, match="1 variables are not the 4"):
        optimizer.apply([jnp.ones((12, 16))], model.trainable_variables[:1])


def test_the_learning_rate_is_the_inner_ones():
    optimizer = SparseOptimizer(adam(), config_of("magnitude"))
    model = compiled(optimizer)
    fit(model, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.5**epoch)])
    assert float(optimizer.learning_rate) == float(optimizer.inner.learning_rate) == 0.5


def test_the_sparsity_is_in_the_logs(capsys):
    model = compiled(SparseOptimizer(adam(), config_of("magnitude")))
    history = fit(model, epochs=3, callbacks=[SparsityLogger()])
    sparsities = history.history["sparsity"]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == 0.5
    assert "██████████░░░░░░░░░░ 50.00% of 240 weights pruned" in capsys.readouterr().out


def test_a_schedule_that_does_not_fit_is_refused_before_the_first_step():
    model = compiled(SparseOptimizer(adam(), config_of("magnitude", update_end_step=40)))
    before = values_of(model)
    with pytest.raises(ValueError, match="the last mask update is at step 40, and the training has 8 steps"):
        fit(model, callbacks=[SparsityLogger()])
    assert len(before) <= len(values_of(model))
    with pytest.raises(ValueError, match="compiled with Adam, which prunes nothing"):
        fit(compiled(adam()), callbacks=[SparsityLogger()])


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="LossScaleOptimizer, whose gradients are scaled; put it outside"):
        SparseOptimizer(keras.optimizers.LossScaleOptimizer(adam()), config_of("magnitude"))
    with pytest.raises(ValueError, match="is sparse already"):
        SparseOptimizer(SparseOptimizer(adam(), config_of("magnitude")), config_of("magnitude"))
    built = adam()
    built.build(model_of().trainable_variables)
    with pytest.raises(ValueError, match="is a MultiOptimizer"):
        SparseOptimizer(keras.optimizers.MultiOptimizer([(adam(), [])]), config_of("magnitude"))
    with pytest.raises(ValueError, match="has no masks yet"):
        SparseOptimizer(adam(), config_of("magnitude")).masks()
    with pytest.raises(ValueError, match="has been built already"):
        SparseOptimizer(built, config_of("magnitude"))
    with pytest.raises(ValueError, match="sparsity"):
        SparseOptimizer(adam(), algorithm="magnitude")
    with pytest.raises(ValueError, match="call build"):
        SparseOptimizer(adam(), config_of("magnitude")).stateless_apply([], [], [])
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match="KERAS_BACKEND=jax"):
        SparseOptimizer(adam(), config_of("magnitude"))


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude_ste", "rigl"])
def test_masks_stay_with_their_weights_when_a_file_changes_the_names(algorithm, tmp_path):
    """Models inside of models lose their names in a file, and with them the order by name."""

    def part(name, layer):
        return keras.Sequential([keras.Input((12,)), keras.layers.Dense(12, name=layer)], name=name)

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,)), part("z", "first"), part("b", "second"), keras.layers.Dense(3)])
    compiled(SparseOptimizer(adam(), config_of(algorithm)), model)
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    by_name = [np.argsort([v.path for v in one.trainable_variables]).tolist() for one in (model, loaded)]
    assert by_name[0] != by_name[1]
    for one in (model, loaded):
        fit(one, epochs=3, initial_epoch=2)
    for a, b in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        np.testing.assert_array_equal(a.value, b.value)


def test_parameters_of_one_path_have_slots_of_their_own():
    """The second moments of each, of two layers whose paths and shapes are the same."""

    def part():
        inputs = keras.Input((12,))
        return keras.Model(inputs, keras.layers.Dense(12, name="hidden")(inputs))

    model = keras.Sequential([keras.Input((12,)), part(), part()])
    optimizer = SparseOptimizer(adam(), config_of("set"))
    optimizer.build(model.trainable_variables)
    paths = [v.path for v in model.trainable_variables if v.ndim > 1]
    values, own = [v.value for v in model.trainable_variables], [v.value for v in optimizer.variables]
    step = jax.jit(optimizer.stateless_apply)
    for _ in range(3):
        before = [np.asarray(value) != 0 for value in values]
        values, own = step(own, [jnp.ones_like(value) for value in values], values)
    for v, value in zip(optimizer.variables, own, strict=True):
        v.assign(value)
    moments = [np.asarray(v.value) for v in optimizer.inner.variables if v.name.endswith("kernel_velocity")]
    masks = [np.asarray(mask) for mask in optimizer.masks().values()]
    assert len(moments) == len(masks) == len(paths) == 2
    kernels = [was for was in before if was.ndim > 1]
    for mask, was, moment in zip(masks, kernels, moments, strict=True):
        assert (mask & ~was).any()
        assert not moment[mask & ~was].any()


def test_a_refused_training_leaves_the_weights():
    """`fit` ends with the averages in place of the weights, also where nothing was trained."""
    inner = keras.optimizers.Adam(1e-2, use_ema=True)
    model = compiled(SparseOptimizer(inner, config_of("magnitude", update_end_step=40)))
    before = [np.asarray(v.value) for v in model.trainable_variables]
    with pytest.raises(ValueError, match="update_end_step"):
        fit(model, callbacks=[SparsityLogger()])
    for v, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(v.value, value)


def test_constraints_hold_of_the_sparse_weights():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(3, kernel_constraint="unit_norm")])
    compiled(SparseOptimizer(adam(), config_of("magnitude")), model)
    fit(model)
    kernel = np.asarray(model.layers[0].kernel)
    assert (kernel == 0).sum() == 18
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)


def test_weights_without_an_optimizer_are_loaded(tmp_path):
    """The way of fine-tuning: weights of a model that was never compiled, or of this one before its first fit."""
    source = model_of(seed=1)
    source.save_weights(tmp_path / "bare.weights.h5")
    model = compiled(SparseOptimizer(adam(), config_of("magnitude")))
    model.load_weights(tmp_path / "bare.weights.h5")
    np.testing.assert_array_equal(model.layers[0].kernel, source.layers[0].kernel)
    fit(model)
    model.save_weights(tmp_path / "own.weights.h5")
    new = compiled(SparseOptimizer(adam(), config_of("magnitude")))
    with pytest.raises(
        ValueError, match=r"call model.optimizer.build\(model.trainable_variables\) before load_weights"
    ):
        new.load_weights(tmp_path / "own.weights.h5")


def test_layers_frozen_since_are_told():
    model = compiled(SparseOptimizer(adam(), config_of("magnitude")))
    fit(model, epochs=1)
    model.layers[0].trainable = False
    model.train_function = None
    with pytest.raises(ValueError, match="compile the model again with a new optimizer"):
        fit(model, epochs=1)


def test_paths_are_told_apart():
    variables = [keras.Variable(jnp.ones(2), name="w") for _ in range(2)] + [keras.Variable(jnp.ones(2), name="w_1")]
    paths = parameters.paths_of(variables)
    assert len(set(paths)) == 3
    tree = parameters.as_tree(paths, [1, 2, 3])
    assert parameters.as_list(paths, tree) == [1, 2, 3]


def test_compact_and_export():
    model = model_of(width=64)
    fn, weights = pure_function(model), weights_of(model)
    groups = jaxpruner.find_groups(fn, weights, X)
    optimizer = SparseOptimizer(
        adam(), config_of("magnitude", sparsity_type=groups, filter_fn=lambda path, p: path[-2] == "hidden")
    )
    fit(compiled(optimizer, model))
    weights = weights_of(model)
    small = jaxpruner.compact(fn, weights, X)
    np.testing.assert_allclose(small.fn(small.params, X), model.predict(X, verbose=0), atol=1e-5)
    assert small.params["net"]["hidden"]["kernel"].shape == (12, 32)
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(jax.jit(lambda x: small.fn(small.params, x)))(
        jax.ShapeDtypeStruct((batch, 12), jnp.float32)
    )
    np.testing.assert_allclose(exported.call(X[:5]), model.predict(X[:5], verbose=0), atol=1e-5)


@pytest.mark.slow
def test_norms_and_dropout_are_part_of_the_function():
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.5),
         layers.Flatten(), layers.Dense(3)]
    )  # fmt: skip
    x = RNG.normal(size=(16, 8, 8, 3)).astype(np.float32)
    compiled(SparseOptimizer(adam(), config_of("magnitude")), model)
    model.fit(x, Y[:16], epochs=8, batch_size=8, verbose=0)
    out = pure_function(model)(weights_of(model), x)
    np.testing.assert_allclose(out, model.predict(x, verbose=0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["data", "model"])
def test_on_several_devices(distribution):
    """Keras's own distributions, on virtual devices: the same sparse weights, and masks where their parameters lie."""
    script = textwrap.dedent(
        f"""
        import os
        os.environ["KERAS_BACKEND"] = "jax"
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
        import warnings; warnings.simplefilter("ignore")
        import keras, numpy as np
        from jaxpruner_keras import SparseOptimizer
        devices = keras.distribution.list_devices()
        assert len(devices) == 4
        if {distribution!r} == "data":
            keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
        else:
            mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
            layout = keras.distribution.LayoutMap(mesh)
            layout[".*kernel"] = (None, "model")
            keras.distribution.set_distribution(
                keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(4)])
        optimizer = SparseOptimizer(keras.optimizers.Adam(1e-2), algorithm="rigl", sparsity=0.5,
            update_start_step=2, update_end_step=6, update_freq=2)
        model.compile(optimizer, loss="mse")
        rng = np.random.default_rng(0)
        x = rng.normal(size=(64, 12)).astype(np.float32)
        model.fit(x, x[:, :4], batch_size=16, epochs=3, shuffle=False, verbose=0)
        for v in model.trainable_variables:
            if v.ndim > 1:
                mask = optimizer.masks()[v.path]
                assert int((np.asarray(v.value) == 0).sum()) * 2 == v.value.size, v.path
                same = mask.sharding.is_equivalent_to(v.value.sharding, v.ndim)
                print(v.path, v.value.sharding.spec, same)
        print("done")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
    assert "False" not in done.stdout
