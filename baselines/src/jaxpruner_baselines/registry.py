"""The one place where a baseline is registered."""

from __future__ import annotations

import importlib

from jaxpruner_baselines.baseline import Baseline
from jaxpruner_baselines.hush import hushed

# name -> module with a `BASELINE`; imported when asked for, as some need an extra.
MODULES = {
    "digits_vit": "jaxpruner_baselines.digits_vit",
    "fed_emnist": "jaxpruner_baselines.fed_emnist",
    "dqn": "jaxpruner_baselines.dqn",
}


def get(name: str) -> Baseline:
    with hushed():
        return importlib.import_module(MODULES[name]).BASELINE
