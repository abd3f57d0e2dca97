"""How a measured number is shown in tables and plots."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Measure:
    """`header` names a column or an axis, its unit included; numbers are multiplied by `scale`.

    Of what hardly differs between seeds the mean alone is shown.
    """

    header: str
    scale: float = 1.0
    decimals: int = 1
    lower_is_better: bool = False
    differs: bool = True  # between seeds
    logarithmic: bool = False  # its axis in plots

    def shown(self, mean: float, std: float = math.nan) -> str:
        """The mean, and the standard deviation unless it is NaN, as it is of a single seed; a dash for no mean."""
        if math.isnan(mean):
            return "-"
        spread = "" if math.isnan(std) or not self.differs else f" ± {self.scale * std:.{self.decimals}f}"
        return f"{self.scale * mean:,.{self.decimals}f}{spread}"


MEASURES = {
    "accuracy": Measure("accuracy (%)", scale=100),
    "loss": Measure("loss (nats a token)", decimals=3, lower_is_better=True),
    "perplexity": Measure("perplexity", lower_is_better=True, logarithmic=True),
    "perplexity_2026-Trump-1": Measure("address of 2026", lower_is_better=True),
    "perplexity_1981-Carter-1": Measure("of 1981", lower_is_better=True),
    "perplexity_hamlet": Measure("Hamlet", lower_is_better=True),
    "retrieval": Measure("verses found (%)", scale=100),
    "pruning_seconds": Measure("seconds", decimals=0, differs=False),
    "peak_resident_bytes": Measure("peak (GB)", scale=1e-9, decimals=1, differs=False),
    "tokens_per_second": Measure("tokens a second", decimals=0, differs=False),
    "step_milliseconds": Measure("step (ms)", decimals=2, differs=False),
    "speedup": Measure("speed-up", decimals=2, differs=False),
    "return": Measure("return"),
    "bleu": Measure("BLEU"),
    "inference_flops_share": Measure("inference FLOPs (% of dense)", scale=100, differs=False),
    "parameters_share": Measure("parameters (% of dense)", scale=100, differs=False),
    "training_flops_share": Measure("training FLOPs (% of dense)", scale=100, differs=False),
    "dead_units_share": Measure("dead units (%)", scale=100),
}


def measure(name: str) -> Measure:
    return MEASURES.get(name, Measure(name))
