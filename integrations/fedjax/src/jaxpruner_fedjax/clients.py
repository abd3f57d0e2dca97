"""Clients that stay on the server's masks, and that send only their largest changes.

`federated_averaging` is FedJAX's, with these two additions. Its server state is FedJAX's own, so evaluation and
checkpoints stay as they are.

A trap: the stock clients train dense. Even if they start on the masks, their gradients move pruned
weights, and a client optimizer with momentum keeps moving them after a gradient was masked. So masked
clients mask each gradient (no statistics are gathered for pruned weights) and each step's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
from fedjax.algorithms import fed_avg

import jaxpruner
from jaxpruner import selection, trees
from jaxpruner.selection import counts
from jaxpruner_fedjax.communication import ClientUpdates, leaf_traffic
from jaxpruner_fedjax.server import SparseOptimizer, dense_client


def federated_averaging(
    grad_fn: Callable[[Any, Any, Any], Any],
    client_optimizer: fedjax.optimizers.Optimizer,
    server_optimizer: SparseOptimizer,
    client_batch_hparams: fedjax.ShuffleRepeatBatchHParams,
    updates: ClientUpdates = ClientUpdates(masked=True),
) -> fedjax.FederatedAlgorithm:
    r"""Federated averaging with sparse client updates.

    With :math:`w` the server's parameters on their mask :math:`m`, a masked client takes steps
    :math:`v \leftarrow m \odot \mathrm{step}(v, m \odot g)` from :math:`v = m \odot w`, and sends
    :math:`\delta = w - v`, which is exactly 0 outside the mask. With `updates.top_k` the largest :math:`|\delta|` of
    each leaf are sent, and the rest counts as 0.

    Args:
      grad_fn: (params, batch, rng) -> gradients, such as `fedjax.model_grad(model)`.
      client_optimizer: steps the clients; any optimizer except a sparse one.
      server_optimizer: from `jaxpruner_fedjax.server_optimizer`.
      client_batch_hparams: how clients batch their data.
      updates: what clients send.

    Returns:
      A `fedjax.FederatedAlgorithm` with the state of `fedjax.algorithms.fed_avg`. With masked clients, `init` puts
      the parameters on the algorithm's initial masks.

    Raises:
      ValueError: for optimizers and algorithms that cannot be combined in this way.

    Examples:
      >>> import numpy as np, optax
      >>> from jaxpruner_fedjax import sample_clients, server_optimizer
      >>> data = fedjax.InMemoryFederatedData({name: {"x": np.eye(4)} for name in (b"a", b"b")})
      >>> gradients = jax.grad(lambda params, batch, rng: jnp.mean((batch["x"] @ params["w"] - 1) ** 2))
      >>> server = server_optimizer(optax.sgd(1.0), algorithm="static_sparse", sparsity=0.75)
      >>> batches = fedjax.ShuffleRepeatBatchHParams(batch_size=2)
      >>> algorithm = federated_averaging(gradients, fedjax.optimizers.sgd(0.1), server, batches)
      >>> state = algorithm.init({"w": jnp.zeros((4, 2))})
      >>> state, _ = algorithm.apply(state, sample_clients(data, num_clients=2, seed=0, round_num=0))
      >>> int(jnp.count_nonzero(state.params["w"]))  # of 8, which all have gradients
      2
    """
    client_optimizer = dense_client(client_optimizer, "federated_averaging")
    check_combination(server_optimizer, updates)
    train = create_train_for_each_client(grad_fn, client_optimizer)

    def init(params: Any) -> fed_avg.ServerState:
        state = fed_avg.ServerState(params, server_optimizer.init(params))
        if updates.masked:
            state = state.replace(params=jaxpruner.apply_mask(params, server_optimizer.masks(state)))
        return state

    def apply(state: fed_avg.ServerState, clients: Any) -> tuple[fed_avg.ServerState, dict[Any, Any]]:
        sizes = {client_id: len(dataset) for client_id, dataset, _ in clients}
        batches = [(cid, data.shuffle_repeat_batch(client_batch_hparams), rng) for cid, data, rng in clients]
        diagnostics = {}

        def deltas():
            for client_id, delta in train(round_input(server_optimizer, state, updates), batches):
                diagnostics[client_id] = {"delta_l2_norm": fedjax.tree_util.tree_l2_norm(delta)}
                yield delta, sizes[client_id]

        mean = fedjax.tree_util.tree_mean(deltas())
        opt_state, params = server_optimizer.apply(mean, state.opt_state, state.params)
        return fed_avg.ServerState(params, opt_state), diagnostics

    return fedjax.FederatedAlgorithm(init, apply)


def round_input(server_optimizer: SparseOptimizer, state: fed_avg.ServerState, updates: ClientUpdates) -> Any:
    """What all clients of a round share: parameters, masks, and how many changes of each leaf they send.

    `masks` is None at leaves that clients train whole; `top_k` is None at leaves that they send whole.
    """
    masks = server_optimizer.masks(state)
    leaves = leaf_traffic(state.params, masks)
    sent = [None if (k := leaf.top_k(updates)) is None else counts.from_int(k) for leaf in leaves]
    return {
        "params": state.params,
        "masks": masks if updates.masked else jax.tree.map(lambda _: None, state.params),
        "top_k": jax.tree.unflatten(jax.tree.structure(state.params), sent),
    }


def create_train_for_each_client(
    grad_fn: Callable[[Any, Any, Any], Any], client_optimizer: fedjax.optimizers.Optimizer
) -> Callable[[Any, Iterable[Any]], Iterable[tuple[Any, Any]]]:
    """The clients' side: (`round_input`, [(client id, batches, rng)]) -> (client id, delta) of each."""

    def client_init(shared, rng):
        params = jaxpruner.apply_mask(shared["params"], shared["masks"])
        return {
            "params": params,
            "opt_state": client_optimizer.init(params),
            "rng": rng,
            "masks": shared["masks"],
        }

    def client_step(state, batch):
        rng, use_rng = jax.random.split(state["rng"])
        grads = jaxpruner.apply_mask(grad_fn(state["params"], batch, use_rng), state["masks"])
        opt_state, params = client_optimizer.apply(grads, state["opt_state"], state["params"])
        params = jaxpruner.apply_mask(params, state["masks"])
        return state | {"params": params, "opt_state": opt_state, "rng": rng}

    def client_final(shared, state):
        delta = jax.tree.map(jnp.subtract, shared["params"], state["params"])
        delta = jaxpruner.apply_mask(delta, shared["masks"])
        return trees.map_pruned(_largest, delta, shared["top_k"], shared["masks"], otherwise=lambda leaf: leaf)

    return fedjax.for_each_client(client_init, client_step, client_final)


def _largest(delta: Any, k: Any, mask: Any) -> Any:
    # Where fewer than k entries changed, those outside the mask still come last.
    scores = jnp.abs(delta) if mask is None else jnp.where(mask, jnp.abs(delta), -1)
    return jnp.where(selection.top_k_mask(scores, k), delta, 0)


def check_combination(server_optimizer: Any, updates: ClientUpdates) -> None:
    """Raises a ValueError for updates that clients cannot send to such a server."""
    if not isinstance(server_optimizer, SparseOptimizer):
        raise ValueError(
            "federated_averaging: server_optimizer has no masks that clients could respect; make it with "
            "jaxpruner_fedjax.server_optimizer(optax_optimizer, algorithm=..., sparsity=...)."
        )
    updater = server_optimizer.updater
    name = type(updater).__name__
    if updates.masked and updater.regrows:
        raise ValueError(
            f"federated_averaging: masked clients cannot be combined with {name}. This is because it grows weights "
            "outside the masks, and needs dense client gradients to know what happens there (RigL ranks by them). "
            "Use ClientUpdates(masked=False), top_k or not, or an algorithm that only prunes."
        )
    if updates.masked and updater.straight_through:
        raise ValueError(
            f"federated_averaging: masked clients cannot be combined with {name}. This is because it trains dense "
            "weights behind the masks by the clients' changes outside them, and masked clients send none. "
            "Use ClientUpdates(masked=False), top_k or not, or a pruner such as magnitude."
        )
