"""Names of leaves over any pytree, patterns, and the leaf that is not pruned."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner
from jaxpruner import trees


class Layer(NamedTuple):
    kernel: object
    bias: object


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layer", "value"], meta_fields=[])
@dataclasses.dataclass
class Model:
    layer: Layer
    # Not a box of flax.nnx, though a field is called like one's.
    value: object


ATTENTION = {"query": object, "key": object, "value": object}


def paths(tree):
    return [path for path, _ in trees.named_leaves(tree)]


# Names


def test_paths_of_plain_containers():
    tree = {"b": [1.0, (2.0, {"c": 3.0})], "a": Layer(4.0, None)}
    assert trees.named_leaves(tree) == [
        (("a", "kernel"), 4.0),
        (("b", "0"), 1.0),
        (("b", "1", "0"), 2.0),
        (("b", "1", "1", "c"), 3.0),
    ]


def test_paths_of_odd_keys():
    assert paths({1: 0.0, 2: 0.0}) == [("1",), ("2",)]
    assert paths({"a/b": {"c": 0.0}}) == [("a/b", "c")]
    assert paths(0.0) == [()]
    assert paths({}) == []


def test_paths_of_a_dataclass():
    assert paths(Model(Layer(1.0, 2.0), [3.0])) == [("layer", "kernel"), ("layer", "bias"), ("value", "0")]


def test_paths_of_a_frozen_dict():
    core = pytest.importorskip("flax.core")
    assert paths(core.freeze({"a": {"kernel": 0.0}})) == [("a", "kernel")]


def test_paths_of_an_nnx_state():
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert sorted(paths(state)) == [("bias",), ("kernel",)]


def test_paths_of_haiku_parameters():
    hk = pytest.importorskip("haiku")
    params = hk.transform(lambda x: hk.nets.MLP([3, 2])(x)).init(jax.random.PRNGKey(0), jnp.ones((1, 4)))
    assert ("mlp/~/linear_0", "w") in paths(params)


def test_paths_of_an_equinox_module():
    eqx = pytest.importorskip("equinox")
    model = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.PRNGKey(0)), eqx.is_array)
    assert ("layers", "0", "weight") in paths(model)


def nnx_of_nodes():
    nnx = pytest.importorskip("flax.nnx")
    if jax.tree.structure(nnx.Param(jnp.ones(2))) == jax.tree.structure(0):
        pytest.skip("the variables of this flax are leaves")
    return nnx


@pytest.mark.parametrize("kind", ["flax", "equinox", "dataclass", "nnx"])
def test_a_field_called_value_beside_others_keeps_its_name(kind):
    """So does it in trees that have None or MaskedNode in the places of the others."""
    if kind == "flax":
        base = pytest.importorskip("flax.struct").dataclass(type("Attention", (), {"__annotations__": ATTENTION}))
    elif kind == "equinox":
        base = type("Attention", (pytest.importorskip("equinox").Module,), {"__annotations__": ATTENTION})
    else:
        base = jax.tree_util.register_dataclass(dataclasses.make_dataclass("Attention", ATTENTION), list(ATTENTION), [])
    nnx = nnx_of_nodes() if kind == "nnx" else None
    box = nnx.Param if nnx else lambda leaf: leaf
    params = {"layer": base(*(box(jnp.ones((2, 2)) * i) for i in range(3)))}
    names = [("layer", name) for name in ATTENTION]
    assert paths(params) == names
    for other in (None, optax.MaskedNode()):
        masks = {"layer": base(box(other), box(other), box(jnp.ones((2, 2))))}
        assert paths(masks) == names[2:]
        for tree in (params, masks):
            seen = trees.map_named(lambda path, *_: path[-1], tree, masks)["layer"]
            assert [getattr(seen, name) for name in ATTENTION] == [box(name) for name in ATTENTION]


def test_a_field_called_value_is_pruned_by_its_name():
    params = Model(Layer(jnp.arange(1.0, 17.0).reshape(4, 4), jnp.ones(4)), jnp.arange(1.0, 17.0).reshape(4, 4))
    tx = jaxpruner.sparsify(
        optax.sgd(0.0), algorithm="magnitude", sparsity=0.75, filter_fn=lambda path, _: path[-1] in ("kernel", "value"),
        update_start_step=0, update_end_step=0,
    )  # fmt: skip
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    assert jaxpruner.summarize_sparsity(params)["value"] == 0.75
    jaxpruner.check_sparse(params, state, tx.init.updater)


def test_a_lone_value_keeps_its_name():
    nnx = nnx_of_nodes()
    assert paths(nnx.Param(jnp.ones(2))) == [("value",)]
    assert paths({"a": nnx.Param(nnx.Param(jnp.ones(2)))}) == [("a",)]


def test_leaf_names():
    assert trees.leaf_name(("a", "b", "0")) == "a/b/0"
    assert trees.leaf_name(()) == "params"


def test_map_named_keeps_the_structure_and_sees_none():
    tree = {"a": 1, "b": Layer(2, 3)}
    marks = {"a": None, "b": Layer(5, optax.MaskedNode())}
    seen = trees.map_named(lambda path, leaf, mark: ("/".join(path), leaf, mark), tree, marks)
    assert seen == {"a": ("a", 1, None), "b": Layer(("b/kernel", 2, 5), ("b/bias", 3, optax.MaskedNode()))}


# Leaves that are not pruned


@pytest.mark.parametrize("unpruned", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_map_pruned(unpruned):
    tree = {"a": 1, "b": [2, 3]}
    marks = {"a": 10, "b": [unpruned, 30]}
    assert trees.map_pruned(lambda x, mark: x + mark, tree, marks) == {"a": 11, "b": [None, 33]}
    assert trees.map_pruned(lambda x, mark: x + mark, tree, marks, otherwise=lambda x: -x) == {"a": 11, "b": [-2, 33]}
    assert trees.map_pruned(lambda x, _, y: x * y, tree, marks, {"a": 5, "b": [6, 7]}) == {"a": 5, "b": [None, 21]}


def test_none_in_trees_and_masked_node_in_states():
    tree = {"a": 1.0, "b": [None, 2.0]}
    state = trees.to_state(tree)
    assert state == {"a": 1.0, "b": [optax.MaskedNode(), 2.0]}
    assert jax.tree.leaves(state) == [1.0, 2.0]
    assert trees.from_state(state) == tree
    assert trees.to_state(state) == state
    assert trees.from_state(tree) == tree
    assert trees.from_state(trees.to_state(None)) is None


def test_is_unpruned():
    assert trees.is_unpruned(None)
    assert trees.is_unpruned(optax.MaskedNode())
    for leaf in (0, 0.0, False, np.zeros(3), (), Layer(None, None)):
        assert not trees.is_unpruned(leaf)


# Patterns


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        (("a", "b"), ("a", "b"), True),
        (("a",), ("a", "b"), False),
        (("a", "*"), ("a", "b"), False),
        (("a", 0), ("a", "0"), True),
        ("a/b", ("a", "b"), True),
        ("a", ("a", "b"), False),
        ("a/*", ("a", "b"), True),
        ("a/*", ("a", "b", "c"), True),
        ("*/kernel", ("a", "b", "kernel"), True),
        ("*/kernel", ("kernel",), False),
        ("layer_?/kernel", ("layer_3", "kernel"), True),
        ("layer_[12]/kernel", ("layer_3", "kernel"), False),
        ("A/b", ("a", "b"), False),
        ("*", (), True),
        ((), (), True),
    ],
)
def test_matches(pattern, path, expected):
    assert trees.matches(pattern, path) is expected


PATHS = [("a", "kernel"), ("b", "kernel"), ("b", "bias")]


def test_resolve():
    assert trees.resolve(None, PATHS, "map") == {}
    assert trees.resolve({"b/*": 1, "*": 2}, PATHS, "map") == {PATHS[0]: 2, PATHS[1]: 1, PATHS[2]: 1}
    assert trees.resolve({("b", "bias"): 3}, PATHS, "map") == {PATHS[2]: 3}


def test_resolve_names_the_nearest_paths():
    with pytest.raises(ValueError, match=r"map: 'b/kernal' matches no parameter .* nearest are b/kernel, "):
        trees.resolve({"b/kernal": 1}, PATHS, "map")
    with pytest.raises(ValueError, match="filter_fn selects nothing"):
        trees.resolve({"b/kernal": 1}, [], "map")


def test_errors_at():
    def fail(error):
        with trees.errors_at(("a", "kernel")):
            raise error

    with pytest.raises(ValueError, match=r"^a/kernel: too odd$"):
        fail(ValueError("too odd"))
    with pytest.raises(TypeError, match=r"^of another kind$"):
        fail(TypeError("of another kind"))
