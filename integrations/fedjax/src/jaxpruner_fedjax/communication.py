r"""What clients send, and how many bytes travel in a round.

A message has the values that the receiver cannot know, and a mask only if the receiver does not hold
it yet. With :math:`n` weights in a leaf, :math:`k` of them on its mask and :math:`b` bytes per value (4 for float32):

- server to client: :math:`k b`, and :math:`\lceil n / 8 \rceil` if the mask of this leaf is not the one that this
  client had last;
- client to server, stock: :math:`n b`;
- client to server, masked: :math:`k b`;
- client to server, the largest j changes of c candidates (:math:`c = k` if masked, else :math:`n`):
  :math:`j b`, and :math:`\min(4 j, \lceil c / 8 \rceil)` for their positions, as a list or a bitmap.

Before the first round all clients hold the mask of ones. Leaves that are not pruned have :math:`k = n` and no
mask. The few bytes of a message that do not grow with the model (shapes, the number of examples) are left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpruner import trees

INDEX_BYTES = 4
DENSE = 0  # the digest of a leaf without zeros in its mask, which everyone holds from the start


@dataclasses.dataclass(frozen=True)
class ClientUpdates:
    """What a client sends to the server.

    Attributes:
      masked: whether clients train and send only the weights on the server's masks.
      top_k: the share of the candidate weights (those on the mask if masked, else all) whose change is
        sent: the largest by magnitude in each leaf of two or more axes; None sends all.

    Raises:
      ValueError: if `top_k` is not in (0, 1].

    Examples:
      >>> masks = {"w": np.arange(1000).reshape(100, 10) % 5 == 0}  # 200 of 1000 weights are kept
      >>> params = {"w": np.float32(masks["w"])}
      >>> for updates in (ClientUpdates(), ClientUpdates(masked=True), ClientUpdates(masked=True, top_k=0.05)):
      ...     print(Ledger(["a client"], params, updates).record(["a client"], params, masks).up, "bytes")
      4000 bytes
      800 bytes
      65 bytes
    """

    masked: bool = False
    top_k: float | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and not 0 < self.top_k <= 1:
            raise ValueError(f"top_k: {self.top_k!r} is outside (0, 1]; it is the share of the changes that is sent.")


class LeafTraffic(NamedTuple):
    """One leaf as messages see it.

    Attributes:
      size: entries.
      kept: entries on the mask.
      value_bytes: bytes of one entry.
      is_pruned: whether it has a mask.
      is_vector: whether it has fewer than two axes; then it is always sent whole, whatever `top_k` is.
    """

    size: int
    kept: int
    value_bytes: int
    is_pruned: bool
    is_vector: bool

    @property
    def down(self) -> int:
        """Bytes of the values that the server sends."""
        return self.kept * self.value_bytes

    @property
    def mask(self) -> int:
        """Bytes of the mask."""
        return _bits(self.size) if self.is_pruned else 0

    def candidates(self, updates: ClientUpdates) -> int:
        """Entries that a client may change."""
        return self.kept if updates.masked else self.size

    def top_k(self, updates: ClientUpdates) -> int | None:
        """How many changes a client sends; None if it sends all."""
        if updates.top_k is None or self.is_vector:
            return None
        candidates = self.candidates(updates)
        return min(candidates, max(1, round(updates.top_k * candidates)))

    def up(self, updates: ClientUpdates) -> int:
        """Bytes that a client sends."""
        candidates, sent = self.candidates(updates), self.top_k(updates)
        if sent is None or sent == candidates:
            return candidates * self.value_bytes
        return sent * self.value_bytes + min(INDEX_BYTES * sent, _bits(candidates))


def leaf_traffic(params: Any, masks: Any) -> list[LeafTraffic]:
    """The leaves of `params` in flattening order.

    Args:
      params: the server's parameters.
      masks: their masks, None where a leaf is not pruned; all ones where everything is sent.
    """
    leaves = jax.tree.leaves(params)
    return [
        LeafTraffic(
            size=leaf.size,
            kept=leaf.size if mask is None else int(np.count_nonzero(mask)),
            value_bytes=leaf.dtype.itemsize,
            is_pruned=mask is not None,
            is_vector=leaf.ndim < 2,
        )
        for leaf, mask in zip(leaves, jax.tree.leaves(masks, is_leaf=trees.is_unpruned), strict=True)
    ]


def masks_on_wire(params: Any, masks: Any) -> Any:
    """The masks that describe `params` as they are: all ones where a leaf does not lie on its mask yet.

    `static_sparse`, `set` and `rigl` have masks before the first round, but the stock algorithms hold dense
    parameters until its end.
    """

    def describe(param, mask):
        mask = np.asarray(mask)
        return mask if not np.any(np.asarray(param)[~mask]) else np.ones_like(mask)

    return trees.map_pruned(describe, params, masks)


class Traffic(NamedTuple):
    """Bytes of one round over all its clients.

    Examples:
      >>> params = {"w": np.ones((100, 10), np.float32)}
      >>> ledger = Ledger(["a", "b", "c"], params)
      >>> rounds = [ledger.record(clients, params, {"w": None}) for clients in (["a", "b"], ["c", "a"], ["b"])]
      >>> Traffic(*map(sum, zip(*rounds)))  # of the whole training
      Traffic(down=20000, up=20000)
    """

    down: int
    up: int


class Ledger:
    """Counts the bytes of each round, and knows which mask each client holds.

    Args:
      client_ids: all clients.
      params: parameters like the server's, or their shapes; only their number of leaves counts.
      updates: what clients send; the default is that of the stock algorithms.

    Attributes:
      held: digests of the masks that each client holds, int64 of shape (clients, leaves), clients in the order of
        `client_ids`; save it with a checkpoint and restore it to resume.

    Examples:
      >>> masks = {"w": np.arange(1000).reshape(100, 10) % 5 == 0}  # 200 of 1000 weights are kept
      >>> params = {"w": np.float32(masks["w"])}
      >>> ledger = Ledger(["a", "b"], params)
      >>> [ledger.record([client], params, masks).down for client in ("a", "b", "a")]  # "a" has the mask by then
      [925, 925, 800]
    """

    def __init__(self, client_ids: Iterable[Hashable], params: Any, updates: ClientUpdates = ClientUpdates()):
        self.updates = updates
        self._places = {client_id: place for place, client_id in enumerate(client_ids)}
        self.held = np.full((len(self._places), len(jax.tree.leaves(params))), DENSE, np.int64)

    def record(self, client_ids: Sequence[Hashable], params: Any, masks: Any) -> Traffic:
        """The bytes of a round. Call it with what the server holds before the round.

        Args:
          client_ids: the clients that take part.
          params: the parameters that the server sends.
          masks: its boolean masks (`SparseOptimizer.masks`), None where a leaf is not pruned.

        Raises:
          ValueError: for a client that was not named at the start.
        """
        unknown = [client_id for client_id in client_ids if client_id not in self._places]
        if unknown:
            raise ValueError(f"client_ids: {unknown[0]!r} is none of the {len(self._places)} clients of this ledger.")
        masks = masks_on_wire(params, masks)
        leaves = leaf_traffic(params, masks)
        digests = np.array([_digest(mask) for mask in jax.tree.leaves(masks, is_leaf=trees.is_unpruned)], np.int64)
        places = [self._places[client_id] for client_id in client_ids]
        stale = self.held[places] != digests
        self.held[places] = digests
        mask_bytes = np.array([leaf.mask for leaf in leaves], np.int64)
        return Traffic(
            down=len(places) * sum(leaf.down for leaf in leaves) + int((stale * mask_bytes).sum()),
            up=len(places) * sum(leaf.up(self.updates) for leaf in leaves),
        )


def _bits(count: int) -> int:
    return -(-count // 8)


def _digest(mask: Any) -> int:
    if mask is None or (mask := np.asarray(mask)).all():
        return DENSE
    digest = hashlib.sha256(np.packbits(mask).tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
