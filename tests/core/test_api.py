"""From configurations to updaters, the registry, and `sparsify`."""

from __future__ import annotations

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import jaxpruner
from jaxpruner import sparsity_distributions
from jaxpruner.sparsity_types import Block, Channel, NByM, Unstructured

PARAMS = {"a": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}, "b": {"kernel": jnp.ones((8, 32))}}

CLASSES = {
    "no_prune": jaxpruner.NoPruning,
    "magnitude": jaxpruner.MagnitudePruning,
    "random": jaxpruner.RandomPruning,
    "saliency": jaxpruner.SaliencyPruning,
    "magnitude_ste": jaxpruner.SteMagnitudePruning,
    "random_ste": jaxpruner.SteRandomPruning,
    "global_magnitude": jaxpruner.GlobalMagnitudePruning,
    "global_saliency": jaxpruner.GlobalSaliencyPruning,
    "static_sparse": jaxpruner.StaticRandomSparse,
    "rigl": jaxpruner.RigL,
    "set": jaxpruner.SET,
    "preserve": jaxpruner.PreserveSparsity,
}
GLOBAL = ("global_magnitude", "global_saliency")
WITHOUT_SPARSITY = ("no_prune", "preserve")
PER_LEAF = [name for name in CLASSES if name not in (*GLOBAL, *WITHOUT_SPARSITY)]


def template(algorithm: str, **changes) -> dict:
    """A configuration with every common key, as one script writes it for all algorithms."""
    return {
        "algorithm": algorithm,
        "dist_type": "erk",
        "sparsity": 0.75,
        "sparsity_type": "unstructured",
        "update_freq": 10,
        "update_start_step": 20,
        "update_end_step": 100,
        "drop_fraction": 0.2,
        "filter_fn": sparsity_distributions.KERNEL_FILTER_FN,
        "custom_sparsity_map": {"a/kernel": 0.5},
    } | changes


def create(algorithm="magnitude", **config):
    return jaxpruner.create_updater_from_config({"algorithm": algorithm, "sparsity": 0.8} | config)


@pytest.fixture(params=[dict, ml_collections.ConfigDict, ml_collections.FrozenConfigDict], ids=lambda t: t.__name__)
def mapping(request):
    return request.param


def test_names_of_the_algorithms():
    assert set(jaxpruner.all_algorithm_names()) >= set(CLASSES)
    assert all(jaxpruner.ALGORITHM_REGISTRY[name] is algorithm for name, algorithm in CLASSES.items())


@pytest.mark.parametrize("name", CLASSES)
def test_every_algorithm_takes_every_common_key(name, mapping):
    updater = jaxpruner.create_updater_from_config(mapping(template(name)))
    assert type(updater) is CLASSES[name]
    assert isinstance(updater, jaxpruner.BaseUpdater)
    if name not in WITHOUT_SPARSITY:
        schedule = jaxpruner.PolynomialSchedule(update_freq=10, update_start_step=20, update_end_step=100)
        assert updater.scheduler == schedule
        assert updater.sparsity_type == Unstructured()
    if name in PER_LEAF:
        expected = sparsity_distributions.erk(PARAMS, 0.75, sparsity_distributions.KERNEL_FILTER_FN, {"a/kernel": 0.5})
        assert updater.sparsity_distribution_fn(PARAMS) == expected
        assert updater.get_target_sparsities(PARAMS) == expected
    if name in GLOBAL:
        expected = sparsity_distributions.uniform(
            PARAMS, 0.75, sparsity_distributions.KERNEL_FILTER_FN, {"a/kernel": 0.5}
        )
        assert updater.get_target_sparsities(PARAMS) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_every_algorithm_gives_a_transformation(name):
    tx = jaxpruner.create_updater_from_config(template(name)).wrap_optax(optax.sgd(0.1))
    state = jax.eval_shape(tx.init, PARAMS)
    assert state.count.dtype == jnp.int32
    assert isinstance(state, jaxpruner.SparseState)


def test_the_distribution_is_uniform_unless_asked():
    expected = {"a": {"kernel": 0.8, "bias": None}, "b": {"kernel": 0.8}}
    assert create().sparsity_distribution_fn(PARAMS) == expected
    assert create(dist_type="uniform").sparsity_distribution_fn(PARAMS) == expected
    assert create(dist_type="erk").sparsity_distribution_fn(PARAMS) == sparsity_distributions.erk(PARAMS, 0.8)


# Structures


@pytest.mark.parametrize(
    ("value", "structure"),
    [
        ("unstructured", Unstructured()),
        ("nm_2,4", NByM(2, 4)),
        ("nm_1,16", NByM(1, 16)),
        ("block_4,4", Block((4, 4))),
        ("block_1,8", Block((1, 8))),
        ("channel_-1", Channel(-1)),
        ("channel_0", Channel(0)),
        (NByM(2, 4, axis=0), NByM(2, 4, axis=0)),
        (Block((2, 2), use_avg_pooling=False), Block((2, 2), use_avg_pooling=False)),
    ],
    ids=str,
)
def test_structures(value, structure, mapping):
    config = mapping({"algorithm": "magnitude", "sparsity": 0.5, "sparsity_type": value})
    assert jaxpruner.create_updater_from_config(config).sparsity_type == structure


def made_masks(updater):
    _, masks = updater.instant_sparsify(PARAMS)
    return jax.tree.map(np.asarray, masks)


PER_LEAF_STRUCTURES = {"a/*": "nm_1,4", "b/kernel": Channel(0)}


@pytest.mark.parametrize(
    "value",
    [
        PER_LEAF_STRUCTURES,
        list(PER_LEAF_STRUCTURES.items()),
        tuple(PER_LEAF_STRUCTURES.items()),
        ml_collections.ConfigDict(PER_LEAF_STRUCTURES),
        lambda path, param: NByM(1, 4) if path[0] == "a" else Channel(0),
    ],
    ids=["mapping", "list", "tuple", "ConfigDict", "function"],
)
def test_structures_by_leaf(value):
    custom = {"a/kernel": 0.75}  # what 1:4 gives
    masks = made_masks(create(sparsity=0.5, sparsity_type=value, custom_sparsity_map=custom))
    np.testing.assert_array_equal(masks["a"]["kernel"], [[False, False, False, True] * 2] * 8)
    np.testing.assert_array_equal(masks["b"]["kernel"], [[True] * 32] * 4 + [[False] * 32] * 4)
    assert masks["a"]["bias"] is None


@pytest.mark.parametrize("order", [1, -1])
def test_the_most_specific_pattern_wins_and_the_rest_is_unstructured(order):
    updater = create(sparsity=0.5, sparsity_type=[("a/kernel", "channel_0"), ("a/*", "channel_1")][::order])
    masks = made_masks(updater)
    np.testing.assert_array_equal(masks["a"]["kernel"], [[True] * 8] * 4 + [[False] * 8] * 4)
    np.testing.assert_array_equal(masks["b"]["kernel"].ravel(), np.arange(256) < 128)


# Schedules


def test_without_a_start_there_are_no_updates():
    assert create().scheduler == jaxpruner.NoUpdateSchedule()
    assert create(update_end_step=100, update_freq=10).scheduler == jaxpruner.NoUpdateSchedule()
    assert create(update_start_step=None, update_end_step=100).scheduler == jaxpruner.NoUpdateSchedule()
    with pytest.raises(ValueError, match="update_start_step: missing, so update_end_step=100 would have no effect"):
        jaxpruner.sparsify(optax.sgd(0.1), algorithm="magnitude_ste", sparsity=0.8, update_end_step=100)


def test_start_equal_to_end_is_one_shot():
    assert create(update_start_step=7, update_end_step=7, update_freq=10).scheduler == jaxpruner.OneShotSchedule(7)


def test_else_the_schedule_is_polynomial():
    expected = jaxpruner.PolynomialSchedule(update_freq=3, update_start_step=0, update_end_step=9)
    assert create(update_start_step=0, update_end_step=9, update_freq=3).scheduler == expected
    every_step = create(update_start_step=0, update_end_step=9).scheduler
    assert [step for step in range(12) if every_step.should_update_mask(step)] == list(range(10))


# Drop fractions


@pytest.mark.parametrize("name", ["rigl", "set"])
@pytest.mark.parametrize(("given", "start"), [({}, 0.1), ({"drop_fraction": 0.3}, 0.3)], ids=["default", "given"])
def test_the_drop_fraction_decays_as_a_cosine(name, given, start):
    drop = create(name, update_start_step=0, update_end_step=80, update_freq=10, **given).drop_fraction_fn
    for step in (0, 1, 20, 40, 79, 80, 100):
        expected = start * (1 + math.cos(math.pi * min(step, 80) / 80)) / 2
        assert float(drop(step)) == pytest.approx(expected, abs=1e-6)
        assert float(jax.jit(drop)(jnp.int32(step))) == pytest.approx(expected, abs=1e-6)


def test_the_drop_fraction_is_constant_without_an_end():
    assert float(create("rigl", drop_fraction=0.3).drop_fraction_fn(50)) == pytest.approx(0.3)


# Other keys


@pytest.mark.parametrize("name", CLASSES)
def test_other_keys_are_given_to_the_algorithm(name, mapping):
    config = {"algorithm": name, "sparsity": 0.8, "rng_seed": 3, "use_packed_masks": True, "skip_gradients": True}
    updater = jaxpruner.create_updater_from_config(mapping(config))
    assert (updater.rng_seed, updater.use_packed_masks, updater.skip_gradients) == (3, True, True)


def test_keys_of_a_global_algorithm():
    updater = create("global_magnitude", use_normalization=False, normalization_eps=0.1)
    assert (updater.sparsity, updater.use_normalization, updater.normalization_eps) == (0.8, False, 0.1)


def test_a_distribution_of_ones_own_stands_for_the_sparsity():
    updater = jaxpruner.create_updater_from_config(
        {
            "algorithm": "magnitude",
            "sparsity_distribution_fn": lambda params: jax.tree.map(lambda p: 0.25 if p.ndim == 2 else None, params),
        }
    )
    assert updater.get_target_sparsities(PARAMS) == {"a": {"kernel": 0.25, "bias": None}, "b": {"kernel": 0.25}}


def test_a_field_beside_a_key_that_says_something_else():
    scheduler = jaxpruner.PeriodicSchedule(10)
    masks = jax.tree.map(lambda p: jnp.ones_like(p, bool), PARAMS)
    updater = create("rigl", scheduler=scheduler, update_end_step=100, initial_sparsity="from_params")
    assert (updater.scheduler, updater.drop_fraction_fn.end_step, updater.masks) == (scheduler, 100, "from_params")
    jaxpruner.sparsify(optax.sgd(0.1), algorithm="rigl", sparsity=0.8, scheduler=scheduler, update_end_step=100)
    updater = create(masks=masks, update_start_step=0, update_end_step=9, initial_sparsity=0.3)
    assert updater.masks is masks
    assert updater.scheduler.initial_sparsity == 0.3


def test_a_tuple_keyed_map_inside_a_config_dict():
    config = ml_collections.ConfigDict({"algorithm": "magnitude", "sparsity": 0.8})
    config.custom_sparsity_map = {("a", "kernel"): 0.5}
    targets = jaxpruner.create_updater_from_config(config).get_target_sparsities(PARAMS)
    assert targets == {"a": {"kernel": 0.5, "bias": None}, "b": {"kernel": 0.8}}


def test_a_configuration_is_left_as_it_was(mapping):
    config = mapping(template("magnitude"))
    before = dict(config.items())
    jaxpruner.create_updater_from_config(config)
    assert dict(config.items()) == before


# The registry


@dataclasses.dataclass(eq=False)
class Distance(jaxpruner.BaseUpdater):
    """Keeps the weights farthest from a point: an algorithm with a field of its own."""

    point: float = 0.0

    def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
        return jax.tree.map(lambda p: jnp.abs(p - self.point), params)


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    for name in list(jaxpruner.ALGORITHM_REGISTRY):
        monkeypatch.setitem(jaxpruner.ALGORITHM_REGISTRY, name, jaxpruner.ALGORITHM_REGISTRY[name])
    before = set(jaxpruner.ALGORITHM_REGISTRY)
    yield jaxpruner.ALGORITHM_REGISTRY
    for name in set(jaxpruner.ALGORITHM_REGISTRY) - before:
        del jaxpruner.ALGORITHM_REGISTRY[name]


@pytest.mark.usefixtures("registry")
def test_register_algorithm():
    jaxpruner.register_algorithm("distance", Distance)
    jaxpruner.register_algorithm("distance", Distance)
    assert "distance" in jaxpruner.all_algorithm_names()
    updater = create("distance", point=2.0, sparsity=0.5, update_start_step=3, update_end_step=3)
    assert updater.scheduler == jaxpruner.OneShotSchedule(3)
    pruned, masks = updater.instant_sparsify(jnp.asarray([[0.0, 1.0, 2.0, 5.0]]))
    np.testing.assert_array_equal(masks, [[True, False, False, True]])
    np.testing.assert_array_equal(pruned, [[0.0, 0.0, 0.0, 5.0]])


@pytest.mark.usefixtures("registry")
def test_register_a_function_of_some_fields():
    def farthest(scheduler, sparsity_distribution_fn, point=1.0):
        return Distance(scheduler, sparsity_distribution_fn=sparsity_distribution_fn, point=point)

    jaxpruner.register_algorithm("farthest", farthest)
    updater = create("farthest", update_start_step=3, update_end_step=3)
    assert updater.scheduler == jaxpruner.OneShotSchedule(3)
    assert updater.point == 1.0
    assert updater.get_target_sparsities(PARAMS)["b"]["kernel"] == 0.8


@pytest.mark.usefixtures("registry")
def test_register_a_function_of_any_fields():
    jaxpruner.register_algorithm("any", lambda **fields: Distance(**fields))
    updater = create("any", point=2.0, update_start_step=3, update_end_step=3, sparsity_type="nm_2,4")
    assert (updater.point, updater.sparsity_type) == (2.0, NByM(2, 4))
    assert updater.scheduler == jaxpruner.OneShotSchedule(3)
    assert updater.get_target_sparsities(PARAMS)["b"]["kernel"] == 0.8


@pytest.mark.usefixtures("registry")
def test_a_name_belongs_to_one_algorithm():
    with pytest.raises(ValueError, match=r"'magnitude' is taken by .*choose another name"):
        jaxpruner.register_algorithm("magnitude", Distance)
    assert jaxpruner.ALGORITHM_REGISTRY["magnitude"] is jaxpruner.MagnitudePruning


# sparsify


CONFIG = {"algorithm": "magnitude", "sparsity": 0.75, "update_start_step": 0, "update_end_step": 0}


@pytest.mark.parametrize(
    "make",
    [
        lambda inner: jaxpruner.sparsify(inner, jaxpruner.create_updater_from_config(CONFIG)),
        lambda inner: jaxpruner.sparsify(inner, CONFIG),
        lambda inner: jaxpruner.sparsify(inner, ml_collections.ConfigDict(CONFIG)),
        lambda inner: jaxpruner.sparsify(inner, **CONFIG),
    ],
    ids=["updater", "mapping", "ConfigDict", "keywords"],
)
def test_sparsify(make):
    tx = make(optax.sgd(0.5))
    params = {"w": jnp.asarray([[-4.0, 1.0, 3.0, 2.0]]), "b": jnp.ones(2)}
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w"], [[-4.5, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(params["b"], [0.5, 0.5])
    assert int(state.count) == 1


def test_sparsify_is_an_optax_transformation():
    tx = jaxpruner.sparsify(optax.adam(1e-3), **CONFIG)
    assert isinstance(tx, optax.GradientTransformation)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_sparsify_says_that_it_comes_last_in_a_chain():
    assert "last" in inspect.getdoc(jaxpruner.sparsify)
