"""Mask updates at the sizes of an accelerator: against sorts, and against one read of the scores."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxpruner_baselines.benchmarks.figures import Reach, alternate, timed
from jaxpruner_baselines.benchmarks.masks import ONE_READ, OURS, Events, call, count_name, our_mask
from jaxpruner_baselines.benchmarks.peers import argsort_mask, top_k_mask


@dataclasses.dataclass(frozen=True)
class Sizes:
    leaves: tuple[int, ...] = (10_000_000, 100_000_000, 1_000_000_000)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    repeats: int = 15
    slow_repeats: int = 3


QUICK = Sizes(leaves=(50_000,), repeats=3, slow_repeats=2)


def mask_updates(sizes: Sizes) -> Events:
    """One leaf of each size and dtype. A peer that does not fit into memory is left out, with a line that says so."""
    for size in sizes.leaves:
        for dtype in sizes.dtypes:
            row = f"mask update, {count_name(size)} {dtype}"
            scores = jnp.abs(jax.random.normal(jax.random.key(0), (size,), dtype))
            functions = {OURS: our_mask, ONE_READ: jnp.max, "jnp.argsort": argsort_mask, "lax.top_k": top_k_mask}
            sides = {}
            for name, fn in functions.items():
                side = call(jax.jit(fn), scores)
                try:
                    jax.block_until_ready(side())
                except jax.errors.JaxRuntimeError as error:
                    if name == OURS or "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    yield f"{row}: no memory for {name}"
                else:
                    sides[name] = side
            if "jnp.argsort" in sides and not jnp.array_equal(sides[OURS](), sides["jnp.argsort"]()):
                raise AssertionError(f"{row}: the masks of the two sides differ.")
            fast = (OURS, ONE_READ)
            repeats = {name: sizes.repeats if name in fast else sizes.slow_repeats for name in sides}
            times = yield from alternate(sides, repeats)
            for peer in sides:
                if peer != OURS:
                    yield timed(
                        row, times, OURS, peer, Reach(), {"size": size, "dtype": dtype}, faster=peer != ONE_READ
                    )
            del scores, side, sides  # before the next scores are made
