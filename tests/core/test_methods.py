"""Each method against a NumPy loop of its paper's rule, on a small least-squares problem."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner

RNG = np.random.default_rng(0)
SHAPES = {"a": (8, 8), "b": (8, 8)}  # of one shape, which is less to compile
START, TARGET = ({k: RNG.normal(size=s).astype(np.float32) for k, s in SHAPES.items()} for _ in range(2))
SCALE = {k: RNG.uniform(0.5, 2, size=s).astype(np.float32) for k, s in SHAPES.items()}
LR, SPARSITY, STEPS = 0.125, 0.75, 9
DATES = {"update_start_step": 2, "update_end_step": 6, "update_freq": 2}
DUE = (2, 4, 6)


def gradient(params):
    """That of sum(scale * (p - target) ** 2) / 2."""
    return {k: SCALE[k] * (params[k] - TARGET[k]) for k in SHAPES}


def compiled(fn, *args, **kwargs):
    """Compiled fast, and called."""
    return jax.jit(fn).lower(*args, **kwargs).compile({"xla_backend_optimization_level": 0})(*args, **kwargs)


def keep(size, sparsity):
    return max(1, round(size * (1 - sparsity)))


def top(scores, number):
    """The highest; of equal ones the first."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-np.asarray(scores, np.float64).ravel(), kind="stable")[:number]] = True
    return mask.reshape(scores.shape)


def sorted_top(scores, sparsity):
    """`topk_fn` in place of the library's selection, which has tests of its own and is ten times as long to compile."""
    ranks = jnp.argsort(jnp.argsort(-scores.ravel(), stable=True)).reshape(scores.shape)
    return ranks < jnp.maximum(1, jnp.round(scores.size * (1 - sparsity)))


def top_together(scores, number):
    """The highest over all leaves."""
    flat = top(np.concatenate([scores[k].ravel() for k in SHAPES]), number)
    sizes = [scores[k].size for k in SHAPES]
    return {k: part.reshape(SHAPES[k]) for k, part in zip(SHAPES, np.split(flat, np.cumsum(sizes)[:-1]), strict=True)}


def cubic(step, target=SPARSITY):
    """The sparsity of masks made at a step."""
    if step >= DUE[-1]:
        return target
    progress = np.clip(step + 1 - 2, 0, 4) / 4
    return target * (1 - (1 - progress) ** 3)


def copied():
    return {k: v.copy() for k, v in START.items()}


def zeros():
    return {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}


def ones():
    return {k: np.ones(s, bool) for k, s in SHAPES.items()}


def compare(algorithm, oracle, inner=None, steps=STEPS, **config):
    """Runs both side by side; the oracle yields (visible parameters, masks) after each step."""
    updater = jaxpruner.create_updater_from_config({"algorithm": algorithm, "sparsity": SPARSITY} | DATES | config)
    if not (updater.is_global or hasattr(updater, "drop_fraction_fn") or "sparsity_type" in config):
        updater.topk_fn = sorted_top
    tx = jaxpruner.sparsify(inner or optax.sgd(LR), updater)
    params = jax.tree.map(jnp.asarray, START)
    state = compiled(tx.init, params)
    update = jax.jit(tx.update).lower(params, state, params).compile({"xla_backend_optimization_level": 0})
    for step, (expected, masks) in zip(range(steps), oracle, strict=False):
        updates, state = update(jax.tree.map(jnp.asarray, gradient(params)), state, params)
        params = optax.apply_updates(params, updates)
        for k in SHAPES:
            np.testing.assert_array_equal(state.masks[k], masks[k], f"{k}, step {step}")
            np.testing.assert_allclose(params[k], expected[k], rtol=1e-4, atol=1e-5, err_msg=f"{k}, step {step}")
    return params, state


def at_once(algorithm, **config):
    return jaxpruner.create_updater_from_config({"algorithm": algorithm, "sparsity": SPARSITY} | config)


def pruned_by(score, remember=lambda memory, w, g, t: memory):
    """A pruner: `score(w, g, memory)` at each update, `remember` in every step before it."""
    w, masks, memory = copied(), ones(), zeros()
    for t in range(STEPS):
        g = gradient(w)
        memory = {k: remember(memory[k], w[k], g[k], t) for k in SHAPES}
        if t in DUE:
            masks = {k: top(score(w[k], g[k], memory[k]), keep(w[k].size, cubic(t))) for k in SHAPES}
        w = {k: masks[k] * (w[k] - LR * g[k]) for k in SHAPES}
        yield w, masks


def test_fisher():
    def remember(memory, w, g, t):
        return np.float32(0.75) * memory + np.float32(0.25) * g * g

    compare("fisher", pruned_by(lambda w, g, f: w * w * f, remember), decay=0.75)
    updater = at_once("fisher", topk_fn=sorted_top)
    _, masks = updater.instant_sparsify(START, gradient(START))
    np.testing.assert_array_equal(masks["a"], top((START["a"] * gradient(START)["a"]) ** 2, keep(64, SPARSITY)))


def adam_with_masks():
    w, masks, mu, nu = copied(), ones(), zeros(), zeros()
    for t in range(STEPS):
        g = gradient(w)
        if t in DUE:
            masks = {k: top(w[k] ** 2 * nu[k], keep(w[k].size, cubic(t))) for k in SHAPES}
        for k in SHAPES:
            mu[k] = 0.9 * mu[k] + 0.1 * g[k]
            nu[k] = 0.999 * nu[k] + 0.001 * g[k] ** 2
            step = mu[k] / (1 - 0.9 ** (t + 1)) / (np.sqrt(nu[k] / (1 - 0.999 ** (t + 1))) + 1e-8)
            w[k] = masks[k] * (w[k] - LR * step)
        yield dict(w), masks


def test_adam_fisher():
    _, state = compare("adam_fisher", adam_with_masks(), optax.inject_hyperparams(optax.adam)(LR))
    _, masks = at_once("adam_fisher", topk_fn=sorted_top).instant_sparsify(START, opt_state=state)
    nu = jaxpruner.training.optimizer_state.second_moments(state, START)[("a",)]
    np.testing.assert_array_equal(masks["a"], top(START["a"] ** 2 * np.asarray(nu), keep(64, SPARSITY)))


@pytest.mark.parametrize(
    "inner", [optax.sgd(0.1, momentum=0.9), optax.lion(0.1), optax.adafactor(0.1, min_dim_size_to_factor=4)]
)
def test_adam_fisher_without_a_second_moment(inner):
    tx = jaxpruner.sparsify(inner, algorithm="adam_fisher", sparsity=0.5, **DATES)
    with pytest.raises(ValueError, match=r"opt_state: the optimizer keeps no second moment of a .*algorithm='fisher'"):
        tx.init(START)


def test_adam_fisher_reads_what_adafactor_does_not_factor_and_nothing_before_the_first_step():
    tx = jaxpruner.sparsify(optax.adafactor(0.1), algorithm="adam_fisher", sparsity=0.5, **DATES)
    tx.init(START)
    tx = jaxpruner.sparsify(
        optax.adam(0.1), algorithm="adam_fisher", sparsity=0.5, update_start_step=0, update_end_step=0
    )
    with pytest.raises(ValueError, match="update_start_step: 0, when the second moments"):
        tx.init(START)


def straight_through(mask_of, stepped, memory=None):
    """Dense weights behind masks that are made in every step."""
    w, masks = copied(), ones()
    for t in range(STEPS):
        g = gradient({k: w[k] * masks[k] for k in SHAPES})
        if memory is not None:
            memory.update({k: memory[k] - w[k] * g[k] for k in SHAPES})
        sparsity = cubic(t) if t >= DUE[0] else 0.0
        w = {k: w[k] - LR * stepped(g[k], masks[k], w[k], sparsity) for k in SHAPES}
        sparsity = cubic(t + 1) if t + 1 >= DUE[0] else 0.0
        masks = {k: mask_of(k, w[k], sparsity) for k in SHAPES}
        yield {k: w[k] * masks[k] for k in SHAPES}, masks


def test_movement():
    scores = zeros()
    oracle = straight_through(
        lambda k, w, s: top(scores[k], keep(w.size, s)), lambda g, mask, w, s: g * mask, memory=scores
    )
    _, state = compare("movement", oracle)
    np.testing.assert_allclose(state.statistics["a"], scores["a"], rtol=1e-4, atol=1e-5)


def test_soft_movement():
    scores = zeros()

    total = sum(s.size for s in scores.values())

    def mask_of(k, w, sparsity):
        return top_together(scores, keep(total, sparsity))[k]

    compare("soft_movement", straight_through(mask_of, lambda g, mask, w, s: g * mask, memory=scores))
    with pytest.raises(ValueError, match="use_normalization: soft_movement"):
        jaxpruner.sparsify(optax.sgd(0.1), algorithm="soft_movement", sparsity=0.5, use_normalization=True)


def test_sr_ste():
    def mask_of(k, w, sparsity):
        if not sparsity:
            return np.ones(w.shape, bool)
        groups = np.abs(w).reshape(-1, 4)
        return (groups >= np.sort(groups, 1)[:, 2:3]).reshape(w.shape)

    def stepped(g, mask, w, sparsity):
        return g + 0.25 * ~mask * w

    compare("sr_ste", straight_through(mask_of, stepped), sparsity=0.5, sparsity_type="nm_2,4", decay=0.25)


def test_top_kast():
    def stepped(g, mask, w, sparsity):
        explored = mask | top(np.abs(w), keep(w.size, max(sparsity - 0.25, 0)))
        return explored * (g + 0.125 * w / np.where(mask, 1, 1 - sparsity))

    oracle = straight_through(lambda k, w, s: top(np.abs(w), keep(w.size, s)), stepped)
    compare("top_kast", oracle, extra_density=0.25, decay=0.125)
    with pytest.raises(ValueError, match="a: cannot use TopKast with n:m"):
        jaxpruner.create_updater_from_config(
            {"algorithm": "top_kast", "sparsity": 0.5, "sparsity_type": "nm_2,4"}
        ).init_state(START)


def test_acdc():
    """Sparse from 2, dense from 4, sparse from 6; momentum starts anew with each."""

    def oracle():
        w, masks, momentum = copied(), ones(), zeros()
        for t in range(STEPS):
            g = gradient(w)
            if t in DUE:
                momentum = zeros()
                masks = {k: top(np.abs(w[k]), w[k].size if t == 4 else keep(w[k].size, SPARSITY)) for k in SHAPES}
            momentum = {k: 0.5 * momentum[k] + g[k] for k in SHAPES}
            w = {k: masks[k] * (w[k] - LR * momentum[k]) for k in SHAPES}
            yield w, masks

    compare("acdc", oracle(), optax.sgd(LR, momentum=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update_end_step": 2}, "update_freq: ACDC is sparse and dense in turn, and this schedule has 1 mask updates"),
        ({"update_end_step": 4}, "this schedule has 2 mask updates"),
        ({"initial_sparsity": 0.5}, "initial_sparsity: 0.5 has no effect on algorithm 'acdc'"),
    ],
)
def test_phases_that_would_not_alternate(changes, message):
    with pytest.raises(ValueError, match=message):
        jaxpruner.sparsify(optax.sgd(LR), {"algorithm": "acdc", "sparsity": 0.5} | DATES | changes)


def test_the_last_phase_is_sparse():
    schedule = jaxpruner.AlternatingSchedule(update_freq=5, update_start_step=3, update_end_step=22)
    found = {step: float(schedule.get_sparsity_at_step(0.75, step)) for step in (5, 9, 10, 11, 14, 15, 20, 23)}
    assert found == {5: 0, 9: 0, 10: 0.75, 11: 0.75, 14: 0.75, 15: 0, 20: 0.75, 23: 0.75}


def test_granet():
    def oracle():
        w, masks = copied(), ones()
        for t in range(STEPS):
            g = gradient(w)
            if t in DUE:
                fraction = 0.5 * 0.5 * (1 + np.cos(np.pi * t / 6))
                for k in SHAPES:
                    left = top(np.where(masks[k], np.abs(w[k]), -1), keep(w[k].size, cubic(t)))
                    number = left.sum()
                    stay = top(np.where(left, np.abs(w[k]), -1), keep(number, fraction))
                    masks[k] = stay | top(np.where(stay, -1, np.abs(g[k])), number - stay.sum())
                    w[k] = w[k] * masks[k]  # no step is taken
            else:
                w = {k: masks[k] * (w[k] - LR * masks[k] * g[k]) for k in SHAPES}
            yield dict(w), dict(masks)

    compare("granet", oracle(), drop_fraction=0.5)


def test_srigl():
    """Three outputs have gradients of next to nothing and small weights, and go."""
    weights = START["a"] * np.where(np.arange(8) < 3, 0.01, 1)
    g = np.abs(RNG.normal(size=(8, 8))) * np.where(np.arange(8) < 3, 1e-3, 1)
    updater = jaxpruner.create_updater_from_config(
        {"algorithm": "srigl", "sparsity": 0.5, "drop_fraction": 0.5, "stack_axes": {"stack": 0}} | DATES
    )
    mask = np.stack([top(RNG.normal(size=8), 4) for _ in range(8)], 1)
    params = {"a": weights * mask, "stack": np.stack([weights * mask] * 2)}
    masks = {"a": mask, "stack": np.stack([mask] * 2)}
    targets = dict.fromkeys(params, jnp.float32(0.5))
    state = jaxpruner.SparseState(masks, target_sparsities=targets, count=jnp.int32(2))
    new = compiled(updater.update_state, state, params, {"a": g, "stack": np.stack([g] * 2)}).masks

    stay = top(np.where(mask, np.abs(weights), -1), keep(32, 0.5 * 0.5 * (1 + np.cos(np.pi * 2 / 6))))
    chosen = stay | top(np.where(stay, -1, g), 32 - stay.sum())
    alive = chosen.sum(0) >= 0.3 * 4
    assert 0 < alive.sum() < 8
    number = min(8, 32 // alive.sum())
    expected = np.stack([top(np.where(chosen & mask, np.inf, g)[:, o], number) & alive[o] for o in range(8)], 1)
    np.testing.assert_array_equal(new["a"], expected)
    np.testing.assert_array_equal(new["stack"], np.stack([expected] * 2))
    tx = jaxpruner.sparsify(optax.sgd(LR), algorithm="srigl", sparsity=0.5, sparsity_type="block_2,2", **DATES)
    with pytest.raises(ValueError, match="a: cannot use SRigL with Block"):
        tx.init(START)


def test_mest_drops_what_is_small_and_does_not_move():
    updater = jaxpruner.create_updater_from_config(
        {"algorithm": "mest", "sparsity": 0.5, "gradient_weight": 2.0, "drop_fraction": 0.5} | DATES
    )
    g, masks = gradient(START), {k: top(RNG.normal(size=SHAPES[k]), 32) for k in SHAPES}
    params = {k: START[k] * masks[k] for k in SHAPES}
    targets = dict.fromkeys(SHAPES, jnp.float32(0.5))
    state = jaxpruner.SparseState(masks, target_sparsities=targets, count=jnp.int32(2))
    new = compiled(updater.update_state, state, params, g)
    fraction = 0.5 * 0.5 * (1 + np.cos(np.pi * 2 / 6))
    for k in SHAPES:
        before, after = masks[k], np.asarray(new.masks[k])
        stay = top(np.where(before, np.abs(params[k]) + 2 * np.abs(g[k]), -1), keep(32, fraction))
        assert after[stay].all()
        assert after.sum() == 32
        # Those of set are others.
        assert (stay != top(np.where(before, np.abs(params[k]), -1), keep(32, fraction))).any()
    with pytest.raises(ValueError, match="gradient_weight: -1 is negative"):
        jaxpruner.MEST(gradient_weight=-1)


def test_lamp():
    scores = {
        k: np.asarray([x * x / sum(y * y for y in w.ravel() if y * y >= x * x) for x in w.ravel()]).reshape(w.shape)
        for k, w in START.items()
    }
    updater = jaxpruner.create_updater_from_config({"algorithm": "lamp", "sparsity": SPARSITY})
    np.testing.assert_allclose(updater.calculate_scores(START)["a"], scores["a"], rtol=1e-5)
    _, masks = compiled(updater.instant_sparsify, START)
    for k, mask in top_together(scores, keep(128, SPARSITY)).items():
        np.testing.assert_array_equal(masks[k], mask)
    # A stack is so many layers.
    stacked = {"w": jnp.stack([START["a"], 100 * START["a"]])}
    updater.stack_axes = {"w": 0}
    found = updater.calculate_scores(stacked)["w"]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    with pytest.raises(ValueError, match="use_normalization: lamp"):
        jaxpruner.LampPruning(use_normalization=True)


# At initialisation.


def loss(params, scale=SCALE):
    return sum(jnp.sum(scale[k] * (params[k] - TARGET[k]) ** 2) for k in SHAPES) / 2


def check_masks(masks, scores):
    for k, mask in top_together(scores, keep(128, SPARSITY)).items():
        np.testing.assert_array_equal(masks[k], mask)


def test_a_last_layer_of_zeros_hides_all_scores_and_is_told():
    params = {"hidden": jnp.asarray(START["a"]), "last": jnp.zeros((8, 3))}

    def loss(params):
        return jnp.sum((jnp.ones((2, 8)) @ params["hidden"] @ params["last"] - 1) ** 2)

    updater = jaxpruner.create_updater_from_config({"algorithm": "snip", "sparsity": 0.5})
    tx = jaxpruner.sparsify(optax.sgd(0.1), updater)
    state = tx.init(params)
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    assert all(mask.all() for mask in jax.tree.leaves(state.masks))
    with pytest.raises(ValueError, match=r"asked 50.0%, and SNIP pruned 0.0%, since all scores were 0: a last layer"):
        jaxpruner.check_sparse(optax.apply_updates(params, updates), state, updater)
    with pytest.raises(ValueError, match=r"50.0% is asked, and nothing is pruned, since all scores were 0"):
        updater.instant_sparsify(params, loss_fn=loss)
    # Where a few steps have trained the last layer, scores say what to keep.
    _, masks = updater.instant_sparsify({**params, "last": jnp.full((8, 3), 0.1)}, loss_fn=loss)
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) == (64 + 24) / 2


def test_snip():
    g = gradient(START)
    scores = {k: np.abs(START[k] * g[k]) for k in SHAPES}
    halves = [{k: (0.5 + i) * SCALE[k] for k in SHAPES} for i in range(2)]  # whose mean is SCALE
    found = compiled(lambda p: at_once("snip").instant_sparsify(p, loss_fn=loss, batches=halves)[1], START)
    check_masks(found, scores)
    # In the first step, whatever the schedule of a sweep is; then it stays.
    masks = top_together(scores, keep(128, SPARSITY))

    def oracle():
        w = copied()
        for _ in range(3):
            w = {k: masks[k] * (w[k] - LR * gradient(w)[k]) for k in SHAPES}
            yield w, masks

    compare("snip", oracle(), steps=3)


def test_grasp():
    def coupled(params):
        x = jnp.concatenate([params[k].ravel() for k in SHAPES])
        return x @ (jnp.asarray(hessian) @ x) / 2 + x @ jnp.asarray(linear)

    hessian = RNG.normal(size=(128, 128)).astype(np.float32)
    hessian, linear = (hessian + hessian.T) / 2, RNG.normal(size=128).astype(np.float32)
    x = np.concatenate([START[k].ravel() for k in SHAPES]).astype(np.float64)
    flat = x * (hessian @ (hessian @ x + linear))
    scores = {k: part.reshape(SHAPES[k]) for k, part in zip(SHAPES, np.split(flat, [64]), strict=True)}
    updater = at_once("grasp")
    # What is removed lessens the gradient flow the least: the paper removes the largest -w (H g).
    tx = jaxpruner.sparsify(optax.sgd(LR), updater)
    _, state = compiled(lambda g, s, p: tx.update(g, s, p, loss_fn=coupled), gradient(START), tx.init(START), START)
    check_masks(state.masks, scores)
    with pytest.raises(ValueError, match=r"loss_fn: GraSP scores with the loss and got none.*masks= of static_sparse"):
        tx.update(gradient(START), tx.init(START), START)
    with pytest.raises(ValueError, match="batches: holds none"):
        updater.instant_sparsify(START, loss_fn=loss, batches=[])


def test_synflow():
    def flow(params):
        return jnp.sum(jnp.ones(8) @ params["a"] @ params["b"])

    masks = ones()
    for k in range(1, 6):
        a, b = (np.abs(START[name]) * masks[name] for name in SHAPES)
        scores = {"a": a * b.sum(1), "b": b * a.sum(0)[:, None]}
        scores = {name: np.where(masks[name], scores[name], -1) for name in SHAPES}
        masks = top_together(scores, keep(128, 1 - (1 - SPARSITY) ** (k / 5)))
    found = compiled(lambda p: at_once("synflow", rounds=5).instant_sparsify(p, loss_fn=flow)[1], START)
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], masks[name])
    with pytest.raises(ValueError, match="rounds: 0"):
        jaxpruner.SynFlow(rounds=0)


# n:m by and by, and activations.


def test_gradual_n_of_m():
    structure = jaxpruner.structure_strings.parse_sparsity_type("gradual_nm_2,4")
    w = np.abs(START["a"])
    groups = w.reshape(-1, 4)
    survivors = (groups >= np.sort(groups, 1)[:, 2:3]).reshape(w.shape)
    mask = jax.jit(structure.mask)
    for sparsity in (0.0, 0.1, 0.3, 0.5):
        expected = top(np.where(survivors, np.inf, w), keep(w.size, sparsity))
        np.testing.assert_array_equal(mask(w, jnp.float32(sparsity)), expected)
    np.testing.assert_array_equal(mask(w, jnp.float32(0.75)), survivors)
    tx = jaxpruner.sparsify(optax.sgd(LR), algorithm="rigl", sparsity=0.5, sparsity_type=structure, **DATES)
    with pytest.raises(ValueError, match=r"a: gradual n:m cannot be regrown.*use nm_2,4"):
        jax.eval_shape(tx.update, START, jax.eval_shape(tx.init, START), START)


def test_sparse_activations():
    def both(x):
        y, back = jax.vjp(lambda x: jaxpruner.sparsify_activations(x, 0.75), x)
        return y, *back(x)

    x = jnp.asarray(START["a"])
    y, cotangent = compiled(both, x)
    np.testing.assert_array_equal(y, np.stack([row * top(np.abs(row), 2) for row in START["a"]]))
    np.testing.assert_array_equal(cotangent, x)
    y = jaxpruner.sparsify_activations(x, 0.5, jaxpruner.sparsity_types.NByM(2, 4))
    np.testing.assert_array_equal(jnp.count_nonzero(y.reshape(-1, 4), axis=1), 2)
    with pytest.raises(ValueError, match=r"batch_axes: 2 of the 2 axes of \(8, 8\)"):
        jaxpruner.sparsify_activations(x, 0.5, batch_axes=2)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fisher", "decay", 1.0),
        ("sr_ste", "decay", -0.1),
        ("top_kast", "decay", -0.1),
        ("top_kast", "extra_density", 0.0),
    ],
)
def test_values_that_make_no_sense(name, key, value):
    with pytest.raises(ValueError, match=f"{key}: {value} "):
        at_once(name, **{key: value})


GRADIENT_READERS = [
    "saliency", "global_saliency", "snip", "mest", "rigl", "srigl", "granet", "fisher", "movement", "soft_movement",
]  # fmt: skip


@pytest.mark.parametrize("algorithm", GRADIENT_READERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_leave_no_trace(algorithm, bad):
    """The optimizer leaves the step out; masks are made in one, too. No part of the leaf may be preferred for that."""
    schedule = {} if algorithm == "snip" else {"update_start_step": 2, "update_end_step": 6, "update_freq": 2}
    tx = jaxpruner.sparsify(optax.apply_if_finite(optax.sgd(0.01), 100), algorithm=algorithm, sparsity=0.5, **schedule)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(32, 32)), jnp.float32), "v": jnp.ones((4, 4))}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(8):
        grads = {"w": jnp.asarray(rng.normal(size=(32, 32)), jnp.float32), "v": jnp.ones((4, 4))}
        if step in (0, 3, 6):
            grads["w"] = grads["w"].at[4:].set(bad)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state.statistics)))
    kept = np.asarray(params["w"] != 0)
    assert 400 < kept.sum() < 640
    assert abs(kept[:4].mean() - 0.5) < 0.2
    assert abs(kept[:16].mean() - kept[16:].mean()) < 0.2


@pytest.mark.parametrize(
    ("algorithm", "structure"),
    [("magnitude", None), ("rigl", "nm_2,4"), ("srigl", None), ("global_magnitude", None), ("granet", "block_2,4")],
)
def test_mask_updates_where_ranks_are_not_promoted(algorithm, structure):
    params = {
        "a": jax.random.normal(jax.random.key(0), (8, 8)),
        "c": jax.random.normal(jax.random.key(1), (3, 2, 4, 8)),
    }
    config = {"algorithm": algorithm, "sparsity": 0.5, "sparsity_type": structure}
    with jax.numpy_rank_promotion("raise"):
        tx = jaxpruner.sparsify(
            optax.sgd(0.1), config | {"update_start_step": 1, "update_end_step": 9, "update_freq": 2}
        )
        update, state = jax.jit(tx.update), tx.init(params)
        for _ in range(10):
            updates, state = update(jax.tree.map(jnp.sin, params), state, params)
            params = jax.tree.map(jnp.add, params, updates)
    jaxpruner.check_sparse(params, state, tx.init.updater)
