"""20,000 steps, in a process of their own: memory stays flat, and masks are exact at their end."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

STEPS, WARM = 20_000, 4_000
# What an allocator may hold back. A step that left 100 bytes behind would take 1.6 MB.
ALLOWED = 1_000_000
HERE = pathlib.Path(__file__).parent
PROGRAM = """
import gc, json, os, sys
sys.path.insert(0, {here!r})
import jax, optax
import sparse_cases as cases
import jaxpruner

def seen():
    jax.block_until_ready((params, state))
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(jax.live_arrays())

updater = jaxpruner.create_updater_from_config(cases.config(**{config!r}))
tx = jaxpruner.sparsify(optax.adam(1e-3), updater)

@jax.jit
def step(params, state):
    grads = jax.tree.map(lambda p: p - 0.1, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

params = cases.tree("dict")
state = tx.init(params)
for i in range({steps}):
    params, state = step(params, state)
    if i == {warm}:
        before = seen()
after = seen()
jaxpruner.check_sparse(params, state, updater)
print(json.dumps([*before, *after, step._cache_size()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it")
@pytest.mark.parametrize(
    ("algorithm", "packed"), [("magnitude", True), ("rigl", False), ("magnitude_ste", True), ("movement", False)]
)
def test_memory_stays_flat(algorithm, packed):
    dates = {"update_start_step": 0, "update_end_step": STEPS - 100, "update_freq": 100}
    config = {"algorithm": algorithm, "packed": packed, **dates}
    program = PROGRAM.format(here=str(HERE), config=config, steps=STEPS, warm=WARM)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bytes_before, arrays_before, bytes_after, arrays_after, programs = json.loads(done.stdout)
    assert arrays_after == arrays_before
    assert bytes_after - bytes_before < ALLOWED
    assert programs == 1
