"""OWL: layers with more outliers stay denser (Yin et al., 2024)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpruner import trees
from jaxpruner.calibration import solvers
from jaxpruner.calibration.program import Leaf
from jaxpruner.calibration.running import Layer

# Of the paper: how many times the mean an outlier is, and how far sparsities may be from their mean.
OUTLIER, SPREAD = 5.0, 0.08


def blocks(
    paths: Sequence[trees.KeyPath], turns: Mapping[Leaf, tuple[int, int]]
) -> Callable[[Leaf], tuple[str | int, ...]]:
    """Which block a leaf belongs to: names up to the first with a number, `layers_3`; of a stack a turn of its loop.

    Names that all parameters begin with do not count. If names have no numbers, each leaf is a block.
    """
    together = list(zip(*paths, strict=False))
    common = next((i for i, names in enumerate(together) if len(set(names)) > 1), len(together))

    def block_of(leaf: Leaf) -> tuple[str | int, ...]:
        path = paths[leaf.number]
        numbered = (path[: i + 1] for i in range(common, len(path)) if re.search(r"[0-9]", path[i]))
        return turns[leaf] if leaf in turns else next(numbered, path)

    return block_of


def sparsities(
    layers: Iterable[Layer], block_of: Callable[[Leaf], Any], sparsity: float, spread: float = SPREAD
) -> dict[Leaf, float]:
    r"""The sparsity of each leaf, the same in a block.

    With :math:`d_b` the share of entries of :math:`|w_{ij}| \|x_i\|_2` in block b that are more than five times their
    mean, scaled to :math:`[0, 2 \lambda]`, block b is :math:`1 - s - \lambda'_b` sparse such that the whole is s.

    Args:
      layers: all layers, dense, with the statistics of their inputs.
      block_of: see :func:`blocks`.
      sparsity: of all of them together.
      spread: :math:`\lambda`.

    Raises:
      ValueError: if sparsities around this one would not be in [0, 1).
    """
    if not spread <= sparsity < 1 - spread:
        raise ValueError(
            f"sparsity: {sparsity:g} leaves dist_type='owl' no room for {spread:g} more and less; use 'uniform'."
        )
    leaves_of: dict[Any, list[Leaf]] = {}
    scores: dict[Any, list[Any]] = {}
    shares: dict[Any, list[tuple[float, int]]] = {}
    sizes: dict[Leaf, int] = {}

    def close() -> None:
        for block, parts in scores.items():
            mean = sum(float(part.sum()) for part in parts) / (size := sum(part.size for part in parts))
            outliers = sum(int((part > OUTLIER * mean).sum()) for part in parts)
            shares.setdefault(block, []).append((outliers / size, size))
        scores.clear()

    for layer in layers:
        leaf = layer.use.leaf
        block = block_of(leaf)
        if block not in scores:
            close()  # so that the scores of one block only are kept
        scores.setdefault(block, []).append(jnp.asarray(solvers.wanda(layer.weights, layer.statistics)))
        if leaf not in sizes:
            leaves_of.setdefault(block, []).append(leaf)
        sizes[leaf] = sizes.get(leaf, 0) + layer.weights.size
    close()
    if not leaves_of:  # all have sparsities of their own
        return {}
    ratio = {
        block: sum(share * size for share, size in parts) / sum(size for _, size in parts)
        for block, parts in shares.items()
    }
    low, high = min(ratio.values()), max(ratio.values())
    # If all blocks are alike, none is denser.
    extra = {block: 2 * spread * (each - low) / (high - low) if high > low else 0.0 for block, each in ratio.items()}
    size_of = {block: sum(sizes[leaf] for leaf in leaves) for block, leaves in leaves_of.items()}
    mean = sum(extra[block] * size for block, size in size_of.items()) / math.fsum(size_of.values())
    return {leaf: sparsity - (extra[block] - mean) for block, leaves in leaves_of.items() for leaf in leaves}
