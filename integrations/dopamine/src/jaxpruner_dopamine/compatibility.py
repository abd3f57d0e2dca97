"""Lets Dopamine 4.1 be imported on today's JAX, in an environment that pip or uv can make.

Nothing of Dopamine, JAX or TensorFlow is changed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from typing import Any

WRAPPERS = "baselines.common.atari_wrappers"


def stand_in() -> bool:
    """Lets `dopamine.discrete_domains.atari_lib` import OpenAI's baselines if they are not installed.

    Dopamine needs them only for `use_ppo_preprocessing` and declares no dependency on them, and they do not install
    today. The stand-in raises an ImportError when it is used. If the real module can be found, nothing is done. A
    folder called `baselines` on the path, such as that of this repository, does not count as the module.

    Returns:
      Whether a stand-in was made.
    """
    try:
        found = importlib.util.find_spec(WRAPPERS) is not None
    except ModuleNotFoundError:
        found = False
    if found:
        return False
    parts = WRAPPERS.split(".")
    packages = [".".join(parts[: i + 1]) for i in range(len(parts))]
    modules = {name: sys.modules.get(name) or types.ModuleType(name) for name in packages[:-1]}
    modules[WRAPPERS] = _Missing(WRAPPERS)
    for name, module in modules.items():
        module.__path__ = getattr(module, "__path__", [])
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    return True


class _Missing(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(name)
        raise ImportError(
            f"{WRAPPERS}.{name}: OpenAI's baselines are not installed, and Dopamine's use_ppo_preprocessing needs "
            "them. Set create_atari_environment.use_ppo_preprocessing = False, or put a copy of OpenAI's "
            "baselines on the path."
        )


def load() -> None:
    """Imports Dopamine, without the warnings that it and its dependencies print on import.

    Raises:
      ImportError: if TensorFlow Probability does not fit this JAX; it names the remedy.
    """
    stand_in()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):  # gym's banner; Dopamine imports it for a mode that is gone
            importlib.import_module("gym")
        check_tensorflow_probability()
        importlib.import_module("dopamine.discrete_domains.run_experiment")
        importlib.import_module("dopamine.jax.agents.sac.sac_agent")


def check_tensorflow_probability() -> None:
    """Raises an ImportError that names the remedy if TensorFlow Probability does not fit this JAX."""
    try:
        importlib.import_module("tensorflow_probability.substrates.jax")
    except Exception as error:  # its failures are of many types
        raise ImportError(
            f"tensorflow_probability fails on this JAX ({type(error).__name__}: {error}). Dopamine asks for the last "
            "release, which is too old, and pip puts it over the nightly. Remedy: "
            "pip uninstall -y tensorflow-probability tfp-nightly && pip install --no-deps tfp-nightly"
        ) from error
