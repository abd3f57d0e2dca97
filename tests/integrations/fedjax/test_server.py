"""FedJAX's own algorithms with a sparse server optimizer: exact sparsity, every algorithm, dense and packed masks."""

from __future__ import annotations

import dataclasses
import functools

import federated_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated_cases import ALGORITHMS, fedjax

import jaxpruner
import jaxpruner_fedjax


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_stock_fed_avg_keeps_the_server_exactly_sparse(algorithm, packed):
    optimizer = cases.server(algorithm, packed)
    states = cases.run(cases.fed_avg(optimizer))
    for state in states[1:]:
        cases.assert_on_masks(optimizer, state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    leaves = cases.pruned(optimizer, states[-1])
    if algorithm == "no_prune":
        assert leaves == []
        return
    assert len(leaves) == 1 + (algorithm in cases.GLOBAL)
    sizes, kept = [mask.size for _, mask in leaves], [int(mask.sum()) for _, mask in leaves]
    if algorithm in cases.GLOBAL:
        assert sum(kept) == round(sum(sizes) * 0.2)
    elif algorithm != "preserve":  # its parameters had no zeros
        assert kept == [round(size * 0.2) for size in sizes]
    assert int(optimizer.sparse_state(states[-1]).count) == cases.ROUNDS


def test_what_is_not_pruned_is_what_the_inner_optimizer_gives():
    # A power of two, so that a fused multiply-add rounds as a product and a sum do.
    optimizer = jaxpruner_fedjax.server_optimizer(optax.sgd(0.5), cases.config("magnitude"))
    sparse, dense = (cases.run(cases.fed_avg(o), rounds=1)[-1] for o in (optimizer, fedjax.optimizers.sgd(0.5)))
    for one, other in zip(jax.tree.leaves(sparse.params), jax.tree.leaves(dense.params), strict=True):
        kept = np.asarray(one) != 0
        np.testing.assert_array_equal(np.asarray(one)[kept], np.asarray(other)[kept])


def test_no_prune_is_the_dense_server():
    servers = (cases.server("no_prune"), fedjax.optimizers.adam(0.01))
    sparse, dense = (cases.run(cases.fed_avg(server), rounds=2)[-1] for server in servers)
    cases.assert_same_bits(sparse.params, dense.params)


@dataclasses.dataclass
class Replaceable:
    """A server optimizer that can be replaced by another, so that the clients' side compiles once for all tests."""

    now: fedjax.optimizers.Optimizer | None = None

    def init(self, params):
        return self.now.init(params)

    def apply(self, grads, opt_state, params):
        return self.now.apply(grads, opt_state, params)


@functools.cache
def other_algorithms():
    """fed_prox and agnostic_fed_avg, each with its server optimizer."""
    loss, sgd, batches = fedjax.model_per_example_loss(cases.model()), fedjax.optimizers.sgd(0.1), cases.BATCHES
    fed_prox, agnostic = Replaceable(), Replaceable()
    padded = fedjax.PaddedBatchHParams(batch_size=16)
    return (
        (fedjax.algorithms.fed_prox.fed_prox(loss, sgd, fed_prox, batches, proximal_weight=0.1), fed_prox),
        (
            fedjax.algorithms.agnostic_fed_avg.agnostic_federated_averaging(
                loss, sgd, agnostic, batches, padded, [0.5, 0.5], 0.1
            ),
            agnostic,
        ),
    )


# Dense and packed in turn: both with every algorithm are tested above.
@pytest.mark.parametrize(
    ("algorithm", "packed"),
    [pytest.param(name, bool(i % 2), id=f"{name}-{('dense', 'packed')[i % 2]}") for i, name in enumerate(ALGORITHMS)],
)
def test_fed_prox_and_agnostic_fed_avg(algorithm, packed):
    optimizer = cases.server(algorithm, packed)
    for built, replaceable in other_algorithms():
        replaceable.now = optimizer
        states = cases.run(built)
        for state in states[1:]:
            cases.assert_on_masks(optimizer, state)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
        masks = [mask for _, mask in cases.pruned(optimizer, states[-1])]
        if algorithm in cases.GLOBAL:
            assert sum(int(mask.sum()) for mask in masks) == 953
        elif algorithm not in ("no_prune", "preserve"):
            assert [int(mask.sum()) for mask in masks] == [941]


def test_fed_prox_and_agnostic_fed_avg_take_a_sparse_server_as_it_is():
    """Without `Replaceable`."""
    optimizer = cases.server("magnitude")
    loss, sgd = fedjax.model_per_example_loss(cases.model()), fedjax.optimizers.sgd(0.1)
    fed_prox = fedjax.algorithms.fed_prox.fed_prox(loss, sgd, optimizer, cases.BATCHES, proximal_weight=0.1)
    ((built, replaceable), _) = other_algorithms()
    replaceable.now = optimizer
    one, other = (cases.run(algorithm, rounds=1)[-1] for algorithm in (fed_prox, built))
    cases.assert_same_bits(one, other)


def test_saliency_and_rigl_see_the_mean_of_the_clients_changes():
    rng = np.random.default_rng(0)
    params, delta = ({"w": jnp.asarray(rng.normal(size=(20, 10)), jnp.float32)} for _ in range(2))
    optimizer = jaxpruner_fedjax.server_optimizer(
        optax.sgd(0.0), algorithm="saliency", sparsity=0.75, update_start_step=0, update_end_step=0
    )
    _, stepped = optimizer.apply(delta, optimizer.init(params), params)
    scores = np.abs(np.asarray(params["w"] * delta["w"]))
    assert set(np.flatnonzero(stepped["w"])) == set(np.argsort(-scores, axis=None)[:50])


def test_ways_to_say_what_the_server_does():
    ml_collections = pytest.importorskip("ml_collections")
    settings = cases.config("static_sparse", rng_seed=3)
    ways = [
        jaxpruner_fedjax.server_optimizer(optax.adam(0.01), **settings),
        jaxpruner_fedjax.server_optimizer(optax.adam(0.01), settings),
        jaxpruner_fedjax.server_optimizer(optax.adam(0.01), ml_collections.ConfigDict(settings)),
        jaxpruner_fedjax.server_optimizer(optax.adam(0.01), jaxpruner.create_updater_from_config(settings)),
    ]
    first, *others = [way.apply(cases.params(), way.init(cases.params()), cases.params()) for way in ways]
    for other in others:
        cases.assert_same_bits(other, first)


@pytest.mark.parametrize("name", ["mime", "mime_lite"])
def test_mime_is_refused(name):
    build = getattr(getattr(fedjax.algorithms, name), name)
    loss = fedjax.model_per_example_loss(cases.model())
    batches = (cases.BATCHES, fedjax.PaddedBatchHParams(batch_size=16))
    with pytest.raises(ValueError, match=rf"{name}: base_optimizer: cannot be sparse.*Use fed_avg, fed_prox or"):
        build(loss, cases.server("magnitude"), *batches, server_learning_rate=1.0)
    build(loss, fedjax.optimizers.sgd(0.1), *batches, server_learning_rate=1.0)


def test_a_sparse_optimizer_of_clients_is_refused():
    sparse = cases.server("magnitude")
    dense = fedjax.optimizers.sgd(0.1)
    loss = fedjax.model_per_example_loss(cases.model())
    algorithms = fedjax.algorithms
    padded = fedjax.PaddedBatchHParams(batch_size=16)
    algorithms.hyp_cluster.hyp_cluster(loss, dense, sparse, padded, cases.BATCHES)  # the server may be
    builds = [
        lambda: algorithms.fed_avg.federated_averaging(fedjax.grad(loss), sparse, dense, cases.BATCHES),
        lambda: algorithms.fed_prox.fed_prox(loss, sparse, dense, cases.BATCHES, 0.1),
        lambda: algorithms.agnostic_fed_avg.agnostic_federated_averaging(
            loss, client_optimizer=sparse, server_optimizer=dense, client_batch_hparams=cases.BATCHES,
            domain_batch_hparams=padded, init_domain_weights=[0.5, 0.5], domain_learning_rate=0.1,
        ),
        lambda: algorithms.hyp_cluster.hyp_cluster(loss, sparse, dense, padded, cases.BATCHES),
        lambda: cases.masked(cases.server("magnitude"), sparse),
    ]  # fmt: skip
    for build in builds:
        with pytest.raises(ValueError, match=r"client_optimizer: cannot be sparse.*starts anew in each round"):
            build()


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        ((), {"algorithm": "magnitud", "sparsity": 0.8}, "'magnitud' is not known"),
        ((), {"algorithm": "magnitude"}, "sparsity: missing"),
        ((), {"algorithm": "magnitude", "sparsity": 1.5}, "Default sparsity"),
        (({"algorithm": "magnitude", "sparsity": 0.8},), {"dist_type": "erk"}, "put everything into one"),
        (("magnitude",), {}, "neither an updater nor a configuration"),
    ],
)
def test_bad_configurations(arguments, config, message):
    with pytest.raises(ValueError, match=message):
        jaxpruner_fedjax.server_optimizer(optax.sgd(0.1), *arguments, **config)
