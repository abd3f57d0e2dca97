"""Trains a small transformer on a (data, model) mesh of 8 virtual devices; `test_sharding.py` runs it.

`python sharded_transformer.py '{"packed": true, "algorithms": ["rigl"]}'` prints, as JSON, what was found for
each algorithm and each way to lay the parameters out. It needs
`XLA_FLAGS=--xla_force_host_platform_device_count=8`, and `NPROC=16 PJRT_NPROC=16` on a machine of few cores.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxpruner

VOCABULARY, WIDTH, HEADS, HIDDEN = 96, 64, 4, 128
SEQUENCE, BATCH, STEPS = 8, 4, 4
SPARSITY = 0.7

# Name -> (shape, its axes in Megatron's layout, its axes in a fully sharded one).
LAYOUT = {
    "embedding": ((VOCABULARY, WIDTH), ("model", None), ("model", "data")),
    "query": ((WIDTH, HEADS, WIDTH // HEADS), (None, "model", None), ("data", "model", None)),
    "key": ((WIDTH, HEADS, WIDTH // HEADS), (None, "model", None), ("data", "model", None)),
    "value": ((WIDTH, HEADS, WIDTH // HEADS), (None, "model", None), ("data", "model", None)),
    "out": ((HEADS, WIDTH // HEADS, WIDTH), ("model", None, None), ("model", None, "data")),
    "norm": ((WIDTH,), (), (("data", "model"),)),
    "wi": ((WIDTH, HIDDEN), (None, "model"), ("data", "model")),
    "wi_bias": ((HIDDEN,), ("model",), (("data", "model"),)),
    "wo": ((HIDDEN, WIDTH), ("model", None), ("model", "data")),
    "head": ((WIDTH, VOCABULARY), (None, "model"), ("data", "model")),
}
KERNELS = [name for name, (shape, _, _) in LAYOUT.items() if len(shape) > 1]
# Each pruned leaf takes its seconds to compile: one algorithm prunes all kernels, the others a few.
FEW_KERNELS = ["query", "wi"]
STYLES = {"megatron": 1, "fsdp": 2}
MOVES = re.compile(r" (all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\(")
ALL_REDUCE = re.compile(r"= (.*?) all-reduce(?:-start)?\(")


def draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        name: (rng.normal(size=shape) / math.sqrt(WIDTH)).astype(np.float32)
        if len(shape) > 1
        else np.ones(shape, np.float32)
        for name, (shape, _, _) in LAYOUT.items()
    }


def loss_fn(params, tokens):
    def norm(x):
        return params["norm"] * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    x = jax.nn.one_hot(tokens[:, :-1], VOCABULARY) @ params["embedding"]
    query, key, value = (jnp.einsum("bsd,dhk->bshk", norm(x), params[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhk,bshk->bhqs", query, key) / math.sqrt(WIDTH // HEADS)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    x += jnp.einsum("bqhk,hkd->bqd", jnp.einsum("bhqs,bshk->bqhk", weights, value), params["out"])
    x += jax.nn.relu(norm(x) @ params["wi"] + params["wi_bias"]) @ params["wo"]
    logits = norm(x) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


loss_and_grads = jax.jit(jax.value_and_grad(loss_fn))


def train_step(tx, params, state, tokens):
    loss, grads = loss_and_grads(params, tokens)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def moves(program) -> list[str]:
    """Collectives that move data rather than add it up."""
    return sorted(set(MOVES.findall(program.as_text())))


def largest_all_reduce(program) -> int:
    sizes = [0]
    for shapes in ALL_REDUCE.findall(program.as_text()):
        # Entries of four bytes: nothing here is wider.
        entries = [math.prod(int(d) for d in dims.split(",") if d) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        sizes.append(4 * sum(entries))
    return max(sizes)


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def lie(tree, shardings) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in pairs)


def counts_are_exact(algorithm: str, masks: dict, zeros: dict) -> bool:
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    sizes = {name: mask.size for name, mask in masks.items()}
    if algorithm == "preserve":
        return kept == {name: size - zeros[name] for name, size in sizes.items()}
    if algorithm.startswith("global"):
        return sum(kept.values()) == round(sum(sizes.values()) * (1 - SPARSITY))
    return kept == {name: max(1, round(size * (1 - SPARSITY))) for name, size in sizes.items()}


def check(algorithm: str, packed: bool, mesh: Mesh) -> dict[str, dict]:
    pruned = KERNELS if (algorithm, packed) == ("magnitude", True) else FEW_KERNELS
    updater = jaxpruner.create_updater_from_config({
        "algorithm": algorithm, "sparsity": SPARSITY, "use_packed_masks": packed, "drop_fraction": 0.3,
        "update_start_step": 0, "update_end_step": 2, "update_freq": 2,
        "filter_fn": lambda path, _: path[-1] in pruned,
    })  # fmt: skip
    tx = jaxpruner.sparsify(optax.adamw(1e-2), updater)
    rng = np.random.default_rng(0)
    host_params, host_grads = draw(rng), draw(rng)
    for name in KERNELS:
        # So that there are ties, and something to preserve.
        host_params[name][np.abs(host_params[name]) < 0.04] = 0
    zeros = {name: int((host_params[name] == 0).sum()) for name in KERNELS}
    tokens = rng.integers(0, VOCABULARY, (BATCH, SEQUENCE + 1))

    # One device.
    params, grads = jax.device_put((host_params, host_grads), jax.devices()[0])
    plain_start = jax.jit(tx.init)(params)
    _, plain = jax.jit(tx.update)(grads, plain_start, params)

    found = {}
    for style, column in STYLES.items():
        where = {name: NamedSharding(mesh, PartitionSpec(*entry[column])) for name, entry in LAYOUT.items()}
        params, grads = jax.device_put((host_params, host_grads), (where, where))
        state_where = jaxpruner.state_shardings(tx, params)
        init = jax.jit(tx.init, out_shardings=state_where).lower(params).compile()
        start = init(params)
        update = jax.jit(tx.update, out_shardings=(where, state_where)).lower(grads, start, params).compile()
        _, updated = update(grads, start, params)

        replicated = NamedSharding(mesh, PartitionSpec())
        if style == "fsdp":
            step = jax.jit(functools.partial(train_step, tx), out_shardings=(where, state_where, replicated))
        else:  # in two programs, one of which is compiled already
            step = functools.partial(train_step, tx._replace(update=update))
        state, batch = start, jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
        for _ in range(STEPS):
            params, state, loss = step(params, state, batch)
        masks = {
            name: np.asarray(mask) for name, mask in updater.current_masks(state, params).items() if mask is not None
        }
        found[f"{algorithm}, {style}"] = {
            "finite loss": bool(jnp.isfinite(loss)),
            "state lies as asked": lie(start, state_where) and lie(state, state_where) and lie(params, where),
            "masks lie as parameters": all(
                state.masks[name].sharding.is_equivalent_to(where[name], len(LAYOUT[name][0])) for name in pruned
            ),
            "initial masks": same(start.masks, plain_start.masks),
            "masks": same(updated.masks, plain.masks),
            "pruned": sorted(masks) == sorted(pruned),
            "exact counts": counts_are_exact(algorithm, masks, zeros),
            "on the masks": all(not np.asarray(params[name])[~masks[name]].any() for name in pruned),
            "moves": sorted({*moves(init), *moves(update)}),
            "largest all-reduce": max(largest_all_reduce(init), largest_all_reduce(update)),
        }
    return found


def main() -> None:
    arguments = json.loads(sys.argv[1])
    assert jax.device_count() == 8
    # Nothing is timed here, and most of the time would go into optimizing.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_threefry_partitionable", True)  # the default of newer JAX
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "model"))
    found = {}
    for algorithm in arguments["algorithms"]:
        found |= check(algorithm, arguments["packed"], mesh)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
