"""From configuration to updater, and `sparsify`. This is the only module that parses strings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import optax

from jaxpruner import algorithms, sparsity_distributions, sparsity_schedules
from jaxpruner.base_updater import BaseUpdater
from jaxpruner.inspection import checks
from jaxpruner.structure_strings import parse_sparsity_type
from jaxpruner.training import projection
from jaxpruner.training.fit import FROM_PARAMS

ALGORITHM_REGISTRY: dict[str, Callable[..., BaseUpdater]] = {
    "no_prune": algorithms.NoPruning,
    "magnitude": algorithms.MagnitudePruning,
    "random": algorithms.RandomPruning,
    "saliency": algorithms.SaliencyPruning,
    "magnitude_ste": algorithms.SteMagnitudePruning,
    "random_ste": algorithms.SteRandomPruning,
    "global_magnitude": algorithms.GlobalMagnitudePruning,
    "global_saliency": algorithms.GlobalSaliencyPruning,
    "static_sparse": algorithms.StaticRandomSparse,
    "rigl": algorithms.RigL,
    "set": algorithms.SET,
    "preserve": algorithms.PreserveSparsity,
    "lamp": algorithms.LampPruning,
    "movement": algorithms.MovementPruning,
    "soft_movement": algorithms.SoftMovementPruning,
    "fisher": algorithms.FisherPruning,
    "adam_fisher": algorithms.AdamFisherPruning,
    "acdc": algorithms.ACDC,
    "granet": algorithms.GraNet,
    "mest": algorithms.MEST,
    "srigl": algorithms.SRigL,
    "sr_ste": algorithms.SrSte,
    "top_kast": algorithms.TopKast,
    "snip": algorithms.SNIP,
    "grasp": algorithms.GraSP,
    "synflow": algorithms.SynFlow,
}

_DISTRIBUTIONS = {"uniform": sparsity_distributions.uniform, "erk": sparsity_distributions.erk}

# Keys that every algorithm accepts, so that one template serves all; some have no use for some.
_COMMON_KEYS = (
    "algorithm",
    "dist_type",
    "sparsity",
    "sparsity_type",
    "update_freq",
    "update_start_step",
    "update_end_step",
    "initial_sparsity",
    "drop_fraction",
    "filter_fn",
    "custom_sparsity_map",
)

# Fields that take the place of common keys, which would have no effect beside them.
_IN_PLACE_OF = {
    "sparsity_distribution_fn": ("sparsity", "dist_type", "filter_fn", "custom_sparsity_map"),
    "scheduler": ("update_start_step", "update_end_step", "update_freq"),
    "topk_fn": ("sparsity_type",),
    "drop_fraction_fn": ("drop_fraction",),
}

# Algorithms that take their sparsity from the parameters, or have none.
_WITHOUT_SPARSITY = ("no_prune", "preserve")


def sparsify(
    inner: optax.GradientTransformation, updater: BaseUpdater | Mapping[str, Any] | None = None, /, **config: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes training with an optax optimizer sparse.

    After `params = optax.apply_updates(params, updates)`, pruned entries are exactly 0 and kept
    entries are bitwise what `inner` would have given them. The transformation must come last in a
    chain (`optax.chain(clip, sparsify(adam, ...))`): anything after it would change the updates
    that set pruned entries to 0. The same holds for wrappers that scale updates.

    Args:
      inner: any optax optimizer.
      updater: an algorithm, or a configuration of `create_updater_from_config` as a mapping or
        `ml_collections.ConfigDict`.
      **config: the configuration as keyword arguments, in place of `updater`.

    Returns:
      An optax transformation whose state is a `SparseState`.

    Raises:
      ValueError: if the configuration is not valid, or would not make the training sparse: it has no schedule, one
        that never reaches the target, or a structure that disagrees with the sparsity.

    Examples:
      >>> import jax.numpy as jnp, optax, jaxpruner
      >>> tx = jaxpruner.sparsify(
      ...     optax.adamw(3e-4), algorithm="magnitude", sparsity=0.75, update_start_step=0, update_end_step=0
      ... )
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 4))}, tx.init(params), params)
      >>> int(jnp.count_nonzero(optax.apply_updates(params, updates)["kernel"]))
      2
    """
    if updater is not None and config:
        raise ValueError(
            f"sparsify: got an updater and the keywords {sorted(config)}; put everything into one of the two."
        )
    if not isinstance(updater, BaseUpdater | None) and not hasattr(updater, "items"):
        raise ValueError(
            f"sparsify: {updater!r} is neither an updater nor a configuration; write "
            "sparsify(tx, algorithm=..., sparsity=...)."
        )
    if not isinstance(updater, BaseUpdater):
        given: Mapping[str, Any] = config if updater is None else updater
        updater = create_updater_from_config(given)
        _check_start(updater, given)
    checks.check_schedule(updater)
    tx = updater.sparsify_optax(inner)
    return tx._replace(init=_CheckedInit(tx.init, updater))


def _check_start(updater: BaseUpdater, config: Mapping[str, Any]) -> None:
    ignored = [key for key in ("update_end_step", "update_freq") if config.get(key) is not None]
    has_start = config.get("update_start_step") is not None or config.get("scheduler") is not None
    if updater.follows_schedule and ignored and not has_start:
        raise ValueError(
            f"update_start_step: missing, so {ignored[0]}={config[ignored[0]]} would have no effect; give the step of "
            f"the first masks, or leave {' and '.join(ignored)} out."
        )


@dataclasses.dataclass(frozen=True)
class _CheckedInit:
    """`init`, once the sparsities of the parameters are known to be what was asked for."""

    init: Callable[[Any], projection.SparseState]
    updater: BaseUpdater

    def __call__(self, params: Any) -> projection.SparseState:
        checks.check_targets(self.updater, params)
        return self.init(params)


def init_projection(updater: BaseUpdater, params: Any) -> projection.SparseState:
    """The state for `project`, or for `begin_step` and `end_step`, at count 0.

    Raises:
      ValueError: as `sparsify` does, for what would not make the training sparse.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> updater = jaxpruner.create_updater_from_config({"algorithm": "static_sparse", "sparsity": 0.75})
      >>> state = jaxpruner.init_projection(updater, {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)})
      >>> int(state.masks["kernel"].sum()), state.masks["bias"], int(state.count)
      (2, MaskedNode(), 0)
    """
    checks.check_schedule(updater)
    checks.check_targets(updater, params)
    return projection.init_state(updater, params)


def create_updater_from_config(config: Mapping[str, Any]) -> BaseUpdater:
    """The algorithm that a configuration names.

    Keys (a mapping or `ml_collections.ConfigDict`):
      algorithm: a name of `all_algorithm_names()`.
      sparsity: final fraction of zeros, in [0, 1).
      dist_type: `uniform` (default) or `erk`; global algorithms have their own.
      sparsity_type: `unstructured` (default, but `per_output` for `srigl`), `nm_2,4` or `nm_2:4`, `block_4,4`,
        `channel_-1`; with an axis: `nm_2,4,axis=0`, `nm_2,4,axis=0:1` (folded), `nm_2,4,axis=input`,
        `block_4,4,axes=1:2`, `channel_input`; `gradual_nm_2,4`, unstructured before it is n:m; if the adapter of a
        framework finds groups in its model (see `find_groups`): `groups`, `groups_*mlp*:*attention*` (patterns),
        `groups,multiple_of=8`, `groups,budget=flops`; or anything that `BaseUpdater.sparsity_type` takes.
      update_start_step, update_end_step, update_freq: masks are made on multiples of `update_freq`
        (default 1) from start to end. Each is sparser than the one before, along a cubic polynomial, and the last has
        exactly the final sparsity. If start equals end, there is one mask at the final sparsity; without a start, none.
      initial_sparsity: where the polynomial starts (default 0), or `from_params`: zeros of the parameters at the first
        step stay, and pruning continues from them (see `masks` of `BaseUpdater`).
      drop_fraction: share of active weights that SET, MEST, RigL, SRigL and GraNet replace, cosine-decayed to 0 at
        `update_end_step` (default 0.1).
      filter_fn: `filter_fn(path, param)` selects the parameters to prune (default: two or more axes).
      custom_sparsity_map: path or pattern -> sparsity; the most specific pattern wins.
      Anything else is passed to the algorithm, such as `use_packed_masks`, `stack_axes` and `rng_seed`. Fields of
      `BaseUpdater` that say the same as keys above stand in place of them: `sparsity_distribution_fn`, `scheduler`,
      `topk_fn`, `drop_fraction_fn`, `masks`.

    Raises:
      ValueError: for unknown keys and values, with the list of valid ones, and for two keys that say the same.

    Examples:
      >>> import jax.numpy as jnp, jaxpruner
      >>> updater = jaxpruner.create_updater_from_config({"algorithm": "magnitude", "sparsity": 0.5})
      >>> pruned, masks = updater.instant_sparsify({"w": jnp.asarray([[1.0, -3.0], [2.0, 0.5]])})
      >>> pruned["w"].tolist()
      [[0.0, -3.0], [2.0, 0.0]]
    """
    # None says "not given", as in templates.
    config = {key: value for key, value in config.items() if value is not None}
    name = config.get("algorithm")
    if not isinstance(name, str) or name not in ALGORITHM_REGISTRY:
        raise ValueError(
            f"algorithm: {name!r} is not known; jaxpruner.all_algorithm_names() are {', '.join(all_algorithm_names())}."
        )
    algorithm = ALGORITHM_REGISTRY[name]
    accepted = _accepted_fields(algorithm, config)
    fields = {key: value for key, value in config.items() if key not in _COMMON_KEYS}
    if unknown := sorted(set(fields) - accepted):
        raise ValueError(
            f"{', '.join(unknown)}: no such key for algorithm {name!r}; valid keys are "
            f"{', '.join([*_COMMON_KEYS, *sorted(accepted - set(_COMMON_KEYS))])}."
        )
    if "sparsity" in accepted and "sparsity_distribution_fn" in fields:
        raise ValueError(
            f"sparsity_distribution_fn: algorithm {name!r} distributes by its own threshold; give sparsity= instead."
        )
    _check_once(config, accepted)
    _parse_distribution(config.get("dist_type", "uniform"))
    if name not in _WITHOUT_SPARSITY and not {"sparsity", "sparsity_distribution_fn"} & set(config):
        raise ValueError("sparsity: missing; give the final fraction of zeros, such as sparsity=0.8.")
    offered = _common_fields(config, getattr(algorithm, "gradual_schedule", sparsity_schedules.PolynomialSchedule))
    if name in _WITHOUT_SPARSITY:
        for key in ("scheduler", "masks"):
            offered.pop(key, None)
    return algorithm(**{key: value for key, value in offered.items() if key in accepted} | fields)


def register_algorithm(name: str, algorithm: Callable[..., BaseUpdater]) -> None:
    """Makes an algorithm known to configurations.

    Args:
      name: the value of `algorithm` in configurations.
      algorithm: a class or function that takes the fields of `BaseUpdater` it needs as keywords.

    Raises:
      ValueError: if the name belongs to another algorithm.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxpruner
      >>> class SmallGradients(jaxpruner.BaseUpdater):
      ...     def calculate_scores(self, params, sparse_state=None, grads=None, **kwargs):
      ...         return jax.tree.map(lambda grad: -jnp.abs(grad), grads)
      >>> jaxpruner.register_algorithm("small_gradients", SmallGradients)
      >>> updater = jaxpruner.create_updater_from_config({"algorithm": "small_gradients", "sparsity": 0.5})
      >>> updater.instant_sparsify({"w": jnp.ones((1, 4))}, grads={"w": jnp.arange(4.0)[None]})[0]["w"].tolist()
      [[1.0, 1.0, 0.0, 0.0]]
    """
    if ALGORITHM_REGISTRY.setdefault(name, algorithm) is not algorithm:
        raise ValueError(f"register_algorithm: {name!r} is taken by {ALGORITHM_REGISTRY[name]}; choose another name.")


def all_algorithm_names() -> tuple[str, ...]:
    """The names that configurations may use.

    Examples:
      >>> import jaxpruner
      >>> [name for name in jaxpruner.all_algorithm_names() if name.startswith("global")]
      ['global_magnitude', 'global_saliency']
    """
    return tuple(ALGORITHM_REGISTRY)


def _check_once(config: Mapping[str, Any], accepted: set[str]) -> None:
    """Raises a ValueError if a common key and a field say the same thing, of which the field alone would count."""
    pairs = [(field, key) for field, keys in _IN_PLACE_OF.items() for key in keys]
    if "drop_fraction_fn" in accepted - set(config):
        pairs.remove(("scheduler", "update_end_step"))  # the drop fraction ends there, too
    # A number is for the schedule, the word for the masks.
    is_number = not isinstance(config.get("initial_sparsity"), str)
    if is_number or not isinstance(config.get("masks"), str):
        pairs.append(("scheduler" if is_number else "masks", "initial_sparsity"))
    for field, key in pairs:
        if field in config and key in config:
            raise ValueError(f"{field}: stands in place of {key}, which would have no effect; give one of the two.")


def _common_fields(config: Mapping[str, Any], gradual: type[sparsity_schedules.Schedule]) -> dict[str, Any]:
    """Constructor arguments from the common keys; an algorithm takes those that it has."""
    if not callable(config.get("filter_fn", callable)):
        raise ValueError(f"filter_fn: {config['filter_fn']!r} is no function; give one of (path, param).")
    if not hasattr(config.get("custom_sparsity_map", {}), "items"):
        raise ValueError("custom_sparsity_map: not a mapping; give {path or pattern: sparsity}.")
    distribution = _parse_distribution(config.get("dist_type", "uniform"))
    placement = {key: config[key] for key in ("filter_fn", "custom_sparsity_map") if key in config}
    if "custom_sparsity_map" in placement:
        placement["custom_sparsity_map"] = dict(placement["custom_sparsity_map"].items())
    offered: dict[str, Any] = dict(placement)
    if "sparsity" in config:
        sparsity_distributions.check_sparsity("Default sparsity", config["sparsity"])
        offered["sparsity"] = config["sparsity"]
        offered["sparsity_distribution_fn"] = functools.partial(distribution, sparsity=config["sparsity"], **placement)
    initial = _parse_initial_sparsity(config)
    if initial == FROM_PARAMS:
        offered["masks"] = FROM_PARAMS
    sparsity_schedules.check_period(config.get("update_freq", 1))
    # Without a start the algorithm's own schedule stands, which makes no updates.
    if "update_start_step" in config:
        offered["scheduler"] = _parse_schedule(config, gradual, 0.0 if initial == FROM_PARAMS else initial)
    offered["drop_fraction_fn"] = _parse_drop_fraction(config)
    if "sparsity_type" in config:
        offered["sparsity_type"] = parse_sparsity_type(config["sparsity_type"])
    return offered


def _parse_distribution(dist_type: Any) -> Callable[..., Any]:
    if not isinstance(dist_type, str) or dist_type not in _DISTRIBUTIONS:
        raise ValueError(f"dist_type: {dist_type!r} is not known; use one of {', '.join(_DISTRIBUTIONS)}.")
    return _DISTRIBUTIONS[dist_type]


def _parse_initial_sparsity(config: Mapping[str, Any]) -> Any:
    initial = config.get("initial_sparsity", 0.0)
    if initial != FROM_PARAMS and not (isinstance(initial, numbers.Real) and 0 <= float(initial) < 1):
        raise ValueError(
            f"initial_sparsity: {initial!r} is outside [0, 1); give the share of zeros that the schedule starts from, "
            f"or {FROM_PARAMS!r}, which keeps the zeros of the parameters."
        )
    return initial


def _parse_schedule(
    config: Mapping[str, Any], gradual: type[sparsity_schedules.Schedule], initial_sparsity: float
) -> sparsity_schedules.Schedule:
    start, end = config["update_start_step"], config.get("update_end_step")
    if start == end:
        return sparsity_schedules.OneShotSchedule(start)
    dates = {"update_freq": config.get("update_freq", 1), "update_start_step": start, "update_end_step": end}
    if issubclass(gradual, sparsity_schedules.PolynomialSchedule):
        return gradual(initial_sparsity=initial_sparsity, **dates)
    if initial_sparsity:
        raise ValueError(
            f"initial_sparsity: {initial_sparsity!r} has no effect on algorithm {config['algorithm']!r}, whose "
            "sparsity does not rise; leave it out."
        )
    return gradual(**dates)


def _parse_drop_fraction(config: Mapping[str, Any]) -> Callable[[Any], Any]:
    fraction, end = config.get("drop_fraction", 0.1), config.get("update_end_step", 0)
    if not isinstance(fraction, numbers.Real) or not 0 <= float(fraction) <= 1:
        raise ValueError(f"drop_fraction: {fraction!r} is outside [0, 1]; it is a share of the active weights.")
    if not isinstance(end, numbers.Integral) or end < 0:
        raise ValueError(f"update_end_step: {end!r} is not a step; give an integer of 0 or more.")
    return sparsity_schedules.CosineDecay(float(fraction), int(end))


def config_keys() -> tuple[str, ...]:
    """All keys that `create_updater_from_config` takes, for one algorithm or another.

    Examples:
      >>> import jaxpruner
      >>> {"sparsity", "update_freq", "skip_gradients"} <= set(jaxpruner.config_keys())
      True
    """
    own = (_accepted_fields(algorithm, {}) for algorithm in ALGORITHM_REGISTRY.values())
    return tuple(sorted(set(_COMMON_KEYS).union(*own)))


def _accepted_fields(algorithm: Callable[..., BaseUpdater], asked: Mapping[str, Any]) -> set[str]:
    parameters = inspect.signature(algorithm).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_all:
        return names
    # It passes them on to an updater: the fields that every updater has, and the updater's own keys.
    common = {field.name for field in dataclasses.fields(BaseUpdater)}
    return names | common | (set(asked) - set(_COMMON_KEYS))
