"""What a user would pick instead: masks by sorting, by partial sorting, and those of PyTorch.

Each peer keeps the same number of entries of float scores (those by a threshold alone keep all ties).
PyTorch is an extra of the benchmarks, `pip install 'jaxpruner-baselines[torch]'` (a CPU build will do);
without it its rows are left out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner_baselines.memory import Peak

SPARSITY = 0.8


def kept(size: int) -> int:
    return round(size * (1 - SPARSITY))


def argsort_mask(scores: jax.Array) -> jax.Array:
    """The mask that ranks everything: exact, ties by index, and what a user writes first."""
    order = jnp.argsort(-scores.ravel())
    return jnp.zeros(scores.size, bool).at[order[: kept(scores.size)]].set(True).reshape(scores.shape)


def sort_mask(scores: jax.Array) -> jax.Array:
    return scores >= jnp.sort(scores.ravel())[scores.size - kept(scores.size)]


def top_k_mask(scores: jax.Array) -> jax.Array:
    _, indices = jax.lax.top_k(scores.ravel(), kept(scores.size))
    return jnp.zeros(scores.size, bool).at[indices].set(True).reshape(scores.shape)


JAX_PEERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "jnp.argsort": argsort_mask,
    "jnp.sort": sort_mask,
    "lax.top_k": top_k_mask,
}


def partition_mask(scores: np.ndarray) -> np.ndarray:
    """The mask from the threshold that numpy.partition finds."""
    nth = scores.size - kept(scores.size)
    return scores >= np.partition(scores.ravel(), nth)[nth]


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


NO_TORCH = "torch is not installed: its rows are left out. pip install 'jaxpruner-baselines[torch]' adds them."


def torch_top_k(scores: np.ndarray) -> Callable[[], Any]:
    """A call of torch.topk and a scatter of its indices into a boolean mask."""
    import torch

    tensor = torch.from_numpy(np.require(scores, requirements="W"))  # a copy where it is read-only

    def call():
        flat = tensor.flatten()
        indices = torch.topk(flat, kept(flat.numel()), sorted=False).indices
        return torch.zeros(flat.numel(), dtype=torch.bool).scatter_(0, indices, True).reshape(tensor.shape)

    return call


def torch_global_unstructured(leaves: Sequence[np.ndarray]) -> Callable[[], Any]:
    """A call of torch.nn.utils.prune.global_unstructured over layers of these weights."""
    import torch
    from torch.nn.utils import prune

    tensors = [torch.from_numpy(np.require(leaf, requirements="W")) for leaf in leaves]

    def call():
        layers = []
        for tensor in tensors:
            layer = torch.nn.Module()
            layer.register_parameter("weight", torch.nn.Parameter(tensor, requires_grad=False))  # shared, not copied
            layers.append((layer, "weight"))
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=SPARSITY)
        return [layer.weight_mask for layer, _ in layers]

    return call


@dataclasses.dataclass(frozen=True)
class HostPeer:
    """A peer outside JAX: `make(scores)` gives a call that makes the mask."""

    make: Callable[[np.ndarray], Callable[[], Any]]
    mask_bytes: int  # of one weight


def host_peers() -> dict[str, HostPeer]:
    """Those that are installed."""
    peers = {"numpy.partition": HostPeer(lambda scores: lambda: partition_mask(scores), 1)}
    if has_torch():
        peers["torch.topk"] = HostPeer(torch_top_k, 1)
        peers["torch global_unstructured"] = HostPeer(lambda scores: torch_global_unstructured([scores]), 4)
    return peers


def peak_bytes(name: str, size: int) -> int:
    """How far a fresh process grows at most while a host peer makes one mask, the mask included."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_growth, (name, size))


def _measure_growth(name: str, size: int) -> int:
    # Made by a small call first, so that libraries are loaded and their threads started.
    host_peers()[name].make(np.random.default_rng(0).random(1000, dtype=np.float32))()
    call = host_peers()[name].make(np.random.default_rng(0).random(size, dtype=np.float32))
    with Peak() as peak:
        mask = call()
    del mask
    return peak.bytes
