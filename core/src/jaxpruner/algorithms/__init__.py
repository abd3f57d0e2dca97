"""The named algorithms: short choices among scores, structures and the time masks are made."""

from jaxpruner.algorithms.global_pruners import GlobalMagnitudePruning, GlobalSaliencyPruning
from jaxpruner.algorithms.preserve import PreserveSparsity
from jaxpruner.algorithms.pruners import (
    MagnitudePruning,
    NoPruning,
    RandomPruning,
    SaliencyPruning,
)
from jaxpruner.algorithms.sparse_trainers import SET, RigL, StaticRandomSparse
from jaxpruner.algorithms.ste import SteMagnitudePruning, SteRandomPruning

__all__ = [
    "SET",
    "GlobalMagnitudePruning",
    "GlobalSaliencyPruning",
    "MagnitudePruning",
    "NoPruning",
    "PreserveSparsity",
    "RandomPruning",
    "RigL",
    "SaliencyPruning",
    "StaticRandomSparse",
    "SteMagnitudePruning",
    "SteRandomPruning",
]
