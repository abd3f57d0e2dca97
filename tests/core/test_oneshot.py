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

STRUCTURES = {"unstructured": {"sparsity": 0.5}, "per_output": {"sparsity": 0.6}, "nm_2,4": {}}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
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
def transformer(layers: int = 3) -> Any:
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


@pytest.mark.parametrize("algorithm", ["magnitude", "wanda", "sparsegpt"])
def test_layers_that_are_run_through_by_scan_are_pruned_one_by_one(algorithm):
    params = transformer()
    layers = [jax.tree.map(lambda stack, i=i: stack[i], params["layers"]) for i in range(3)]
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


def test_a_layer_that_is_used_twice_is_calibrated_on_both(x64):
    w, x = drawn(16, 16), correlated(64, 16)

    def forward(p, x):
        return jnp.tanh(x @ p["kernel"]) @ p["kernel"]

    _, masks = jaxpruner.prune_oneshot(forward, {"kernel": w}, [x], algorithm="wanda", sparsity=0.5)
    both = np.concatenate([x, np.tanh(x @ w)])
    np.testing.assert_array_equal(masks["kernel"], wanda(w.T, both, "per_output")[1].T)


UNFIT = {
    "is multiplied with another parameter": lambda p, x: (x @ p["kernel"]) @ (p["a"] @ p["b"]),
    "is used by exp": lambda p, x: (x @ p["kernel"]) @ jnp.exp(p["a"]) @ p["b"],
    "is used inside of while": lambda p, x: jax.lax.fori_loop(
        0, jnp.int32(x[0, 0]) + 1, lambda i, h: h @ p["a"] @ p["b"], x @ p["kernel"]
    ),
    "is repeated, or multiplied with along different axes": lambda p, x: (
        (x @ p["kernel"]) @ p["a"] @ p["b"] @ p["a"].T @ p["b"]
    ),
    "is not used": lambda p, x: (x @ p["kernel"]) @ p["b"],
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_cannot_be_calibrated_stays_dense_and_is_told(reason):
    params = {name: drawn(8, 8, seed=i).astype(np.float32) for i, name in enumerate(("kernel", "a", "b"))}

    with pytest.warns(UserWarning, match=rf"stay dense: .*a {reason}|stay dense: a .*{reason}"):
        pruned, masks = jaxpruner.prune_oneshot(UNFIT[reason], params, [np.abs(drawn(16, 8))], sparsity=0.5)
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


@pytest.mark.parametrize("framework", [linen, nnx, haiku, equinox], ids=lambda each: each.__name__)
def test_networks_of_any_framework(framework):
    forward, params = framework()
    before = jaxpruner.summarize_sparsity(params, only_total_sparsity=True)["_nparams"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # biases of Equinox's convolutions have three axes
        pruned, masks = jaxpruner.prune_oneshot(forward, params, [drawn(4, 6, 6, 3).astype(np.float32)], sparsity=0.5)
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
"""


def test_batches_over_eight_devices_give_the_same_masks():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"up": 0, "down": 0}] * 2


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


def mlp_params() -> dict[str, Any]:
    return {
        "up": drawn(8, 32).astype(np.float32), "b1": drawn(32).astype(np.float32),
        "down": drawn(32, 4).astype(np.float32), "b2": drawn(4).astype(np.float32),
    }  # fmt: skip


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


def test_units_that_are_always_the_same_leave_without_a_trace():
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
W16_TWICE, BLOCKS, NM = {**W16, "other": W16["kernel"]}, "block_4,4", "nm_2,4"
ERRORS = {
    "no product with a parameter": (lambda p, x: x + p["kernel"].sum(), W16, [X16], {"sparsity": 0.5}),
    "kernel is not used": (lambda p, x: x @ W16["kernel"], W16, [X16], {"sparsity": 0.5}),
    "batches: there are none": (dense, W16, [], {"sparsity": 0.5}),
    r"batches: params of number 1 is float32\[8, 16\]": (dense, W16, [X16, X16[:8]], {"sparsity": 0.5}),
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
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_and_where(message):
    forward, params, batches, options = ERRORS[message]
    with pytest.raises(ValueError, match=message):
        jaxpruner.prune_oneshot(forward, params, batches, **options)


def test_a_hessian_that_is_hardly_positive_definite_is_damped_and_told():
    x = np.repeat(drawn(64, 1), 16, axis=1).astype(np.float32) * 1e3
    with pytest.warns(UserWarning, match="kernel: the Hessian of its inputs is not positive definite"):
        pruned, _ = jaxpruner.prune_oneshot(dense, W16, [x], sparsity=0.5, damping=1e-12)
    assert np.isfinite(pruned["kernel"]).all()
