"""One layer of one-shot pruning: its solver against the same in PyTorch, and how it grows with the width."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxpruner
from jaxpruner_baselines.benchmarks import peers
from jaxpruner_baselines.benchmarks.figures import Figure, Reach, alternate, timed
from jaxpruner_baselines.benchmarks.masks import Events
from jaxpruner_baselines.memory import Peak

# A transformer of 7B parameters, as Llama 2: kernels of 4096x4096 and 4096x11008, 32 layers.
WEIGHTS_7B = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Square layers; sparsities of 50 % and 2:4."""

    widths: tuple[int, ...] = (512, 1024, 2048, 4096)
    tokens: int = 2048
    repeats: int = 3


QUICK = Sizes(widths=(32,), tokens=64, repeats=2)
STRUCTURES = {"unstructured": {"sparsity": 0.5}, "2:4": {"sparsity_type": "nm_2,4"}}


def oneshot_layers(sizes: Sizes) -> Events:
    """`prune_oneshot` of one layer with SparseGPT, statistics included, against PyTorch on the same CPU."""
    for width in sizes.widths:
        rng = np.random.default_rng(width)
        weights = rng.normal(size=(width, width)).astype(np.float32)
        inputs = (rng.normal(size=(sizes.tokens, width)) * np.exp(rng.normal(size=width))).astype(np.float32)
        for name, options in STRUCTURES.items():
            sides: dict[str, Callable[[], Any]] = {"ours": functools.partial(_ours, weights, inputs, options)}
            if peers.has_torch():
                sides["torch"] = functools.partial(_torch, weights, inputs, name == "2:4")
            times = yield from alternate(sides, dict.fromkeys(sides, sizes.repeats))
            with Peak() as peak:
                jax.block_until_ready(sides["ours"]())
            config = {"width": width, "tokens": sizes.tokens, "structure": name}
            row = f"SparseGPT of a layer {width}x{width}, {name}"
            if "torch" in sides:
                yield timed(row, times, "ours", "torch", Reach(at_least=1.0), config)
            yield Figure(f"{row}: peak", peak.bytes, "its weights", weights.nbytes, "bytes",
                         peak.bytes / weights.nbytes, False, Reach(), config)  # fmt: skip
            if width == sizes.widths[-1]:
                # As long a weight, and as wide.
                hours = statistics.median(times["ours"]) / 3.6e6 * WEIGHTS_7B / weights.size
                row = f"SparseGPT of 7B weights at this rate, {name}"
                yield Figure(row, hours, "a day", 24.0, "h", hours / 24, False, Reach(at_most=1.0), config)


def _forward(params: Any, x: Any) -> Any:
    return x @ params["kernel"]


def _ours(weights: np.ndarray, inputs: np.ndarray, options: dict[str, Any]) -> Any:
    return jaxpruner.prune_oneshot(_forward, {"kernel": weights}, [inputs], algorithm="sparsegpt", **options)


def _torch(weights: np.ndarray, inputs: np.ndarray, is_24: bool, block: int = 128) -> Any:
    """Algorithm 1 of Frantar & Alistarh (2023), with half of the weights of each block, or 2 of each 4."""
    import torch

    w, x = torch.tensor(weights.T).contiguous(), torch.tensor(inputs)
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        rows, factor = w[:, start:end].clone(), inverse[start:end, start:end]
        errors = torch.zeros_like(rows)
        scores = rows**2 / factor.diagonal() ** 2
        gone = scores <= scores.flatten().kthvalue(scores.numel() // 2).values
        for j in range(end - start):
            if is_24 and j % 4 == 0:
                group = rows[:, j : j + 4] ** 2 / factor.diagonal()[j : j + 4] ** 2
                gone[:, j : j + 4] = False
                gone.scatter_(1, j + group.topk(2, dim=1, largest=False).indices, True)
            errors[:, j] = torch.where(gone[:, j], rows[:, j], 0.0) / factor[j, j]
            rows[:, j:] -= errors[:, j : j + 1] * factor[j : j + 1, j:]
            rows[:, j] = torch.where(gone[:, j], 0.0, rows[:, j])
        w[:, start:end] = rows
        w[:, end:] -= errors @ inverse[start:end, end:]
    return w
