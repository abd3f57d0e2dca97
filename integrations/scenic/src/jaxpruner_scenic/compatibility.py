"""Finds Scenic, and lets its trainers be imported without two packages that most of them never use.

Nothing of Scenic is changed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from typing import Any

COMMIT = "4a38d47"  # the one that is tested
INSTALL = (
    f"Install it from its repository: pip install --no-deps 'git+https://github.com/google-research/scenic@{COMMIT}'"
)

# Imported at the top of modules that all trainers import, but used only by functions that few call.
_OPTIONAL = {
    "big_vision.utils": "checkpoints of big_vision; install it from https://github.com/google-research/big_vision",
    "tensorflow_addons.image": "image operations of the big_transfer pipeline; its project has ended, and no release "
    "fits this TensorFlow",
}


def load() -> None:
    """Makes Scenic importable.

    Raises:
      ImportError: if there is no Scenic, or only PyPI's project of that name; it names the remedy.
    """
    spec = importlib.util.find_spec("scenic")
    folders = [pathlib.Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    found = any((folder / "train_lib").is_dir() for folder in folders)
    if spec is None or (spec.origin is None and not found):  # a folder of that name is no package
        raise ImportError(f"No module named 'scenic'. {INSTALL}", name="scenic")
    if not found:
        raise ImportError(
            f"The package 'scenic' in {folders[0]} is PyPI's language for scenarios, not "
            f"Google's library for vision: it has no scenic.train_lib. First: pip uninstall scenic. {INSTALL}",
            name="scenic",
        )
    for name, what in _OPTIONAL.items():
        stand_in(name, what)


def stand_in(name: str, what: str) -> bool:
    """Puts an empty module in the place of `package.module` if the package is not installed; using it raises.

    Returns:
      Whether it did.
    """
    package = name.partition(".")[0]
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return False
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = []
    sys.modules[name] = _Missing(name, what)
    for module in (package, name):
        sys.modules[module].__spec__ = importlib.machinery.ModuleSpec(module, None)
    setattr(sys.modules[package], name.rpartition(".")[2], sys.modules[name])
    return True


class _Missing(types.ModuleType):
    def __init__(self, name: str, what: str):
        super().__init__(name)
        self._what = what

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what the import system asks of every module
            raise AttributeError(attribute)
        raise ImportError(f"{self.__name__}.{attribute}: not installed. It is for {self._what}.")
