"""One process of a training over several; `test_distributed.py` starts them.

`python distributed_training.py '{"port": ..., "process": 0, "processes": 2, "algorithm": "rigl", "packed": true,
"folder": ..., "steps": 12, "every": 3, "wait_after": null, "result": ...}'` trains from the newest checkpoint in the
folder to the last step. With `wait_after`, it says `waiting` after that step and waits to be killed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxpruner

WIDTH, HIDDEN, BATCH = 32, 64, 16


def loss_fn(params, batch):
    x, y = batch
    hidden = jax.nn.relu(x @ params["wi"] + params["bias"])
    return jnp.mean((hidden @ params["wo"] - y) ** 2)


def on_mesh(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array over all processes of what each of them knows whole."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def digests(tree) -> list[list[str]]:
    """Of the bytes of each piece of each leaf on this process' devices."""
    return [
        [hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest() for shard in leaf.addressable_shards]
        for leaf in jax.tree.leaves(tree)
    ]


def train(arguments: dict) -> dict:
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "model"))
    place = functools.partial(NamedSharding, mesh)
    where = {
        "wi": place(PartitionSpec("data", "model")),
        "bias": place(PartitionSpec("model")),
        "wo": place(PartitionSpec("model", "data")),
    }
    rng = np.random.default_rng(0)
    draw = {name: rng.normal(size=shape).astype(np.float32) / 8 for name, shape in (
        ("wi", (WIDTH, HIDDEN)), ("bias", (HIDDEN,)), ("wo", (HIDDEN, WIDTH))
    )}  # fmt: skip
    tx = jaxpruner.sparsify(
        optax.adamw(1e-2), algorithm=arguments["algorithm"], sparsity=0.75, use_packed_masks=arguments["packed"],
        drop_fraction=0.3, update_start_step=0, update_end_step=8, update_freq=2,
    )  # fmt: skip
    params = {name: on_mesh(value, where[name]) for name, value in draw.items()}
    state_where = jaxpruner.state_shardings(tx, params)

    @functools.partial(jax.jit, out_shardings=(where, state_where), donate_argnums=(0, 1))
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    with ocp.CheckpointManager(
        Path(arguments["folder"]), options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    ) as manager:
        started = manager.latest_step() or 0
        if started:
            state = jax.eval_shape(tx.init, params)
            target = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                {"params": params, "state": state},
                {"params": where, "state": state_where},
            )
            restored = manager.restore(started, args=ocp.args.StandardRestore(target))
            params, state = restored["params"], restored["state"]
        else:
            state = jax.jit(tx.init, out_shardings=state_where)(params)
        for i in range(started, arguments["steps"]):
            rng = np.random.default_rng(i)
            rows = place(PartitionSpec("data"))
            batch = [on_mesh(rng.normal(size=(BATCH, WIDTH)).astype(np.float32), rows) for _ in range(2)]
            params, state = step(params, state, batch)
            if (i + 1) % arguments["every"] == 0:
                manager.save(i + 1, args=ocp.args.StandardSave({"params": params, "state": state}))
                manager.wait_until_finished()
            if i + 1 == arguments["wait_after"]:
                jax.block_until_ready(params)
                print("waiting", flush=True)
                time.sleep(600)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(state_where), strict=True)
    return {
        "started": started,
        "count": int(state.count),
        "params": digests(params),
        "masks": digests(state.masks),
        "state": digests(state),
        "lies as asked": all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in leaves),
        "kept": {name: int(jnp.count_nonzero(params[name])) for name in ("wi", "wo")},
    }


def main() -> None:
    arguments = json.loads(sys.argv[1])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{arguments['port']}", arguments["processes"], arguments["process"], initialization_timeout=60
    )
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    Path(arguments["result"]).write_text(json.dumps(train(arguments)))


if __name__ == "__main__":
    main()
