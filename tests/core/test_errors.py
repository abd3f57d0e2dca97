"""Every promised error: the message says where, what and the remedy, and it comes before the first step."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxpruner
from jaxpruner import mask_calculator, sparsity_distributions, sparsity_schedules
from jaxpruner.sparsity_types import Block, Channel, NByM, Unstructured

PARAMS = {
    "params": {
        "decoder": {"wi": {"kernel": jnp.zeros((512, 1030))}, "wo": {"kernel": jnp.zeros((1024, 512))}},
        "norm": {"scale": jnp.zeros(512)},
    }
}
SMALL = {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "b": {"kernel": jnp.ones((4, 8))}}


def config(**changes):
    return {"algorithm": "magnitude", "sparsity": 0.5, "update_start_step": 0, "update_end_step": 0} | changes


def make(**changes):
    return jaxpruner.sparsify(optax.sgd(0.1), config(**changes))


def message_of(call, error=ValueError) -> str:
    with pytest.raises(error) as info:
        call()
    return str(info.value)


def check_words(message: str, *words: str) -> None:
    for word in words:
        assert word in message, message


# Shapes that do not fit the structure: raised by `init`, naming the leaf


def test_an_axis_that_is_no_multiple_of_m():
    tx = make(sparsity_type="nm_2,4")
    message = (
        "params/decoder/wi/kernel: axis -1 of (512, 1030) is not a multiple of m=4; exclude it with filter_fn or "
        "choose another axis"
    )
    for init in (tx.init, jax.jit(tx.init), lambda params: jax.eval_shape(tx.init, params)):
        check_words(message_of(lambda: init(PARAMS)), message)  # noqa: B023


def test_it_is_excluded_or_put_along_another_axis():
    jax.eval_shape(make(sparsity_type=NByM(2, 4, axis=0)).init, PARAMS)
    jax.eval_shape(make(sparsity_type="nm_2,4", filter_fn=lambda path, _: path[-2] == "wo").init, PARAMS)
    jax.eval_shape(make(sparsity_type={"*/wo/*": "nm_2,4"}).init, PARAMS)


@pytest.mark.parametrize("structure", [NByM(2, 4, axis=2), Channel(2), Channel(-3)], ids=str)
def test_an_axis_that_does_not_exist(structure):
    message = message_of(lambda: make(sparsity_type=structure).init(SMALL))
    check_words(message, "a/kernel: axis", "does not exist in (4, 4)", "exclude it with filter_fn")


def test_n_larger_than_m_is_told_when_the_mask_is_made():
    structure = NByM(4, 2)
    updater = jaxpruner.create_updater_from_config(config(sparsity_type="nm_4,2"))
    assert updater.sparsity_type == structure
    for call in (
        lambda: mask_calculator.get_topk_fn(structure)(jnp.zeros((2, 4)), 0.5),
        lambda: make(sparsity_type="nm_4,2").init(SMALL),
        lambda: updater.instant_sparsify(SMALL),
    ):
        check_words(message_of(call), "n=4 of every m=2", "choose 1 <= n <= m")
    with pytest.raises(ValueError, match="n=0 of every m=4"):
        mask_calculator.get_topk_fn(NByM(0, 4))(jnp.zeros((2, 4)), 0.5)


def test_structures_are_checked_against_bare_scores_too():
    with pytest.raises(ValueError, match=r"axis -1 of \(6,\) is not a multiple of m=4"):
        mask_calculator.get_topk_fn(NByM(2, 4))(jnp.zeros(6), 0.5)
    with pytest.raises(ValueError, match=r"axis 1 does not exist in \(6,\)"):
        mask_calculator.get_topk_fn(Channel(1))(jnp.zeros(6), 0.5)


def test_a_leaf_that_sparsity_zero_leaves_dense_is_checked_too():
    with pytest.raises(ValueError, match=r"a/kernel: axis -1 of \(4, 4\) is not a multiple of m=3"):
        make(sparsity_type="nm_1,3", sparsity=0.0).init(SMALL)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 2, 3)], ids=str)
def test_block_shapes_that_are_no_two_positive_sizes(shape):
    with pytest.raises(ValueError, match=r"block_shape: .*give \(h, w\), such as \(4, 4\)"):
        Block(shape)


def test_integer_parameters_cannot_be_pruned():
    ids = {"ids": jnp.zeros((4, 4), jnp.int32)}
    assert make().init(ids | {"kernel": jnp.ones((4, 4))}).masks["ids"] == optax.MaskedNode()
    check_words(message_of(lambda: make().init(ids)), "filter_fn: selects none of the 1 parameters (ids")


# Sparsities


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, 80, math.nan])
@pytest.mark.parametrize("name", ["magnitude", "global_magnitude", "rigl", "magnitude_ste"])
def test_a_sparsity_outside_the_range(name, sparsity):
    message = message_of(lambda: make(algorithm=name, sparsity=sparsity))
    check_words(message, f"Default sparsity {sparsity} is outside [0, 1)", "0.8 prunes 80 %")


@pytest.mark.parametrize("name", ["magnitude", "global_magnitude"])
def test_a_custom_sparsity_outside_the_range(name):
    tx = make(algorithm=name, custom_sparsity_map={"b/*": 1.0})
    message = message_of(lambda: tx.init(SMALL))
    check_words(message, "custom_sparsity_map: b/kernel: sparsity 1.0 is outside [0, 1)")


def test_a_distribution_of_ones_own_is_checked():
    updater = jaxpruner.MagnitudePruning(
        sparsity_distribution_fn=lambda params: jax.tree.map(lambda p: 1.0 if p.ndim > 1 else None, params)
    )
    for call in (lambda: updater.init_state(SMALL), lambda: updater.instant_sparsify(SMALL)):
        check_words(message_of(call), "a/kernel: sparsity 1.0 is outside [0, 1)")


def test_a_missing_sparsity():
    message = message_of(lambda: jaxpruner.create_updater_from_config({"algorithm": "magnitude"}))
    check_words(message, "sparsity: missing", "sparsity=0.8")
    for name in ("no_prune", "preserve"):
        jaxpruner.create_updater_from_config({"algorithm": name})


# Names and keys


@pytest.mark.parametrize("name", ["magnitud", "", None])
def test_an_unknown_algorithm(name):
    for call in (lambda: make(algorithm=name), lambda: jaxpruner.create_updater_from_config({"algorithm": name})):
        check_words(message_of(call), f"algorithm: {name!r}", "jaxpruner.all_algorithm_names()", "magnitude", "rigl")


def test_a_missing_algorithm():
    check_words(message_of(lambda: jaxpruner.sparsify(optax.sgd(0.1))), "algorithm: None", "all_algorithm_names()")
    check_words(message_of(lambda: jaxpruner.sparsify(optax.sgd(0.1), sparsity=0.5)), "algorithm: None")


@pytest.mark.parametrize("name", jaxpruner.all_algorithm_names())
def test_an_unknown_key(name):
    message = message_of(lambda: make(algorithm=name, update_frequency=10))
    check_words(
        message, "update_frequency: no such key", repr(name), "update_freq,", "update_start_step", "use_packed_masks"
    )


def test_every_unknown_key_is_named():
    check_words(message_of(lambda: make(first=1, second=2)), "first, second: no such key")


def test_an_unknown_distribution():
    for value in ("gaussian", 3):
        check_words(message_of(lambda: make(dist_type=value)), f"dist_type: {value!r}", "uniform, erk")  # noqa: B023


@pytest.mark.parametrize(
    "text", ["structured", "nm", "nm_2", "nm_2,4,8", "nm_a,b", "block_4", "channel", "unstructured_2"]
)
def test_an_unknown_structure(text):
    check_words(message_of(lambda: make(sparsity_type=text)), f"Sparsity type {text!r}")


def test_an_unknown_structure_lists_the_known_ones():
    message = message_of(lambda: make(sparsity_type="diagonal"))
    check_words(message, "'unstructured'", "'nm_2,4'", "'block_4,4'", "'channel_-1'", "jaxpruner.sparsity_types")
    check_words(message_of(lambda: make(sparsity_type={"a/*": "diagonal"})), "Sparsity type 'diagonal'")


@pytest.mark.parametrize("structure", ["diagonal", 3, None], ids=str)
def test_an_object_that_is_no_structure(structure):
    check_words(message_of(lambda: mask_calculator.get_topk_fn(structure)), "Sparsity type", "Unstructured()")
    updater = jaxpruner.MagnitudePruning(sparsity_type=structure)
    check_words(message_of(lambda: updater.init_state(SMALL)), "Sparsity type", "Unstructured()")


def test_an_updater_and_a_configuration_at_once():
    message = message_of(lambda: jaxpruner.sparsify(optax.sgd(0.1), jaxpruner.NoPruning(), sparsity=0.5))
    check_words(message, "sparsify: got an updater and the keywords ['sparsity']", "one of the two")


def test_something_that_is_neither_updater_nor_configuration():
    with pytest.raises((TypeError, ValueError), match="sparsify"):
        jaxpruner.sparsify(optax.sgd(0.1), "magnitude")


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_drop_fraction_outside_the_range(value):
    for name in ("rigl", "set"):
        message = message_of(lambda: make(algorithm=name, drop_fraction=value))  # noqa: B023
        check_words(message, f"drop_fraction: {value} is outside [0, 1]", "active weights")


# Schedules


def test_a_start_past_the_end():
    for call in (
        lambda: make(update_start_step=10, update_end_step=5),
        lambda: sparsity_schedules.PolynomialSchedule(update_freq=1, update_start_step=10, update_end_step=5),
        lambda: sparsity_schedules.PeriodicSchedule(update_freq=1, update_start_step=10, update_end_step=5),
    ):
        check_words(message_of(call), "update_end_step: 5 comes before update_start_step=10", "at or after the start")


def test_a_start_without_an_end():
    check_words(message_of(lambda: make(update_end_step=None)), "update_end_step: missing")


def test_a_frequency_below_one():
    check_words(message_of(lambda: make(update_end_step=9, update_freq=0)), "update_freq: 0", "1 or more")


def test_a_start_below_zero():
    check_words(message_of(lambda: make(update_start_step=-1, update_end_step=-1)), "-1 is before the first step")
    check_words(message_of(lambda: make(update_start_step=-1)), "update_start_step: -1 is before the first step")


# Filters and custom maps


# The others are made of the same parts; some of them make no masks at step 0, or not once.
PAPERS = jaxpruner.all_algorithm_names()[:12]


@pytest.mark.parametrize("name", [n for n in PAPERS if n != "no_prune"])
def test_a_filter_that_selects_nothing(name):
    tx = make(algorithm=name, filter_fn=lambda path, param: path[-1] == "weight")
    message = message_of(lambda: tx.init(SMALL))
    check_words(message, "filter_fn: selects none of the 3 parameters", "a/bias", "a/kernel", "algorithm='no_prune'")


def test_parameters_of_one_axis_only():
    check_words(message_of(lambda: make().init({"bias": jnp.zeros(4)})), "filter_fn: selects none of the 1 parameters")


@pytest.mark.parametrize("key", ["b/kernle", ("b", "kernle"), "c/*", "kernel", ("b",)], ids=str)
@pytest.mark.parametrize("options", [{}, {"dist_type": "erk"}, {"algorithm": "global_magnitude"}], ids=str)
def test_a_custom_map_key_that_matches_no_leaf(options, key):
    tx = make(custom_sparsity_map={key: 0.5}, **options)
    message = message_of(lambda: tx.init(SMALL))
    check_words(message, f"custom_sparsity_map: {key!r} matches no parameter", "b/kernel", "encoder/*/kernel")


def test_a_custom_map_key_of_a_leaf_that_the_filter_leaves_out():
    message = message_of(lambda: make(custom_sparsity_map={"a/bias": 0.5}).init(SMALL))
    check_words(message, "'a/bias' matches no parameter that filter_fn selects")


def test_a_pattern_of_structures_that_matches_no_leaf():
    message = message_of(lambda: make(sparsity_type={"c/*": "nm_2,4"}).init(SMALL))
    check_words(message, "sparsity_type: 'c/*' matches no parameter", "a/kernel")


def test_erk_of_a_single_parameter():
    for call in (
        lambda: sparsity_distributions.erk(jnp.zeros((4, 4)), 0.5),
        lambda: make(dist_type="erk").init(jnp.zeros((4, 4))),
    ):
        check_words(message_of(call), "Single parameter is provided", "uniform")


# What an algorithm cannot do


@pytest.mark.parametrize("name", ["static_sparse", "set", "rigl"])
def test_sparse_trainers_refuse_instant_sparsify(name):
    updater = jaxpruner.create_updater_from_config(config(algorithm=name))
    message = message_of(lambda: updater.instant_sparsify(SMALL), RuntimeError)
    check_words(message, "instant_sparsify", type(updater).__name__, "MagnitudePruning")


@pytest.mark.parametrize("name", ["saliency", "global_saliency"])
def test_saliency_without_gradients(name):
    updater = jaxpruner.create_updater_from_config(config(algorithm=name))
    message = message_of(lambda: updater.instant_sparsify(SMALL))
    check_words(message, f"grads: {type(updater).__name__}", "pass grads=")


@pytest.mark.parametrize("name", ["global_magnitude", "global_saliency"])
def test_global_pruning_ranks_single_weights(name):
    message = message_of(lambda: make(algorithm=name, sparsity_type="nm_2,4").init(SMALL))
    check_words(message, "a/kernel: cannot use", "NByM", "because", "custom_sparsity_map")


def test_an_updater_without_scores():
    with pytest.raises(NotImplementedError, match="BaseUpdater does not override calculate_scores"):
        jaxpruner.BaseUpdater().instant_sparsify(SMALL)


@pytest.mark.parametrize("name", PAPERS)
def test_update_without_parameters(name):
    tx = make(algorithm=name)
    state = tx.init(SMALL)
    for update in (tx.update, jax.jit(tx.update)):
        message = message_of(lambda: update(SMALL, state))  # noqa: B023
        check_words(message, "needs the parameters", "tx.update(updates, state, params)")


def test_straight_through_updates_without_parameters():
    updater = jaxpruner.create_updater_from_config(config(algorithm="magnitude_ste"))
    tx = updater.wrap_optax(optax.sgd(0.1))
    check_words(message_of(lambda: tx.update(SMALL, tx.init(SMALL))), "needs the parameters")


@pytest.mark.parametrize("states", [0, 2])
def test_an_optimizer_state_without_one_sparse_state(states):
    updater = jaxpruner.create_updater_from_config(config(algorithm="magnitude_ste"))
    opt_state = tuple(updater.wrap_optax(optax.sgd(0.1)).init(SMALL) for _ in range(states))
    message = message_of(lambda: updater.pre_forward_update(SMALL, opt_state))
    check_words(message, f"opt_state: holds {states} sparse states", "one sparse transformation")


def test_errors_of_one_leaf_name_it():
    def topk(scores, sparsity):
        raise ValueError("no mask today")

    updater = jaxpruner.MagnitudePruning(topk_fn=topk)
    assert message_of(lambda: updater.instant_sparsify(SMALL)) == "a/kernel: no mask today"
    assert message_of(lambda: updater.instant_sparsify(jnp.zeros((4, 4)))) == "params: no mask today"


def test_valid_input_raises_nothing():
    jax.eval_shape(make(sparsity_type=Unstructured).init, SMALL)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"algorithm": ["rigl"], "sparsity": 0.5}, "algorithm: "),
        ({"algorithm": "rigl", "sparsity": "0.5"}, "Default sparsity '0.5'"),
        ({"algorithm": "rigl", "sparsity": 0.5, "dist_type": ["erk"]}, "dist_type: "),
        ({"algorithm": "rigl", "sparsity": 0.5, "drop_fraction": "a third"}, "drop_fraction: 'a third'"),
        ({"algorithm": "rigl", "sparsity": 0.5, "sparsity_type": 3}, "Sparsity type 3"),
        ({"algorithm": "magnitude", "sparsity": 0.5, "update_start_step": "0"}, "update_end_step: missing"),
        ({"algorithm": "magnitude", "sparsity": 0.5, "update_end_step": -5}, "update_end_step: -5"),
        ({"algorithm": "magnitude", "sparsity": 0.5, "filter_fn": "kernel"}, "filter_fn: 'kernel'"),
        ({"algorithm": "magnitude", "sparsity": 0.5, "custom_sparsity_map": ["a"]}, "custom_sparsity_map: "),
        ({"algorithm": "preserve", "dist_type": "nope"}, "dist_type: 'nope'"),
        ({"algorithm": "global_magnitude", "sparsity_distribution_fn": len}, "sparsity_distribution_fn: "),
        *(
            (schedule | {"algorithm": algorithm, "sparsity": 0.5} | wrong, f"{key}: {value!r} is ")
            for wrong in ({"initial_sparsity": "from_param"}, {"initial_sparsity": 1.7}, {"update_freq": 0})
            for key, value in wrong.items()
            for algorithm in ("magnitude", "static_sparse", "preserve")
            for schedule in ({}, {"update_start_step": 4, "update_end_step": 4})
        ),
    ],
)
def test_values_of_a_wrong_type_are_named(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxpruner.create_updater_from_config(config)


@pytest.mark.parametrize(
    ("field", "key", "value"),
    [
        ("sparsity_distribution_fn", "sparsity", 0.9),
        ("sparsity_distribution_fn", "dist_type", "erk"),
        ("sparsity_distribution_fn", "filter_fn", lambda path, _: True),
        ("sparsity_distribution_fn", "custom_sparsity_map", {"a/*": 0.0}),
        ("scheduler", "update_start_step", 0),
        ("scheduler", "update_end_step", 5),
        ("scheduler", "update_freq", 5),
        ("scheduler", "initial_sparsity", 0.3),
        ("topk_fn", "sparsity_type", "nm_2,4"),
        ("drop_fraction_fn", "drop_fraction", 0.3),
        ("masks", "initial_sparsity", "from_params"),
    ],
)
def test_two_keys_that_say_the_same(field, key, value):
    full = {
        "sparsity_distribution_fn": lambda params: jax.tree.map(lambda p: 0.5, params),
        "scheduler": jaxpruner.OneShotSchedule(3),
        "topk_fn": lambda scores, sparsity: scores > 0,
        "drop_fraction_fn": lambda step: 0.5,
        "masks": {"a": {"kernel": jnp.ones((4, 4), bool)}},
    }
    config = {"algorithm": "rigl" if key == "drop_fraction" else "magnitude", field: full[field]}
    config |= {} if field == "sparsity_distribution_fn" else {"sparsity": 0.5}
    jaxpruner.create_updater_from_config(config | {key: None})
    for make in (jaxpruner.create_updater_from_config, lambda config: jaxpruner.sparsify(optax.sgd(0.1), config)):
        with pytest.raises(ValueError, match=f"{field}: stands in place of {key}, .* give one of the two"):
            make(config | {key: value})


def test_a_structure_class_that_needs_sizes_is_told():
    with pytest.raises(ValueError, match="Sparsity type NByM"):
        jaxpruner.mask_calculator.get_topk_fn(jaxpruner.sparsity_types.NByM)


def test_a_leaf_past_32_bits_is_named():
    params = {"decoder": {"kernel": jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)}}
    updater = jaxpruner.MagnitudePruning()
    with pytest.raises(ValueError, match=r"decoder/kernel: leaf 0 of shape \(65536, 65536\).*split it"):
        jax.eval_shape(updater.instant_sparsify, params)
