"""Exact top-k masks without a sort: which entries of one leaf or of many are the highest, by counting."""

from jaxpruner.selection import counts, score_reading
from jaxpruner.selection.in_rows import highest_of_each, n_of_m
from jaxpruner.selection.score_reading import Scores, order_preserving_keys
from jaxpruner.selection.top_k import (
    Choosing,
    Competition,
    Regrowth,
    count_true,
    is_one_cpu,
    select,
    together,
    top_k_mask,
    top_k_masks,
)

__all__ = [
    "Choosing",
    "Competition",
    "Regrowth",
    "Scores",
    "count_true",
    "counts",
    "highest_of_each",
    "is_one_cpu",
    "n_of_m",
    "order_preserving_keys",
    "score_reading",
    "select",
    "together",
    "top_k_mask",
    "top_k_masks",
]
