"""A configuration in a form that a checkpoint can hold, and what differs from it when a training is resumed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxpruner.base_updater import BaseUpdater

DENSE = "no_prune"
# The keys that determine the layout of a checkpoint's state.
_LAYOUT = ("algorithm", "use_packed_masks")
# Keys that do not change a training.
_FREE = ("is_debug", "scheduler")


def describe(updater: BaseUpdater | None) -> dict[str, Any]:
    """The configuration of an algorithm as JSON: strings, numbers, booleans and None, by the keys of `sparsify`.

    Args:
      updater: the algorithm; None stands for a dense training.

    Examples:
      >>> import jaxpruner
      >>> updater = jaxpruner.create_updater_from_config({"algorithm": "magnitude", "sparsity": 0.8})
      >>> described = jaxpruner.describe(updater)
      >>> described["algorithm"], described["sparsity"], described["schedule"]
      ('magnitude', 0.8, 'NoUpdateSchedule')
    """
    if updater is None:
        return {"algorithm": DENSE}
    described = {"algorithm": _algorithm_name(type(updater))}
    for field in dataclasses.fields(updater):
        value = vars(updater).get(field.name)
        if field.name in _FREE:
            continue
        if field.name == "sparsity_distribution_fn":
            described |= _distribution(value)
        elif field.name == "drop_fraction_fn":
            described["drop_fraction"] = getattr(value, "drop_fraction", _text(value))
        elif field.name == "masks" and value is not None and not isinstance(value, str):
            described["masks"] = "a tree"
        else:
            described[field.name] = _text(value)
    return described | _schedule(updater.scheduler)


def check_resumed(saved: Mapping[str, Any], updater: BaseUpdater | None, where: str) -> list[str]:
    """Compares the configuration of a checkpoint with the current one.

    Args:
      saved: the result of `describe` for the run that wrote the checkpoint.
      updater: the current algorithm; None if the training is dense.
      where: the checkpoint, for messages.

    Returns:
      A line for the log for each other key that differs: from here on, the current configuration holds.

    Raises:
      ValueError: if the state of the checkpoint is of another algorithm or storage. It names the key, both values and
        the remedy.

    Examples:
      >>> import jaxpruner
      >>> before, now = (
      ...     jaxpruner.create_updater_from_config({"algorithm": "magnitude", "sparsity": sparsity})
      ...     for sparsity in (0.5, 0.8)
      ... )
      >>> jaxpruner.check_resumed(jaxpruner.describe(before), now, "runs/1")
      ['sparsity: 0.5 in the run of runs/1, 0.8 now; the configuration at hand holds.']
    """
    now = describe(updater)
    for key in _LAYOUT:
        if key in saved and key in now and saved[key] != now[key]:
            raise ValueError(
                f"{key}: {saved[key]!r} in the run of {where}, {now[key]!r} now, which cannot go on from its state. "
                f"Set {key}={saved[key]!r} to continue it, or start in a new folder from its parameters"
                + ("." if now["algorithm"] == DENSE else " (initial_sparsity='from_params' keeps their zeros).")
            )
    return [
        f"{key}: {saved.get(key)!r} in the run of {where}, {now.get(key)!r} now; the configuration at hand holds."
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]


def _algorithm_name(algorithm: type) -> str:
    from jaxpruner.api import ALGORITHM_REGISTRY

    names = [name for name, registered in ALGORITHM_REGISTRY.items() if registered is algorithm]
    return names[0] if names else f"{algorithm.__module__}.{algorithm.__qualname__}"


def _distribution(value: Any) -> dict[str, Any]:
    if not isinstance(value, functools.partial):
        return {"sparsity_distribution_fn": _text(value)}
    return {"dist_type": value.func.__name__} | {key: _text(item) for key, item in value.keywords.items()}


def _schedule(schedule: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(schedule) if hasattr(schedule, "__dataclass_fields__") else {}
    return {"schedule": type(schedule).__name__} | {key: _text(value) for key, value in fields.items()}


def _text(value: Any) -> Any:
    """A value as JSON; functions by their names, which are the same in the next process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, functools.partial):
        arguments = [*map(_text, value.args), *(f"{key}={_text(item)}" for key, item in value.keywords.items())]
        return f"{_text(value.func)}({', '.join(map(str, arguments))})"
    if hasattr(value, "items"):
        return ", ".join(f"{key}: {_text(item)}" for key, item in sorted(value.items(), key=str))
    if isinstance(value, list | tuple):
        return ", ".join(str(_text(item)) for item in value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        return repr(value)
    return type(value).__qualname__ if " at 0x" in repr(value) else repr(value)
