"""Counted bytes against what serialization really gives, and who holds which mask."""

from __future__ import annotations

import federated_cases as cases
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpruner_fedjax
from jaxpruner_fedjax import ClientUpdates, Ledger
from jaxpruner_fedjax.communication import LeafTraffic

shapes = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)
dtypes = st.sampled_from([np.float32, np.float16, np.float64])
shares = st.none() | st.floats(0.01, 1.0)


@st.composite
def leaves(draw):
    """(parameter on its mask, mask or None)."""
    shape, dtype, seed = draw(shapes), draw(dtypes), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.99])) if draw(st.booleans()) else None
    param = np.asarray(rng.normal(size=shape) + 3, dtype)
    return (param if mask is None else np.asarray(param * mask, dtype)), mask


def serialized_down(param, mask) -> tuple[bytes, bytes]:
    """The values and the mask, as a server would write them."""
    if mask is None:
        return param.tobytes(), b""
    return param[mask].tobytes(), np.packbits(mask).tobytes()


def serialized_up(param, mask, updates) -> int:
    """The bytes of the shortest way to write a client's changes."""
    candidates = param[mask] if updates.masked and mask is not None else param.ravel()
    if updates.top_k is None or param.ndim < 2 or not candidates.size:
        return len(candidates.tobytes())
    k = min(candidates.size, max(1, round(updates.top_k * candidates.size)))
    chosen = np.zeros(candidates.size, bool)
    chosen[np.argsort(-np.abs(candidates), kind="stable")[:k]] = True
    where = [np.flatnonzero(chosen).astype(np.uint32).tobytes(), np.packbits(chosen).tobytes()]
    if chosen.all():
        where.append(b"")
    return len(candidates[chosen].tobytes()) + min(map(len, where))


@settings(max_examples=60, deadline=None)
@given(st.lists(leaves(), min_size=1, max_size=4), st.booleans(), shares)
def test_counted_bytes_are_serialized_bytes(tree, masked, top_k):
    params, masks = [param for param, _ in tree], [mask for _, mask in tree]
    updates = ClientUpdates(masked=masked, top_k=top_k)
    ledger = Ledger(["a", "b"], params, updates)
    written = [serialized_down(*leaf) for leaf in tree]
    values = sum(len(part) for part, _ in written)
    bits = sum(len(part) for (_, part), mask in zip(written, masks, strict=True) if mask is not None and not mask.all())
    up = sum(serialized_up(param, mask, updates) for param, mask in tree)

    first = ledger.record(["a"], params, masks)
    assert first == (values + bits, up)
    assert ledger.record(["a", "b"], params, masks) == (2 * values + bits, 2 * up)
    assert ledger.record(["b", "a"], params, masks) == (2 * values, 2 * up)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_client_gets_exactly_the_masks_that_changed_since_it_came_last(data):
    shapes = [(3, 5), (4, 4), (7,)]
    params = [np.zeros(shape, np.float32) for shape in shapes]
    ledger = Ledger("abc", params)
    held = {client: [np.ones(shape, bool) for shape in shapes] for client in "abc"}
    for _ in range(data.draw(st.integers(1, 6))):
        # Few different masks, so that some leaves stay as they are and some go back to what they were.
        seeds = data.draw(st.tuples(*(st.integers(-1, 2) for _ in shapes)))
        masks = [
            np.ones(shape, bool) if seed < 0 else np.arange(np.prod(shape)).reshape(shape) % (seed + 2) == 0
            for shape, seed in zip(shapes, seeds, strict=True)
        ]
        clients = data.draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True))
        sent = 0
        for client in clients:
            changed = [new for new, old in zip(masks, held[client], strict=True) if not np.array_equal(new, old)]
            sent += sum(len(np.packbits(mask).tobytes()) for mask in changed)
            held[client] = masks
        values = len(clients) * sum(4 * int(mask.sum()) for mask in masks)
        assert ledger.record(clients, params, masks).down == values + sent


@given(st.integers(0, 10**9), st.floats(1e-6, 1.0), st.booleans())
def test_top_k_counts(candidates, share, masked):
    updates = ClientUpdates(masked=masked, top_k=share)
    leaf = LeafTraffic(10**9, candidates if masked else 10**9, 4, True, False)
    k = leaf.top_k(updates)
    assert min(1, leaf.candidates(updates)) <= k <= leaf.candidates(updates)
    assert abs(k - share * leaf.candidates(updates)) <= 1
    assert leaf.up(updates) <= 4 * leaf.candidates(updates) + -(-leaf.candidates(updates) // 8)


def test_a_client_that_comes_back_gets_the_new_mask_once():
    params = [np.zeros((4, 8), np.float32)]
    old, new = np.zeros((4, 8), bool), np.zeros((4, 8), bool)
    old[0], new[:2] = True, True
    ledger = Ledger("xyz", params)
    assert ledger.record("x", params, [old]).down == 8 * 4 + 4
    assert ledger.record("xy", params, [old]).down == 2 * 8 * 4 + 4
    assert ledger.record("y", params, [new]).down == 16 * 4 + 4
    assert ledger.record("xyz", params, [new]).down == 3 * 16 * 4 + 2 * 4
    assert ledger.record("xyz", params, [new]) == (3 * 16 * 4, 3 * 32 * 4)


def test_masks_of_ones_are_held_by_all_and_dense_is_4_bytes_a_weight():
    params = [np.ones((4, 8), np.float32), np.ones(8, np.float32)]
    assert Ledger("x", params).record("x", params, [np.ones((4, 8), bool), None]) == (160, 160)
    assert Ledger("x", params).record("x", params, [None, None]) == (160, 160)


def test_parameters_that_are_not_on_their_mask_yet_are_sent_whole():
    optimizer = cases.server("static_sparse")
    states = cases.run(cases.fed_avg(optimizer), rounds=1)
    size = sum(leaf.size for leaf in jax.tree.leaves(states[0].params))
    ledger = Ledger(cases.digits().client_ids(), states[0].params)
    before, after = (ledger.record([b"f0000_00"], state.params, optimizer.masks(state)) for state in states)
    assert before == (4 * size, 4 * size)
    assert after.down < size * 1.1


def test_what_clients_hold_survives_a_restart():
    params, mask = [np.zeros((4, 8), np.float32)], np.eye(4, 8, dtype=bool)
    ledger = Ledger("xy", params)
    ledger.record("x", params, [mask])
    resumed = Ledger("xy", params)
    resumed.held = ledger.held.copy()
    assert resumed.record("x", params, [mask]).down == 4 * 4
    assert resumed.record("y", params, [mask]).down == 4 * 4 + 4


def test_an_unknown_client():
    with pytest.raises(ValueError, match="'q' is none of the 2 clients"):
        Ledger("xy", [np.zeros(3)]).record("q", [np.zeros(3)], [None])


def test_bytes_of_a_training_follow_its_sparsity():
    optimizer = cases.server("magnitude", packed=True)
    algorithm = cases.masked(optimizer, masked=True, top_k=0.1)
    states = cases.run(algorithm)
    updates = ClientUpdates(masked=True, top_k=0.1)
    ledger = jaxpruner_fedjax.Ledger(cases.digits().client_ids(), states[0].params, updates)
    rounds = []
    for round_num, state in enumerate(states[:-1]):
        ids = [client_id for client_id, *_ in cases.clients(round_num)]
        rounds.append(ledger.record(ids, state.params, optimizer.masks(state)))
    dense = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(states[0].params))
    assert rounds[0].down == dense
    assert rounds[-1].down < 0.35 * dense
    assert rounds[-1].up < 0.1 * dense
