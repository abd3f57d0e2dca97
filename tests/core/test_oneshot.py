"""One-shot pruning against readings of the papers' equations in NumPy, float64."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner
from jaxpruner.calibration import outliers, running
from jaxpruner.calibration.program import Leaf
from jaxpruner.calibration.task import Task

# Apart, in an older JAX.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
STRUCTURES = {"unstructured": {"sparsity": 0.5}, "per_output": {"sparsity": 0.6}, "nm_2,4": {}}


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def correlated(tokens: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Inputs of unlike scales that go together, as those of real layers do."""
    mixed = drawn(tokens, inputs, seed=seed) @ drawn(inputs, inputs, seed=seed + 1)
    return mixed * np.exp(drawn(inputs, seed=seed + 2))


# Oracles. W is (outputs, inputs) as in the papers, X is (tokens, inputs).


def keep_highest(scores: np.ndarray, keep: int) -> np.ndarray:
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:keep]] = True
    return mask.reshape(scores.shape)


def keep_count(number: int, sparsity: float) -> int:
    return max(1, round(number * (1 - sparsity)))


def masked_by(scores: np.ndarray, structure: str, sparsity: float) -> np.ndarray:
    outputs, inputs = scores.shape
    if structure == "unstructured":
        # In the order of our layout, (inputs, outputs).
        return keep_highest(scores.T, keep_count(scores.size, sparsity)).T
    if structure == "per_output":
        return np.stack([keep_highest(row, keep_count(inputs, sparsity)) for row in scores])
    groups = scores.reshape(outputs, inputs // 4, 4)
    return np.stack([[keep_highest(group, 2) for group in row] for row in groups]).reshape(scores.shape)


def wanda(w: np.ndarray, x: np.ndarray, structure: str, sparsity: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    mask = masked_by(np.abs(w) * np.linalg.norm(x, axis=0), structure, sparsity)
    return w * mask, mask


def sparsegpt(
    w: np.ndarray, x: np.ndarray, structure: str, sparsity: float = 0.5, block: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of Frantar & Alistarh (2023), column after column."""
    w, hessian = w.copy(), x.T @ x
    dead = np.diag(hessian) == 0
    mean = np.diag(hessian)[~dead].mean()
    hessian[dead, dead] = mean
    w[:, dead] = 0
    hessian += 0.01 * mean * np.eye(len(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    inputs = w.shape[1]
    mask = np.zeros(w.shape, bool)
    kept_before = 0
    each = inputs if structure == "per_output" else w.size
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        until = keep_count(each, sparsity)
        until = until if end == inputs else round(until * end / inputs)
        scores = w[:, start:end] ** 2 / np.diag(inverse)[start:end] ** 2
        if structure == "unstructured":
            mask[:, start:end] = keep_highest(scores.T, until - kept_before).T
        elif structure == "per_output":
            mask[:, start:end] = np.stack([keep_highest(row, until - kept_before) for row in scores])
        kept_before = until
        for j in range(start, end):
            if structure == "nm_2,4" and j % 4 == 0:
                group = w[:, j : j + 4] ** 2 / np.diag(inverse)[j : j + 4] ** 2
                mask[:, j : j + 4] = np.stack([keep_highest(row, 2) for row in group])
            error = np.where(mask[:, j], 0, w[:, j]) / inverse[j, j]
            w[:, j] = np.where(mask[:, j], w[:, j], 0)
            w[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
    return w, mask


ORACLES = {"wanda": wanda, "sparsegpt": sparsegpt}


def dense(params: Any, x: Any) -> Any:
    return x @ params["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("algorithm", ORACLES)
def test_a_layer_is_pruned_as_its_paper_says(x64, algorithm, structure):
    """In two batches, with an input that is always zero, and blocks that do not divide the inputs."""
    w, x = drawn(24, 20), correlated(96, 20)
    x[:, 7] = 0
    options = STRUCTURES[structure]
    expected, mask = ORACLES[algorithm](
        w, x, structure, *options.values(), **({"block": 8} if algorithm == "sparsegpt" else {})
    )
    pruned, masks = jaxpruner.prune_oneshot(
        dense, {"kernel": jnp.asarray(w.T)}, [x[:48], x[48:]],
        algorithm=algorithm, sparsity_type=structure, block_size=8, **options,
    )  # fmt: skip
    np.testing.assert_array_equal(masks["kernel"], mask.T)
    np.testing.assert_allclose(pruned["kernel"], expected.T, atol=1e-9 * np.abs(w).max())


def test_least_squares_do_better_than_masks_alone():
    w, x = drawn(64, 64).astype(np.float32), correlated(512, 64).astype(np.float32)

    def error(algorithm):
        pruned, _ = jaxpruner.prune_oneshot(dense, {"kernel": w}, [x], algorithm=algorithm, sparsity=0.6)
        return float(jnp.linalg.norm(x @ pruned["kernel"] - x @ w))

    assert error("sparsegpt") < 0.95 * error("wanda") < 0.9 * error("magnitude")


def test_each_layer_is_calibrated_on_what_those_before_it_give(x64):
    params = {"a": drawn(12, 32), "bias": drawn(32), "b": drawn(32, 16), "c": drawn(16, 4)}

    def forward(p, x):
        return jnp.tanh(jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]) @ p["c"]

    x = correlated(64, 12)
    pruned, masks = jaxpruner.prune_oneshot(forward, params, [x[:32], x[32:]], algorithm="wanda", sparsity=0.5)
    expected, inputs = dict(params), x
    for name, after in (("a", lambda h: np.maximum(h + params["bias"], 0)), ("b", np.tanh), ("c", lambda h: h)):
        kept, mask = wanda(params[name].T, inputs, "per_output", 0.5)
        expected[name] = kept.T
        np.testing.assert_array_equal(masks[name], mask.T)
        inputs = after(inputs @ kept.T)
    for name, value in expected.items():
        np.testing.assert_allclose(pruned[name], value)
    assert masks["bias"] is None


# Whatever the layout.


def heads(p, x):
    return jnp.einsum("ti,ihk->thk", x, p["w"].reshape(16, 3, 4))


LAYOUTS = {
    "as it is": (lambda w: w, lambda p, x: x @ p["w"]),
    "outputs first": (lambda w: w.T, lambda p, x: x @ p["w"].T),
    "the other operand": (lambda w: w.T, lambda p, x: jax.vmap(lambda row: p["w"] @ row)(x)),
    "heads": (lambda w: w, heads),
    "several inputs": (
        lambda w: w.reshape(4, 4, 12),
        lambda p, x: jnp.einsum("thk,hko->to", x.reshape(-1, 4, 4), p["w"]),
    ),
    "cast and scaled": (lambda w: w / 2, lambda p, x: x.astype(jnp.float32) @ (2 * p["w"].astype(jnp.float32))),
    "under jit and remat": (lambda w: w, jax.jit(jax.checkpoint(lambda p, x: x @ p["w"]))),
    "a convolution of one pixel": (
        lambda w: w[None, None],
        lambda p, x: jax.lax.conv_general_dilated(
            x[:, None, None], p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
def test_whatever_the_layout_the_same_weights_go(algorithm, layout):
    w, x = drawn(16, 12).astype(np.float32), correlated(64, 16).astype(np.float32)
    place, forward = LAYOUTS[layout]
    options = {"algorithm": algorithm, "sparsity_type": "nm_2,4"}
    reference, mask = jaxpruner.prune_oneshot(dense, {"kernel": w}, [x], **options)
    pruned, masks = jaxpruner.prune_oneshot(forward, {"w": place(w)}, [x], **options)
    np.testing.assert_array_equal(masks["w"], np.asarray(place(mask["kernel"] * 1.0)) > 0)
    np.testing.assert_allclose(pruned["w"], place(reference["kernel"]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_are_products_with_patches(x64, groups):
    kernel, images = drawn(3, 3, 8 // groups, 16), drawn(2, 6, 6, 8)

    def forward(p, x):
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    pruned, masks = jaxpruner.prune_oneshot(forward, {"kernel": kernel}, [images], sparsity=0.5)
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), (1, 2))[:, ::2]  # n, h, w, channels, 3, 3
    for group in range(groups):
        inputs, outputs = (
            slice(group * 8 // groups, (group + 1) * 8 // groups),
            slice(group * 16 // groups, (group + 1) * 16 // groups),
        )
        x = windows[..., inputs, :, :].transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9 * 8 // groups)
        w = kernel[..., outputs].reshape(-1, 16 // groups).T
        expected, mask = sparsegpt(w, x, "unstructured")
        np.testing.assert_array_equal(masks["kernel"][..., outputs].reshape(mask.T.shape), mask.T)
        np.testing.assert_allclose(pruned["kernel"][..., outputs].reshape(mask.T.shape), expected.T, atol=1e-9)


def test_a_kernel_in_parts_and_kernels_as_one():
    """One kernel of which two products take a half each; two kernels that one product takes together."""
    x = correlated(64, 16).astype(np.float32)
    a, b = (drawn(16, 8, seed=i).astype(np.float32) for i in range(2))

    def in_parts(p, x):
        return x @ p["ab"][:, :8], x @ p["ab"][:, 8:]

    def as_one(p, x):
        return x @ jnp.concatenate([p["a"], p["b"]], 1)

    parts, of_parts = jaxpruner.prune_oneshot(in_parts, {"ab": np.concatenate([a, b], 1)}, [x], sparsity=0.5)
    one, of_one = jaxpruner.prune_oneshot(as_one, {"a": a, "b": b}, [x], sparsity=0.5)
    for i, name in enumerate("ab"):
        half = slice(8 * i, 8 * (i + 1))
        alone, mask = jaxpruner.prune_oneshot(dense, {"kernel": (a, b)[i]}, [x], sparsity=0.5)
        for values, masks in ((parts["ab"][:, half], of_parts["ab"][:, half]), (one[name], of_one[name])):
            np.testing.assert_array_equal(masks, mask["kernel"])
            np.testing.assert_allclose(values, alone["kernel"], atol=1e-5)


def test_windows_of_other_shapes_have_statistics_of_their_own():
    """All that the equations of these convolutions say is equal, but for their operands."""
    params = {"high": drawn(3, 1, 2, 4).astype(np.float32), "wide": drawn(1, 3, 2, 4).astype(np.float32)}
    images = correlated(2 * 6 * 6, 2).astype(np.float32).reshape(2, 6, 6, 2)

    def forward(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return [jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=numbers) for w in p.values()]

    _, masks = jaxpruner.prune_oneshot(forward, params, [images], algorithm="wanda", sparsity=0.5)
    for name, axis in (("high", 1), ("wide", 2)):
        windows = np.lib.stride_tricks.sliding_window_view(images, 3, axis)  # ..., channels, 3
        x = np.moveaxis(windows, -1, -2).reshape(-1, 6)
        _, mask = wanda(params[name].reshape(6, 4).T, x, "per_output")
        np.testing.assert_array_equal(masks[name].reshape(6, 4), mask.T)


@pytest.mark.parametrize("algorithm", ["magnitude", "sparsegpt"])
def test_numbers_are_exact_over_all_matrices_of_a_parameter(algorithm):
    """A depthwise convolution is many small matrices, of which each would round."""
    images, kernel = drawn(2, 4, 4, 6).astype(np.float32), drawn(3, 3, 1, 6).astype(np.float32)

    def forward(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=6)

    _, masks = jaxpruner.prune_oneshot(forward, {"w": kernel}, [images], algorithm=algorithm, sparsity=0.5)
    assert int(masks["w"].sum()) == 27


ON_THE_WAY = {
    "a cast": (jnp.float32, lambda w: w.astype(jnp.bfloat16)),
    "a scale": (jnp.float32, lambda w: w * 3),
    "a scale of bfloat16": (jnp.bfloat16, lambda w: w * jnp.bfloat16(3)),
    "halves": (jnp.float32, lambda w: (w[:, :6], w[:, 6:])),
}


@pytest.mark.parametrize("way", ON_THE_WAY)
def test_weights_that_stay_do_so_to_the_bit(x64, way):
    """Where float64 is enabled too, and parameters are narrower."""
    dtype, move = ON_THE_WAY[way]
    params, x = {"w": jnp.asarray(drawn(16, 12), dtype)}, drawn(32, 16).astype(np.float32)

    def forward(p, x):
        return [x @ w for w in jax.tree.leaves(move(p["w"]))]

    pruned, masks = jaxpruner.prune_oneshot(forward, params, [x], algorithm="wanda", sparsity=0.5)
    assert pruned["w"].dtype == dtype
    assert int(masks["w"].sum()) == 96
    np.testing.assert_array_equal(pruned["w"], jnp.where(masks["w"], params["w"], 0))


def test_parameters_of_numpy_stay_as_they_are():
    """Also those that are wider than what JAX computes in, and those without entries."""
    params = {"kernel": drawn(16, 12), "none": np.zeros((0, 4))}
    x = drawn(32, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned, masks = jaxpruner.prune_oneshot(
            lambda p, x: (x @ p["kernel"], x[:, :0] @ p["none"]), params, [x], sparsity=0.5
        )
    assert isinstance(pruned["kernel"], np.ndarray)
    assert pruned["kernel"].dtype == np.float64
    np.testing.assert_array_equal(pruned["kernel"] != 0, masks["kernel"])
    assert masks["none"] is None


def test_kernels_as_one_have_blocks_of_their_own():
    params = {name: drawn(8, 8, seed=i).astype(np.float32) for i, name in enumerate("ab")}

    def forward(p, x):
        return x @ jnp.concatenate([p["a"], p["b"]], 1)

    options = {"algorithm": "magnitude", "sparsity": 0.5, "sparsity_type": "block_4,4"}
    _, masks = jaxpruner.prune_oneshot(forward, params, [drawn(4, 8).astype(np.float32)], **options)
    for name, mask in masks.items():
        scores = np.abs(params[name]).reshape(2, 4, 2, 4).sum((1, 3))
        np.testing.assert_array_equal(mask, np.kron(keep_highest(scores, 2), np.ones((4, 4), bool)))


def test_masks_that_are_too_large_to_be_printed_are_told_apart():
    """As one they would be pruned by the last of them."""
    halves = np.zeros((2, 40, 40), np.float32)
    halves[0, 10:20], halves[1, 20:30] = 1, 1

    def forward(p, x):
        return x @ (p["w"] * halves[0]), x @ (p["w"] * halves[1]), x @ p["other"]

    params = {name: drawn(40, 40).astype(np.float32) for name in ("w", "other")}
    with pytest.warns(UserWarning, match=f"w {IN_TWO_WAYS}"):
        _, masks = jaxpruner.prune_oneshot(forward, params, [drawn(4, 40)], algorithm="magnitude", sparsity=0.5)
    assert masks["w"] is None


def test_what_is_compiled_is_shared_by_equal_constants_only():
    """Constants of a function that a loop calls are in no operand, and in no text of its jaxpr."""
    ones = [np.ones((16, 64), np.float32), np.ones((16, 64), np.float32)]
    ones[1][:, 8:56] = 0

    def layer(x, constant):
        scale = jax.jit(lambda h: h * constant)
        return jax.lax.scan(lambda h, _: (scale(h), None), x, None, length=2)[0]

    def forward(p, x):
        return layer(layer(x @ p["a"], ones[0]) @ p["b"], ones[1]) @ p["c"]

    params = {name: drawn(64, 64, seed=i).astype(np.float32) for i, name in enumerate("abc")}
    _, masks = jaxpruner.prune_oneshot(forward, params, [drawn(16, 64)], algorithm="wanda", sparsity=0.5)
    np.testing.assert_array_equal(masks["c"][:8] & masks["c"][56:], True)


def test_what_is_in_no_product_is_told():
    params = {"kernel": drawn(16, 12).astype(np.float32)}
    with pytest.warns(UserWarning, match="entries that no product takes stay dense in kernel"):
        _, masks = jaxpruner.prune_oneshot(
            lambda p, x: x @ p["kernel"][:, :4], params, [drawn(32, 16)], algorithm="wanda", sparsity=0.5
        )
    assert masks["kernel"].sum(0).tolist() == [8] * 4 + [16] * 8


# Networks.


def block(p, x):
    """Attention whose keys and values have fewer heads than its queries, and an MLP; both residual."""
    q = jnp.einsum("btd,dhk->bthk", x, p["query"])
    k, v = (jnp.repeat(jnp.einsum("btd,dhk->bthk", x, p[name]), 2, axis=2) for name in ("key", "value"))
    attended = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)
    x = x + jnp.einsum("bthk,hkd->btd", attended, p["out"])
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


SHAPES = {
    "query": (16, 4, 4), "key": (16, 2, 4), "value": (16, 2, 4), "out": (4, 4, 16), "up": (16, 32), "down": (32, 16),
}  # fmt: skip


@functools.cache
def transformer(layers: int = 2) -> Any:
    stack = {name: 0.3 * drawn(layers, *shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {"embedding": drawn(40, 16).astype(np.float32), "layers": stack}


def scanned(params: Any, tokens: Any) -> Any:
    x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), params["embedding"][tokens], params["layers"])
    return x @ params["embedding"].T


def looped(params: Any, tokens: Any) -> Any:
    x = params["embedding"][tokens]
    for p in params["layers"]:
        x = block(p, x)
    return x @ params["embedding"].T


def tokens(number: int = 2) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 40, (8, 6)) for i in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "wanda", "sparsegpt"])
def test_layers_that_are_run_through_by_scan_are_pruned_one_by_one(algorithm):
    params = transformer()
    layers = [jax.tree.map(lambda stack, i=i: stack[i], params["layers"]) for i in range(2)]
    with pytest.warns(UserWarning, match="embedding is looked up by the data"):
        stacked, masks = jaxpruner.prune_oneshot(scanned, params, tokens(), algorithm=algorithm, sparsity=0.5)
    with pytest.warns(UserWarning, match="1 parameters stay dense"):
        single, each = jaxpruner.prune_oneshot(
            looped, {**params, "layers": layers}, tokens(), algorithm=algorithm, sparsity=0.5
        )
    for name in SHAPES:
        np.testing.assert_array_equal(masks["layers"][name], np.stack([mask[name] for mask in each["layers"]]))
        np.testing.assert_allclose(
            stacked["layers"][name], np.stack([layer[name] for layer in single["layers"]]), atol=1e-4
        )
    assert masks["embedding"] is None
    np.testing.assert_array_equal(stacked["embedding"], params["embedding"])


STACKS = {
    "cast before": (lambda stack: stack, lambda w: w.astype(jnp.bfloat16).astype(jnp.float32)),
    "another axis, scaled": (lambda stack: np.moveaxis(stack, 0, 1) / 2, lambda w: 2 * jnp.moveaxis(w, 1, 0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", STACKS)
def test_stacks_are_followed_into_scan(way):
    place, move = STACKS[way]
    stack = np.asarray(jnp.asarray(0.3 * drawn(2, 16, 16), jnp.bfloat16), np.float32)

    def forward(p, x, move=lambda stack: stack):
        step = lambda x, p: (jnp.tanh(x @ p["w"]) + p["b"], None)  # noqa: E731
        return jax.lax.scan(step, x, {"w": move(p["w"]), "b": p["b"]})[0]

    def pruned(stack, *move):
        params = {"w": stack, "b": drawn(2, 16).astype(np.float32)}
        _, masks = jaxpruner.prune_oneshot(
            lambda p, x: forward(p, x, *move), params, [drawn(32, 16)], algorithm="wanda", sparsity=0.5
        )
        assert masks["b"] is None  # one axis, but for its layers
        return masks["w"]

    np.testing.assert_array_equal(move(pruned(place(stack), move) * 1.0) > 0, pruned(stack))


@pytest.mark.parametrize("loops", [1, 2])
def test_layers_under_scan_have_the_shares_of_layers(loops):
    """Of layers in one loop, or in loops in a loop; run through twice, with casts and calls on the way."""
    stack = {"w": drawn(4, 32, 24), "v": drawn(4, 24, 32), "b": drawn(4, 32)}
    shape = (4,) if loops == 1 else (2, 2)
    params = jax.tree.map(np.float16, {"in": drawn(16, 32), "layers": stack, "head": drawn(32, 16)})
    params["layers"] = jax.tree.map(lambda w: w.reshape(*shape, *w.shape[1:]), params["layers"])

    def layer(h, p):
        return jnp.tanh(jax.jit(jnp.matmul)(h, p["w"]) @ p["v"] + p["b"]), None

    def through(h, p):
        return jax.lax.scan(layer, h, p)

    def forward(p, x):
        run = through if loops == 1 else lambda h, p: jax.lax.scan(through, h, p)
        p = jax.tree.map(jnp.float32, p)
        h, _ = run(x @ p["in"], p["layers"])
        return run(h, p["layers"])[0] @ p["head"]

    def unrolled(p, x):
        p = jax.tree.map(jnp.float32, p)
        h = x @ p["in"]
        for each in 2 * p["layers"]:
            h, _ = layer(h, each)
        return h @ p["head"]

    options = {"algorithm": "magnitude", "sparsity": 0.8, "dist_type": "erk"}
    x = [drawn(8, 16).astype(np.float32)]
    each = [jax.tree.map(lambda w, at=at: w[at], params["layers"]) for at in np.ndindex(shape)]
    _, masks = jaxpruner.prune_oneshot(forward, params, x, **options)
    _, expected = jaxpruner.prune_oneshot(unrolled, {**params, "layers": each}, x, **options)
    assert masks["layers"]["b"] is None
    for name in ("w", "v"):
        for at, layer_masks in zip(np.ndindex(shape), expected["layers"], strict=True):
            np.testing.assert_array_equal(masks["layers"][name][at], layer_masks[name])
    np.testing.assert_array_equal(masks["head"], expected["head"])


def test_a_scan_without_turns():
    def forward(p, x):
        x, rows = jax.lax.scan(lambda x, _: (x @ p["kernel"], x), x, None, length=0)
        return (x + rows.sum()) @ p["kernel"]

    _, masks = jaxpruner.prune_oneshot(forward, W16, [X16], algorithm="wanda", sparsity=0.5)
    assert int(masks["kernel"].sum()) == 128


def test_layers_that_are_alike_share_what_is_compiled(monkeypatch):
    segments, whole = set(), running.Calibration._segment

    def segment(*arguments):
        segments.add(found := whole(*arguments))
        return found

    monkeypatch.setattr(running.Calibration, "_segment", segment)
    params = {f"{name}_{i}": drawn(8, 8, seed=i).astype(np.float32) for i in range(6) for name in ("q", "k", "up")}

    def forward(p, x):
        for i in range(6):
            q, k = x @ p[f"q_{i}"], x @ p[f"k_{i}"]
            x = x + jnp.tanh((q * k - k) @ p[f"up_{i}"])
        return x

    jaxpruner.prune_oneshot(forward, params, [drawn(4, 8)], algorithm="wanda", sparsity=0.5)
    assert len(segments) == 3  # up to k, up to `up`, and up to the next layer


def test_a_layer_that_is_used_twice_is_calibrated_on_both(x64):
    w, x = drawn(16, 16), correlated(64, 16)

    def forward(p, x):
        return jnp.tanh(x @ p["kernel"]) @ p["kernel"]

    _, masks = jaxpruner.prune_oneshot(forward, {"kernel": w}, [x], algorithm="wanda", sparsity=0.5)
    both = np.concatenate([x, np.tanh(x @ w)])
    np.testing.assert_array_equal(masks["kernel"], wanda(w.T, both, "per_output")[1].T)


def contracted_in_two_ways(p, x):
    """Axes in the same order, but one of them is an input here and an output there."""
    h, a = x @ p["kernel"], p["a"].reshape(2, 4, 8)
    return jnp.einsum("tij,ijo->to", h.reshape(-1, 2, 4), a) @ p["b"], jnp.einsum("ti,ijo->tjo", h[:, :2], a)


IN_TWO_WAYS = "is repeated, or multiplied with along different axes"
UNFIT = [
    ("is multiplied with another parameter", lambda p, x: (x @ p["kernel"]) @ (p["a"] @ p["b"])),
    ("is used by exp", lambda p, x: (x @ p["kernel"]) @ jnp.exp(p["a"]) @ p["b"]),
    (
        "is used inside of while",
        lambda p, x: jax.lax.fori_loop(0, jnp.int32(x[0, 0]) + 1, lambda i, h: h @ p["a"] @ p["b"], x @ p["kernel"]),
    ),
    (IN_TWO_WAYS, lambda p, x: (x @ p["kernel"]) @ p["a"] @ p["b"] @ p["a"].T @ p["b"]),
    (IN_TWO_WAYS, contracted_in_two_ways),
    ("is not used", lambda p, x: (x @ p["kernel"]) @ p["b"]),
    ("is multiplied with complex numbers", lambda p, x: jnp.abs((x @ p["kernel"] + 1j) @ p["a"]) @ p["b"]),
]


@pytest.mark.parametrize(("reason", "forward"), UNFIT)
def test_what_cannot_be_calibrated_stays_dense_and_is_told(reason, forward):
    params = {name: drawn(8, 8, seed=i).astype(np.float32) for i, name in enumerate(("kernel", "a", "b"))}

    with pytest.warns(UserWarning, match=rf"stay dense: .*a {reason}|stay dense: a .*{reason}"):
        pruned, masks = jaxpruner.prune_oneshot(forward, params, [np.abs(drawn(16, 8))], sparsity=0.5)
    assert masks["a"] is None
    assert masks["kernel"].sum() == 32
    np.testing.assert_array_equal(pruned["a"], params["a"])


def linen():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(4)])
    return model.apply, model.init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))


def nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.head = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.conv(x)).mean((1, 2)))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), params


def haiku():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(4)(jax.nn.relu(hk.Conv2D(8, 3)(x)).mean((1, 2)))))
    return net.apply, net.init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))


def equinox():
    eqx = pytest.importorskip("equinox")
    conv, head = eqx.nn.Conv2d(3, 8, 3, key=jax.random.key(0)), eqx.nn.Linear(8, 4, key=jax.random.key(1))
    net = eqx.nn.Sequential([conv, eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(lambda x: x.mean((1, 2))), head])
    return lambda net, x: jax.vmap(net)(jnp.moveaxis(x, -1, 1)), net


@pytest.mark.slow
@pytest.mark.parametrize("framework", [linen, nnx, haiku, equinox], ids=lambda each: each.__name__)
def test_networks_of_any_framework(framework):
    forward, params = framework()
    before = jaxpruner.summarize_sparsity(params, only_total_sparsity=True)["_nparams"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # biases of Equinox's convolutions have three axes
        pruned, masks = jaxpruner.prune_oneshot(
            forward, params, [drawn(4, 6, 6, 3).astype(np.float32)],
            algorithm="wanda", sparsity_type="unstructured", sparsity=0.5,
        )  # fmt: skip
    kernels = [leaf for leaf in jax.tree.leaves(masks) if getattr(leaf, "dtype", None) == np.bool_]
    assert sorted(int(mask.sum()) for mask in kernels) == [16, 108]
    assert jaxpruner.summarize_sparsity(pruned)["_nparams_nnz"] <= before - 124
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    assert np.isfinite(forward(pruned, drawn(4, 6, 6, 3).astype(np.float32))).all()


def test_training_goes_on_with_these_zeros():
    params = {"kernel": drawn(16, 12).astype(np.float32)}
    pruned, masks = jaxpruner.prune_oneshot(dense, params, [correlated(64, 16).astype(np.float32)], sparsity=0.5)
    tx = jaxpruner.sparsify(optax.adam(1e-2), algorithm="preserve")
    state = tx.init(pruned)
    for _ in range(3):
        updates, state = tx.update({"kernel": jnp.ones((16, 12))}, state, pruned)
        pruned = optax.apply_updates(pruned, updates)
    np.testing.assert_array_equal(pruned["kernel"] != 0, masks["kernel"])


SHARDED = """
import json, sys
import jax, numpy as np
import jaxpruner
from jax.sharding import NamedSharding, PartitionSpec
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",))
rng = np.random.default_rng(0)
params = {"up": rng.normal(size=(16, 32)).astype("f"), "down": rng.normal(size=(32, 16)).astype("f")}
batches = [rng.normal(size=(64, 16)).astype("f") @ rng.normal(size=(16, 16)).astype("f") for _ in range(2)]
forward = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
spread = [jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))) for batch in batches]
for algorithm in ("wanda", "sparsegpt"):
    _, here = jaxpruner.prune_oneshot(forward, params, batches, algorithm=algorithm, sparsity=0.5)
    _, there = jaxpruner.prune_oneshot(forward, params, spread, algorithm=algorithm, sparsity=0.5)
    print(json.dumps({name: int((here[name] != there[name]).sum()) for name in params}))
# Parameters that are bound to no device go with data on all of them, before and after; others stay where they are.
params = {"up": jax.numpy.asarray(params["up"]), "down": jax.device_put(
    params["down"], NamedSharding(mesh, PartitionSpec()))}
pruned, masks = jaxpruner.prune_oneshot(forward, params, spread, algorithm="wanda", sparsity=0.5)
forward({name: leaf * masks[name] for name, leaf in pruned.items()}, spread[0])
assert pruned["down"].sharding == masks["down"].sharding == params["down"].sharding
"""


@pytest.mark.slow
def test_batches_over_eight_devices_give_the_same_masks():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"up": 0, "down": 0}] * 2


@pytest.mark.slow
def test_what_was_interrupted_goes_on(tmp_path):
    params, x = {"a": drawn(16, 24), "b": drawn(24, 16), "c": drawn(16, 8)}, correlated(64, 16)
    params = jax.tree.map(np.float32, params)

    def forward(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]

    options = {"sparsity": 0.5, "checkpoint": tmp_path / "layers"}
    whole, masks = jaxpruner.prune_oneshot(forward, params, [x], sparsity=0.5)
    jaxpruner.prune_oneshot(forward, params, [x], **options)
    files = sorted((tmp_path / "layers").glob("*.npz"))
    assert len(files) == 3
    files[-1].unlink()  # as if it had been stopped before the last
    times = [file.stat().st_mtime_ns for file in files[:-1]]
    again, kept = jaxpruner.prune_oneshot(forward, params, [x], **options)
    assert [file.stat().st_mtime_ns for file in files[:-1]] == times
    jax.tree.map(np.testing.assert_array_equal, (again, kept), (whole, masks))
    with pytest.raises(ValueError, match="of another calibration: sparsities differ"):
        jaxpruner.prune_oneshot(forward, params, [x], sparsity=0.6, checkpoint=tmp_path / "layers")
    with pytest.raises(ValueError, match="of another calibration: batches, params differ"):
        jaxpruner.prune_oneshot(forward, {**params, "a": 2 * params["a"]}, [2 * x], **options)
    with pytest.raises(ValueError, match="of another calibration: forward differ"):
        jaxpruner.prune_oneshot(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], params, [x], **options)


def test_masks_alone_go_on_too(tmp_path):
    options = {"algorithm": "wanda", "sparsity": 0.5, "checkpoint": tmp_path}
    first = jaxpruner.prune_oneshot(dense, W16, [X16], **options)
    jax.tree.map(np.testing.assert_array_equal, jaxpruner.prune_oneshot(dense, W16, [X16], **options), first)


IN_ANY_PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jaxpruner
from jax.sharding import PartitionSpec
try:
    from jax import shard_map
except ImportError:
    from jax.experimental.shard_map import shard_map

def forward(p, x):
    # A loop that stays one, with functions that someone wrote, and an operation on axes.
    h, _ = jax.lax.scan(lambda h, _: (jax.nn.silu(jax.nn.relu(h) + 1), None), x @ p["kernel"], None, length=3)
    h = jax.lax.associative_scan(jnp.add, h, axis=1)
    mesh = jax.make_mesh((1, 1), ("first", "second"))
    return shard_map(jnp.sin, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())(h) @ p["kernel"]

x = np.linspace(-1, 1, 16 * 16, dtype=np.float32).reshape(16, 16)
jaxpruner.prune_oneshot(forward, {"kernel": jnp.cos(9 * x)}, [x], sparsity=0.5, checkpoint=sys.argv[1])
"""


@pytest.mark.slow
def test_what_another_process_began_goes_on(tmp_path):
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", IN_ANY_PROCESS, str(tmp_path)],
            capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def other_calls(value: float) -> Any:
    """Forward passes with calls, made anew, which differ in parameters of one equation."""
    slope = jax.jit(lambda x: jax.nn.leaky_relu(x, value))
    return lambda p, x: jax.lax.fori_loop(0, 2, lambda _, h: slope(h), x @ p["kernel"]) @ p["other"]


@pytest.mark.parametrize(
    "variants",
    [
        [lambda n: lambda p, x: (x @ p["kernel"]) ** n @ p["other"], 2, 3],
        [lambda n: lambda p, x: jnp.cumsum(x @ p["kernel"], axis=n) @ p["other"], 0, 1],
        [other_calls, 0.1, 0.2],
    ],
)
def test_another_forward_pass_is_refused(tmp_path, variants):
    make, first, second = variants
    options = {"algorithm": "wanda", "sparsity": 0.5, "checkpoint": tmp_path}
    for _ in range(2):  # the same, made anew
        jaxpruner.prune_oneshot(make(first), W16_TWICE, [X16], **options)
    with pytest.raises(ValueError, match="of another calibration: forward differ"):
        jaxpruner.prune_oneshot(make(second), W16_TWICE, [X16], **options)


def test_magnitudes_need_no_pass():
    _, masks = jaxpruner.prune_oneshot(nonfinite, W16_TWICE, [X16], algorithm="magnitude", sparsity=0.5)
    assert int(masks["other"].sum()) == 128


# Sparsities.


def test_blocks_with_more_outliers_stay_denser():
    params = {f"layers_{i}": {"kernel": drawn(64, 64, seed=i).astype(np.float32)} for i in range(4)}
    for i in range(4):  # so many rows of the i-th layer are far larger than the others
        params[f"layers_{i}"]["kernel"][: 2 * i] *= 40

    def forward(p, x):
        for i in range(4):
            x = jnp.tanh(x @ p[f"layers_{i}"]["kernel"])
        return x

    x = drawn(128, 64).astype(np.float32)
    _, masks = jaxpruner.prune_oneshot(forward, params, [x], algorithm="wanda", sparsity=0.6, dist_type="owl")
    kept = [float(masks[f"layers_{i}"]["kernel"].mean()) for i in range(4)]
    assert kept == sorted(kept)
    assert kept[-1] - kept[0] == pytest.approx(0.16, abs=0.02)
    assert np.mean(kept) == pytest.approx(0.4, abs=0.01)


def test_blocks_are_told_by_their_names_and_by_their_loops():
    names = ["m1/layer_0/q", "m1/layer_0/mlp/up", "m1/layer_1/q", "m1/head"]
    block_of = outliers.blocks([tuple(name.split("/")) for name in names], {})
    assert [block_of(Leaf(i))[1:] for i in range(4)] == [("layer_0",), ("layer_0",), ("layer_1",), ("head",)]
    params = {"all": {side: {name: drawn(2, 4, 4) for name in "ab"} for side in ("encoder", "decoder")}}

    def forward(p, x):
        for stack in p["all"].values():
            x = jax.lax.scan(lambda x, p: (x @ p["a"] @ p["b"], None), x, stack)[0]
        return x

    weights, _ = Task(forward, params, [drawn(2, 4)]).calibration(set(range(4)))
    block_of = outliers.blocks(names, weights.turns)
    blocks = [[block_of(Leaf(number, (i,))) for i in range(2)] for number in range(4)]  # decoder a, b; encoder a, b
    assert blocks[0] == blocks[1]
    assert blocks[2] == blocks[3]
    assert len({*blocks[0], *blocks[2]}) == 4


def test_owl_leaves_sparsities_that_are_given():
    params = {f"layer_{i}": drawn(8, 8, seed=i).astype(np.float32) for i in range(2)}
    options = {"algorithm": "magnitude", "sparsity": 0.5, "dist_type": "owl", "custom_sparsity_map": {"*": 0.75}}
    _, masks = jaxpruner.prune_oneshot(lambda p, x: x @ p["layer_0"] @ p["layer_1"], params, [drawn(4, 8)], **options)
    assert [int(mask.sum()) for mask in masks.values()] == [16, 16]


@pytest.mark.slow
def test_sparsities_of_their_own():
    params = {"a": drawn(16, 32).astype(np.float32), "b": drawn(32, 20).astype(np.float32)}
    forward = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    x = [drawn(64, 16).astype(np.float32)]
    _, masks = jaxpruner.prune_oneshot(forward, params, x, sparsity=0.5, custom_sparsity_map={"b": 0.9})
    assert (int(masks["a"].sum()), int(masks["b"].sum())) == (256, 64)
    _, masks = jaxpruner.prune_oneshot(forward, params, x, sparsity=0.5, filter_fn=lambda path, _: path == ("a",))
    assert masks["b"] is None
    _, masks = jaxpruner.prune_oneshot(
        forward, params, x, sparsity=0.5, algorithm="magnitude", sparsity_type={"a": "nm_2,4", "b": "channel_-1"}
    )
    assert masks["a"].reshape(4, 4, 32).sum(1).tolist() == np.full((4, 32), 2).tolist()
    assert sorted(masks["b"].sum(0).tolist()) == [0] * 10 + [32] * 10


# Units.


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"] + p["b2"]


def residual(p, x):
    """What goes around the layer is added before its bias."""
    return x[:, :4] + jax.nn.relu(x @ p["up"] + p["b1"]) @ p["down"] + p["b2"]


def mlp_params() -> dict[str, Any]:
    return {
        "up": drawn(8, 32).astype(np.float32), "b1": drawn(32).astype(np.float32),
        "down": drawn(32, 4).astype(np.float32), "b2": drawn(4).astype(np.float32),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "wanda", "flap"])
def test_units_leave(algorithm):
    params, x = mlp_params(), drawn(64, 8).astype(np.float32)
    groups = jaxpruner.find_groups(mlp, params, x)
    pruned, masks = jaxpruner.prune_oneshot(mlp, params, [x], algorithm=algorithm, sparsity=0.5, sparsity_type=groups)
    small = jaxpruner.compact(mlp, pruned, x)
    assert small.params["up"].shape == (8, 16)
    np.testing.assert_allclose(small.fn(small.params, x), mlp(pruned, x), atol=1e-5)
    if algorithm == "flap":
        hidden = np.maximum(x @ params["up"] + params["b1"], 0)
        scores = hidden.var(0) * (params["down"] ** 2).sum(1)
        np.testing.assert_array_equal(masks["b1"], keep_highest(scores, 16))
        lost = hidden.mean(0)[~masks["b1"]] @ params["down"][~masks["b1"]]
        np.testing.assert_allclose(pruned["b2"], params["b2"] + lost, rtol=1e-4)


def test_units_of_a_model_with_functions_among_its_parameters():
    params = {"act": jax.nn.relu, **mlp_params()}
    forward = lambda p, x: mlp({name: p[name] for name in p if name != "act"}, x)  # noqa: E731
    x = drawn(64, 8).astype(np.float32)
    options = {"algorithm": "magnitude", "sparsity": 0.5, "sparsity_type": jaxpruner.find_groups(forward, params, x)}
    pruned, masks = jaxpruner.prune_oneshot(forward, params, [x], **options)
    scores = np.abs(params["up"]).sum(0) + np.abs(params["down"]).sum(1)
    np.testing.assert_array_equal(masks["b1"], keep_highest(scores, 16))
    assert pruned["act"] is jax.nn.relu
    assert masks["act"] is None


def test_units_that_no_product_scores_are_told():
    params = {**mlp_params(), "in": drawn(8, 8).astype(np.float32), "down": drawn(32, 8).astype(np.float32)}

    def forward(p, x):
        step = lambda i, h: jax.nn.relu(h @ p["up"]) @ p["down"]  # noqa: E731
        return jax.lax.fori_loop(0, jnp.int32(x[0, 0]), step, x @ p["in"])

    params.pop("b1"), params.pop("b2")
    x = drawn(64, 8).astype(np.float32)
    groups = jaxpruner.find_groups(forward, params, x).choose("up*")
    with pytest.raises(ValueError, match=r"up\[1\]: nothing scores its units"):
        jaxpruner.prune_oneshot(forward, params, [x], algorithm="wanda", sparsity=0.5, sparsity_type=groups)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_units_of_layers_under_scan_leave_their_biases_a_mean(kind):
    shapes = {"up": (3, 8, 16), "b1": (3, 16), "down": (3, 16, 8), "b2": (3, 8)}
    params = {name: kind(drawn(*shape), np.float32) for name, shape in shapes.items()}
    x = drawn(64, 8).astype(np.float32)

    def forward(p, x):
        return jax.lax.scan(lambda h, p: (mlp(p, h) / 4, None), x, p)[0]

    groups = jaxpruner.find_groups(forward, params, x)
    pruned, masks = jaxpruner.prune_oneshot(forward, params, [x], algorithm="flap", sparsity=0.5, sparsity_type=groups)
    assert {name: type(leaf) for name, leaf in pruned.items()} == {name: type(leaf) for name, leaf in params.items()}
    gone = ~np.asarray(masks["b1"])
    for i, h in enumerate(hidden_of(params, x)):
        lost = h.mean(0)[gone[i]] @ params["down"][i][gone[i]]
        np.testing.assert_allclose(pruned["b2"][i], params["b2"][i] + lost, rtol=1e-3, atol=1e-4)


def hidden_of(params, x):
    """The hidden units of each layer, of the dense pass."""
    for up, b1, down, b2 in zip(*(np.asarray(params[name]) for name in ("up", "b1", "down", "b2")), strict=True):
        h = np.maximum(x @ up + b1, 0)
        yield h
        x = (h @ down + b2) / 4


@pytest.mark.parametrize("mlp", [mlp, residual])
def test_units_that_are_always_the_same_leave_without_a_trace(mlp):
    """Their mean is all that they add, and the bias takes it up."""
    params = mlp_params()
    params["up"][:, 10:] = 0
    params["b1"][10:] = np.abs(params["b1"][10:])
    x = drawn(64, 8).astype(np.float32)
    pruned, masks = jaxpruner.prune_oneshot(
        mlp, params, [x], algorithm="flap", sparsity=1 - 10 / 32, sparsity_type=jaxpruner.find_groups(mlp, params, x)
    )
    assert masks["b1"].tolist() == [True] * 10 + [False] * 22
    np.testing.assert_allclose(mlp(pruned, x), mlp(params, x), atol=1e-4)


@pytest.mark.slow
def test_units_of_all_groups_compete():
    params = transformer()
    groups = jaxpruner.find_groups(scanned, params, tokens()[0]).choose("*up*", "*out*")
    options = {"algorithm": "flap", "sparsity": 0.5, "sparsity_type": groups, "dist_type": "global"}
    with pytest.warns(UserWarning, match="have no bias"):
        pruned, _ = jaxpruner.prune_oneshot(scanned, params, tokens(), **options)
    report = jaxpruner.compact(scanned, pruned, tokens()[0]).report()
    assert report.params[1] < report.params[0]


# Errors.


def nonfinite(p, x):
    return jnp.log(x @ p["kernel"] - 1e9) @ p["other"]


X16 = drawn(32, 16).astype(np.float32)
W16 = {"kernel": drawn(16, 16).astype(np.float32)}
MLP = mlp_params()
OF_UNITS = {"algorithm": "wanda", "sparsity": 0.5, "sparsity_type": "groups"}
W16_TWICE, BLOCKS, NM = {**W16, "other": W16["kernel"]}, "block_4,4", "nm_2,4"
ERRORS = {
    "no product with a parameter": (lambda p, x: x + p["kernel"].sum(), W16, [X16], {"sparsity": 0.5}),
    "kernel is not used": (lambda p, x: x @ W16["kernel"], W16, [X16], {"sparsity": 0.5}),
    "batches: there are none": (dense, W16, [], {"sparsity": 0.5}),
    r"batches: params of number 1 is float32\[8, 16\]": (dense, W16, [X16, X16[:8]], {"sparsity": 0.5}),
    "kernel: its inputs are empty in batch 0": (dense, W16, [X16[:0]] * 2, {"sparsity": 0.5}),
    "batches: number 1 is": (dense, W16, [X16, {"x": X16}], {"sparsity": 0.5}),
    "other: its inputs are not finite in batch 0": (nonfinite, W16_TWICE, [X16], {"sparsity": 0.5}),
    "algorithm: 'obc' is not known": (dense, W16, [X16], {"sparsity": 0.5, "algorithm": "obc"}),
    "dist_type: 'owls' is not known": (dense, W16, [X16], {"sparsity": 0.5, "dist_type": "owls"}),
    "sparsity: missing": (dense, W16, [X16], {}),
    "sparsity 1.5 is outside": (dense, W16, [X16], {"sparsity": 1.5}),
    "sparsity of 0.75 is asked for, and 2:4 gives 0.5": (dense, W16, [X16], {"sparsity": 0.75, "sparsity_type": NM}),
    "kernel: 16 inputs are not a multiple of m=3": (dense, W16, [X16], {"sparsity_type": "nm_1,3"}),
    "kernel: algorithm: 'sparsegpt' has no masks": (dense, W16, [X16], {"sparsity": 0.5, "sparsity_type": BLOCKS}),
    "filter_fn: selects none": (dense, W16, [X16], {"sparsity": 0.5, "filter_fn": lambda path, p: False}),
    "'flap' ranks units": (dense, W16, [X16], {"sparsity": 0.5, "algorithm": "flap"}),
    "'owl' no room": (dense, W16, [X16], {"sparsity": 0.02, "dist_type": "owl"}),
    "damping: 0 is not above 0": (dense, W16, [X16], {"sparsity": 0.5, "damping": 0}),
    "kernel: 2:4 has one sparsity": (dense, W16, [X16], {"sparsity_type": NM, "dist_type": "owl"}),
    "sparsity_type: 'k' matches no parameter": (dense, W16, [X16], {"sparsity": 0.5, "sparsity_type": {"k": NM}}),
    "dist_type: 'owl' spreads": (mlp, MLP, [X16[:, :8]], OF_UNITS | {"dist_type": "owl"}),
    "checkpoint: units leave": (mlp, MLP, [X16[:, :8]], OF_UNITS | {"checkpoint": "folder"}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_and_where(message):
    forward, params, batches, options = ERRORS[message]
    with pytest.raises(ValueError, match=message):
        jaxpruner.prune_oneshot(forward, params, batches, **options)


@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
def test_inputs_that_say_nothing_are_told(algorithm):
    """Those of `other` are zero; two uses of `kernel` see something, if only one of them."""

    def forward(p, x):
        return x @ p["kernel"] + (0 * (x @ p["kernel"])) @ p["other"] + (0 * x) @ p["kernel"]

    with pytest.warns(UserWarning, match="other: its inputs are 0 in all batches") as told:
        jaxpruner.prune_oneshot(forward, W16_TWICE, [X16, X16], algorithm=algorithm, sparsity=0.5)
    assert len(told) == 1


def test_batches_without_examples_suffice_for_magnitudes():
    _, masks = jaxpruner.prune_oneshot(dense, W16, [X16[:0]], algorithm="magnitude", sparsity=0.5)
    assert int(masks["kernel"].sum()) == 128


def test_a_hessian_that_is_hardly_positive_definite_is_damped_and_told():
    x = np.repeat(drawn(64, 1), 16, axis=1).astype(np.float32) * 1e3
    with pytest.warns(UserWarning, match="kernel: the Hessian of its inputs is not positive definite"):
        pruned, _ = jaxpruner.prune_oneshot(dense, W16, [x], sparsity=0.5, damping=1e-12)
    assert np.isfinite(pruned["kernel"]).all()
