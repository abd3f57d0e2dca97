"""Structures as configurations write them, the axes they name, and which pattern wins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import jaxpruner
from jaxpruner import trees
from jaxpruner.sparsity_types import Block, Channel, NByM, Unstructured


def made(**config):
    return jaxpruner.create_updater_from_config({"algorithm": "magnitude", "sparsity": 0.5} | config)


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ("unstructured", Unstructured()),
        ("nm_2,4", NByM(2, 4)),
        ("nm_2:4", NByM(2, 4)),
        ("nm_2,4,axis=0", NByM(2, 4, 0)),
        ("nm_2:4,axis=-2", NByM(2, 4, -2)),
        ("nm_4,8,axis=0:1", NByM(4, 8, (0, 1))),
        ("nm_2,4,axis=input", NByM(2, 4, "input")),
        ("block_4,4", Block((4, 4))),
        ("block_4,1,axes=1:2", Block((4, 1), axes=(1, 2))),
        ("block_4,1,axes=-2:-1", Block((4, 1), axes=(-2, -1))),
        ("channel_-1", Channel(-1)),
        ("channel_axis=0", Channel(0)),
        ("channel_input", Channel("input")),
        ("channel_output", Channel("output")),
    ],
)
def test_strings(text, structure):
    assert made(sparsity_type=text).sparsity_type == structure


@pytest.mark.parametrize(
    "text",
    ["nm_2,4_0", "block_4_4,4", "channel_1_0", "nm_2", "nm_2,4,8", "nm_2, 4", "nm_2,4,axis=", "nm_2,4,axis=out",
     "block_4", "block_4,4,axes=1", "channel_", "channel_1.0", "nm", "nm_-2,4", "Unstructured", ""],
)  # fmt: skip
def test_strings_that_are_none(text):
    with pytest.raises(ValueError, match=r"Sparsity type .* is not known; use .*'nm_2,4' or 'nm_2:4'"):
        made(sparsity_type=text)


def groups_along(mask, axes, m):
    """The number of kept weights in each m of the axes, folded in C order, last."""
    mask = np.moveaxis(np.asarray(mask), axes, range(mask.ndim - len(axes), mask.ndim))
    folded = mask.reshape(*mask.shape[: mask.ndim - len(axes)], -1, m)
    return folded.sum(-1)


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        (("dense", "kernel"), (8, 6), (0,)),
        (("linear", "w"), (8, 6), (0,)),
        (("conv", "kernel"), (3, 3, 4, 6), (0, 1, 2)),
        (("conv", "kernel"), (2, 2, 3, 6), (0, 1, 2)),  # 3 is no multiple of 4, and 2 * 2 * 3 is one
        (("attention", "query", "kernel"), (8, 3, 5), (0,)),
        (("attention", "out", "kernel"), (3, 4, 6), (0, 1)),
        (("linear", "weight"), (6, 8), (1,)),
        (("conv", "weight"), (6, 4, 3, 3), (1, 2, 3)),
        (("embed", "embedding"), (6, 8), (1,)),
    ],
)
def test_n_of_m_along_what_is_contracted(path, shape, axes):
    params = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    for name in reversed(path):
        params = {name: params}
    _, masks = made(sparsity_type="nm_2:4,axis=input").instant_sparsify(params)
    (mask,) = jax.tree.leaves(masks)
    assert (groups_along(mask, axes, 4) == 2).all()
    (weights,) = jax.tree.leaves(params)
    axis = axes[0] if len(axes) == 1 else ":".join(map(str, axes))
    _, named = made(sparsity_type=f"nm_2,4,axis={axis}").instant_sparsify(params)
    np.testing.assert_array_equal(jax.tree.leaves(named)[0], mask)
    # The largest two of each four.
    folded = np.moveaxis(np.asarray(weights), axes, range(weights.ndim - len(axes), weights.ndim))
    fours = np.abs(folded.reshape(*folded.shape[: folded.ndim - len(axes)], -1, 4))
    expected = np.sort(fours, -1)[..., 2:].sum()
    np.testing.assert_allclose(np.abs(np.asarray(weights)[np.asarray(mask)]).sum(), expected, rtol=1e-5)


def test_along_the_inputs_of_a_stack():
    params = {"layers": {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 6)), jnp.float32)}}
    _, masks = made(sparsity_type="nm_2:4,axis=input", stack_axes={"layers/*": 0}).instant_sparsify(params)
    assert (groups_along(masks["layers"]["kernel"], (1,), 4) == 2).all()


def test_channels_by_name():
    rng = np.random.default_rng(1)
    params = {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)}}
    for name, axis in (("input", 2), ("output", 3)):
        _, masks = made(sparsity_type=f"channel_{name}").instant_sparsify(params)
        kept = np.moveaxis(np.asarray(masks["conv"]["kernel"]), axis, 0).reshape(
            params["conv"]["kernel"].shape[axis], -1
        )
        assert (kept.all(1) | ~kept.any(1)).all()
        assert kept.all(1).sum() == kept.shape[0] // 2


def test_blocks_over_other_axes():
    params = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 4)), jnp.float32)}
    _, masks = made(sparsity_type="block_4,2,axes=1:2").instant_sparsify(params)
    mask = np.asarray(masks["kernel"])
    assert (mask == mask[:1]).all()
    blocks = mask[0].reshape(2, 4, 2, 2).transpose(0, 2, 1, 3).reshape(4, 8)
    assert sorted(blocks.sum(1).tolist()) == [0, 0, 8, 8]


def test_nothing_is_contracted_by_a_bias():
    updater = made(sparsity_type="nm_2,4,axis=input", filter_fn=lambda path, param: True)
    with pytest.raises(ValueError, match=r"bias: axis 'input': a leaf of shape \(8,\) contracts nothing"):
        updater.instant_sparsify({"bias": jnp.ones(8)})


# Patterns

LAYERS = {"encoder": {"attention": {"kernel": jnp.ones((8, 8))}, "mlp": {"kernel": jnp.ones((8, 8))}}}


@pytest.mark.parametrize("kind", [dict, lambda pairs: dict(reversed(pairs)), ml_collections.ConfigDict, list])
def test_the_most_specific_pattern_wins_whatever_the_order(kind):
    sparsities = [("*", 0.25), ("*/attention/*", 0.5)]
    if kind in (list,):
        kind = dict
    targets = made(custom_sparsity_map=kind(dict(sparsities) if kind is ml_collections.ConfigDict else sparsities))
    targets = targets.get_target_sparsities(LAYERS)
    assert targets["encoder"] == {"attention": {"kernel": 0.5}, "mlp": {"kernel": 0.25}}
    structures = made(sparsity_type=ml_collections.ConfigDict({"*/attention/*": "nm_2,4", "*": "channel_0"}))
    assert structures.structure(("encoder", "attention", "kernel"), jnp.ones((8, 8))) == NByM(2, 4)
    assert structures.structure(("encoder", "mlp", "kernel"), jnp.ones((8, 8))) == Channel(0)


def test_specificity():
    narrowing = ["*", "enc*", "*/kernel", "*/attention/kernel", "encoder/*/kernel/x", ("a", "b")]
    ranks = [trees.specificity(pattern) for pattern in narrowing]
    assert ranks == sorted(ranks)
    assert trees.specificity("a/b") == trees.specificity(("a", "b"))


def test_equally_specific_patterns_that_differ_are_an_error():
    patterns = {"encoder/*": 0.25, "*/kernel": 0.5}
    with pytest.raises(
        ValueError, match=r"'encoder/\*' \(0.25\) and '\*/kernel' \(0.5\) are equally specific and both"
    ):
        made(custom_sparsity_map=patterns).get_target_sparsities(LAYERS)
    made(custom_sparsity_map={"encoder/*": 0.5, "*/kernel": 0.5}).get_target_sparsities(LAYERS)
    with pytest.raises(ValueError, match=r"sparsity_type: .* are equally specific"):
        made(sparsity_type={"encoder/*": "nm_2,4", "*/kernel": "unstructured"}).instant_sparsify(LAYERS)
