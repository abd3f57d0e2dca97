"""The named algorithms. Each combines scores, structures and the times when masks are made."""

from jaxpruner.algorithms.at_initialisation import SNIP, GraSP, SynFlow
from jaxpruner.algorithms.global_pruners import GlobalMagnitudePruning, GlobalSaliencyPruning, LampPruning
from jaxpruner.algorithms.gradual import ACDC, GraNet
from jaxpruner.algorithms.preserve import PreserveSparsity
from jaxpruner.algorithms.pruners import (
    MagnitudePruning,
    NoPruning,
    RandomPruning,
    SaliencyPruning,
)
from jaxpruner.algorithms.remembering import (
    AdamFisherPruning,
    FisherPruning,
    MovementPruning,
    SoftMovementPruning,
)
from jaxpruner.algorithms.sparse_trainers import MEST, SET, RigL, StaticRandomSparse
from jaxpruner.algorithms.ste import SrSte, SteMagnitudePruning, SteRandomPruning, TopKast
from jaxpruner.algorithms.structured_rigl import SRigL

__all__ = [
    "ACDC",
    "MEST",
    "SET",
    "SNIP",
    "AdamFisherPruning",
    "FisherPruning",
    "GlobalMagnitudePruning",
    "GlobalSaliencyPruning",
    "GraNet",
    "GraSP",
    "LampPruning",
    "MagnitudePruning",
    "MovementPruning",
    "NoPruning",
    "PreserveSparsity",
    "RandomPruning",
    "RigL",
    "SRigL",
    "SaliencyPruning",
    "SoftMovementPruning",
    "SrSte",
    "StaticRandomSparse",
    "SteMagnitudePruning",
    "SteRandomPruning",
    "SynFlow",
    "TopKast",
]
