"""What frameworks do with a transformation: compile, scan, donate, save, restore, wrap and replicate it."""

from __future__ import annotations

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sparse_cases as cases

import jaxpruner

KINDS = ("magnitude", "random", "global_magnitude", "magnitude_ste", "rigl")

# Powers of two, so that a fused multiply-add rounds as a product and a sum do.
EXACT = functools.partial(optax.sgd, 0.125, momentum=0.5)


def kernels(algorithm: str) -> int:
    return 2 if algorithm in cases.GLOBAL else 1


def final_masks(updater, steps):
    last = steps[-1]
    return cases.mask_list(updater, last.new_state, last.new_params)


def period(algorithm):
    """The shortest: a step that regrows weights does not train."""
    return 2 if algorithm in cases.DROP_AND_GROW else 1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_jit_equals_no_jit(algorithm):
    params = cases.tree("dict", kernels=kernels(algorithm))
    packed = cases.ALGORITHMS.index(algorithm) % 2 == 1
    tx = jaxpruner.sparsify(
        EXACT(), cases.config(algorithm, packed=packed, update_start_step=1, update_freq=period(algorithm))
    )
    compiled, plain = (cases.run(tx, params, 3, update=update) for update in (jax.jit(tx.update), tx.update))
    for one, other in zip(compiled, plain, strict=True):
        cases.assert_same_bits(one.new_params, other.new_params)
        cases.assert_same_bits(one.new_state, other.new_state)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [*cases.ALGORITHMS, "movement"])
def test_state_survives_orbax_and_pickle(algorithm, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params = cases.tree("dict", kernels=kernels(algorithm))
    packed = [*cases.ALGORITHMS, *cases.MORE].index(algorithm) % 2 == 0
    tx = jaxpruner.sparsify(optax.adamw(1e-2), cases.config(algorithm, packed=packed))
    update = cases.compiled(tx.update)
    steps = cases.run(tx, params, 6, update=update)
    middle = steps[2]
    saved = {"params": middle.new_params, "state": middle.new_state}

    cases.assert_same_bits(pickle.loads(pickle.dumps(saved)), saved)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "standard", jax.tree.map(jnp.zeros_like, saved))
    cases.assert_same_bits(restored, saved)
    resumed = cases.run(tx, restored["params"], 3, state=restored["state"], start=3, update=update)
    for one, other in zip(resumed, steps[3:], strict=True):
        cases.assert_same_bits(one.new_params, other.new_params)
        cases.assert_same_bits(one.new_state, other.new_state)

    tree_checkpointer = ocp.PyTreeCheckpointer()
    tree_checkpointer.save(tmp_path / "tree", saved)
    template = jax.tree.map(jnp.zeros_like, saved)
    arguments = ocp.checkpoint_utils.construct_restore_args(template)
    cases.assert_same_bits(tree_checkpointer.restore(tmp_path / "tree", item=template, restore_args=arguments), saved)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("algorithm", [*cases.ALGORITHMS, "movement"])
def test_state_is_a_scan_carry(algorithm, packed):
    """Same structure, shapes, dtypes and weak types after a step: `lax.scan` accepts no less."""
    params = cases.tree("dict", kernels=kernels(algorithm))
    tx = jaxpruner.sparsify(optax.adamw(1e-2), cases.config(algorithm, packed=packed))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    jax.eval_shape(lambda: jax.lax.scan(step, (params, tx.init(params)), length=3))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", KINDS)
def test_scan_over_donated_buffers(algorithm):
    params = cases.tree("dict", kernels=kernels(algorithm))
    updater = cases.make_updater(algorithm)
    tx = jaxpruner.sparsify(EXACT(), updater)
    expected = cases.run(tx, params)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[step.grads for step in expected])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state, grads):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), grads)[0]

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    trained, state = train(params, state, grads)
    cases.assert_same_bits(trained, expected[-1].new_params)
    cases.assert_same_bits(state, expected[-1].new_state)


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude_ste", "static_sparse"])
def test_init_without_values(algorithm):
    """Hosts that shard call `init` under `eval_shape` first."""
    params = cases.tree("dict")
    tx = jaxpruner.sparsify(optax.adamw(1e-2), cases.config(algorithm))
    abstract = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert cases.signature(state) == cases.signature(abstract)
    cases.assert_same_bits(jax.jit(tx.init)(params), state)


def test_transformation_is_a_static_argument_of_jit():
    params = cases.tree("dict")
    step = jax.jit(lambda tx, grads, state, params: tx.update(grads, state, params), static_argnums=0)
    updater = cases.make_updater("magnitude")
    for tx in (jaxpruner.sparsify(EXACT(), updater), updater.wrap_optax(EXACT())):
        assert isinstance(hash(tx), int)
        steps = cases.run(tx, params, update=functools.partial(step, tx))
        cases.check_structure(final_masks(updater, steps)[1], "unstructured")


@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_update_without_params_is_told(algorithm):
    params = cases.tree("dict", kernels=kernels(algorithm))
    updater = cases.make_updater(algorithm)
    for tx in (jaxpruner.sparsify(optax.sgd(0.1), updater), updater.wrap_optax(optax.sgd(0.1))):
        with pytest.raises(ValueError, match="params"):
            tx.update(params, jax.eval_shape(tx.init, params))


def test_last_in_a_chain():
    params = cases.tree("dict")
    updater = cases.make_updater("magnitude")
    tx = optax.chain(optax.clip_by_global_norm(0.5), jaxpruner.sparsify(optax.adamw(1e-2), updater))
    bare = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2))
    steps = cases.run(tx, params)
    for step, expected in zip(steps[: cases.FIRST], cases.run(bare, params, cases.FIRST), strict=True):
        cases.assert_same_bits(step.new_params, expected.new_params)
    masks = final_masks(updater, steps)
    cases.check_structure(masks[1], "unstructured")
    cases.check_zeros(steps[-1].new_params, masks)


def test_inside_a_chain_that_scales_afterwards_is_not_exact():
    """Why the order is documented: whatever scales later moves pruned entries off zero."""
    params = cases.tree("dict")
    tx = optax.chain(jaxpruner.sparsify(optax.sgd(0.1), cases.config("magnitude")), optax.scale(0.5))
    assert all(np.asarray(cases.run(tx, params)[-1].new_params["dense"]["kernel"]).ravel() != 0)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_optax_masked(algorithm):
    """Only part of the tree is handed to the transformation."""
    params = {"frozen": cases.tree("dict"), "trained": cases.tree("dict", seed=1, kernels=kernels(algorithm))}
    updater = cases.make_updater(algorithm)
    chosen = {"frozen": False, "trained": True}
    tx = optax.chain(
        optax.masked(jaxpruner.sparsify(EXACT(), updater), chosen),
        optax.masked(optax.set_to_zero(), {"frozen": True, "trained": False}),
    )
    steps = cases.run(tx, params)
    cases.assert_same_bits(steps[-1].new_params["frozen"], params["frozen"])
    check_final_sparsity(algorithm, steps[-1].new_params["trained"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", KINDS)
def test_multi_transform(algorithm):
    params = {"dense": cases.tree("dict"), "sparse": cases.tree("dict", seed=1, kernels=kernels(algorithm))}
    tx = optax.multi_transform(
        {"dense": optax.adam(1e-2), "sparse": jaxpruner.sparsify(optax.adam(1e-2), cases.config(algorithm))},
        {"dense": "dense", "sparse": "sparse"},
    )
    steps = cases.run(tx, params)
    expected = cases.run(optax.adam(1e-2), params)
    cases.assert_same_bits(steps[-1].new_params["dense"], expected[-1].new_params["dense"])
    check_final_sparsity(algorithm, steps[-1].new_params["sparse"])


def check_final_sparsity(algorithm, params):
    """The number of zeros, seen from the parameters alone (regrown weights may be zero, too)."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    kept, size = sum(np.count_nonzero(leaf) for leaf in leaves), sum(leaf.size for leaf in leaves)
    if algorithm in cases.WITHOUT_SPARSITY:
        assert kept == size
    elif algorithm in cases.DROP_AND_GROW:
        assert 0 < kept <= cases.kept_number(size)
    else:
        assert kept == cases.kept_number(size)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", KINDS)
def test_apply_if_finite(algorithm):
    params = cases.tree("dict", kernels=kernels(algorithm))
    updater = cases.make_updater(algorithm, update_start_step=1, update_freq=period(algorithm), update_end_step=3)
    tx = optax.apply_if_finite(jaxpruner.sparsify(EXACT(), updater), max_consecutive_errors=3)
    update = cases.compiled(tx.update)
    steps = cases.run(tx, params, 4, update=update)
    last = steps[-1]
    broken = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), last.grads)
    updates, state = update(broken, last.new_state, last.new_params)
    params = optax.apply_updates(last.new_params, updates)
    cases.assert_same_bits(params, last.new_params)
    cases.assert_same_bits(cases.sparse_state(state), cases.sparse_state(last.new_state))
    cases.check_zeros(params, final_masks(updater, steps))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", KINDS)
def test_outer_inject_hyperparams(algorithm):
    params = cases.tree("dict", kernels=kernels(algorithm))
    updater = cases.make_updater(algorithm)
    tx = optax.inject_hyperparams(lambda learning_rate: jaxpruner.sparsify(optax.sgd(learning_rate, 0.5), updater))(
        learning_rate=0.125
    )
    expected = cases.run(jaxpruner.sparsify(EXACT(), updater), params)
    steps = cases.run(tx, params)
    cases.assert_same_bits(steps[-1].new_params, expected[-1].new_params)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", KINDS)
def test_vmap_over_params_and_seeds(algorithm):
    """An ensemble trained at once is the ensemble trained one by one."""
    members = [cases.tree("dict", seed, kernels(algorithm)) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    grads = [cases.gradients(members[0], step) for step in range(4)]

    def train(params, seed):
        changes = {"update_start_step": 1, "update_freq": period(algorithm)}
        config = cases.config(algorithm, rng_seed=jax.random.key(seed), **changes)
        tx = jaxpruner.sparsify(EXACT(), config | {"update_end_step": 3})
        state = tx.init(params)

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        sequence = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
        return jax.lax.scan(step, (params, state), sequence)[0]

    together = cases.compiled(jax.vmap(train))(stacked, jnp.arange(2))
    alone = cases.compiled(train)
    for i, params in enumerate(members):
        cases.assert_same_bits(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone(params, jnp.arange(2)[i]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
@pytest.mark.parametrize("algorithm", ["magnitude", "set", "magnitude_ste"])
def test_pmap(algorithm):
    params = cases.tree("dict")
    tx = jaxpruner.sparsify(EXACT(), cases.config(algorithm, packed=True))
    expected = cases.run(tx, params, 4)
    stack = functools.partial(jax.tree.map, lambda leaf: leaf[None])
    params, state = stack(params), stack(tx.init(params))
    update = jax.pmap(tx.update, axis_name="devices")
    apply = jax.pmap(optax.apply_updates)
    for step in expected:
        updates, state = update(stack(step.grads), state, params)
        params = apply(params, updates)
    cases.assert_same_bits(jax.tree.map(lambda leaf: leaf[0], params), expected[-1].new_params)
    cases.assert_same_bits(jax.tree.map(lambda leaf: leaf[0], state), expected[-1].new_state)
