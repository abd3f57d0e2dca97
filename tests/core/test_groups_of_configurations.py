"""Groups as configurations ask for them, and which of them filters choose."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner
from jaxpruner.coupled_structures import AllGroups
from jaxpruner.inspection import checks, timing

SIZES = (6, 32, 16, 24, 3)
NAMES = ("one", "two", "three", "four")


def network(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x


def parameters():
    keys = jax.random.split(jax.random.key(0), len(NAMES))
    return {
        name: {"kernel": jax.random.normal(key, (a, b)), "bias": jnp.ones(b)}
        for name, key, a, b in zip(NAMES, keys, SIZES, SIZES[1:], strict=False)
    }


def found():
    return jaxpruner.find_groups(network, parameters(), jnp.ones((2, SIZES[0])))


def units(mask):
    """Columns with something left."""
    return int(np.asarray(mask).any(0).sum())


def config(algorithm="magnitude", **more):
    given = {"sparsity": 0.5, "sparsity_type": found(), "update_start_step": 0, "update_end_step": 0}
    return {"algorithm": algorithm} | given | more


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "global_magnitude", "magnitude_ste"])
def test_units_of_a_layer_that_was_not_chosen_all_stay(algorithm):
    """Its rows go with the units before it all the same."""
    updater = jaxpruner.create_updater_from_config(
        config(algorithm, filter_fn=lambda path, _: path == ("one", "kernel"))
    )
    params, masks = updater.instant_sparsify(parameters())
    assert units(masks["one"]["kernel"]) == 16
    assert np.asarray(masks["two"]["kernel"]).any(1).sum() == 16
    assert units(masks["two"]["kernel"]) == 16 == SIZES[2]
    assert masks["three"]["kernel"] is None
    tx = jaxpruner.sparsify(optax.sgd(0.0), updater)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    jaxpruner.check_sparse(params, state, updater)
    assert checks.shares_pruned(params, state, updater)[:2] == pytest.approx((0.5, 0.5))


def test_the_kernel_of_attention_owns_its_groups():
    """Not a bias of (heads, width), which filters leave out."""

    def attend(params, x):
        q, k = (
            jnp.einsum("te,ehd->thd", x, params[name]["kernel"]) + params[name]["bias"] for name in ("query", "key")
        )
        scores = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
        return jnp.einsum("hqk,hk->q", scores, jnp.ones(scores.shape[:2]))

    params = {name: {"kernel": jnp.ones((5, 2, 8)), "bias": jnp.ones((2, 8))} for name in ("query", "key")}
    groups = jaxpruner.find_groups(attend, params, jnp.ones((4, 5)))
    assert [group.name for group in groups.removable if group.size == 8] == ["key/kernel[2]"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("groups", AllGroups()),
        ("groups,multiple_of=8", AllGroups(multiple_of=8)),
        ("groups_*/mlp/*", AllGroups(("*/mlp/*",))),
        ("groups_a/kernel[1.0]:*b*,multiple_of=4,budget=flops", AllGroups(("a/kernel[1.0]", "*b*"), 4, "flops")),
    ],
)
def test_strings(text, wanted):
    updater = jaxpruner.create_updater_from_config(config(sparsity_type=text))
    assert updater.sparsity_type == wanted
    assert jaxpruner.describe(updater)["sparsity_type"] == repr(wanted)


@pytest.mark.parametrize("text", ["group", "groups_", "groups,multiple_of=0", "groups,budget=params", "groups,8"])
def test_strings_that_are_none(text):
    with pytest.raises(ValueError, match=r"Sparsity type .* is not known; use .*'groups'"):
        jaxpruner.create_updater_from_config(config(sparsity_type=text))


def test_what_a_string_asks_of_a_model():
    chosen = AllGroups(("two/kernel[1]",), multiple_of=4).of(found())
    assert ([group.name for group in chosen.pruned], chosen.multiple_of) == (["two/kernel[1]"], 4)
    with pytest.raises(ValueError, match="names no group"):
        AllGroups(("five*",)).of(found())
    tx = jaxpruner.sparsify(optax.sgd(0.1), config(sparsity_type="groups"))
    with pytest.raises(ValueError, match=r"groups = jaxpruner\.find_groups"):
        tx.init(parameters())


def test_flops_of_what_nothing_needs_are_not_saved():
    def with_waste(params, x):
        (x @ params["one"]["kernel"]) @ params["one"]["kernel"].T
        return network(params, x)

    reports = [jaxpruner.compact(fn, parameters(), jnp.ones((1, SIZES[0]))).report() for fn in (network, with_waste)]
    assert reports[0].flops == reports[1].flops
    assert reports[0].flops[0] == reports[0].flops[1]
    assert "units " in str(reports[0])


def test_functions_are_timed_in_turn():
    calls = []
    seconds = timing.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    assert calls == list("ababab")
    assert min(seconds.values()) >= 0
