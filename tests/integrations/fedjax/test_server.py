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
from federated_cases import fedjax

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


# One of each kind, dense and packed in turn: every algorithm with both is tested above.
KINDS = ("no_prune", "magnitude", "global_saliency", "static_sparse", "rigl", "magnitude_ste")


@pytest.mark.parametrize(
    ("algorithm", "packed"),
    [pytest.param(name, bool(i % 2), id=f"{name}-{('dense', 'packed')[i % 2]}") for i, name in enumerate(KINDS)],
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
    wrapped = build(loss, wrapped_sparse(), *batches, server_learning_rate=1.0)
    with pytest.raises(ValueError, match=rf"{name}: base_optimizer: cannot be sparse"):
        wrapped.init(cases.params())
    dense = build(loss, fedjax.optimizers.sgd(0.1), *batches, server_learning_rate=1.0)
    state = dense.init(cases.params())
    with pytest.raises(ValueError, match=rf"{name}: base_optimizer: cannot be sparse"):  # a state of another training
        dense.apply(state.replace(opt_state=wrapped_sparse().init(cases.params())), cases.clients())


@functools.cache
def wrapped_sparse():
    """A sparse optimizer that shows it in its state only."""
    sparse = jaxpruner.sparsify(optax.sgd(0.1), cases.config("magnitude"))
    inside = optax.inject_hyperparams(lambda rate: optax.chain(optax.scale(rate), sparse))(1.0)
    return fedjax.optimizers.create_optimizer_from_optax(inside)


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


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # of FedJAX's evaluator
def test_a_sparse_optimizer_of_clients_is_refused_however_it_was_wrapped():
    sparse, dense = wrapped_sparse(), fedjax.optimizers.sgd(0.1)
    loss = fedjax.model_per_example_loss(cases.model())
    algorithms, padded = fedjax.algorithms, fedjax.PaddedBatchHParams(batch_size=16)
    for name, algorithm in {
        "federated_averaging": algorithms.fed_avg.federated_averaging(fedjax.grad(loss), sparse, dense, cases.BATCHES),
        "fed_prox": algorithms.fed_prox.fed_prox(loss, sparse, dense, cases.BATCHES, 0.1),
        "agnostic_federated_averaging": algorithms.agnostic_fed_avg.agnostic_federated_averaging(
            loss, sparse, dense, cases.BATCHES, padded, [0.5, 0.5], 0.1
        ),
        "hyp_cluster": algorithms.hyp_cluster.hyp_cluster(loss, sparse, dense, padded, cases.BATCHES),
        "federated_averaging: ": cases.masked(cases.server("magnitude"), sparse),
    }.items():
        params = [cases.params()] if name == "hyp_cluster" else cases.params()
        with pytest.raises(ValueError, match=rf"{name.strip(': ')}: client_optimizer: cannot be sparse"):
            algorithm.apply(algorithm.init(params), cases.clients())
    centers = algorithms.hyp_cluster.ModelKMeansInitializer(cases.model(), sparse)
    with pytest.raises(ValueError, match="ModelKMeansInitializer: client_optimizer: cannot be sparse"):
        centers.cluster_params(2, jax.random.PRNGKey(0), cases.clients(), cases.BATCHES, padded)


def two_label_clients():
    """Two clients of the labels 0 and 1, two of 2 and 3."""
    whole = {name: [] for name in ("x", "y")}
    for _, data in cases.digits(8).clients():
        for name, values in data.all_examples().items():
            if name in whole:
                whole[name].append(values)
    examples = {name: np.concatenate(values) for name, values in whole.items()}
    for i, labels in enumerate([(0, 1), (0, 1), (2, 3), (2, 3)]):
        own = np.flatnonzero(np.isin(examples["y"], labels))[i % 2 :: 2][:10]
        dataset = fedjax.ClientDataset({name: values[own] for name, values in examples.items()})
        yield b"%d" % i, dataset, jax.random.PRNGKey(i)


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # of FedJAX's evaluator
def test_clusters_of_hyp_cluster_are_exactly_sparse():
    optimizer = cases.server("magnitude")
    loss, padded = fedjax.model_per_example_loss(cases.model()), fedjax.PaddedBatchHParams(batch_size=16)
    algorithm = fedjax.algorithms.hyp_cluster.hyp_cluster(
        loss, fedjax.optimizers.sgd(0.1), optimizer, padded, cases.BATCHES
    )

    def expecting(labels):
        bias = np.zeros(10, np.float32)
        bias[labels] = 5
        return cases.params() | {"linear_1": cases.params()["linear_1"] | {"b": jnp.asarray(bias)}}

    state = algorithm.init([expecting([0, 1]), expecting([2, 3]), expecting([9])])
    clients = list(two_label_clients())
    for _ in range(cases.ROUNDS):
        state, told = algorithm.apply(state, clients)
        assert [int(one["cluster_id"]) for one in told.values()] == [0, 0, 1, 1]
    kernels = [np.asarray(params["linear"]["w"]) for params in state.cluster_params]
    masks = [masks["linear"]["w"] for masks in optimizer.masks(state)]
    assert [int(np.count_nonzero(kernel)) for kernel in kernels[:2]] == [941, 941]
    for kernel, mask in zip(kernels[:2], masks[:2], strict=True):
        np.testing.assert_array_equal(kernel != 0, mask)
    assert not np.array_equal(*masks[:2])
    # A cluster without clients takes no step, and its schedule waits.
    assert [int(jaxpruner_fedjax.server.find_state(one).count) for one in state.opt_states] == [3, 3, 0]
    np.testing.assert_array_equal(kernels[2], cases.params()["linear"]["w"])


def test_rounds_of_mask_updates_lose_the_clients_work_and_it_is_told(caplog):
    params = {"w": jnp.arange(1.0, 41.0).reshape(8, 5)}
    settings = {"algorithm": "rigl", "sparsity": 0.5, "update_start_step": 0, "update_end_step": 4}

    def moved(**more):
        optimizer = jaxpruner_fedjax.server_optimizer(optax.sgd(0.1), **settings, **more)
        opt_state, now, steps = optimizer.init(params), params, []
        for _ in range(6):
            before, (opt_state, now) = now, optimizer.apply(params, opt_state, now)
            kept = (np.asarray(before["w"]) != 0) & (np.asarray(now["w"]) != 0)
            steps.append(bool((np.asarray(before["w"] != now["w"]) & kept).any()))
        return steps

    assert moved(update_freq=2) == [False, True, False, True, False, True]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "one of 2 rounds" in told
    assert "what the clients trained in it is dropped" in told
    caplog.clear()
    assert moved(update_freq=2, skip_gradients=False) == [True] * 6
    assert not caplog.records


def test_saliency_keeps_zeros_where_nothing_else_has_a_score():
    """Weights that no client's data reached score 0, as pruned ones do: masks hold 80 %, values more."""
    params = {"w": jnp.ones((2, 10))}
    first = jnp.zeros(20).at[16:].set(1.0).reshape(2, 10)
    optimizer = jaxpruner_fedjax.server_optimizer(
        optax.sgd(0.1), algorithm="saliency", sparsity=0.8, update_start_step=0, update_end_step=1
    )
    opt_state, params = optimizer.apply({"w": first}, optimizer.init(params), params)
    assert np.flatnonzero(params["w"]).tolist() == [16, 17, 18, 19]
    opt_state, params = optimizer.apply({"w": first.at[1, 7:].set(0.0)}, opt_state, params)
    mask = optimizer.updater.current_masks(jaxpruner_fedjax.server.find_state(opt_state), params)["w"]
    assert int(mask.sum()) == 4
    assert np.flatnonzero(params["w"]).tolist() == [16]


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        ((), {"algorithm": "magnitud", "sparsity": 0.8}, "'magnitud' is not known"),
        ((), {"algorithm": "magnitude"}, "sparsity: missing"),
        ((), {"algorithm": "magnitude", "sparsity": 1.5}, "Default sparsity"),
        (({"algorithm": "magnitude", "sparsity": 0.8},), {"dist_type": "erk"}, "put everything into one"),
        (("magnitude",), {}, "neither an updater nor a configuration"),
        ((), {"algorithm": "magnitude_ste", "sparsity": 0.8, "update_end_step": 9}, "update_start_step: missing"),
        (({"algorithm": "random_ste", "sparsity": 0.8, "update_freq": 9},), {}, "update_start_step: missing"),
    ],
)
def test_bad_configurations(arguments, config, message):
    with pytest.raises(ValueError, match=message):
        jaxpruner_fedjax.server_optimizer(optax.sgd(0.1), *arguments, **config)


def test_a_server_state_of_another_configuration_is_not_continued():
    params, grads = cases.params(), cases.params()
    dense = optax.adam(0.01).init(params)
    magnitude, packed, hidden = (cases.server(*of) for of in (("magnitude",), ("magnitude", True), ("magnitude_ste",)))
    for optimizer, opt_state, message in [
        (magnitude, dense, "holds no masks.*made by a dense server"),
        (magnitude, packed.init(params), "use_packed_masks=False now, .*use_packed_masks=True"),
        (packed, magnitude.init(params), "use_packed_masks=True now, .*use_packed_masks=False"),
        (hidden, magnitude.init(params), "state of another algorithm"),
        (magnitude, hidden.init(params), "straight-through algorithm, and algorithm is MagnitudePruning now"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.apply(grads, opt_state, params)
