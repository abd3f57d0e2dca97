"""The one place where a baseline is registered."""

from __future__ import annotations

import importlib

from jaxpruner_baselines.baseline import Baseline
from jaxpruner_baselines.hush import hushed

# name -> module:attribute; imported when asked for, as some need an extra.
MODULES = {
    "digits_vit": "jaxpruner_baselines.digits_vit:BASELINE",
    "later_methods": "jaxpruner_baselines.later_methods:BASELINE",
    "stock_trainers": "jaxpruner_baselines.stock_trainers:BASELINE",
    "compact": "jaxpruner_baselines.compact:BASELINE",
    "oneshot": "jaxpruner_baselines.oneshot:BASELINE",
    "oneshot_retrieval": "jaxpruner_baselines.oneshot:RETRIEVAL",
    "vit": "jaxpruner_baselines.scenic_images:VIT",
    "resnet": "jaxpruner_baselines.scenic_images:RESNET",
    "t5": "jaxpruner_baselines.t5:BASELINE",
    "fed_emnist": "jaxpruner_baselines.fed_emnist:BASELINE",
    "dqn": "jaxpruner_baselines.dqn:BASELINE",
}


def get(name: str) -> Baseline:
    module, _, attribute = MODULES[name].partition(":")
    with hushed():
        return getattr(importlib.import_module(module), attribute)
