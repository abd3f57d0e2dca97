"""Torch-Pruning with the same architectures, in PyTorch on the CPU.

Both are an extra, `pip install 'jaxpruner-baselines[torch]'`; without them their part of the table is left out.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
import time
import warnings
from typing import Any

import numpy as np

from jaxpruner_baselines.breadth.cases import Size

NOT_INSTALLED = (
    "torch and torch-pruning are not installed: their part is left out. "
    "pip install 'jaxpruner-baselines[torch]' adds it."
)
SPARSITY = 0.5
SEED = 0


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "torch_pruning"))


def names() -> list[str]:
    """The architectures that it is tried with."""
    from jaxpruner_baselines.breadth.torch_networks import NETWORKS

    return list(NETWORKS)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "torch-pruning")}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found out about one architecture.

    Attributes:
      groups: those that it prunes by default, the layers of the results left out.
      units_removed: the share of the parameters that went.
      difference: the largest one to the network whose pruned channels are zero, relative to the largest output; None
        where pruning raises.
      error: what it raises.
      find_seconds: building its graph.
    """

    groups: int
    units_removed: float
    difference: float | None
    error: str | None
    find_seconds: float


def measure(name: str, size: Size) -> Measured:
    """Prunes by half, by magnitude, and compares with a copy in which the same channels are zero."""
    import torch
    import torch_pruning as tp

    from jaxpruner_baselines.breadth.torch_networks import NETWORKS

    torch.manual_seed(SEED)
    network = NETWORKS[name](size)
    _randomize(network.module)
    parameters = sum(p.numel() for p in network.module.parameters())
    masked = _Masked(network.module)
    groups, started = 0, time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                network.module, network.example, importance=tp.importance.GroupMagnitudeImportance(p=1),
                pruning_ratio=SPARSITY, ignored_layers=network.ignored, num_heads=dict(network.heads),
            )  # fmt: skip
            find_seconds = time.perf_counter() - started
            groups = sum(1 for _ in pruner.DG.get_all_groups(
                ignored_layers=network.ignored, root_module_types=pruner.root_module_types
            ))  # fmt: skip
            for group in pruner.step(interactive=True):
                masked.zero(group, pruner.DG)
                group.prune()
        with torch.no_grad():
            got, expected = network.module(network.example).numpy(), masked.copy(network.example).numpy()
    except Exception as error:  # of any kind, in what it supports or does not
        return Measured(groups, 0.0, None, _told(error), time.perf_counter() - started)
    left = sum(p.numel() for p in network.module.parameters())
    difference = float(np.max(np.abs(got - expected)) / (np.max(np.abs(expected)) + 1e-12))
    return Measured(groups, 1 - left / parameters, difference, None, find_seconds)


def _told(error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first[:100]}".replace("|", "/")


def _randomize(module: Any) -> None:
    """Biases and statistics of norms, too, are not 0 and 1."""
    import torch

    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim == 1:
                tensor.copy_(0.5 + 0.5 * torch.rand_like(tensor))


class _Masked:
    """A copy of a network in which what a pruner removes becomes zero."""

    def __init__(self, module: Any):
        self.copy = copy.deepcopy(module)
        self._original = module
        self._left: dict[tuple[str, str], np.ndarray] = {}  # which channels of the copy those of the original are

    def zero(self, group: Any, graph: Any) -> None:
        """Before a group is pruned: the same channels of the copy."""
        names = {id(part): name for name, part in self._original.named_modules()}
        names |= {id(part): name for name, part in self._original.named_parameters()}
        gone: dict[tuple[str, str], tuple[Any, set[int]]] = {}
        for dependency, indices in group:
            part = dependency.target.module
            if id(part) not in names:  # an operation
                continue
            side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
            key = names[id(part)], side
            gone.setdefault(key, (dependency, set()))[1].update(indices)
        for (name, side), (dependency, indices) in gone.items():
            self._zero_one(name, side, dependency, sorted(indices))

    def _zero_one(self, name: str, side: str, dependency: Any, indices: list[int]) -> None:
        import torch
        from torch import nn

        left = self._left.setdefault((name, side), np.arange(self._size(name, side, dependency)))
        channels = torch.from_numpy(left[indices])
        self._left[name, side] = np.delete(left, indices)
        parameters = dict(self.copy.named_parameters())
        with torch.no_grad():
            if name in parameters:
                parameters[name].index_fill_(dependency.target.pruning_dim, channels, 0)
                return
            part = self.copy.get_submodule(name)
            if isinstance(part, nn.LSTM | nn.GRU):
                _zero_recurrent(part, side, channels)
                return
            is_transposed = isinstance(part, nn.ConvTranspose2d | nn.Embedding)
            is_flat = part.weight.ndim == 1
            axis = 0 if is_flat or (side == "out") != is_transposed else 1
            if isinstance(part, nn.Conv2d) and part.groups > 1:
                axis = 0
            part.weight.index_fill_(axis, channels, 0)
            if side == "out" and getattr(part, "bias", None) is not None:
                part.bias.index_fill_(0, channels, 0)

    def _size(self, name: str, side: str, dependency: Any) -> int:
        from torch import nn

        parameters = dict(self.copy.named_parameters())
        if name in parameters:
            return parameters[name].shape[dependency.target.pruning_dim]
        part = self.copy.get_submodule(name)
        if isinstance(part, nn.LSTM | nn.GRU):
            return part.hidden_size if side == "out" else part.input_size
        is_transposed = isinstance(part, nn.ConvTranspose2d | nn.Embedding)
        if part.weight.ndim == 1 or (isinstance(part, nn.Conv2d) and part.groups > 1):
            return part.weight.shape[0]
        return part.weight.shape[0 if (side == "out") != is_transposed else 1]


def _zero_recurrent(part: Any, side: str, channels: Any) -> None:
    import torch

    if side == "in":
        part.weight_ih_l0.index_fill_(1, channels, 0)
        return
    gates = part.weight_hh_l0.shape[0] // part.hidden_size
    rows = torch.cat([channels + gate * part.hidden_size for gate in range(gates)])
    for parameter in (part.weight_ih_l0, part.weight_hh_l0, part.bias_ih_l0, part.bias_hh_l0):
        parameter.index_fill_(0, rows, 0)
    part.weight_hh_l0.index_fill_(1, channels, 0)
