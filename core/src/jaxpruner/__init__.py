"""JaxPruner: pruning and sparse training for JAX as optax transformations."""

from jaxpruner import (
    algorithms,
    api,
    base_updater,
    mask_calculator,
    sparsity_distributions,
    sparsity_schedules,
    sparsity_types,
    utils,
)
from jaxpruner.algorithms import (
    SET,
    GlobalMagnitudePruning,
    GlobalSaliencyPruning,
    MagnitudePruning,
    NoPruning,
    PreserveSparsity,
    RandomPruning,
    RigL,
    SaliencyPruning,
    StaticRandomSparse,
    SteMagnitudePruning,
    SteRandomPruning,
)
from jaxpruner.api import (
    ALGORITHM_REGISTRY,
    all_algorithm_names,
    create_updater_from_config,
    init_projection,
    register_algorithm,
    sparsify,
)
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.calibration.oneshot import prune_oneshot
from jaxpruner.compaction.compact import Compact, Report, compact
from jaxpruner.compaction.finding import find_groups
from jaxpruner.compaction.groups import Group, Groups
from jaxpruner.inspection.checks import check_schedule, check_sparse
from jaxpruner.inspection.description import check_resumed, describe
from jaxpruner.inspection.flops import shifted_parameters, summarize_flops
from jaxpruner.sparsity_schedules import (
    NoUpdateSchedule,
    OneShotSchedule,
    PeriodicSchedule,
    PolynomialSchedule,
)
from jaxpruner.sparsity_types import SparsityType
from jaxpruner.training.projection import (
    SparseState,
    StraightThroughState,
    apply_mask,
    apply_state_masks,
    begin_step,
    end_step,
    project,
)
from jaxpruner.training.sharding import state_shardings
from jaxpruner.utils import summarize_intersection, summarize_sparsity

__version__ = "0.1.0"

__all__ = [
    "ALGORITHM_REGISTRY",
    "SET",
    "BaseUpdater",
    "Compact",
    "GlobalMagnitudePruning",
    "GlobalSaliencyPruning",
    "Group",
    "Groups",
    "MagnitudePruning",
    "NoPruning",
    "NoUpdateSchedule",
    "OneShotSchedule",
    "PeriodicSchedule",
    "PolynomialSchedule",
    "PreserveSparsity",
    "RandomPruning",
    "Report",
    "RigL",
    "SaliencyPruning",
    "SparseState",
    "SparsityType",
    "StaticRandomSparse",
    "SteMagnitudePruning",
    "SteRandomPruning",
    "StraightThroughState",
    "algorithms",
    "all_algorithm_names",
    "api",
    "apply_mask",
    "apply_state_masks",
    "base_updater",
    "begin_step",
    "check_resumed",
    "check_schedule",
    "check_sparse",
    "compact",
    "create_updater_from_config",
    "describe",
    "end_step",
    "find_groups",
    "init_projection",
    "mask_calculator",
    "project",
    "prune_oneshot",
    "register_algorithm",
    "shifted_parameters",
    "sparsify",
    "sparsity_distributions",
    "sparsity_schedules",
    "sparsity_types",
    "state_shardings",
    "summarize_flops",
    "summarize_intersection",
    "summarize_sparsity",
    "utils",
]
