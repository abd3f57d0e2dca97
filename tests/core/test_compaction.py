"""Compaction: the small function gives what the masked one gives, and what was pruned is gone."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import jaxpruner
from jaxpruner import mask_storage
from jaxpruner.compaction import files

X = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(X.normal(size=shape) / np.sqrt(shape[0] if shape else 1), jnp.float32)


# Networks made of layers: each takes (batch, time, channels) and its own parameters, and gives the same kind.


def _dense(c, out=None):
    width = c if out is None else out
    params = {"kernel": normal(c, width), "bias": normal(width)}
    return params, lambda p, x: jax.nn.gelu(x @ p["kernel"] + p["bias"]), width


def _wide(c):
    return _dense(c, 2 * c)


def _convolution(c):
    def apply(p, x):
        return jax.nn.relu(
            jax.lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        )

    return {"kernel": normal(3, c, 8)}, apply, 8


def _depthwise(c):
    def apply(p, x):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=c
        )

    return {"kernel": normal(3, 1, 2 * c)}, apply, 2 * c


def _statistics(c):
    params = {"mean": normal(c), "var": jnp.abs(normal(c)), "scale": normal(c), "bias": normal(c)}
    return params, lambda p, x: (x - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-3) * p["scale"] + p["bias"], c


def _group_norm(c):
    def apply(p, x):
        y = x.reshape(*x.shape[:2], 2, c // 2)
        y = (y - y.mean((1, 3), keepdims=True)) * jax.lax.rsqrt(y.var((1, 3), keepdims=True) + 1e-3)
        return y.reshape(x.shape) * p["scale"]

    return {"scale": normal(c)}, apply, c


def _layer_norm(c):
    def apply(p, x):
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-3) * p["scale"]

    return {"scale": normal(c)}, apply, c


def _residual(c):
    params = {"in": normal(c, 12), "out": normal(12, c)}
    return params, lambda p, x: x + jnp.tanh(x @ p["in"]) @ p["out"], c


def _concatenated(c):
    return {"kernel": normal(c, 6)}, lambda p, x: jnp.concatenate([x, jax.nn.silu(x @ p["kernel"])], -1), c + 6


def _doubled(c):
    del c
    return {}, lambda p, x: jnp.concatenate([x, x], -1), None


def _split(c):
    def apply(p, x):
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first, jax.nn.relu(second @ p["kernel"]), second], -1)

    return {"kernel": normal(c // 2, 4)}, apply, c + 4


def _shuffled(c):
    return {}, lambda p, x: x.reshape(*x.shape[:2], 2, c // 2).swapaxes(2, 3).reshape(x.shape), c


def _attention(c):
    params = {name: normal(c, 4, 6) for name in ("query", "key", "value")} | {"out": normal(4, 6, c)}

    def apply(p, x):
        q, k, v = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
        return x + jnp.einsum("bhts,bshd,hdc->btc", weights, v, p["out"])

    return params, apply, c


def _recurrent(c):
    params = {"in": normal(c, 8), "recurrent": normal(8, 8)}

    def apply(p, x):
        def step(carry, now):
            carry = jnp.tanh(now @ p["in"] + carry @ p["recurrent"])
            return carry, carry

        return jax.lax.scan(step, jnp.zeros((x.shape[0], 8)), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return params, apply, 8


def _layers_in_a_loop(c):
    params = {"in": normal(3, c, 10), "out": normal(3, 10, c)}

    def apply(p, x):
        body = jax.checkpoint(lambda x, p: (x + jax.nn.relu(x @ p["in"]) @ p["out"], None))
        return jax.lax.scan(body, x, p)[0]

    return params, apply, c


def _rotated(c):
    """Attention of one head's turned pairs, as rotary embeddings turn them."""
    params = {name: normal(c, 4, 6) for name in ("query", "key")} | {"out": normal(4, 6, c)}

    def turn(x):
        even, odd = jnp.unstack(x.reshape(*x.shape[:-1], 3, 2), axis=-1)
        angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None, None]
        turned = jnp.cos(angle) * even - jnp.sin(angle) * odd, jnp.sin(angle) * even + jnp.cos(angle) * odd
        return jnp.stack(turned, axis=-1).reshape(x.shape)

    def apply(p, x):
        q, k = (turn(jnp.einsum("btc,chd->bthd", x, p[name])) for name in ("query", "key"))
        return x + jnp.einsum("bthd,bshd,bshe,hec->btc", q, k, k, p["out"])

    return params, apply, c


def _excited(c):
    params = {"squeeze": normal(c, 4), "excite": normal(4, c)}

    def apply(p, x):
        gates = jax.nn.sigmoid(jax.nn.relu(x.mean(1) @ p["squeeze"]) @ p["excite"])
        return x * gates[:, None]

    return params, apply, c


def _gathered(c):
    del c
    return {}, lambda p, x: x[:, jnp.array([2, 0, 1, 2])], None


def _chosen(c):
    params = {"a": normal(c, c), "b": normal(c, c)}
    return params, lambda p, x: jax.lax.cond(x.sum() > 0, lambda: x @ p["a"], lambda: jnp.sin(x @ p["b"])), c


def _padded(c):
    return {}, lambda p, x: jnp.pad(x, ((0, 0), (0, 0), (1, 1))), c + 2


LAYERS = [
    _dense, _wide, _convolution, _depthwise, _statistics, _group_norm, _layer_norm, _residual, _concatenated, _doubled,
    _split, _shuffled, _attention, _recurrent, _layers_in_a_loop, _rotated, _excited, _gathered, _chosen, _padded,
]  # fmt: skip


def network(layers):
    """Parameters and the function of layers one after the other, a dense one before and behind."""
    params, applies, width = [], [], 5
    for layer in (_wide, *layers, lambda c: _dense(c, 3)):
        made = [_dense(width, 8), layer(8)] if width % 2 else [layer(width)]  # halves are wanted
        for own, apply, out in made:
            params.append(own)
            applies.append(apply)
            width = out if out is not None else 2 * width if layer is _doubled else width

    def fn(params, x):
        for own, apply in zip(params, applies, strict=True):
            x = apply(own, x)
        return x

    return fn, params


def pruned_by_groups(groups, params, sparsity=0.5):
    updater = jaxpruner.create_updater_from_config(
        {"algorithm": "magnitude", "sparsity": sparsity, "sparsity_type": groups}
    )
    return updater.instant_sparsify(params)[0]


def close(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, atol=2e-4 * max(1e-3, np.abs(a).max(initial=0)), rtol=0)


def gradient(fn, params, *args):
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, *args)))))(params)


@pytest.mark.slow
@given(layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4), sparsity=st.sampled_from([0.3, 0.5, 0.75]))
@settings(max_examples=8, deadline=None)
def test_networks_of_random_layers(layers, sparsity):
    fn, params = network(layers)
    x = normal(2, 3, 5)
    groups = jaxpruner.find_groups(fn, params, x)
    masked = pruned_by_groups(groups, params, sparsity)
    small = jaxpruner.compact(fn, masked, x, check=False)
    close(jax.jit(fn)(masked, x), jax.jit(small.fn)(small.params, x))
    # What was removed is gone, and more only where it was of use to none of what is left.
    for group in groups.removable:
        assert 1 <= small.sizes[group.name] <= max(1, round(group.size * (1 - sparsity)))
    # It trains on as the masked network does, at any batch size.
    x = normal(3, 3, 5)
    whole = small.cut(gradient(fn, masked, x))
    jax.tree.map(close, whole, gradient(small.fn, small.params, x))


@given(layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3), seed=st.integers(0, 9))
@settings(max_examples=6, deadline=None)
def test_what_is_dead_leaves_networks_that_were_pruned_weight_by_weight(layers, seed):
    fn, params = network(layers)
    draws = np.random.default_rng(seed)
    sparse = jax.tree.map(lambda p: p * (draws.random(p.shape) < 0.08), params)
    x = normal(2, 3, 5)
    small = jaxpruner.compact(fn, sparse, x, check=False)
    close(jax.jit(fn)(sparse, x), jax.jit(small.fn)(small.params, x))


# What a user asks for, and is told.


def mlp(params, x):
    return jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


def mlp_params(width=16):
    return {"up": {"kernel": normal(5, width), "bias": normal(width)}, "down": {"kernel": normal(width, 3)}}


def updater_of(groups, algorithm="magnitude", **config):
    config = {"sparsity": 0.5, "update_start_step": 0, "update_end_step": 0} | config
    return jaxpruner.create_updater_from_config({"algorithm": algorithm, "sparsity_type": groups} | config)


def test_what_a_group_is():
    groups = jaxpruner.find_groups(mlp, mlp_params(), normal(2, 5))
    (group,) = groups.removable
    assert (group.name, group.size, group.owner) == ("up/kernel[1]", 16, ("up", "kernel"))
    assert {str(place) for place in group.places} == {"up/kernel[1]", "up/bias[0]", "down/kernel[0]"}
    assert (group.params, group.flops) == (5 + 1 + 3, 2 * 2 * (5 + 3))
    assert {group.name: group.reasons for group in groups.frozen} == {
        "up/kernel[0]": ("is an axis of an argument",),
        "down/kernel[1]": ("is an axis of what the function returns",),
    }
    for text in ("up/kernel[1]", "is an axis of an argument"):
        assert text in str(groups)


def test_units_are_scored_over_all_their_places():
    params = mlp_params()
    groups = jaxpruner.find_groups(mlp, params, normal(1, 5))
    masks = updater_of(groups).instant_sparsify(params)[1]
    score = sum(
        np.abs(leaf).sum(axis)
        for leaf, axis in ((params["up"]["kernel"], 0), (params["up"]["bias"], ()), (params["down"]["kernel"], 1))
    )
    kept = np.argsort(np.argsort(-score)) < 8
    np.testing.assert_array_equal(masks["up"]["bias"], kept)
    np.testing.assert_array_equal(masks["up"]["kernel"], np.broadcast_to(kept, (5, 16)))
    np.testing.assert_array_equal(masks["down"]["kernel"], np.broadcast_to(kept[:, None], (16, 3)))


ALGORITHMS = ["magnitude", "saliency", "random", "magnitude_ste", "random_ste", "global_magnitude", "static_sparse"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_training_keeps_whole_units_and_as_many_as_asked(algorithm, multiple_of):
    params = {"first": mlp_params(10), "second": {"kernel": normal(3, 14)}, "third": {"kernel": normal(14, 2)}}

    def fn(params, x):
        return jnp.tanh(mlp(params["first"], x) @ params["second"]["kernel"]) @ params["third"]["kernel"]

    x = normal(4, 5)
    groups = jaxpruner.find_groups(fn, params, x).choose(multiple_of=multiple_of)
    tx = jaxpruner.sparsify(optax.adamw(1e-2), updater_of(groups, algorithm, sparsity=0.7))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(fn, params, x), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    # One bit a unit of each place.
    assert sum(leaf.size for leaf in jax.tree.leaves(state.masks)) <= sum(
        -(-sum(leaf.shape) // 8) for leaf in jax.tree.leaves(params)
    )
    for _ in range(3):
        params, state = step(params, state)
    jaxpruner.check_sparse(params, state, tx.init.updater)
    small = jaxpruner.compact(fn, params, x)
    sizes = {group.name: group.size for group in groups.removable}
    if algorithm == "global_magnitude":
        assert abs(sum(small.sizes.values()) - 0.3 * sum(sizes.values())) <= multiple_of * len(sizes)
    else:
        wanted = {name: round(0.3 * size) for name, size in sizes.items()}
        assert small.sizes == {name: min(sizes[name], -(-n // multiple_of) * multiple_of) for name, n in wanted.items()}
    # And trains on with what the optimizer knows.
    left = small.cut(state)
    if "ste" not in algorithm:
        inner = optax.adamw(1e-2)
        updates, _ = inner.update(gradient(small.fn, small.params, x), left.inner_state, small.params)
        whole, _ = inner.update(gradient(fn, params, x), state.inner_state, params)
        jax.tree.map(close, small.cut(whole), updates)
        jaxpruner.check_sparse(small.params, left)


def test_a_budget_of_flops():
    fn, params = network([_wide, _dense, _residual])
    x = normal(2, 3, 5)
    groups = jaxpruner.find_groups(fn, params, x).choose(budget="flops")
    masked = updater_of(groups, "global_magnitude", sparsity=0.4).instant_sparsify(params)[0]
    flops = jaxpruner.compact(fn, masked, x).report().flops
    assert 0.5 <= flops[1] / flops[0] <= 0.6
    with pytest.raises(ValueError, match="budget: MagnitudePruning prunes each group by itself"):
        updater_of(groups).instant_sparsify(params)
    few = groups.choose("0/kernel*", budget="flops")
    with pytest.raises(ValueError, match=r"0.9 of the FLOPs cannot go"):
        updater_of(few, "global_magnitude", sparsity=0.9).instant_sparsify(params)


@functools.cache
def pruned_to_budget(sparsity):
    shapes = {"a": (4, 8), "b": (8, 5), "c": (5, 3)}
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    groups = jaxpruner.find_groups(fn, params, jnp.ones((1, 4))).choose(budget="flops")
    return shapes, groups, jax.jit(updater_of(groups, "global_magnitude", sparsity=sparsity).instant_sparsify)


@given(seed=st.integers(0, 999), highest=st.integers(0, 3), sparsity=st.sampled_from([0.25, 0.5]))
@settings(max_examples=30, deadline=None)
def test_a_budget_of_flops_is_met_where_scores_tie(seed, highest, sparsity):
    """No unit more goes than has to, and of those that tie in a group the lower ones stay."""
    shapes, groups, prune = pruned_to_budget(sparsity)
    draw = np.random.default_rng(seed)
    # Alike over the inputs of a unit, and over its outputs, so that units tie.
    each = {name: draw.integers(0, highest, shape[1], endpoint=True) for name, shape in shapes.items()}
    params = {name: np.broadcast_to(each[name], shape).astype(np.float32) for name, shape in shapes.items()}
    _, masks = prune(params)
    kept = {"a[1]": masks["a"].any(0), "b[1]": masks["c"].any(1)}
    numbers = {name: int(mask.sum()) for name, mask in kept.items()}
    budget = (1 - sparsity) * groups.flops({})
    assert groups.flops(numbers) <= budget
    back = [numbers | {name: numbers[name] + 1} for name, mask in kept.items() if not mask.all()]
    assert max(map(groups.flops, back)) > budget
    scores = {"a[1]": params["a"].sum(0) + params["b"].sum(1), "b[1]": params["b"].sum(0) + params["c"].sum(1)}
    for name, mask in kept.items():
        np.testing.assert_array_equal(
            np.sort(np.argsort(-scores[name], kind="stable")[: mask.sum()]), mask.nonzero()[0]
        )


def test_only_what_is_chosen_is_pruned():
    fn, params = network([_wide, _attention])
    x = normal(2, 3, 5)
    groups = jaxpruner.find_groups(fn, params, x)
    chosen = groups.choose("*/key*")
    small = jaxpruner.compact(fn, pruned_by_groups(chosen, params), x)
    for group in groups.removable:
        assert small.sizes[group.name] == (group.size // 2 if "key" in group.name else group.size)
    with pytest.raises(ValueError, match=r"0/kernel\[0\] \(5\) cannot lose units, since it is an axis of an argument"):
        groups.choose("0/kernel[0]")
    with pytest.raises(ValueError, match="names no group"):
        groups.choose("nothing")


def test_statistics_beside_the_parameters_are_cut_with_them():
    def fn(variables, x):
        params, stats = variables["params"], variables["batch_stats"]
        hidden = (x @ params["up"] - stats["mean"]) * params["scale"] + params["shift"]
        return jax.nn.relu(hidden) @ params["down"]

    params = {"up": normal(5, 8), "scale": normal(8), "shift": normal(8), "down": normal(8, 2)}
    x = normal(3, 5)
    groups = jaxpruner.find_groups(fn, {"params": params, "batch_stats": {"mean": normal(8)}}, x)
    # The optimizer trains the parameters alone.
    masked, masks = updater_of(groups).instant_sparsify(params)
    variables = {"params": masked, "batch_stats": {"mean": normal(8)}}
    small = jaxpruner.compact(fn, variables, x)
    assert small.params["batch_stats"]["mean"].shape == (4,)
    assert jax.tree.map(jnp.shape, small.cut(masks)) == {"up": (5, 4), "scale": (4,), "shift": (4,), "down": (4, 2)}


def test_a_unit_that_gives_a_constant_stays_and_is_told():
    params = mlp_params()
    params["up"]["kernel"] = params["up"]["kernel"].at[:, :6].set(0)
    params["up"]["bias"] = jnp.ones(16).at[:2].set(-1)  # two give zero, four give one
    small = jaxpruner.compact(mlp, params, normal(2, 5))
    assert small.sizes == {"up/kernel[1]": 16}
    assert small.constant_units == {"up/kernel[1]": 6}
    assert "6 of its units give a constant" in str(small.report())


def test_nothing_is_dead():
    small = jaxpruner.compact(mlp, mlp_params(), normal(2, 5))
    assert "Nothing was removed" in str(small.report())


def test_a_group_that_would_lose_all_units_keeps_one():
    params = jax.tree.map(jnp.zeros_like, mlp_params())
    small = jaxpruner.compact(mlp, params, normal(2, 5))
    assert small.sizes == {"up/kernel[1]": 1}


def test_units_are_kept_by_choice_and_a_saved_choice_gives_the_same_function():
    params, x = mlp_params(), normal(2, 5)
    small = jaxpruner.compact(mlp, params, x, keep={"up/kernel[1]": [1, 3, 8]})
    np.testing.assert_array_equal(small.params["up"]["bias"], params["up"]["bias"][jnp.array([1, 3, 8])])
    shapes = jax.eval_shape(lambda: params)
    again = jaxpruner.compact(mlp, shapes, x, keep=small.kept)
    close(small.fn(small.params, x), again.fn(small.params, x))
    mask = np.isin(np.arange(16), [1, 3, 8])
    assert jaxpruner.compact(mlp, params, x, keep={"up/kernel[1]": mask}).sizes == {"up/kernel[1]": 3}
    for keep, told in (
        ({"up/kernel[0]": [0]}, r"up/kernel\[0\] cannot lose units, since it is an axis of an argument"),
        ({"elsewhere": [0]}, "no group is called 'elsewhere'"),
        ({"up/kernel[1]": [16]}, "has units 0 to 15"),
        ({"up/kernel[1]": []}, "has units 0 to 15"),
        ({"up/kernel[1]": [True]}, "has 16 units, and the mask has shape"),
    ):
        with pytest.raises(ValueError, match=told):
            jaxpruner.compact(mlp, params, x, keep=keep)
    with pytest.raises(ValueError, match="shapes tell nothing of zeros"):
        jaxpruner.compact(mlp, shapes, x)


def test_what_cannot_be_shortened_says_why():
    constant = normal(16)
    halves = lambda y, first: jax.lax.slice(y, (0, first), y.shape, (1, 2))  # noqa: E731
    cases = {
        "reduced by reduce_sum": lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"],
        "counted by iota": lambda p, x: ((x @ p["a"]) * jnp.arange(16)) @ p["b"],
        "constant of the function": lambda p, x: ((x @ p["a"]) * constant) @ p["b"],
        "which there is no rule for": lambda p, x: jnp.fft.fft(x @ p["a"]).real @ p["b"],
        "is sorted": lambda p, x: jnp.sort(x @ p["a"]) @ p["b"],
        "is taken in strides": lambda p, x: jnp.concatenate([halves(x @ p["a"], i) for i in range(2)], -1) @ p["b"],
        "is an axis of what the function returns": lambda p, x: (x @ p["a"], x @ p["a"] @ p["b"]),
    }
    params, x = {"a": normal(5, 16), "b": normal(16, 3)}, normal(2, 5)
    for reason, fn in cases.items():
        groups = jaxpruner.find_groups(fn, params, x)
        assert not groups.removable, reason
        assert any(reason in each for group in groups.frozen for each in group.reasons), (reason, str(groups))
        # What cannot be shortened is left alone.
        sparse = {"a": params["a"].at[:, :4].set(0), "b": params["b"].at[:4].set(0)}
        close(
            jnp.real(jax.tree.leaves(fn(sparse, x))[0]),
            jax.tree.leaves(jaxpruner.compact(fn, sparse, x).fn(sparse, x))[0],
        )
    # Constants that are the same for all units are no obstacle.
    fn = lambda p, x: ((x @ p["a"]) * np.full(16, 0.5, np.float32)) @ p["b"]  # noqa: E731
    assert [group.size for group in jaxpruner.find_groups(fn, params, x).removable] == [16]


def test_functions_and_arguments_that_cannot_be_compacted_are_told():
    params, x = mlp_params(), normal(2, 5)
    with pytest.raises(ValueError, match="fn multiplies with none of the parameters"):
        jaxpruner.find_groups(lambda _, x: mlp(params, x), params, x)
    small = jaxpruner.compact(mlp, pruned_by_groups(jaxpruner.find_groups(mlp, params, x), params), x)
    with pytest.raises(ValueError, match=r"down/kernel has shape \(16, 3\), and the small function takes \(8, 3\)"):
        small.fn(params, x)
    with pytest.raises(ValueError, match="a tree of 1 leaves, and the small function takes the 3"):
        small.fn({"down": small.params["down"]}, x)
    groups = jaxpruner.find_groups(mlp, params, x)
    with pytest.raises(ValueError, match="elsewhere: the groups do not know it"):
        updater_of(groups).instant_sparsify({"elsewhere": normal(3, 3)})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"algorithm": "rigl", "update_freq": 2, "update_end_step": 10}, "would never learn"),
        ({"algorithm": "set", "update_freq": 2, "update_end_step": 10}, "would never learn"),
        ({"stack_axes": {"*": 0}}, "stack_axes: has no effect on groups"),
        ({"initial_sparsity": "from_params"}, "masks of single weights are no masks of units"),
        ({"filter_fn": lambda path, p: path == ("down", "kernel")}, "filter_fn selects none of the 1 parameters"),
    ],
)
def test_what_does_not_go_with_groups_is_told(config, told):
    params = mlp_params()
    groups = jaxpruner.find_groups(mlp, params, normal(2, 5))
    with pytest.raises(ValueError, match=told):
        updater_of(groups, config.pop("algorithm", "magnitude"), **config).init_state(params)
    algorithm = jaxpruner.MagnitudePruning(sparsity_type=groups, topk_fn=lambda scores, sparsity: scores > sparsity)
    with pytest.raises(ValueError, match="topk_fn: has no effect on groups"):
        algorithm.init_state(params)


def test_very_sparse_kernels_become_sparse_matrices():
    draws = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p * (draws.random(p.shape) < 0.3), mlp_params(64))
    params["up"]["kernel"] = params["up"]["kernel"] * (draws.random((5, 64)) < 0.2)
    x = normal(20, 5)
    small = jaxpruner.compact(mlp, params, x, sparse_above=0.8)
    report = small.report()
    assert list(report.sparse) == ["up/kernel"]
    close(mlp(params, x), jax.jit(small.fn)(small.params, x))
    assert report.bytes[1] < report.bytes[0]


def test_files_keep_dtypes(tmp_path):
    params, x = pruned_by_groups(jaxpruner.find_groups(mlp, mlp_params(), normal(2, 5)), mlp_params()), normal(2, 5)
    small = jaxpruner.compact(mlp, params, x)
    trained = {"down": jax.tree.map(lambda p: p.astype(jnp.bfloat16), small.params["down"]), "up": small.params["up"]}
    files.save_compact(tmp_path / "small.npz", small, trained)
    loaded = files.load_compact(tmp_path / "small.npz", mlp, params, x).params
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)
    assert jax.tree.map(lambda p: p.dtype, loaded) == jax.tree.map(lambda p: p.dtype, trained)


def test_files_without_dtypes(tmp_path):
    """As earlier versions wrote them: bfloat16 is bytes in a file of NumPy."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), mlp_params())
    small = jaxpruner.compact(mlp, half, normal(2, 5).astype(jnp.bfloat16))
    files.save_compact(tmp_path / "small.npz", small)
    with np.load(tmp_path / "small.npz") as content:
        earlier = {key: array for key, array in content.items() if not key.startswith("dtype:")}
    np.savez(tmp_path / "small.npz", **earlier)
    loaded = files.load_compact(tmp_path / "small.npz", mlp, half, normal(2, 5))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, half)
    with pytest.raises(ValueError, match=r"has 2 bytes an entry there.*give params of that dtype instead of float32"):
        files.load_compact(tmp_path / "small.npz", mlp, mlp_params(), normal(2, 5))


def test_files_of_sparse_matrices(tmp_path):
    draws = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p * (draws.random(p.shape) < 0.1), mlp_params(64))
    x = normal(20, 5)
    small = jaxpruner.compact(mlp, params, x, sparse_above=0.8)
    files.save_compact(tmp_path / "small.npz", small)
    loaded = files.load_compact(tmp_path / "small.npz", mlp, params, x)
    told, expected = loaded.report(), small.report()
    assert told.sparse
    assert (told.sparse, told.params, told.bytes) == (expected.sparse, expected.params, expected.bytes)
    np.testing.assert_array_equal(jax.jit(loaded.fn)(loaded.params, x), jax.jit(small.fn)(small.params, x))


def test_random_bits_are_drawn_for_what_is_left():
    def fn(params, key, x):
        hidden = jax.nn.relu(x @ params["up"]["kernel"])
        kept = jax.random.bernoulli(key, 0.5, hidden.shape)
        return jnp.where(kept, hidden, 0) @ params["down"]["kernel"]

    params, key, x = mlp_params(), jax.random.key(0), normal(2, 5)
    params = {"up": {"kernel": params["up"]["kernel"]}, "down": params["down"]}
    masked = pruned_by_groups(jaxpruner.find_groups(fn, params, key, x), params)
    small = jaxpruner.compact(fn, masked, key, x, check=False)
    assert small.sizes == {"up/kernel[1]": 8}
    assert small.fn(small.params, key, x).shape == (2, 3)
    with pytest.raises(ValueError, match="Where it draws random numbers"):
        jaxpruner.compact(fn, masked, key, x)


def test_derivatives_that_someone_wrote_are_kept():
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), x), lambda x, g: (g * (jnp.abs(x) < 1),))

    @jax.custom_jvp
    def clipped(x):
        return jnp.clip(x, -1, 1)

    clipped.defjvp(lambda x, t: (clipped(*x), 2 * t[0]))

    def fn(params, x):
        return rounded(4 * clipped(x @ params["up"]["kernel"])) @ params["down"]["kernel"]

    params, x = mlp_params(), normal(6, 5)
    params = {"up": {"kernel": params["up"]["kernel"]}, "down": params["down"]}
    masked = pruned_by_groups(jaxpruner.find_groups(fn, params, x), params)
    small = jaxpruner.compact(fn, masked, x)
    whole = gradient(fn, masked, x)
    assert float(jnp.abs(whole["up"]["kernel"]).max()) > 0
    jax.tree.map(close, small.cut(whole), gradient(small.fn, small.params, x))


def test_derivatives_without_an_end():
    """Each derivative calls a function that has one of its own, as in TensorFlow Probability."""
    called = []

    @jax.custom_jvp
    def wave(x):
        return jnp.sin(x)

    def derivative(x, t):
        called.append(x)
        return wave(*x), wave(x[0] + jnp.pi / 2) * t[0]

    wave.defjvp(derivative)

    def fn(params, x):
        return wave(x @ params["up"]["kernel"]) @ params["down"]["kernel"]

    params, x = mlp_params(), normal(6, 5)
    params = {"up": {"kernel": params["up"]["kernel"]}, "down": params["down"]}
    masked = pruned_by_groups(jaxpruner.find_groups(fn, params, x), params)
    small = jaxpruner.compact(fn, masked, x)
    assert small.sizes == {"up/kernel[1]": 8}
    assert len(called) < 30
    jax.tree.map(close, small.cut(gradient(fn, masked, x)), gradient(small.fn, small.params, x))
    # The third derivative in x, beyond those that are read.
    thrice = [
        jax.grad(jax.grad(jax.grad(lambda a, f=f, p=p: f(p, a * x).sum())))(1.0)
        for f, p in ((fn, masked), (small.fn, small.params))
    ]
    close(*thrice)


def test_transformations_of_the_small_function():
    params, x = mlp_params(), normal(2, 5)
    small = jaxpruner.compact(mlp, pruned_by_groups(jaxpruner.find_groups(mlp, params, x), params), x)
    expected = small.fn(small.params, x)
    close(expected, jax.jit(small.fn)(small.params, x))
    close(expected, jax.vmap(small.fn, (None, 0))(small.params, x))
    exported = export.export(jax.jit(small.fn))(
        small.params, jax.ShapeDtypeStruct(export.symbolic_shape("batch, 5"), jnp.float32)
    )
    close(expected, exported.call(small.params, x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("of_data", ["bfloat16", "float32"])
def test_parameters_of_other_dtypes(dtype, of_data):
    params, x = mlp_params() | {"scale": jnp.float32(2)}, normal(2, 5)
    fn = lambda p, x: p["scale"] * mlp(p, x)  # noqa: E731
    masked = pruned_by_groups(jaxpruner.find_groups(fn, params, x), params)
    small = jaxpruner.compact(fn, masked, x)
    before = small.fn(small.params, x)
    masked, cut = (jax.tree.map(lambda p: p.astype(dtype), each) for each in (masked, small.params))
    expected, got = fn(masked, x.astype(of_data)), small.fn(cut, x.astype(of_data))
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, atol=0.1)
    np.testing.assert_array_equal(before, small.fn(small.params, x))


def test_the_whole_parameters_are_not_kept():
    params, x = mlp_params(), normal(2, 5)
    params = pruned_by_groups(jaxpruner.find_groups(mlp, params, x), params)
    whole = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    small = jaxpruner.compact(mlp, params, x)
    before = str(small.report())
    del params
    gc.collect()
    assert not any(leaf() is not None for leaf in whole)
    assert str(small.report()) == before


def test_the_state_of_groups_is_placed_on_a_mesh():
    params = mlp_params()
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("model",))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda p: columns if p.ndim == 2 else whole, params)
    groups = jaxpruner.find_groups(mlp, params, normal(2, 5))
    tx = jaxpruner.sparsify(optax.adam(1e-3), updater_of(groups))
    placed = jaxpruner.state_shardings(tx, jax.device_put(params, shardings))
    assert placed.inner_state[0].mu["up"]["kernel"] == columns
    assert placed.masks["up"]["kernel"] == whole
    jax.jit(tx.init, out_shardings=placed)(params)


def test_numbers_that_come_in_beside_zeros_keep_units_alive():
    params = {"up": normal(4, 8).at[:, :3].set(0), "down": normal(8, 3)}
    cases = {
        "padding": (lambda h: jnp.pad(h, ((0, 0), (1, 0), (0, 0)), constant_values=1.0), 8),
        "no padding": (lambda h: jnp.pad(h, ((0, 0), (1, 0), (0, 0))), 5),
        "indices outside": (lambda h: h.at[:, jnp.array([0, 9])].get(mode="fill", fill_value=1.0), 8),
        "indices": (lambda h: h[:, jnp.array([0, 2])], 5),
        "windows of padding": (
            lambda h: jnp.tanh(
                jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 1, 1), (1, 1, 1), ((0, 0), (1, 1), (0, 0)))
            ),
            8,
        ),
    }
    x = normal(2, 5, 4)
    for name, (between, left) in cases.items():

        def fn(p, x, between=between):
            return between(jax.nn.relu(x @ p["up"])) @ p["down"]

        small = jaxpruner.compact(fn, params, x)
        assert small.sizes == {"up[1]": left}, name
        close(fn(params, x), small.fn(small.params, x))


def test_trees_that_may_be_of_several_parts_are_told():
    twin = {"up": normal(4, 8).at[:, :4].set(0), "down": normal(8, 3)}
    params = {"enc": twin, "dec": {"mid": {"up": normal(4, 8).at[:, 6:].set(0), "down": normal(8, 3)}}}

    def fn(p, x):
        return sum(jax.nn.relu(x @ q["up"]) @ q["down"] for q in (p["enc"], p["dec"]["mid"]))

    x = normal(2, 4)
    small = jaxpruner.compact(fn, params, x)
    assert jax.tree.map(jnp.shape, small.cut(optax.adam(1.0).init(params))[0].mu) == jax.tree.map(
        jnp.shape, small.params
    )
    with pytest.raises(ValueError, match="the tree may be of enc or dec/mid"):
        small.cut(optax.adam(1.0).init(twin))
    groups = jaxpruner.find_groups(fn, params, x)
    with pytest.raises(ValueError, match="may be those of dec/mid or enc"):
        updater_of(groups).init_state(twin)


def test_a_packed_mask_of_the_shape_of_its_parameter_is_cut_as_a_mask():
    params = {"a": normal(1, 33), "c": normal(33, 2)}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["c"]  # noqa: E731
    tx = jaxpruner.sparsify(
        optax.sgd(0.1),
        algorithm="magnitude",
        sparsity=0.5,
        update_start_step=0,
        update_end_step=0,
        use_packed_masks=True,
    )
    x = normal(3, 1)
    _, state = tx.update(gradient(fn, params, x), tx.init(params), params)
    small = jaxpruner.compact(fn, params, x, keep={"a[1]": np.arange(16)})
    masks = [
        mask_storage.storage_of(s.masks["a"], (1, n)).decode(s.masks["a"], (1, n))
        for s, n in ((state, 33), (small.cut(state), 16))
    ]
    np.testing.assert_array_equal(masks[0][:, :16], masks[1])


def test_numbers_among_the_parameters_stay_as_they_are():
    params, x = mlp_params() | {"scale": 2.0}, normal(2, 5)
    fn = lambda p, x: p["scale"] * mlp(p, x)  # noqa: E731
    small = jaxpruner.compact(fn, params, x)
    with pytest.raises(ValueError, match=r"scale is a number of the function, 2\.0"):
        small.fn(small.params | {"scale": 4.0}, x)
