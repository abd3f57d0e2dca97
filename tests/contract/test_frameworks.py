"""Models of NNX, Linen, Haiku and Equinox: public functions take what they hold, boxed or not, whole or filtered."""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpruner

FRAMEWORKS = ("nnx", "linen", "haiku", "equinox")
ALGORITHMS = ("magnitude", "magnitude_ste", "rigl")
SPARSITY, STEPS = 0.75, 6
X = jax.random.normal(jax.random.key(0), (8, 8))


class Trained(NamedTuple):
    """A few steps of a framework's own loop.

    Attributes:
      params: what it holds parameters in, by name.
      states: what it holds the state of the optimizer in.
      forward: (params, x) to outputs, for any of the params.
      kernels: the names of the pruned leaves.
    """

    params: dict[str, Any]
    states: dict[str, Any]
    forward: Callable[..., Any]
    kernels: tuple[str, str]


def updater(algorithm: str) -> jaxpruner.BaseUpdater:
    return jaxpruner.create_updater_from_config({
        "algorithm": algorithm, "sparsity": SPARSITY, "update_start_step": 1, "update_end_step": 4, "update_freq": 2,
        "use_packed_masks": algorithm != "rigl",
    })  # fmt: skip


def sparse_adam(algorithm: str) -> optax.GradientTransformationExtraArgs:
    return jaxpruner.sparsify(optax.adam(1e-2), updater(algorithm))


def loss(outputs: Any) -> Any:
    return jnp.mean((outputs - 1) ** 2)


def trained_nnx(algorithm: str) -> Trained:
    nnx = pytest.importorskip("flax.nnx")
    if "model" not in inspect.signature(nnx.Optimizer.update).parameters:
        pytest.skip("the optimizer of this flax keeps the model")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(8, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)
            self.out = nnx.Linear(16, 4, rngs=rngs)
            self.label, self.depth, self.nothing = "a string", 2, None

        def __call__(self, x):
            return self.out(self.drop(nnx.relu(self.norm(self.hidden(x)))))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: loss(model(X)))(model))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sparse_adam(algorithm), wrt=nnx.Param)
    for _ in range(STEPS):
        step(model, optimizer)
    model.eval()
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, x):
        merged = nnx.merge(graphdef, params, rest) if isinstance(params, nnx.State) else params
        return merged(x)

    params = nnx.state(model, nnx.Param)
    return Trained(
        {"module": model, "state": nnx.state(model), "params": params, "pure": nnx.to_pure_dict(params)},
        {
            "optimizer": optimizer,
            "opt_state": optimizer.opt_state,
            "arrays": nnx.as_pure(optimizer.opt_state),
            "nnx.state": nnx.state(optimizer),
            "pure": nnx.to_pure_dict(nnx.state(optimizer)),
        },
        forward,
        ("hidden/kernel", "out/kernel"),
    )


def trained_linen(algorithm: str) -> Trained:
    nn = pytest.importorskip("flax.linen")
    from flax import core, serialization
    from flax.training import train_state

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="out")(nn.relu(nn.Dense(16, name="hidden")(x)))

    net = Net()
    state = train_state.TrainState.create(
        apply_fn=net.apply, params=net.init(jax.random.key(0), X)["params"], tx=sparse_adam(algorithm)
    )

    @jax.jit
    def step(state):
        return state.apply_gradients(
            grads=jax.grad(lambda params: loss(state.apply_fn({"params": params}, X)))(state.params)
        )

    for _ in range(STEPS):
        state = step(state)
    return Trained(
        {"params": state.params, "frozen": core.freeze(state.params)},
        {"train_state": state, "opt_state": state.opt_state, "dict": serialization.to_state_dict(state.opt_state)},
        lambda params, x: net.apply({"params": params}, x),
        ("hidden/kernel", "out/kernel"),
    )


def trained_haiku(algorithm: str) -> Trained:
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 4])(x)))
    params, tx = net.init(jax.random.key(0), X), sparse_adam(algorithm)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(lambda params: loss(net.apply(params, X)))(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return Trained({"params": params}, {"state": state}, net.apply, ("mlp/~/linear_0/w", "mlp/~/linear_1/w"))


def trained_equinox(algorithm: str) -> Trained:
    """The whole module is given to optax, functions and all."""
    eqx = pytest.importorskip("equinox")
    model, tx = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0)), sparse_adam(algorithm)
    state = tx.init(model)

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: loss(jax.vmap(model)(X)))(model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    for _ in range(STEPS):
        model, state = step(model, state)
    return Trained(
        {"module": model, "filtered": eqx.filter(model, eqx.is_inexact_array)},
        {"state": state},
        lambda params, x: jax.vmap(eqx.combine(params, model))(x),
        ("layers/0/weight", "layers/1/weight"),
    )


@functools.cache
def trained(framework: str, algorithm: str) -> Trained:
    return globals()[f"trained_{framework}"](algorithm)


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


def masked_leaves(masks: Any) -> list[Any]:
    return jax.tree.leaves(masks)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude_ste"])
def test_what_takes_parameters_and_a_state(framework, algorithm):
    run, algorithm = trained(framework, algorithm), updater(algorithm)
    for name, params in run.params.items():
        summary = jaxpruner.summarize_sparsity(params)
        kept = [summary[kernel] for kernel in run.kernels]
        assert kept == [SPARSITY] * 2, name
        for state in run.states.values():
            jaxpruner.check_sparse(params, state, algorithm)
            masks = algorithm.current_masks(state, params)
            assert sorted(int(mask.sum()) for mask in masked_leaves(masks)) == [16, 32]
            assert jaxpruner.summarize_intersection(masks, masks)["_total_intersection"] == 1
            for result in (
                jaxpruner.apply_state_masks(params, state),
                jaxpruner.apply_mask(params, masks),
                algorithm.post_gradient_update(params, state),
                algorithm.pre_forward_update(params, state),
            ):
                assert jaxpruner.summarize_sparsity(result) == summary


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude_ste"])
def test_what_takes_parameters_alone(framework, algorithm):
    run, algorithm = trained(framework, algorithm), updater(algorithm)
    for name, params in run.params.items():
        pruned, masks = algorithm.instant_sparsify(params)
        assert jaxpruner.summarize_sparsity(pruned)[run.kernels[0]] == SPARSITY, name
        assert sorted(int(mask.sum()) for mask in masked_leaves(masks)) == [16, 32]
        state = jaxpruner.init_projection(algorithm, params)
        step = jaxpruner.begin_step(algorithm, params, params, state)
        ended, _ = jaxpruner.end_step(step, params)
        projected, _ = jaxpruner.project(algorithm, params, params, params, state)
        for result in (ended, projected):
            assert jaxpruner.summarize_sparsity(result, True)["_nparams"] > 0
        if name in ("state", "pure"):  # no arguments of `forward`
            continue
        flops = jaxpruner.summarize_flops(run.forward, params, X[:1], updater=algorithm, steps=STEPS)
        assert flops["_inference_flops"] == 2 * (8 * 16 + 16 * 4)
        assert flops["_inference_flops_nnz"] == flops["_inference_flops"] / 4
        assert jaxpruner.shifted_parameters(run.forward, params, X[:1]) == ()


def test_state_shardings(framework):
    """Of the parameters, and of a whole module where that is what the optimizer was given."""
    tx = sparse_adam("magnitude")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("model",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    run = trained(framework, "magnitude")
    for name in ("params", "frozen", "pure", "filtered", *(["module"] if framework == "equinox" else [])):
        if name in run.params:
            placed = jax.tree.map(
                lambda leaf: jax.device_put(leaf, place) if isinstance(leaf, jax.Array) else leaf, run.params[name]
            )
            shardings = jaxpruner.state_shardings(tx, placed)
            assert jax.tree.structure(shardings) == jax.tree.structure(tx.init(placed))


def test_parameters_of_another_tree_are_told():
    run = trained("linen", "magnitude")
    for call in (updater("magnitude").current_masks, updater("magnitude").post_gradient_update):
        arguments = [run.states["opt_state"], {"params": run.params["params"]}]
        arguments = arguments if call.__name__ == "current_masks" else arguments[::-1]
        with pytest.raises(ValueError, match="the state masks hidden/kernel, which is no path of these parameters"):
            call(*arguments)


def frozen_case() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    kernel = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"base": {"kernel": kernel(8, 16)}, "lora": {"a": kernel(8, 4), "b": jnp.zeros((4, 16))}}
    return params, {"base": "freeze", "lora": "train"}


def train_adapters(tx: Any, steps: int = 4) -> tuple[Any, Any]:
    params, _ = frozen_case()

    def value(params):
        weight = params["base"]["kernel"] + params["lora"]["a"] @ params["lora"]["b"]
        return loss(X @ weight)

    state = tx.init(params)
    update = jax.jit(lambda params, state: tx.update(jax.grad(value)(params), state, params))
    for _ in range(steps):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
    return params, state


ONCE = {"algorithm": "magnitude", "sparsity": 0.5, "update_start_step": 2, "update_end_step": 2}


def test_around_multi_transform_frozen_parameters_are_pruned():
    """The trap: `sparsify` prunes all that it is given, also what the optimizer inside does not touch."""
    _, labels = frozen_case()
    groups = {"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}
    params, _ = train_adapters(jaxpruner.sparsify(optax.multi_transform(groups, labels), ONCE))
    assert jaxpruner.summarize_sparsity(params)["base/kernel"] == 0.5


@pytest.mark.parametrize("pruned", ["adapters", "b", "base"])
def test_inside_multi_transform_frozen_parameters_stay(pruned):
    """Adapters pruned, one of them dense, or the base pruned at once and its adapters dense."""
    before, labels = frozen_case()
    config = ONCE | ({"filter_fn": lambda path, _: path[-1] == "b"} if pruned == "b" else {})
    train = optax.adam(1e-2) if pruned == "base" else jaxpruner.sparsify(optax.adam(1e-2), config)
    freeze = jaxpruner.sparsify(optax.set_to_zero(), config) if pruned == "base" else optax.set_to_zero()
    params, state = train_adapters(optax.multi_transform({"train": train, "freeze": freeze}, labels))
    summary = jaxpruner.summarize_sparsity(params)
    expected = {"adapters": (0, 0.5, 0.5), "b": (0, 0, 0.5), "base": (0.5, 0, 0)}[pruned]
    assert (summary["base/kernel"], summary["lora/a"], summary["lora/b"]) == expected
    jaxpruner.check_sparse(params, state)
    kept = np.asarray(params["base"]["kernel"]) != 0
    np.testing.assert_array_equal(params["base"]["kernel"][kept], before["base"]["kernel"][kept])


def tunix_trainer(algorithm: str, steps: int, folder: pathlib.Path) -> Any:
    nnx = pytest.importorskip("flax.nnx")
    from tunix.sft import peft_trainer

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 8, rngs=rngs)
            self.out = nnx.Linear(8, 16, rngs=rngs)

        def __call__(self, tokens, positions, cache, attention_mask):
            return self.out(nnx.tanh(self.embed(tokens))), cache

    def model_input(batch):
        batch_size, length = batch.input_tokens.shape
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": jnp.broadcast_to(jnp.arange(length), (batch_size, length)),
            "attention_mask": jnp.ones((batch_size, length, length), bool),
        }

    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100, max_steps=steps, checkpoint_root_directory=str(folder), pbar_description=None
    )
    trainer = peft_trainer.PeftTrainer(Net(nnx.Rngs(0)), sparse_adam(algorithm), config)
    return trainer.with_gen_model_input_fn(model_input)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # it uses old names of JAX and Orbax
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tunix_peft_trainer(algorithm, tmp_path):
    """The stock trainer, exactly sparse, and resumed to the same bits as without a break."""
    pytest.importorskip("tunix")
    from flax import nnx
    from tunix.sft.peft_trainer import TrainingInput

    rng = np.random.default_rng(0)
    batches = [TrainingInput(rng.integers(0, 16, (2, 6)), np.ones((2, 6), bool)) for _ in range(STEPS)]

    def train(steps, folder):
        trainer = tunix_trainer(algorithm, steps, folder)
        start = trainer.train_steps
        trainer.train(batches)
        trainer.close()
        return start, trainer

    _, whole = train(STEPS, tmp_path / "whole")
    train(STEPS - 2, tmp_path / "parts")
    start, resumed = train(STEPS, tmp_path / "parts")
    assert (start, resumed.train_steps) == (STEPS - 2, STEPS)
    jaxpruner.check_sparse(whole.model, whole.optimizer.opt_state, updater(algorithm))
    summary = jaxpruner.summarize_sparsity(whole.model)
    assert min(summary["embed/embedding"], summary["out/kernel"]) >= SPARSITY
    for one, other in ((whole.model, resumed.model), (whole.optimizer, resumed.optimizer)):
        jax.tree.map(
            np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(one)), nnx.to_pure_dict(nnx.state(other))
        )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "static_sparse", "global_magnitude"])
def test_the_hooks_of_easydel(algorithm):
    """`TrainingArguments(pruning_module=updater)`: the trainer wraps its optimizer once, calls two hooks around each
    compiled step, outside of it, and keeps what they return. The weights are those of `sparsify`, to the bit."""
    nnx = pytest.importorskip("flax.nnx")
    config = {"algorithm": algorithm, "sparsity": SPARSITY}
    if algorithm != "static_sparse":
        config |= {"update_start_step": 1, "update_end_step": 4, "update_freq": 2}
    pruning_module = jaxpruner.create_updater_from_config(config)

    def train(tx, pre, post):
        graph, graphstate = nnx.split(
            nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
        )
        opt_state = tx.init(graphstate)

        @jax.jit
        def step(graphstate, opt_state):
            grads = jax.grad(lambda state: loss(nnx.merge(graph, state)(X)))(graphstate)
            updates, opt_state = tx.update(grads, opt_state, graphstate)
            return optax.apply_updates(graphstate, updates), opt_state

        for _ in range(STEPS):
            graphstate = pre(graphstate, opt_state)
            graphstate, opt_state = step(graphstate, opt_state)
            graphstate = post(graphstate, opt_state)
        return graphstate, opt_state

    same = lambda params, opt_state: params  # noqa: E731
    hooked, opt_state = train(
        pruning_module.wrap_optax(optax.adam(1e-2)),
        pruning_module.pre_forward_update,
        pruning_module.post_gradient_update,
    )
    plain, _ = train(jaxpruner.sparsify(optax.adam(1e-2), pruning_module), same, same)
    jax.tree.map(np.testing.assert_array_equal, hooked, plain)
    jaxpruner.check_sparse(hooked, opt_state, pruning_module)
