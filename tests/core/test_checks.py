"""What is refused before the first step, and what a first summary tells."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxpruner

PARAMS = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10), "bias": jnp.ones(10)}


def sparse(algorithm="magnitude", sparsity=0.5, **config):
    return jaxpruner.sparsify(optax.sgd(0.1), algorithm=algorithm, sparsity=sparsity, **config)


def schedule(start, end, freq=1):
    return {"update_start_step": start, "update_end_step": end, "update_freq": freq}


REGROWS = ("rigl", "set")
PRUNES = ("magnitude", "saliency", "random", "global_magnitude", "global_saliency")


@pytest.mark.parametrize("algorithm", PRUNES + REGROWS)
def test_without_a_schedule(algorithm):
    with pytest.raises(ValueError, match="update_start_step: "):
        sparse(algorithm)
    updater = jaxpruner.create_updater_from_config({"algorithm": algorithm, "sparsity": 0.5})
    with pytest.raises(ValueError, match="update_start_step: "):
        jaxpruner.init_projection(updater, PARAMS)
    # Scripts of the paper's library that prune at once go on, and so do those that wrap.
    updater.wrap_optax(optax.sgd(0.1)).init(PARAMS)


@pytest.mark.parametrize("algorithm", ["no_prune", "static_sparse", "preserve", "magnitude_ste", "random_ste"])
def test_algorithms_that_need_no_schedule(algorithm):
    sparse(algorithm).init(PARAMS)


@pytest.mark.parametrize("name", ["update_end_step", "update_freq"])
@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "magnitude_ste"])
def test_an_end_or_a_period_without_a_start(algorithm, name):
    with pytest.raises(ValueError, match=f"update_start_step: missing, so {name}=10"):
        sparse(algorithm, **{name: 10})


@pytest.mark.parametrize(("bounds", "nearest"), [((0, 100, 200), 50), ((5, 9, 10), 2), ((3, 12, 10), 4)])
def test_schedules_that_never_arrive(bounds, nearest):
    with pytest.raises(ValueError, match=rf"update_freq: .*update_freq={nearest}"):
        sparse(**schedule(*bounds))
    start, end, _ = bounds
    sparse(**schedule(start, end, nearest))
    sparse(**schedule(end, end))


@pytest.mark.parametrize("algorithm", REGROWS)
def test_regrowth_that_never_trains_or_never_regrows(algorithm):
    with pytest.raises(ValueError, match=r"update_freq: 1 lets .* change its mask in every step"):
        sparse(algorithm, **schedule(1, 9))
    with pytest.raises(ValueError, match=r"update_end_step: the drop fraction of .* is 0 already"):
        sparse(algorithm, **schedule(5, 5))
    with pytest.raises(ValueError, match=r"update_start_step: .* would never change its mask"):
        sparse(algorithm, **schedule(5, 9, 10))
    sparse(algorithm, **schedule(2, 9, 2))


def test_a_schedule_against_the_length_of_the_training():
    def check(steps, algorithm="magnitude", **bounds):
        updater = jaxpruner.create_updater_from_config({"algorithm": algorithm, "sparsity": 0.5} | bounds)
        jaxpruner.check_schedule(updater, steps)

    check(101, **schedule(10, 100, 10))
    check(96, **schedule(10, 100, 30))  # its last update is at 90
    with pytest.raises(ValueError, match=r"update_end_step: .* at step 100, and the training has 100 steps"):
        check(100, **schedule(10, 100, 10))
    with pytest.raises(ValueError, match=r"update_start_step: .* at step 10, and the training has 5 steps"):
        check(5, "rigl", **schedule(10, 100, 10))
    with pytest.raises(ValueError, match="update_end_step: "):
        check(50, "magnitude_ste", **schedule(10, 100, 200))
    for algorithm in ("no_prune", "static_sparse"):
        check(5, algorithm, **schedule(10, 100, 10))


def test_an_updater_without_a_sparsity():
    for updater in (jaxpruner.MagnitudePruning, jaxpruner.GlobalMagnitudePruning):
        tx = jaxpruner.sparsify(optax.sgd(0.1), updater(scheduler=jaxpruner.OneShotSchedule(0)))
        with pytest.raises(ValueError, match="sparsity: is 0 for all parameters"):
            tx.init(PARAMS)
    pruned, _ = jaxpruner.MagnitudePruning().instant_sparsify(PARAMS)  # as in the paper's library
    assert pruned["kernel"].all()


def test_a_sparsity_and_nm_that_disagree():
    params, once = {"kernel": jnp.ones((8, 8))}, schedule(0, 0)
    with pytest.raises(ValueError, match=r"kernel: a sparsity of 0.9 is asked for, and 2:4 gives 0.5"):
        sparse(sparsity=0.9, sparsity_type="nm_2,4", **once).init(params)
    with pytest.raises(ValueError, match=r"2:4 gives 0.5; ask for sparsity=0.5 with dist_type='uniform'"):
        sparse(sparsity=0.9, sparsity_type={"kern*": "nm_2:4"}, **once).init(params)
    sparse(sparsity=0.5, sparsity_type="nm_2,4", **once).init(params)
    mixed = {"nm": jnp.ones((8, 8)), "free": jnp.ones((8, 8))}
    config = {"sparsity_type": {"nm": "nm_1,4"}, "custom_sparsity_map": {"nm": 0.75}}
    sparse(sparsity=0.9, **config, **once).init(mixed)
    # Scripts of the paper's library pass both: told, once.
    config = {"algorithm": "magnitude", "sparsity": 0.93, "sparsity_type": "nm_2,4"}
    with pytest.warns(UserWarning, match=r"a sparsity of 0.93 is asked for, and 2:4 gives 0.5"):
        jaxpruner.create_updater_from_config(config).instant_sparsify(params)
    jaxpruner.create_updater_from_config(config).instant_sparsify(params)  # where a warning is an error


def test_units_too_large_for_the_sparsity_are_told():
    params = {"conv": jnp.ones((3, 2, 4, 8)), "kernel": jnp.arange(1.0, 129.0).reshape(8, 16)}
    updater = jaxpruner.create_updater_from_config(
        {"algorithm": "magnitude", "sparsity": 0.9, "sparsity_type": "block_2,4", **schedule(0, 0)}
    )
    tx = jaxpruner.sparsify(optax.sgd(0.1), updater)
    # Blocks are of the first two axes, so that the convolution has two, one of them at the edge and smaller.
    with pytest.warns(UserWarning, match=r"conv: a sparsity of 0.9 is asked for, and of its 2 units of Block"):
        params, state = trained(tx, params)
    assert int(jnp.count_nonzero(params["conv"])) == 128
    jaxpruner.check_sparse(params, state, updater)  # as sparse as such units can be


def test_zeros_that_rank_alike_are_told():
    params = {"lora": jnp.zeros((4, 6)), "kernel": jnp.ones((4, 4))}
    with pytest.warns(UserWarning, match="lora is zero throughout, and masks are made at step 0"):
        sparse(**schedule(0, 0)).init(params)
    sparse(**schedule(1, 1)).init(params)
    sparse("magnitude_ste", **schedule(1, 9)).init(params)


def trained(tx, params=PARAMS, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("packed", [False, True])
def test_check_sparse_tells_what_changes_the_updates(packed):
    once = schedule(0, 0) | {"use_packed_masks": packed}
    jaxpruner.check_sparse(*trained(sparse(**once)))
    jaxpruner.check_sparse(*trained(optax.chain(optax.clip(1.0), sparse(**once))))
    with pytest.raises(ValueError, match=r"kernel: 50 of the 50 weights that its mask prunes .* come last in a chain"):
        jaxpruner.check_sparse(*trained(optax.chain(sparse(**once), optax.scale(0.5))))
    params, state = trained(sparse(**once))
    with pytest.raises(ValueError, match=r"kernel: 50 of the 50 .*apply_state_masks"):
        jaxpruner.check_sparse(PARAMS, state)
    jaxpruner.check_sparse(jaxpruner.apply_state_masks(PARAMS, state), state)
    jaxpruner.check_sparse(PARAMS, sparse(**once).init(PARAMS))  # before the first step
    with pytest.raises(ValueError, match="opt_state: holds no sparse state"):
        jaxpruner.check_sparse(params, optax.adam(0.1).init(params))


@pytest.mark.parametrize("packed", [False, True])
def test_check_sparse_reads_what_vmap_stacked(packed):
    """Eight trainings side by side, whose mask alone would be packed along another axis than a mask of all of them."""
    tx = sparse("magnitude", 0.75, **schedule(0, 0), use_packed_masks=packed)
    stacked = {"kernel": jax.random.normal(jax.random.key(0), (8, 3, 7)), "bias": jnp.ones((8, 7))}
    params, state = jax.vmap(functools.partial(trained, tx))(stacked)
    jaxpruner.check_sparse(params, state, tx.init.updater)
    with pytest.raises(ValueError, match="kernel: 16 of the 16 weights that its mask prunes are not zero"):
        jaxpruner.check_sparse(params | {"kernel": params["kernel"].at[5].set(1.0)}, state)
    other = sparse("magnitude", 0.9, **schedule(0, 0), use_packed_masks=packed).init.updater
    with pytest.raises(ValueError, match=r"sparsity: asked 90.0%, masks hold 76.2%"):
        jaxpruner.check_sparse(params, state, other)


def test_check_sparse_tells_masks_that_are_not_as_sparse_as_asked():
    updater = jaxpruner.create_updater_from_config({"algorithm": "magnitude", "sparsity": 0.75} | schedule(0, 0))
    params, state = trained(jaxpruner.sparsify(optax.sgd(0.1), updater))
    jaxpruner.check_sparse(params, state, updater)
    updater.sparsity_distribution_fn = functools.partial(jaxpruner.sparsity_distributions.uniform, sparsity=0.9)
    with pytest.raises(ValueError, match=r"sparsity: asked 90.0%, masks hold 75.0%, and the schedule is over"):
        jaxpruner.check_sparse(params, state, updater)


def test_check_sparse_passes_over_the_dense_weights_of_the_papers_protocol():
    updater = jaxpruner.create_updater_from_config({"algorithm": "magnitude_ste", "sparsity": 0.5})
    params, state = trained(updater.wrap_optax(optax.sgd(0.1)))
    jaxpruner.check_sparse(params, state, updater)
    params, state = trained(jaxpruner.sparsify(optax.sgd(0.1), updater))
    jaxpruner.check_sparse(params, state, updater)


def standardised(params, x):
    w = params["kernel"]
    w = (w - w.mean(0)) / jnp.sqrt(w.var(0) + 1e-5)
    return jax.nn.relu(x @ w) @ params["head"]


def test_weight_standardisation_is_told():
    params = {"kernel": jnp.eye(4), "head": jnp.eye(4)}
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    assert jaxpruner.shifted_parameters(standardised, params, x) == ("kernel",)
    summary = jaxpruner.summarize_flops(standardised, params, x)
    assert summary["_shifted_parameters"] == ["kernel"]
    assert summary["_inference_flops_nnz"] == 2 * 2 * 16 + 2 * 2 * 16 / 4  # the first product is dense

    def gradient_step(params, x):
        grads = jax.grad(lambda p: jnp.sum((x @ p["kernel"] * 2.0) @ jnp.tanh(p["head"])))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * (g + 0.1 * p), params, grads)

    assert jaxpruner.shifted_parameters(gradient_step, params, x) == ()
    merged = lambda p, x: x @ (p["kernel"] + p["head"])  # noqa: E731
    assert jaxpruner.shifted_parameters(merged, params, x) != ()


def test_an_optimizer_that_was_not_called():
    with pytest.raises(ValueError, match=r"inner: <function sgd.* is no optax optimizer .*call it"):
        jaxpruner.sparsify(optax.sgd, algorithm="static_sparse", sparsity=0.5)


def test_gradients_with_missing_branches():
    tx = sparse(**schedule(0, 0))
    with pytest.raises(ValueError, match="gradients: have no entry for kernel, which is pruned"):
        tx.update({"bias": PARAMS["bias"]}, tx.init(PARAMS), PARAMS)
