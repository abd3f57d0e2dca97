"""20,000 steps: memory stays flat, and masks are exact at their end."""

from __future__ import annotations

import gc
import os
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest
import sparse_cases as cases

import jaxpruner

STEPS, WARM = 20_000, 4_000
STATM = pathlib.Path("/proc/self/statm")
# What an allocator may hold back. A step that left 100 bytes behind would take 1.6 MB.
ALLOWED = 1_000_000


def resident_bytes() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="memory of a process is read as Linux tells it")
@pytest.mark.parametrize(
    ("algorithm", "packed"), [("magnitude", True), ("rigl", False), ("magnitude_ste", True), ("movement", False)]
)
def test_memory_stays_flat(algorithm, packed):
    config = cases.config(algorithm, packed=packed, update_start_step=0, update_end_step=STEPS - 100, update_freq=100)
    updater = jaxpruner.create_updater_from_config(config)
    tx = jaxpruner.sparsify(optax.adam(1e-3), updater)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: p - 0.1 * state.count, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = cases.tree("dict")
    state, before, live = tx.init(params), 0, 0
    for i in range(STEPS):
        params, state = step(params, state)
        if i == WARM:
            before, live = resident_bytes(), len(jax.live_arrays())
    jax.block_until_ready(params)
    assert len(jax.live_arrays()) == live
    assert resident_bytes() - before < ALLOWED
    assert step._cache_size() == 1
    jaxpruner.check_sparse(params, state, updater)
    assert bool(jnp.all(jnp.isfinite(params["dense"]["kernel"])))
