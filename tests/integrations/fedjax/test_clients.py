"""Clients on the server's masks, top-k changes, and the combinations that are refused."""

from __future__ import annotations

import federated_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated_cases import fedjax

import jaxpruner
import jaxpruner_fedjax
from jaxpruner_fedjax.clients import create_train_for_each_client, round_input

CLIENT_OPTIMIZERS = {
    "sgd": lambda: fedjax.optimizers.sgd(0.1),
    "momentum": lambda: fedjax.optimizers.sgd(0.1, momentum=0.9),
    "adam": lambda: fedjax.optimizers.adam(0.01),
}


def sparse_state(optimizer):
    """A server that is sparse and has momentum of its own."""
    return cases.run(cases.masked(optimizer), rounds=3)[-1]


def deltas(optimizer, state, client_optimizer, **updates):
    train = create_train_for_each_client(fedjax.model_grad(cases.model()), client_optimizer)
    shared = round_input(optimizer, state, jaxpruner_fedjax.ClientUpdates(**updates))
    batches = [(cid, data.shuffle_repeat_batch(cases.BATCHES), rng) for cid, data, rng in cases.clients()]
    return dict(train(shared, batches))


@pytest.mark.parametrize("client_optimizer", CLIENT_OPTIMIZERS)
def test_masked_clients_send_nothing_outside_the_masks(client_optimizer):
    optimizer = cases.server("magnitude")
    state = sparse_state(optimizer)
    sent = deltas(optimizer, state, CLIENT_OPTIMIZERS[client_optimizer](), masked=True)
    assert len(sent) == 3
    for delta in sent.values():
        ((kernel, mask),) = cases.pruned(optimizer, state, delta)
        assert not kernel[~mask].any()
        assert kernel[mask].any()


@pytest.mark.parametrize("client_optimizer", CLIENT_OPTIMIZERS)
def test_stock_clients_move_pruned_weights(client_optimizer):
    """The trap: they start from a sparse server, and train dense."""
    optimizer = cases.server("magnitude")
    state = sparse_state(optimizer)
    sent = deltas(optimizer, state, CLIENT_OPTIMIZERS[client_optimizer](), masked=False)
    for delta in sent.values():
        ((kernel, mask),) = cases.pruned(optimizer, state, delta)
        assert kernel[~mask].any()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("algorithm", ["no_prune", "magnitude", "static_sparse", "global_saliency", "preserve"])
def test_a_server_of_masked_clients_stays_exactly_sparse(algorithm, packed):
    optimizer = cases.server(algorithm, packed)
    for state in cases.run(cases.masked(optimizer), rounds=2):
        cases.assert_on_masks(optimizer, state)  # also before the first round


@pytest.mark.parametrize("algorithm", ["preserve", "static_sparse", "magnitude"])
def test_masked_clients_keep_the_zeros_that_they_start_from(algorithm):
    """Already in the first round, whose masks are in the parameters alone."""
    sparser = jaxpruner.create_updater_from_config(cases.config("magnitude", sparsity=0.9))
    pruned, masks = sparser.instant_sparsify(cases.params())
    more = {} if algorithm == "preserve" else {"initial_sparsity": "from_params"}
    optimizer = cases.server(algorithm, **more)
    state = cases.masked(optimizer).init(pruned)
    cases.assert_same_bits(state.params, pruned)
    zeros = ~np.asarray(masks["linear"]["w"])
    for delta in deltas(optimizer, state, fedjax.optimizers.sgd(0.1), masked=True).values():
        assert not np.asarray(delta["linear"]["w"])[zeros].any()


def test_neither_masked_nor_top_k_is_fed_avg():
    own = cases.run(cases.masked(cases.server("magnitude"), masked=False), rounds=2)[-1]
    stock = cases.run(cases.fed_avg(cases.server("magnitude")), rounds=2)[-1]
    cases.assert_same_bits(own, stock)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_top_k_sends_the_largest_changes(masked, share):
    optimizer = cases.server("magnitude")
    state = sparse_state(optimizer)
    sgd = fedjax.optimizers.sgd(0.1)
    whole = deltas(optimizer, state, sgd, masked=masked)
    sent = deltas(optimizer, state, sgd, masked=masked, top_k=share)
    masks = jax.tree.leaves(optimizer.masks(state), is_leaf=lambda mask: mask is None)
    for client_id, delta in sent.items():
        for few, every, mask in zip(jax.tree.leaves(delta), jax.tree.leaves(whole[client_id]), masks, strict=True):
            few, every = np.asarray(few), np.asarray(every)
            if few.ndim < 2:
                np.testing.assert_array_equal(few, every)
                continue
            candidates = int(mask.sum()) if masked and mask is not None else few.size
            k = max(1, round(share * candidates))
            cut = np.sort(np.abs(every), axis=None)[::-1][k - 1]
            np.testing.assert_array_equal(few[few != 0], every[few != 0])
            assert np.count_nonzero(few) == min(k, np.count_nonzero(every))
            if np.count_nonzero(few):
                assert np.abs(few[few != 0]).min() >= cut


def test_top_k_with_a_server_that_grows():
    optimizer = cases.server("rigl")
    for state in cases.run(cases.masked(optimizer, masked=False, top_k=0.1), rounds=2)[1:]:
        cases.assert_on_masks(optimizer, state)


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [
        ("rigl", "RigL.*This is because it grows weights outside the masks.*ClientUpdates"),
        ("set", "SET.*This is because it grows weights outside the masks"),
        ("magnitude_ste", "SteMagnitudePruning.*This is because it trains dense weights behind the masks"),
        ("random_ste", "SteRandomPruning.*This is because it trains dense weights behind the masks"),
    ],
)
def test_masked_clients_of_servers_that_need_dense_ones(algorithm, reason):
    for top_k in (None, 0.1):
        with pytest.raises(ValueError, match=reason):
            cases.masked(cases.server(algorithm), masked=True, top_k=top_k)


def test_a_server_without_masks_is_refused():
    with pytest.raises(ValueError, match=r"server_optimizer has no masks.*jaxpruner_fedjax.server_optimizer"):
        cases.masked(fedjax.optimizers.sgd(0.1))


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_top_k_outside_its_range(share):
    with pytest.raises(ValueError, match="outside"):
        jaxpruner_fedjax.ClientUpdates(top_k=share)


def test_a_bad_pattern_is_told_before_the_first_round():
    patterns = {"no/such/*": "nm_2,4"}
    optimizer = jaxpruner_fedjax.server_optimizer(optax.sgd(0.1), cases.config("magnitude", sparsity_type=patterns))
    with pytest.raises(ValueError, match="no/such"):
        cases.masked(optimizer).init(cases.params())


def test_masks_of_the_server_are_those_of_its_parameters():
    optimizer = cases.server("static_sparse", packed=True)
    state = cases.masked(optimizer).init(cases.params())
    total = jaxpruner.summarize_sparsity([jnp.asarray(param) for param, _ in cases.pruned(optimizer, state)])
    assert total["_total_sparsity"] == pytest.approx(0.8, abs=0.01)
