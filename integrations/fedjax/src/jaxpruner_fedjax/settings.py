"""The settings of a training: a rule for each, and what they make of the server's optimizer."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax

import jaxpruner
from jaxpruner import sparsity_distributions, trees


class Rule(NamedTuple):
    """What a setting must be.

    Attributes:
      holds: whether a value follows the rule.
      words: the rule in words.
    """

    holds: Callable[[Any], bool]
    words: str


def _whole(least: int, below: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Integral) and least <= int(value) < below


def _number(inside: Callable[[float], bool]) -> Callable[[Any], bool]:
    # NaN is never inside.
    return lambda value: isinstance(value, numbers.Real) and inside(float(value))


def _one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, f"known; use one of {', '.join(choices)}")


ANY = Rule(lambda value: True, "")  # told by who reads it
GIVEN = Rule(bool, "given")
COUNT = Rule(_whole(1), "a whole number of 1 or more")
FREQUENCY = Rule(_whole(0), "a whole number of rounds; give 0 for after the last only")
ROUND = Rule(_whole(0), "a round; they count from 0")
SEED = Rule(_whole(0, 2**32), "a seed; give a whole number of 0 or more, below 2**32")
STEP_SIZE = Rule(_number(lambda x: 0 < x < math.inf), "a step size; give a number above 0")
DECAY = Rule(_number(lambda x: 0 <= x < 1), "in [0, 1)")
SWITCH = Rule(lambda value: value in (True, False, None), "true or false")


def option(default: Any, rule: Rule, text: str) -> Any:
    """A field with what must hold for it, and what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"rule": rule, "help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a training; defaults are those of the paper's experiment."""

    task: str = option(None, GIVEN, "A task of FedJAX such as EMNIST_CONV, or module:function")
    cache_dir: str | None = option(None, ANY, "Where FedJAX keeps data (default ~/.cache/fedjax)")
    root_dir: str = option(None, GIVEN, "Root directory of experiment outputs")
    num_rounds: int = option(1000, COUNT, "Number of federated training rounds")
    num_clients_per_round: int = option(50, COUNT, "Clients that take part in a round")
    checkpoint_frequency: int = option(50, FREQUENCY, "Checkpoint frequency in rounds; 0: after the last only")
    eval_frequency: int = option(50, FREQUENCY, "Evaluation frequency in rounds; 0: after the last only")
    seed: int = option(0, SEED, "Decides parameters, clients, shuffling, dropout and masks")
    backend: str = option(
        "jit",
        _one_of("jit", "debug", "pmap"),
        "How FedJAX goes through the clients: jit, debug or pmap; they differ by rounding",
    )
    server_optimizer: str = option("adam", _one_of("adam", "yogi", "adagrad", "sgd"), "adam, yogi, adagrad or sgd")
    server_learning_rate: float = option(10**-2.5, STEP_SIZE, "Server step size")
    server_momentum: float = option(0.0, DECAY, "Momentum of sgd")
    server_beta1: float = option(0.9, DECAY, "Adam and Yogi beta 1")
    server_beta2: float = option(0.999, DECAY, "Adam and Yogi beta 2")
    server_epsilon: float = option(1e-4, STEP_SIZE, "Adam, Yogi and Adagrad epsilon")
    client_learning_rate: float = option(10**-1.5, STEP_SIZE, "Client step size (sgd)")
    client_momentum: float = option(0.0, DECAY, "Client momentum")
    batch_size: int = option(32, COUNT, "Batch size of clients")
    num_epochs: int = option(1, COUNT, "Epochs of clients in a round")
    eval_batch_size: int = option(256, COUNT, "Batch size of the evaluation")
    algorithm: str = option("magnitude", ANY, f"One of {', '.join(jaxpruner.all_algorithm_names())}")
    sparsity: float = option(0.8, ANY, "Final fraction of zeros")
    dist_type: str = option("uniform", ANY, "uniform or erk")
    sparsity_type: str = option(
        "unstructured", ANY, "unstructured, nm_2,4, block_4,4, channel_-1, or groups (whole units)"
    )
    exclude: Sequence[str] | None = option(
        None, ANY, "Parameters to keep dense: paths or patterns with commas between, such as '*/linear_1/w'"
    )
    custom_sparsity_map: Mapping[str, float] | None = option(
        None, ANY, "Parameters with a sparsity of their own, such as '*/conv2_d/w=0.5,*/linear/w=0.9'"
    )
    algorithm_options: Mapping[str, float] | None = option(
        None,
        ANY,
        "What else the algorithm takes: name=number,... such as drop_fraction=0.3 (rigl) or decay=0.95 (fisher)",
    )
    update_start_round: int = option(250, ROUND, "First round of mask updates, from 0")
    update_end_round: int = option(750, ROUND, "No mask updates after this round; the last one has the final sparsity")
    update_freq: int = option(10, COUNT, "Masks are updated in rounds that it divides")
    skip_gradients: bool | None = option(
        None, SWITCH, "Whether the server takes no step in rounds of mask updates (default: with rigl and set only)"
    )
    use_packed_masks: bool = option(False, SWITCH, "Keep a bit a weight instead of a byte")
    masked_clients: bool = option(False, SWITCH, "Clients train and send only what lies on the masks")
    top_k: float | None = option(None, ANY, "Share of the changes that clients send")

    @property
    def numbers(self) -> dict[str, Any]:
        """The settings that decide the numbers of a round, so that a checkpoint is not continued with others.

        They exclude `backend`, which changes numbers only by rounding, and may change with the machine. A training
        continues to the same bits only with the same backend.
        """
        free = ("cache_dir", "root_dir", "num_rounds", "checkpoint_frequency", "eval_frequency", "backend")
        deciding = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # However they were given, and nothing if they say nothing.
        deciding["exclude"] = sorted(self.exclude or ()) or None
        for name in ("custom_sparsity_map", "algorithm_options"):
            deciding[name] = dict(getattr(self, name) or {}) or None
        return {name: value for name, value in deciding.items() if name not in free}


@dataclasses.dataclass(frozen=True)
class Excluding:
    """A `filter_fn` that selects parameters with two or more axes, except those that a path or pattern names."""

    patterns: tuple[str, ...]

    def __call__(self, path: tuple[str, ...], param: Any) -> bool:
        """Whether to prune this parameter."""
        is_named = any(trees.matches(pattern, path) for pattern in self.patterns)
        return not is_named and sparsity_distributions.NOT_DIM_ONE_FILTER_FN(path, param)


def check(config: Config) -> None:
    """Raises a ValueError for settings that make no sense, before anything is loaded."""
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata["rule"]
        if rule is GIVEN and not value:
            raise ValueError(f"{field.name}: missing; give --{field.name}.")
        if not rule.holds(value):
            raise ValueError(f"{field.name}: {value!r} is not {rule.words}.")
    _check_folder(Path(config.root_dir).absolute())
    _check_server(config)
    _check_custom(config)


def _check_folder(root: Path) -> None:
    nearest = next(path for path in (root, *root.parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"root_dir: {nearest} is a file; give a folder, which need not exist.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"root_dir: {nearest} cannot be written to; give another folder, which need not exist.")


# The settings of each server optimizer besides the step size.
_SERVERS: dict[str, tuple[str, ...]] = {
    "adam": ("server_beta1", "server_beta2", "server_epsilon"),
    "yogi": ("server_beta1", "server_beta2", "server_epsilon"),
    "adagrad": ("server_epsilon",),
    "sgd": ("server_momentum",),
}


def _check_server(config: Config) -> None:
    for field in dataclasses.fields(config):
        users = [name for name, own in _SERVERS.items() if field.name in own]
        value = getattr(config, field.name)
        if users and config.server_optimizer not in users and value != field.default:
            raise ValueError(
                f"{field.name}: {value!r} has no use for server_optimizer={config.server_optimizer!r}; leave it out, "
                f"or use {' or '.join(users)}."
            )


def _check_custom(config: Config) -> None:
    if isinstance(config.exclude, str) or not all(isinstance(name, str) and name for name in config.exclude or ()):
        raise ValueError(f"exclude: {config.exclude!r} is not a sequence of paths or patterns.")


def check_excluded(config: Config, params: Any) -> None:
    """Raises a ValueError for a pattern of `exclude` that names no parameter that could be pruned."""
    kernels = [path for path, leaf in trees.named_leaves(params) if leaf.ndim > 1]
    for pattern in config.exclude or ():
        if not any(trees.matches(pattern, path) for path in kernels):
            names = ", ".join(map(trees.leaf_name, kernels))
            raise ValueError(f"exclude: {pattern!r} names no parameter of two or more axes, which are {names}.")


# Keys of the core, and the names of this trainer's settings for them.
_ROUNDS = {"update_start_step": "update_start_round", "update_end_step": "update_end_round"}
_IN_SETTINGS = _ROUNDS | {
    "mask update is at step": "mask update is at round",
    " steps (the last": " rounds (the last, counted from 0,",
    "filter_fn: selects none": "exclude: leaves none",
    "choose a filter_fn that takes some": "exclude fewer",
    "filter_fn selects": "exclude leaves",
    "filter_fn": "--exclude",
}


def in_settings(message: str) -> str:
    """A message of the core, with its keys named as the settings of this trainer."""
    for theirs, ours in _IN_SETTINGS.items():
        message = message.replace(theirs, ours)
    return message


def sparsity_config(config: Config) -> dict[str, Any]:
    """The configuration of JaxPruner. A step of the server is a round.

    Raises:
      ValueError: for an option of the algorithm that has its own setting.
    """
    same = (
        "algorithm", "sparsity", "dist_type", "sparsity_type", "custom_sparsity_map", "update_freq", "skip_gradients",
        "use_packed_masks",
    )  # fmt: skip
    settings = {
        **{name: getattr(config, name) for name in same},
        **{theirs: getattr(config, ours) for theirs, ours in _ROUNDS.items()},
        "filter_fn": Excluding(tuple(config.exclude)) if config.exclude else None,
        "rng_seed": config.seed,
    }
    # Flags are all floats; some options are whole numbers.
    options = {k: int(v) if float(v).is_integer() else v for k, v in (config.algorithm_options or {}).items()}
    if twice := sorted(set(options) & (set(settings) | set(_ROUNDS.values()) | {"seed"})):
        raise ValueError(f"algorithm_options: {twice[0]} has a setting of its own; give that.")
    return settings | options


def inner_optimizer(config: Config) -> optax.GradientTransformation:
    """The dense optimizer of the server."""
    rate, betas = config.server_learning_rate, {"b1": config.server_beta1, "b2": config.server_beta2}
    match config.server_optimizer:
        case "adam":
            return optax.adam(rate, **betas, eps=config.server_epsilon)
        case "yogi":
            return optax.yogi(rate, **betas, eps=config.server_epsilon)
        case "adagrad":
            return optax.adagrad(rate, eps=config.server_epsilon)
        case _:
            return optax.sgd(rate, momentum=config.server_momentum or None)
