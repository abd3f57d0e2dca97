"""Who takes part in a round, as a pure function of seed and round. A bit-exact resume needs this."""

from __future__ import annotations

from typing import Any

import fedjax
import jax
import numpy as np

# Branches of a seed's keys. Updaters draw masks with fold_in(fold_in(key(seed), update), leaf), and keys that are split
# from a seed are such keys too; with branches past any count of updates, neither a client's dropout nor an initial
# parameter comes from the random bits of a mask.
PARAMS, CLIENTS = 2**31 - 1, 2**31 - 2


class SeededDataset(fedjax.ClientDataset):
    """A client's data with its own shuffling seed.

    FedJAX takes the seed from the batch hyperparameters. There it is the same in all rounds or, by default,
    a new one from the system at each call.
    """

    def __init__(self, dataset: fedjax.ClientDataset, seed: int):
        super().__init__(dataset.raw_examples, dataset.preprocessor)
        self._seed = seed

    def shuffle_repeat_batch(self, hparams: Any = None, **kwargs: Any) -> Any:
        """As in FedJAX, with this seed in place of that of `hparams`."""
        return super().shuffle_repeat_batch(hparams, **(kwargs | {"seed": self._seed}))


def branch_key(seed: int, branch: int) -> Any:
    """A key for one purpose, `PARAMS` or `CLIENTS`, of a training with this seed."""
    return jax.random.fold_in(jax.random.PRNGKey(seed), branch)


def sample_clients(
    data: fedjax.FederatedData, num_clients: int, seed: int, round_num: int
) -> list[tuple[fedjax.ClientId, fedjax.ClientDataset, Any]]:
    """The clients of a round, without replacement, for `FederatedAlgorithm.apply`.

    Args:
      data: all clients.
      num_clients: how many take part.
      seed: of the whole training.
      round_num: which round; together with `seed` it decides who takes part, the keys and how data are shuffled.

    Returns:
      (client id, data, key) of each.

    Raises:
      ValueError: if there are fewer clients than that.

    Examples:
      >>> data = fedjax.InMemoryFederatedData({b"%d" % i: {"x": np.ones((4, 2))} for i in range(10)})
      >>> clients, again = (sample_clients(data, num_clients=3, seed=0, round_num=7) for _ in range(2))
      >>> [name for name, _, _ in clients] == [name for name, _, _ in again]
      True
    """
    if not 1 <= num_clients <= data.num_clients():
        raise ValueError(
            f"num_clients: {num_clients} clients a round cannot be taken from {data.num_clients()}; "
            "give a number between 1 and that."
        )
    generator = np.random.default_rng([seed, round_num])
    ids = list(data.client_ids())
    chosen = [ids[i] for i in generator.choice(len(ids), num_clients, replace=False)]
    shuffles = generator.integers(2**32, size=num_clients)
    keys = jax.random.split(jax.random.fold_in(branch_key(seed, CLIENTS), round_num), num_clients)
    return [
        (client_id, SeededDataset(dataset, int(shuffle)), key)
        for (client_id, dataset), shuffle, key in zip(data.get_clients(chosen), shuffles, keys, strict=True)
    ]
