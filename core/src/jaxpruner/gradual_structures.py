"""Structures that are reached gradually: below the final sparsity, masks are less structured."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxpruner.selection.score_reading import as_array
from jaxpruner.sparsity_types import NByM, Unstructured


@dataclasses.dataclass(frozen=True)
class GradualNByM(NByM):
    r"""n:m, reached gradually: the survivors of n:m rank first, then all other weights by their scores.

    A leaf of :math:`N` weights keeps as many as an unstructured one at the same sparsity, but no survivor is pruned. At
    the sparsity :math:`1 - n / m` only the survivors are left (the paper's library has this as an extension). Use it
    with schedules that rise; methods that are sparse from the start regrow within plain n:m.
    """

    def mask(self, scores: Any, sparsity: Any) -> Any:
        scores = as_array(scores)
        survivors = super().mask(scores, 0.5)
        ranked = jnp.where(survivors, jnp.inf, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)))
        return survivors | Unstructured().mask(ranked, sparsity)

    def regrow(self, mask: Any, drop_scores: Any, grow_scores: Any, drop_fraction: Any) -> Any:
        raise ValueError(
            f"gradual n:m cannot be regrown. This is because only its final sparsity is {self.n}:{self.m}; use "
            f"nm_{self.n},{self.m}."
        )
