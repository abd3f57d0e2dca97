"""Sharded parameters stay sharded: on 8 virtual devices, masks are made without gathering anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ALGORITHMS = (
    "magnitude", "saliency", "global_magnitude", "global_saliency", "random", "static_sparse", "rigl", "set",
    "magnitude_ste", "random_ste", "preserve",
)  # fmt: skip

SCRIPT = r"""
import json, re, sys
import jax, jax.numpy as jnp, numpy as np, optax, jaxpruner
from jax.sharding import NamedSharding, PartitionSpec

structure, packed, axis, algorithms = json.loads(sys.argv[1])
assert jax.device_count() == 8
jax.config.update("jax_threefry_partitionable", True)  # the default of newer JAX
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("devices",))
shape = (64, 128)
FREE = ("magnitude", "rigl", "magnitude_ste")
split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((*[None] * axis, "devices"), ()))
rng = np.random.default_rng(0)
draw = lambda: {"kernel": rng.normal(size=shape).astype(np.float32), "bias": rng.normal(size=128).astype(np.float32)}
host_params, host_grads = draw(), draw()

def placements(tree):
    # Whatever has the rank of the kernel is split as the kernel is: moments, hidden weights, masks, packed masks.
    return jax.tree.map(lambda leaf: split if jnp.ndim(leaf) == 2 else whole, tree)

def stay(tree):
    return all(leaf.sharding.is_equivalent_to(split, 2) for leaf in jax.tree.leaves(tree))

def same(a, b):
    a, b = (np.asarray(x) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

report = {}
for algorithm in algorithms:
    config = dict(algorithm=algorithm, sparsity=0.5 if structure.startswith("nm") else 0.7, sparsity_type=structure,
                  use_packed_masks=packed, update_start_step=0, update_end_step=1, drop_fraction=0.3,
                  update_freq=2 if algorithm in ("rigl", "set") else 1)
    updater = jaxpruner.create_updater_from_config(config)
    tx = jaxpruner.sparsify(optax.adamw(1e-2), updater)

    # The same program on one device. Some weights are zero, so that there are ties and something to preserve.
    params = {k: jnp.where(jnp.abs(v) < 0.3, 0, v) if v.ndim > 1 else jnp.asarray(v) for k, v in host_params.items()}
    grads = jax.tree.map(jnp.asarray, host_grads)
    state = jax.jit(tx.init)(params)
    plain_updates, plain = jax.jit(tx.update)(grads, state, params)

    where = placements(params)
    params, grads = jax.device_put((params, grads), (where, where))
    state_where = placements(state)
    if algorithm in ("static_sparse", "rigl", "set"):
        init = jax.jit(tx.init, in_shardings=(where,), out_shardings=state_where).lower(params).compile()
        start = init(params)
    else:
        init, start = None, jax.device_put(state, state_where)
    shardings = (where, state_where, where)
    update = jax.jit(tx.update, in_shardings=shardings, out_shardings=shardings[:2])
    update = update.lower(grads, start, params).compile()
    updates, new = update(grads, start, params)
    # Told nothing, the sharding of the masks follows from that of the parameters.
    free = jax.jit(tx.update).lower(grads, start, params).compile() if algorithm in FREE else update
    free_masks = jax.tree.leaves(free(grads, start, params)[1].masks)

    def moves(program):
        if program is None:
            return []
        names = r"(all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
        return sorted(set(re.findall(names, program.as_text())))

    def reduced(program):
        # Bytes of the largest all-reduce.
        sizes = [0]
        for shapes in () if program is None else re.findall(r"= (.*?) all-reduce(?:-start)?\(", program.as_text()):
            for dims in re.findall(r"[a-z]+\d+\[([\d,]*)\]", shapes):
                sizes.append(4 * int(np.prod([int(d) for d in dims.split(",") if d] or [1])))
        return max(sizes)

    report[algorithm] = {
        "initial masks": all(map(same, jax.tree.leaves(start.masks), jax.tree.leaves(state.masks))),
        "masks": all(map(same, jax.tree.leaves(new.masks), jax.tree.leaves(plain.masks))),
        "updates": all(np.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(
            jax.tree.leaves(updates), jax.tree.leaves(plain_updates))),
        "sharding": stay(new.masks) and stay(updates["kernel"]),
        "free sharding": stay(free_masks),
        "moves at init": moves(init),
        "moves": moves(update),
        "free moves": moves(free),
        "all-reduced bytes": max(reduced(update), reduced(init)),
    }
# That the search above would find something: a sort along the split axis cannot do without moving data.
control = jax.jit(lambda x: jnp.sort(x, axis), in_shardings=split, out_shardings=split)
assert moves(control.lower(host_params["kernel"]).compile()), control
print(json.dumps(report))
"""


def run(*arguments: object) -> dict[str, dict]:
    return json.loads(run_on_8_devices("-c", SCRIPT, json.dumps(arguments)).splitlines()[-1])


def run_on_8_devices(*arguments: str) -> str:
    """What a program prints."""
    # Collectives under `lax.cond` on more virtual devices than cores can starve XLA's thread pool, which NPROC sizes.
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",
        "PJRT_NPROC": "16",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "packed", "axis", "algorithms"), [
    pytest.param("unstructured", False, 0, ALGORITHMS, id="unstructured-dense-rows"),
    pytest.param("unstructured", True, 1, ALGORITHMS, id="unstructured-packed-columns"),
    pytest.param("unstructured", True, 0, ("magnitude",), id="unstructured-packed-rows"),
    pytest.param("nm_2,4", True, 1, ("magnitude", "set"), id="nm-packed-columns"),
    pytest.param("block_4,4", False, 1, ("magnitude",), id="block-dense-columns"),
    pytest.param("channel_-1", False, 0, ("magnitude",), id="channel-dense-rows"),
])  # fmt: skip
def test_sharded_masks(structure, packed, axis, algorithms):
    report = run(structure, packed, axis, algorithms)
    assert set(report) == set(algorithms)
    # Counts are all that devices tell each other, and n:m groups lie on one device.
    assert (report["magnitude"]["all-reduced bytes"] > 0) == (not structure.startswith("nm"))
    faults = {
        algorithm: fault
        for algorithm, found in report.items()
        if (fault := {
            key: value
            for key, value in found.items()
            if value is False or (isinstance(value, list) and value) or (key == "all-reduced bytes" and value > 4096)
        })
    }  # fmt: skip
    assert not faults, json.dumps(faults, indent=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packed", "algorithms"),
    [
        (False, ("rigl", "random", "global_magnitude", "magnitude_ste", "preserve", "static_sparse")),
        (False, ("set", "magnitude", "global_saliency", "random_ste", "saliency")),
        # Masks are made the same, and then packed: one algorithm of each kind.
        (True, ("rigl", "global_magnitude", "magnitude_ste", "preserve")),
    ],
    ids=["dense-rigl", "dense-set", "packed"],
)
def test_transformer(packed, algorithms):
    """A train step with parameters split over both axes of a (data, model) mesh, in two ways."""
    script = Path(__file__).with_name("sharded_transformer.py")
    printed = run_on_8_devices(str(script), json.dumps({"packed": packed, "algorithms": algorithms}))
    report = json.loads(printed.splitlines()[-1])
    assert len(report) == 2 * len(algorithms)
    faults = {
        case: fault
        for case, found in report.items()
        if (fault := {key: value for key, value in found.items() if value is False or value == [] or key == "moves"})
        != {"moves": []}
        or found["largest all-reduce"] > 4096
    }
    assert not faults, json.dumps(faults, indent=1)
    assert report[f"{algorithms[0]}, fsdp"]["largest all-reduce"] > 0


@pytest.mark.slow
def test_state_shardings():
    cases = Path(__file__).with_name("state_shardings_cases.py")
    run_on_8_devices("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(cases))
