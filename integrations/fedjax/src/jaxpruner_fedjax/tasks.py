"""The data and model of a training: FedJAX's own tasks, or your own function."""

from __future__ import annotations

import importlib
import os
from typing import Any

import fedjax
import requests

EMNIST_URL = "https://storage.googleapis.com/gresearch/fedjax/emnist/"
EMNIST_FILES = ("federated_emnist_train.sqlite", "federated_emnist_test.sqlite")
TIMEOUT = 10  # seconds, to find out whether the data can be had at all

Task = tuple[fedjax.FederatedData, fedjax.FederatedData, fedjax.Model]


def load_task(name: str, cache_dir: str | None = None) -> Task:
    """The (training data, test data, model) of a task.

    Args:
      name: one of `fedjax.training.ALL_TASKS`, or `module:function` for a function that returns the three.
      cache_dir: where FedJAX keeps what it downloads; by default `~/.cache/fedjax`.

    Raises:
      ValueError: for an unknown name, or a function that returns something else.
      FileNotFoundError: if the data are not there and cannot be fetched; it says what to do.
    """
    module, _, function = name.partition(":")
    if function:
        try:
            make: Any = getattr(importlib.import_module(module), function)
            if not callable(make):
                raise TypeError(f"{function!r} of {module!r} is no function")
        except (ImportError, AttributeError, TypeError, ValueError) as error:  # the latter two: of ".name" and ""
            raise ValueError(
                f"task {name!r}: {error}; give module:function of a function that can be imported."
            ) from error
        return _check_task(name, make())
    if name not in fedjax.training.ALL_TASKS:
        raise ValueError(
            f"task {name!r} is not known; use one of {', '.join(fedjax.training.ALL_TASKS)}, or module:function of a "
            "function that returns (training data, test data, model)."
        )
    if name.startswith("EMNIST_"):
        require_emnist(cache_dir)
    try:
        return fedjax.training.get_task(name, cache_dir=cache_dir)
    except (requests.RequestException, OSError) as error:
        folder = cache_dir or fedjax.datasets.downloads.default_cache_dir()
        raise FileNotFoundError(
            f"The data of {name} are not all in {folder}, and cannot be fetched from here ({error}).\n"
            f"On a machine that can, start the same training, let it fetch them, and copy what it puts into its "
            f"{fedjax.datasets.downloads.default_cache_dir()} to {folder} under the same names."
        ) from error


def _check_task(name: str, made: Any) -> Task:
    kinds = (fedjax.FederatedData, fedjax.FederatedData, fedjax.Model)
    is_task = isinstance(made, tuple | list) and len(made) == len(kinds)
    if not (is_task and all(isinstance(part, kind) for part, kind in zip(made, kinds, strict=True))):
        found = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple | list) else repr(made)
        raise ValueError(
            f"task {name!r}: returns ({found}); return (training data, test data, model): two fedjax.FederatedData "
            "and a fedjax.Model."
        )
    return tuple(made)


def require_emnist(cache_dir: str | None = None) -> None:
    """Checks in seconds that federated EMNIST is there, or that FedJAX will be able to fetch it.

    Raises:
      FileNotFoundError: if not; it says what to download and where to put it.
    """
    folder = cache_dir or fedjax.datasets.downloads.default_cache_dir()
    missing = [name for name in EMNIST_FILES if not os.path.exists(os.path.join(folder, name))]
    try:
        for name in missing:
            # By the library that FedJAX downloads with, so that proxies and certificates apply as they will then.
            requests.head(EMNIST_URL + name, timeout=TIMEOUT, allow_redirects=True).raise_for_status()
    except requests.RequestException as error:
        urls = "\n".join(f"  {EMNIST_URL}{name}" for name in missing)
        raise FileNotFoundError(
            f"Federated EMNIST is not in {folder}, and cannot be fetched from here ({error}).\n"
            f"On a machine that can, download\n{urls}\nand put them into {folder} under the same names."
        ) from error
