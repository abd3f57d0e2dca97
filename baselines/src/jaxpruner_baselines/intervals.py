"""How certain a comparison is: a bootstrap over seeds and test examples.

A method's value is the mean of what its runs score on single test examples. Seeds and examples are both drawn anew,
with replacement and independently of one another, which has the variance of both (Owen, 2007, "The pigeonhole
bootstrap"). All methods see the same draws, so that two of them are compared in pairs: runs of one seed had the same
data in the same order, and were tested on the same examples.

With few seeds a bootstrap's intervals are too narrow: of five, by about a tenth.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

import numpy as np
from scipy import stats

RESAMPLES = 4000
LEVEL = 0.95


def pack(values: np.ndarray) -> str:
    """What a run scored on each test example, as a text for its row: right or wrong in a bit, numbers as float32."""
    values = np.asarray(values)
    if values.dtype == bool:
        kind, content = "bits", np.packbits(values).tobytes()
    else:
        kind, content = "float32", values.astype("<f4").tobytes()
    return f"{kind}:{len(values)}:{base64.b64encode(content).decode()}"


def unpack(text: str) -> np.ndarray:
    """float64 of shape (examples,); see `pack`."""
    kind, count, content = text.split(":")
    packed = base64.b64decode(content)
    if kind == "bits":
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=int(count)).astype(float)
    return np.frombuffer(packed, "<f4").astype(float)


def resampled_means(scores: Mapping[str, Mapping[int, np.ndarray]], seed: int = 0) -> dict[str, np.ndarray]:
    """The mean of each method in each of `RESAMPLES` draws, over the seeds that all methods have.

    Args:
      scores: of each method, by seed, what its run scored on each test example.
      seed: of the draws.

    Returns:
      Of each method an array of shape (RESAMPLES,); nothing where no seed is common to all.
    """
    seeds = sorted(set.intersection(*(set(runs) for runs in scores.values()))) if scores else []
    if not seeds:
        return {}
    table = np.stack([[runs[seed] for seed in seeds] for runs in scores.values()])  # methods, seeds, examples
    generator = np.random.default_rng(seed)
    shares = [
        generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count for count in table.shape[1:]
    ]
    means = np.einsum("msr,rs->mr", table @ shares[1].T, shares[0])
    return dict(zip(scores, means, strict=True))


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle `LEVEL` of the samples that are numbers; NaN where there are none."""
    if not np.isfinite(samples).any():
        return np.nan, np.nan
    low, high = np.nanquantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def is_higher(ours: np.ndarray, other: np.ndarray) -> bool | None:
    """Whether one mean is higher than another, None where the interval of their difference has zero in it."""
    low, high = interval(ours - other)
    return True if low > 0 else False if high < 0 else None


def rank_correlations(means: Mapping[str, np.ndarray], published: Mapping[str, float]) -> np.ndarray:
    """Spearman's rank correlation with published numbers in each draw, over the methods that both have."""
    both = [method for method in means if method in published]
    ranks = stats.rankdata([published[method] for method in both])
    drawn = stats.rankdata([means[method] for method in both], axis=0)
    ranks, drawn = ranks - ranks.mean(), drawn - drawn.mean(axis=0)
    with np.errstate(invalid="ignore"):  # all of a draw may be equal
        return ranks @ drawn / np.sqrt((ranks**2).sum() * (drawn**2).sum(axis=0))
