"""Making masks: time and memory against sorts, and what masks take in the state."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpruner
from jaxpruner import mask_calculator, selection, sparsity_types
from jaxpruner.selection import counts
from jaxpruner_baselines.benchmarks import peers
from jaxpruner_baselines.benchmarks.figures import Figure, Reach, alternate, timed
from jaxpruner_baselines.benchmarks.peers import JAX_PEERS, SPARSITY, argsort_mask, kept
from jaxpruner_baselines.methods import DENSE, all_methods

OURS = "ours"
ONE_READ = "one read of the scores"
ONE_COMPARISON = "one comparison a score"


@dataclasses.dataclass(frozen=True)
class Sizes:
    leaf: int = 10_000_000
    leaves: int = 10
    leaves_each: tuple[int, int] = (1000, 1000)
    groups: tuple[int, int] = (4096, 4096)
    group_sizes: tuple[int, ...] = (4, 8, 16, 32)  # m of n:m
    thresholds: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
    repeats: int = 15
    slow_repeats: int = 3  # of sides that take seconds


QUICK = Sizes(
    leaf=100_000, leaves=3, leaves_each=(200, 150), groups=(128, 128), group_sizes=(4,),
    thresholds=(1024, 65_536), repeats=3, slow_repeats=2,
)  # fmt: skip

Events = Iterator[str | Figure]


def scores_of(shape: int | tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.abs(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)))


def our_mask(scores: jax.Array) -> jax.Array:
    return mask_calculator.get_topk_fn(sparsity_types.Unstructured())(scores, SPARSITY)


def check_equal(row: str, ours: object, peer: object) -> None:
    if not all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, peer))):
        raise AssertionError(f"{row}: the masks of the two sides differ.")


def mask_update(sizes: Sizes) -> Events:
    """One leaf, unstructured."""
    row = f"mask update, {count_name(sizes.leaf)} float32"
    scores = scores_of(sizes.leaf)
    on_host = np.asarray(scores)
    jitted = {name: jax.jit(fn) for name, fn in {OURS: our_mask, ONE_READ: jnp.max, **JAX_PEERS}.items()}
    sides: dict[str, Callable] = {name: call(fn, scores) for name, fn in jitted.items()}
    sides |= {name: peer.make(on_host) for name, peer in peers.host_peers().items()}
    check_equal(row, *(np.asarray(sides[name]()) for name in (OURS, "jnp.argsort")))
    fast = (OURS, ONE_READ, "numpy.partition")
    repeats = {name: sizes.repeats if name in fast else sizes.slow_repeats for name in sides}
    times = yield from alternate(sides, repeats)
    reaches = {"jnp.argsort": Reach(at_least=100), "numpy.partition": Reach(at_most=0.5)}
    for peer in sides:
        if peer == ONE_READ:
            yield timed(row, times, OURS, peer, Reach(), {"size": sizes.leaf}, faster=False)
        elif peer != OURS:
            yield timed(row, times, OURS, peer, reaches.get(peer, Reach()), {"size": sizes.leaf})


def drop_and_grow(sizes: Sizes) -> Events:
    """A RigL update of one leaf: two selections, one of them among what the other leaves."""
    weights, grads = scores_of(sizes.leaf, seed=1), scores_of(sizes.leaf, seed=2)
    structure = sparsity_types.Unstructured()
    mask = jax.jit(our_mask)(weights)

    def ours(weights, grads, mask):
        return structure.regrow(mask, selection.Scores(jnp.abs, (weights,)), selection.Scores(jnp.abs, (grads,)), 0.3)

    def peer(weights, grads, mask):
        survivors = rank_mask(jnp.where(mask, weights, -1), kept(sizes.leaf) - round(0.3 * kept(sizes.leaf)))
        return rank_mask(jnp.where(survivors, jnp.inf, grads), kept(sizes.leaf))

    def rank_mask(scores, keep):
        return jnp.zeros(scores.size, bool).at[jnp.argsort(-scores)[:keep]].set(True)

    row = f"RigL's drop and grow, {count_name(sizes.leaf)} float32"
    arguments = (weights, grads, mask)
    ours_fn, peer_fn, one = jax.jit(ours), jax.jit(peer), jax.jit(our_mask)
    check_equal(row, ours_fn(*arguments), peer_fn(*arguments))
    sides = {
        OURS: lambda: ours_fn(*arguments),
        "two argsorts": lambda: peer_fn(*arguments),
        "one mask": call(one, weights),
    }
    times = yield from alternate(
        sides, {OURS: sizes.repeats, "two argsorts": sizes.slow_repeats, "one mask": sizes.repeats}
    )
    yield timed(row, times, OURS, "two argsorts", Reach(at_least=100), {"size": sizes.leaf})
    yield timed(row, times, OURS, "one mask", Reach(), {"size": sizes.leaf}, faster=False)


def global_mask(sizes: Sizes) -> Events:
    """One threshold over many leaves."""
    scores = {f"leaf_{i}": scores_of(sizes.leaves_each, seed=i) for i in range(sizes.leaves)}
    updater = jaxpruner.GlobalMagnitudePruning(sparsity=SPARSITY, use_normalization=False)

    def concatenated(scores):
        mask = argsort_mask(jnp.concatenate([leaf.ravel() for leaf in scores.values()]))
        return dict(zip(scores, mask.reshape(sizes.leaves, *sizes.leaves_each), strict=True))

    ours_fn, peer_fn = jax.jit(lambda scores: updater.create_masks(scores, SPARSITY)), jax.jit(concatenated)
    row = f"global mask, {sizes.leaves} leaves of {count_name(math.prod(sizes.leaves_each))}"
    check_equal(row, ours_fn(scores), peer_fn(scores))
    sides = {OURS: call(ours_fn, scores), "concatenate + argsort": call(peer_fn, scores)}
    if peers.has_torch():
        sides["torch global_unstructured"] = peers.torch_global_unstructured([np.asarray(s) for s in scores.values()])
    repeats = dict.fromkeys(sides, sizes.slow_repeats) | {OURS: sizes.repeats}
    times = yield from alternate(sides, repeats)
    config = {"leaves": sizes.leaves, "each": sizes.leaves_each}
    for peer, reach in {"concatenate + argsort": Reach(at_least=100), "torch global_unstructured": Reach()}.items():
        if peer in sides:
            yield timed(row, times, OURS, peer, reach, config)


def ranked(scores: jax.Array, m: int, axis: int) -> jax.Array:
    """The upper half of each group of m, by sorting the groups twice."""
    groups = scores.reshape(*scores.shape[:axis], -1, m, *scores.shape[axis + 1 :])
    ranks = jnp.argsort(jnp.argsort(groups, axis=axis + 1), axis=axis + 1)
    return (ranks >= m // 2).reshape(scores.shape)


def nm_mask(sizes: Sizes) -> Events:
    """Half of every m, along either axis."""
    scores = scores_of(sizes.groups)
    for axis, m in itertools.product((1, 0), sizes.group_sizes):
        structure = sparsity_types.NByM(m // 2, m, axis)
        ours_fn = jax.jit(functools.partial(structure.mask, sparsity=0.5))
        peer_fn = jax.jit(functools.partial(ranked, m=m, axis=axis))
        row = f"{m // 2}:{m} mask along axis {axis}, {sizes.groups}"
        check_equal(row, ours_fn(scores), peer_fn(scores))
        sides = {
            OURS: call(ours_fn, scores),
            "double argsort": call(peer_fn, scores),
            ONE_COMPARISON: call(jax.jit(lambda scores: scores > 1), scores),
        }
        times = yield from alternate(
            sides, dict.fromkeys(sides, sizes.repeats) | {"double argsort": sizes.slow_repeats}
        )
        config = {"shape": sizes.groups, "m": m, "axis": axis}
        yield timed(row, times, OURS, "double argsort", Reach(at_least=150), config)
        yield timed(row, times, OURS, ONE_COMPARISON, Reach(), config, faster=False)


def thresholds(sizes: Sizes) -> Events:
    """The two ways of choosing thresholds, by size."""
    for size in sizes.thresholds:
        scores = scores_of(size)
        keep = counts.from_int(kept(size))
        methods = {
            method: jax.jit(functools.partial(selection.top_k_mask, keep=keep, method=method))
            for method in ("sample", "split")
        }
        check_equal("thresholds", *(fn(scores) for fn in methods.values()))
        times = yield from alternate(
            {name: call(fn, scores) for name, fn in methods.items()}, dict.fromkeys(methods, 5 * sizes.repeats)
        )
        row = f"thresholds by sample, {count_name(size)} float32"
        yield timed(row, times, "sample", "split", Reach(), {"size": size}, faster=False)


def peak_memory(sizes: Sizes) -> Events:
    """What making a mask takes beside scores and mask, against the bytes of the scores."""
    size = 4 * sizes.leaf
    scores = jax.ShapeDtypeStruct((sizes.leaf,), jnp.float32)

    def figure(name, scratch, reach):
        row = f"peak scratch of a mask update ({name})"
        return Figure(
            row, scratch / 1e6, "the scores", size / 1e6, "MB", scratch / size, False, reach, {"size": sizes.leaf}
        )

    for name, fn in {OURS: our_mask, **JAX_PEERS}.items():
        yield f"compiling {name}"
        analysis = jax.jit(fn).lower(scores).compile().memory_analysis()
        if analysis is None:
            yield "this device tells nothing about memory"
            break
        yield figure(name, analysis.temp_size_in_bytes, Reach(at_most=0.3) if name == OURS else Reach())
    for name, peer in peers.host_peers().items():
        yield f"measuring {name}"
        grown = peers.peak_bytes(name, sizes.leaf) - peer.mask_bytes * sizes.leaf
        yield figure(name, max(grown, 0), Reach())


def mask_bytes(sizes: Sizes) -> Events:
    """Bits a weight of masks, in the state the worst of all algorithms."""
    params = {"kernel": jax.ShapeDtypeStruct(sizes.groups, jnp.float32)}
    weights = math.prod(sizes.groups)

    def figure(name, bits, reach, config):
        return Figure(f"mask memory, {name}", bits, "1 bit a weight", 1.0, "bit", bits, False, reach, config)

    for name, packed, reach in (("packed", True, Reach(at_most=1.01)), ("dense", False, Reach())):
        bits = {}
        for method in all_methods():
            if method != DENSE:
                yield f"{name} masks, {method}"
                tx = jaxpruner.sparsify(
                    optax.sgd(0.1), algorithm=method, sparsity=SPARSITY, use_packed_masks=packed,
                    update_start_step=1, update_end_step=100, update_freq=10,
                )  # fmt: skip
                masks = jax.tree.leaves(jax.eval_shape(tx.init, params).masks)
                bits[method] = 8 * sum(mask.size * mask.dtype.itemsize for mask in masks) / weights
        config: Mapping = {"shape": sizes.groups, "bits": bits}
        yield figure(f"{name}, worst of {len(bits)} algorithms", max(bits.values()), reach, config)
    for name, peer in peers.host_peers().items():
        yield figure(name, 8.0 * peer.mask_bytes, Reach(), {})


def call(fn: Callable, argument) -> Callable:
    return lambda: fn(argument)


def count_name(n: int) -> str:
    return f"{n / 1e9:g}B" if n >= 1e9 else f"{n / 1e6:g}M" if n >= 1e6 else f"{n:,}"
