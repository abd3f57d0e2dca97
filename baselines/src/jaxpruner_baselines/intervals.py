"""How certain a comparison is: a bootstrap over seeds and test examples.

A method's value is the mean of what its runs score on single test examples. Seeds and examples are both drawn anew,
with replacement and independently of one another, which has the variance of both (Owen, 2007, "The pigeonhole
bootstrap"). All methods see the same draws, so that two of them are compared in pairs: runs of one seed had the same
data in the same order, and were tested on the same examples.

A bootstrap of few seeds is too narrow. Deviations from the mean are therefore widened as Student's t is beside the
normal distribution (Hesterberg, 2015, "What teachers should know about the bootstrap"), as if all variance were that of
seeds. Where it is, intervals of five seeds cover what they promise, and those of two a little less (93 % in place of
95 %); where test examples vary more than seeds, intervals are too wide.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping

import numpy as np
from scipy import stats

RESAMPLES = 4000
_AT_ONCE = 250  # draws, of ten thousand examples each in some megabytes
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
    """The mean of each method in each of `RESAMPLES` draws.

    Args:
      scores: of each method, by seed, what its run scored on each test example.
      seed: of the draws.

    Returns:
      Of each method an array of shape (RESAMPLES,); nothing unless all methods have the same seeds, two or more.
    """
    seeds = sorted(set().union(*scores.values()))
    if len(seeds) < 2 or any(set(runs) != set(seeds) for runs in scores.values()):
        return {}
    table = np.stack([[runs[seed] for seed in seeds] for runs in scores.values()])  # methods, seeds, examples
    generator = np.random.default_rng(seed)
    of_seeds, of_examples = table.shape[1:]
    drawn = [
        np.einsum("mrs,rs->mr", _means(table, generator, of_examples, draws), _shares(generator, of_seeds, draws))
        for draws in [_AT_ONCE] * (RESAMPLES // _AT_ONCE)
    ]
    means = table.mean(axis=(1, 2))[:, None]
    widened = means + widening(of_seeds) * (np.concatenate(drawn, axis=1) - means)
    return dict(zip(scores, widened, strict=True))


def widening(seeds: int) -> float:
    """By how much an interval of so many seeds is wider than a bootstrap has it."""
    tail = (1 + LEVEL) / 2
    return float(stats.t.ppf(tail, seeds - 1) / stats.norm.ppf(tail) * np.sqrt(seeds / (seeds - 1)))


def _means(table: np.ndarray, generator: np.random.Generator, count: int, draws: int) -> np.ndarray:
    """Means over drawn examples, of shape (methods, draws, seeds)."""
    return np.swapaxes(table @ _shares(generator, count, draws).T, 1, 2)


def _shares(generator: np.random.Generator, count: int, draws: int) -> np.ndarray:
    """The share of each of `count` in draws of as many with replacement, of shape (draws, count)."""
    rows = generator.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(rows.ravel(), minlength=draws * count).reshape(draws, count) / count


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


def rank_correlation_bounds(means: Mapping[str, np.ndarray], published: Mapping[str, float]) -> tuple[float, float]:
    """The lowest and the highest of Spearman's rank correlations with published numbers that our draws leave open.

    They are those of all orders of the methods which agree with every pair that `is_higher` tells apart. (Correlations
    of single draws would be too low: noise in the ranks of methods that are close to one another lowers each.)

    Args:
      means: of each method in the draws; see `resampled_means`. All orders are tried: ten methods are too many.
      published: numbers by method; those without count for nothing.
    """
    both = [method for method in means if method in published]
    orders = np.array(list(itertools.permutations(range(len(both)))))  # the rank of each method
    for (i, one), (j, other) in itertools.permutations(enumerate(both), 2):
        if is_higher(means[one], means[other]):
            orders = orders[orders[:, i] > orders[:, j]]
    ranks = stats.rankdata([published[method] for method in both])
    ours, ranks = orders - (len(both) - 1) / 2, ranks - ranks.mean()
    found = ours @ ranks / np.sqrt((ours[0] ** 2).sum() * (ranks**2).sum())
    return float(found.min()), float(found.max())
