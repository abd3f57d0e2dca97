"""An update of sharded parameters: what each device does, and what devices tell each other.

Nothing is run or timed: programs are compiled for virtual devices, and read. That needs a process of its
own, since XLA takes the number of virtual devices when it starts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxpruner
from jaxpruner_baselines.benchmarks import hlo
from jaxpruner_baselines.benchmarks.figures import Figure, Reach
from jaxpruner_baselines.benchmarks.masks import SPARSITY, Events

UPDATE_FREQ = 100


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A stack of transformer layers, their kernels stacked as `lax.scan` over layers takes them."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    hidden: int = 4096
    devices: tuple[int, ...] = (1, 2, 4, 8)
    algorithm: str = "magnitude"


QUICK = Sizes(layers=2, width=32, heads=4, hidden=64, devices=(1, 2))


def sharded_update(sizes: Sizes) -> Events:
    """Per number of devices: the cost of one device, its scratch, and the collectives."""
    found: dict[int, dict[str, Any]] = {}
    for one in _compiled_elsewhere(sizes):
        found[one["devices"]] = one
        yield f"compiled for {one['devices']} devices"
    config = dataclasses.asdict(sizes)
    for program in ("mask update", "whole update"):
        for one in found.values():
            yield _against_one_device(f"{program}, bytes touched", one, found[1], f"{program}, bytes", config)
    for devices, one in found.items():
        scratch, leaf = one["whole update, scratch"] / 1e6, one["largest leaf"] / 1e6
        row = f"whole update, scratch of a device, {_count(devices)}"
        peer = "its part of the largest leaf"
        yield Figure(row, scratch, peer, leaf, "MB", scratch / leaf, False, Reach(), config | one)
    for devices, one in found.items():
        if devices > 1:
            told, weights = one["all-reduced"] / 1e3, one["weights"] / 1e3
            row = f"whole update, all-reduced, {_count(devices)}"
            yield Figure(row, told, "weights of a device", weights, "kB", told / weights, False, Reach(), config | one)
    for devices, one in found.items():
        if devices > 1:
            row = f"whole update, gathers and other moves, {_count(devices)}"
            moves, reduces = float(one["moves"]), float(one["all-reduces"])
            yield Figure(row, moves, "all-reduces", reduces, "ops", moves, False, Reach(at_most=0), config | one)


def _against_one_device(row: str, one: dict[str, Any], single: dict[str, Any], key: str, config: Any) -> Figure:
    ours, peer, devices = one[key] / 1e9, single[key] / 1e9, one["devices"]
    # A twentieth for what is not split: counts, thresholds, the loop.
    reach = Reach(at_most=round(1.05 / devices, 4)) if devices > 1 else Reach()
    row = f"{row} by a device, {_count(devices)}"
    return Figure(row, ours, "one device", peer, "GB", ours / peer, False, reach, {**config, **one})


def _count(devices: int) -> str:
    return f"{devices} device{'s' if devices > 1 else ''}"


def _compiled_elsewhere(sizes: Sizes) -> Iterator[dict[str, Any]]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(sizes.devices)}"
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(sizes))],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield from map(json.loads, process.stdout)
        if process.wait():
            raise RuntimeError(f"sharded_update: the compiling process ended with {process.returncode}.")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def mesh_of(devices: int) -> Mesh:
    """A (data, model) mesh with up to 4 devices along the model."""
    model = min(4, devices)
    return Mesh(np.asarray(jax.devices()[:devices]).reshape(devices // model, model), ("data", "model"))


def stack(sizes: Sizes, mesh: Mesh) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, NamedSharding]]:
    """Shapes and shardings of the kernels: heads and hidden units over `model`, the width over `data`."""
    layers, width, heads, hidden = sizes.layers, sizes.width, sizes.heads, sizes.hidden
    into_heads = ((layers, width, heads, width // heads), (None, "data", "model", None))
    leaves = {
        "query": into_heads,
        "key": into_heads,
        "value": into_heads,
        "out": ((layers, heads, width // heads, width), (None, "model", None, "data")),
        "wi": ((layers, width, hidden), (None, "data", "model")),
        "wo": ((layers, hidden, width), (None, "model", "data")),
    }
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in leaves.items()}
    return params, {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, (_, spec) in leaves.items()}


def measure(sizes: Sizes, devices: int) -> dict[str, Any]:
    """Compiles the update for so many devices and reads the programs of one of them."""
    updater = jaxpruner.create_updater_from_config({
        "algorithm": sizes.algorithm, "sparsity": SPARSITY, "use_packed_masks": True,
        "update_start_step": 0, "update_end_step": 10**6, "update_freq": UPDATE_FREQ,
    })  # fmt: skip
    tx = jaxpruner.sparsify(optax.adamw(1e-3), updater)
    params, where = stack(sizes, mesh_of(devices))
    state, state_where = jax.eval_shape(tx.init, params), jaxpruner.state_shardings(tx, params, where)

    def compile_for(fn, *arguments, out):
        return jax.jit(fn, out_shardings=out).lower(*arguments).compile()

    def on_mesh(shapes, shardings):
        return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, shardings)

    params, state = on_mesh(params, where), on_mesh(state, state_where)
    masks = compile_for(
        lambda params, state: updater.update_state(state, params, params).masks, params, state, out=state_where.masks
    )
    update = compile_for(tx.update, params, state, params, out=(where, state_where))
    told = hlo.collectives(update.as_text())
    reduces = [one for one in told if one.kind == hlo.REDUCES]
    shards = [4 * math.prod(where[name].shard_shape(leaf.shape)) for name, leaf in params.items()]
    return {
        "devices": devices,
        "weights": sum(shards),
        "largest leaf": max(shards),
        "mask update, bytes": _touched(masks),
        "whole update, bytes": _touched(update),
        "whole update, scratch": update.memory_analysis().temp_size_in_bytes,
        "all-reduces": sum(one.times for one in reduces),
        "all-reduced": sum(one.times * one.bytes for one in reduces),
        "largest all-reduce": max((one.bytes for one in reduces), default=0),
        "moves": sum(one.times for one in told if one.kind != hlo.REDUCES),
    }


def _touched(program: Any) -> float:
    """Bytes read and written by one device, as XLA estimates them: the body of a loop once."""
    analysis = program.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["bytes accessed"])


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    chosen = Sizes(**chosen | {"devices": tuple(chosen["devices"])})
    for number in chosen.devices:
        print(json.dumps(measure(chosen, number)), flush=True)
