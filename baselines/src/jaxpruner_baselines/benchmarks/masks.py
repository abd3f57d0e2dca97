"""Making masks: time and scratch memory against sorts, and what masks take in the state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner
from jaxpruner import mask_calculator, sparsity_types
from jaxpruner_baselines.benchmarks.figures import Figure, Reach, alternate, timed
from jaxpruner_baselines.methods import DENSE, all_methods

SPARSITY = 0.8
OURS = "ours"


@dataclasses.dataclass(frozen=True)
class Sizes:
    leaf: int = 10_000_000
    leaves: int = 10
    leaves_each: tuple[int, int] = (1000, 1000)
    groups: tuple[int, int] = (4096, 4096)
    repeats: int = 15
    slow_repeats: int = 3  # of sides that take seconds


QUICK = Sizes(leaf=100_000, leaves=3, leaves_each=(200, 150), groups=(128, 128), repeats=3, slow_repeats=2)

Events = Iterator[str | Figure]


def scores_of(shape: int | tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.abs(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)))


def kept(size: int) -> int:
    return round(size * (1 - SPARSITY))


def argsort_mask(scores: jax.Array) -> jax.Array:
    """The mask that ranks everything: exact, ties by index, and what a user writes first."""
    order = jnp.argsort(-scores.ravel())
    return jnp.zeros(scores.size, bool).at[order[: kept(scores.size)]].set(True).reshape(scores.shape)


def sort_mask(scores: jax.Array) -> jax.Array:
    return scores >= jnp.sort(scores)[scores.size - kept(scores.size)]


def top_k_mask(scores: jax.Array) -> jax.Array:
    _, indices = jax.lax.top_k(scores, kept(scores.size))
    return jnp.zeros(scores.size, bool).at[indices].set(True)


def our_mask(scores: jax.Array) -> jax.Array:
    return mask_calculator.get_topk_fn(sparsity_types.Unstructured())(scores, SPARSITY)


def mask_update(sizes: Sizes) -> Events:
    """One leaf, unstructured."""
    scores = scores_of(sizes.leaf)
    on_host = np.asarray(scores)
    nth = sizes.leaf - kept(sizes.leaf)
    jitted = {
        OURS: jax.jit(our_mask),
        "jnp.argsort": jax.jit(argsort_mask),
        "jnp.sort": jax.jit(sort_mask),
        "lax.top_k": jax.jit(top_k_mask),
    }
    if not np.array_equal(jitted[OURS](scores), jitted["jnp.argsort"](scores)):
        raise AssertionError("mask_update: the masks of the two sides differ.")
    sides: dict[str, Callable] = {name: _call(fn, scores) for name, fn in jitted.items()}
    sides["numpy.partition"] = lambda: np.partition(on_host, nth)  # the threshold alone, no mask yet
    repeats = dict.fromkeys(sides, sizes.slow_repeats) | {OURS: sizes.repeats, "numpy.partition": sizes.repeats}
    times = yield from alternate(sides, repeats)
    reaches = {
        "jnp.argsort": Reach(at_least=100),
        "jnp.sort": Reach(),
        "lax.top_k": Reach(),
        "numpy.partition": Reach(at_most=0.5),
    }
    for peer, reach in reaches.items():
        yield timed(f"mask update, {_count(sizes.leaf)} float32", times, OURS, peer, reach, {"size": sizes.leaf})


def global_mask(sizes: Sizes) -> Events:
    """One threshold over many leaves."""
    scores = {f"leaf_{i}": scores_of(sizes.leaves_each, seed=i) for i in range(sizes.leaves)}
    updater = jaxpruner.GlobalMagnitudePruning(sparsity=SPARSITY, use_normalization=False)

    def peer(scores):
        mask = argsort_mask(jnp.concatenate([leaf.ravel() for leaf in scores.values()]))
        return dict(zip(scores, mask.reshape(sizes.leaves, *sizes.leaves_each), strict=True))

    ours_fn, peer_fn = jax.jit(lambda scores: updater.create_masks(scores, SPARSITY)), jax.jit(peer)
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, ours_fn(scores), peer_fn(scores)))):
        raise AssertionError("global_mask: the masks of the two sides differ.")
    row = f"global mask, {sizes.leaves} leaves of {_count(math.prod(sizes.leaves_each))}"
    config = {"leaves": sizes.leaves, "each": sizes.leaves_each}
    yield from _against(
        row, _call(ours_fn, scores), "concatenate + argsort", _call(peer_fn, scores), Reach(at_least=100), sizes, config
    )


def nm_mask(sizes: Sizes) -> Events:
    """2 of every 4."""
    scores = scores_of(sizes.groups)

    def peer(scores):
        ranks = jnp.argsort(jnp.argsort(scores.reshape(-1, 4), axis=1), axis=1)
        return (ranks >= 2).reshape(scores.shape)

    ours_fn = jax.jit(lambda s: mask_calculator.get_topk_fn(sparsity_types.NByM(2, 4))(s, 0.5))
    peer_fn = jax.jit(peer)
    if not np.array_equal(ours_fn(scores), peer_fn(scores)):
        raise AssertionError("nm_mask: the masks of the two sides differ.")
    yield from _against(
        f"2:4 mask, {sizes.groups}",
        _call(ours_fn, scores),
        "double argsort",
        _call(peer_fn, scores),
        Reach(at_least=100),
        sizes,
        {"shape": sizes.groups},
    )


def peak_memory(sizes: Sizes) -> Events:
    """Scratch of a compiled mask update, against the bytes of the scores."""
    scores = jax.ShapeDtypeStruct((sizes.leaf,), jnp.float32)
    for name, fn, reach in ((OURS, our_mask, Reach(at_most=0.3)), ("jnp.argsort", argsort_mask, Reach())):
        yield f"compiling {name}"
        analysis = jax.jit(fn).lower(scores).compile().memory_analysis()
        if analysis is None:
            yield "this device tells nothing about memory"
            return
        scratch, size = analysis.temp_size_in_bytes / 1e6, 4 * sizes.leaf / 1e6
        row = f"peak scratch of a mask update ({name})"
        yield Figure(row, scratch, "the scores", size, "MB", scratch / size, False, reach, {"size": sizes.leaf})


def mask_bytes(sizes: Sizes) -> Events:
    """Bits a weight of the masks in the state, the worst of all algorithms."""
    params = {"kernel": jax.ShapeDtypeStruct(sizes.groups, jnp.float32)}
    weights = math.prod(sizes.groups)
    for name, packed, reach in (("packed", True, Reach(at_most=1.01)), ("dense", False, Reach())):
        bits = {}
        for method in all_methods():
            if method != DENSE:
                yield f"{name} masks, {method}"
                tx = jaxpruner.sparsify(optax.sgd(0.1), algorithm=method, sparsity=SPARSITY, use_packed_masks=packed)
                masks = jax.tree.leaves(jax.eval_shape(tx.init, params).masks)
                bits[method] = 8 * sum(mask.size * mask.dtype.itemsize for mask in masks) / weights
        worst = max(bits, key=bits.__getitem__)
        row = f"mask memory, {name}, worst of {len(bits)} algorithms"
        config = {"shape": sizes.groups, "bits": bits}
        yield Figure(row, bits[worst], "1 bit a weight", 1.0, "bit", bits[worst], False, reach, config)


def _against(row, ours, peer_name, peer, reach, sizes, config) -> Events:
    sides, repeats = {OURS: ours, peer_name: peer}, {OURS: sizes.repeats, peer_name: sizes.slow_repeats}
    times = yield from alternate(sides, repeats)
    yield timed(row, times, OURS, peer_name, reach, config)


def _call(fn: Callable, argument) -> Callable:
    return lambda: fn(argument)


def _count(n: int) -> str:
    return f"{n / 1e6:g}M" if n >= 1e6 else f"{n:,}"
