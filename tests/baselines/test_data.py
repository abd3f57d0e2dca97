"""The data sets: shapes, and no picture (or hand) on both sides of a split."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpruner_baselines import data


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(
    ("name", "shape", "sizes", "validation_sizes"),
    [("digits", (8, 8, 1), (1414, 383), (1158, 256)), ("mnist_5k", (28, 28, 1), (4000, 1000), (3000, 1000))],
)
def test_shapes_and_ranges(name, shape, sizes, validation_sizes, validation):
    dataset = data.DATASETS[name](validation=validation)
    assert (len(dataset.train), len(dataset.test)) == (validation_sizes if validation else sizes)
    for split in (dataset.train, dataset.test):
        assert split.images.shape == (len(split), *shape)
        assert split.images.dtype == np.float32
        assert split.labels.dtype == np.int32
        assert (split.images.min(), split.images.max()) == (0.0, 1.0)
        assert set(np.unique(split.labels)) == set(range(10))


@pytest.mark.parametrize("name", data.DATASETS)
def test_splits_are_disjoint(name):
    dataset, tuning = data.DATASETS[name](), data.DATASETS[name](validation=True)

    def pictures(split):
        return {image.tobytes() for image in split.images}

    test = pictures(dataset.test)
    for other in (dataset.train, tuning.train, tuning.test):
        assert not test & pictures(other)
    assert not pictures(tuning.train) & pictures(tuning.test)
    assert pictures(tuning.train) | pictures(tuning.test) == pictures(dataset.train)


def test_digits_are_split_by_the_form_they_were_written_on():
    forms = data.digits_forms()
    assert np.array_equal(np.flatnonzero(np.diff(forms)) + 1, data.DIGITS_FORM_STARTS[1:])
    assert all(122 <= count <= 130 for count in np.bincount(forms))
    assert len(data.digits().test) == np.isin(forms, data.DIGITS_TEST_FORMS).sum()
    assert not set(data.DIGITS_TEST_FORMS) & set(data.DIGITS_VALIDATION_FORMS)


def test_mnist_is_split_alike_in_every_class():
    dataset = data.mnist_5k()
    assert np.array_equal(np.bincount(dataset.test.labels), np.full(10, 100))
    assert np.array_equal(np.bincount(dataset.train.labels), np.full(10, 400))
