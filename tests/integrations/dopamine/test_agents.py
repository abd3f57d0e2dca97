"""Every agent and every algorithm: exact sparsity, checkpoints, what is logged, what is refused."""

from __future__ import annotations

import dataclasses
import functools

import dopamine_cases as cases
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dopamine.discrete_domains import atari_lib
from dopamine.jax import networks
from dopamine.jax.agents.dqn import dqn_agent
from dopamine.labs.redo import recycled_dqn_agents
from dopamine.labs.tandem_dqn import tandem_dqn_agent
from flax.metrics import tensorboard

import jaxpruner
import jaxpruner_dopamine as jd
from jaxpruner_dopamine import compaction

pytestmark = cases.quiet

BATCHES = ["ReplayBuffer.batch_size = 4", "ReplayBuffer.max_capacity = 500"]
SPARSE = cases.bind(
    algorithm="magnitude", sparsity=0.9, dist_type="erk",
    update_start_agent_step=0, update_end_agent_step=24, update_freq_agent_steps=8,
)  # fmt: skip
CLASSIC = {
    "num_actions": 3, "observation_shape": (4,), "observation_dtype": jnp.float32, "stack_size": 1, "seed": 1,
    "min_replay_history": 8, "update_period": 4, "target_update_period": 8,
}  # fmt: skip
TINY_ATARI = ("JaxDQNAgent.observation_shape = (44, 44)", "JaxDQNAgent.seed = 0")
LIMITS = (np.full((2,), -1, np.float32), np.full((2,), 1, np.float32))


class TinyQuantile(networks.QuantileNetwork):
    """The stock network's outputs from a vector."""

    @networks.nn.compact
    def __call__(self, x):
        x = networks.nn.relu(networks.nn.Dense(16)(x.astype(jnp.float32).reshape(-1)))
        logits = networks.nn.Dense(self.num_actions * self.num_atoms)(x).reshape((self.num_actions, self.num_atoms))
        probabilities = networks.nn.softmax(jnp.ones_like(logits))
        return atari_lib.RainbowNetworkType(logits.mean(1), logits, probabilities)


class TinyImplicitQuantile(networks.ImplicitQuantileNetwork):
    """The stock network's outputs from a vector."""

    @networks.nn.compact
    def __call__(self, x, num_quantiles, rng):
        x = networks.nn.Dense(16)(x.astype(jnp.float32).reshape(-1))
        quantiles = jax.random.uniform(rng, (num_quantiles, 1))
        embedding = networks.nn.relu(networks.nn.Dense(16)(jnp.cos(jnp.arange(1, 9) * jnp.pi * quantiles)))
        values = networks.nn.Dense(self.num_actions)(x * embedding)
        return atari_lib.ImplicitQuantileNetworkType(values, quantiles)


class TinyFullRainbow(networks.FullRainbowNetwork):
    """The stock network's noisy layers on a vector."""

    @networks.nn.compact
    def __call__(self, x, support, eval_mode=False, key=None):
        layer = networks.feature_layer(jax.random.key(0) if key is None else key, self.noisy, eval_mode=eval_mode)
        x = networks.nn.relu(layer(x.astype(jnp.float32).reshape(-1), 16))
        logits = layer(x, self.num_actions * self.num_atoms).reshape((self.num_actions, self.num_atoms))
        probabilities = networks.nn.softmax(logits)
        return atari_lib.RainbowNetworkType((support * probabilities).sum(1), logits, probabilities)


classic = functools.partial(networks.ClassicControlDQNNetwork, hidden_units=16)
rainbow = functools.partial(networks.ClassicControlRainbowNetwork, hidden_units=16)


AGENTS = {
    "dqn": lambda **kw: jd.SparseJaxDQNAgent(**{"network": classic} | CLASSIC | kw),
    "rainbow": lambda **kw: jd.SparseJaxRainbowAgent(network=rainbow, num_atoms=5, **CLASSIC | kw),
    "full_rainbow": lambda **kw: jd.SparseJaxFullRainbowAgent(
        num_actions=3, network=TinyFullRainbow, num_atoms=5, seed=1, num_updates_per_train_step=2, **kw
    ),
    "quantile": lambda **kw: jd.SparseJaxQuantileAgent(network=TinyQuantile, num_atoms=5, **CLASSIC | kw),
    "implicit_quantile": lambda **kw: jd.SparseJaxImplicitQuantileAgent(
        network=TinyImplicitQuantile, num_tau_samples=4, num_tau_prime_samples=4, num_quantile_samples=4, **CLASSIC | kw
    ),
    "sac": lambda **kw: jd.SparseSACAgent(
        action_shape=(2,), action_limits=LIMITS, observation_shape=(4,), num_layers=1, hidden_units=16, seed=1,
        min_replay_history=8, update_period=4, **kw,
    ),
    "ppo": lambda **kw: jd.SparsePPOAgent(
        action_shape=(2,), action_limits=LIMITS, observation_shape=(4,), num_layers=1, hidden_units=16, seed=1,
        update_period=8, num_epochs=2, batch_size=4, **kw,
    ),
}  # fmt: skip


def bindings(*more: str) -> list[str]:
    return [
        *BATCHES,
        "import dopamine.jax.agents.dqn.dqn_agent",
        "import dopamine.jax.replay_memory.replay_buffer",
        "import dopamine.jax.replay_memory.samplers",
        "PrioritizedSamplingDistribution.max_capacity = 500",
        # What full_rainbow does not hand on.
        "JaxDQNAgent.min_replay_history = 8",
        "JaxDQNAgent.observation_shape = (4,)",
        "JaxDQNAgent.stack_size = 1",
        *SPARSE,
        *more,
    ]


def make(kind: str, *more: str, **arguments):
    """An agent; PPO takes all that it stored as one batch."""
    own = ["ReplayBuffer.batch_size = 8"] if kind == "ppo" else []
    with cases.configured([], bindings(*own, *more)):
        return AGENTS[kind](**arguments)


def nature(**arguments):
    """The stock network for pixels."""
    return jd.SparseJaxDQNAgent(
        **{**CLASSIC, "observation_shape": (20, 20), "observation_dtype": jnp.uint8} | arguments
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nature", "implicit_quantile", "sac"])
def test_each_agent_acts_the_same_without_its_dead_units(kind, monkeypatch):
    monkeypatch.setitem(AGENTS, "nature", nature)
    agent = make(kind, *cases.bind(sparsity=0.5, sparsity_type="groups", dist_type="uniform"))
    pruned = jax.jit(lambda params: agent.updater.instant_sparsify(params)[0])(cases.params_of(agent))
    setattr(agent, agent._params_attribute, pruned)
    network = compaction.compacted(agent)
    assert all(left <= whole // 2 for whole, left in network.small.report().units.values())

    def actions():
        before, agent.eval_mode = agent._rng, True
        rng = np.random.default_rng(2)
        states = rng.integers(0, 256, (6, *agent.observation_shape)).astype(np.float32)
        chosen = [agent.begin_episode(states[0]), *(agent.step(0.0, state) for state in states[1:])]
        agent._rng, agent.eval_mode = before, False
        return np.asarray(chosen)

    dense = actions()
    with compaction.acting_with(agent, network):
        np.testing.assert_allclose(actions(), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", AGENTS)
def test_each_agent_is_sparse_after_every_train_step_and_resumes(kind, tmp_path):
    agent = make(kind)
    assert isinstance(agent.optimizer_state, jaxpruner.SparseState)
    cases.feed(agent, 32 if kind != "ppo" else 48)
    assert int(agent.optimizer_state.count) >= 3
    cases.assert_exactly_sparse(agent, 0.9)
    assert agent.sparsity()["total"] == pytest.approx(0.9, abs=0.03)
    assert agent.shortfall() is None
    if kind == "sac":  # its target network is an average, which can be put on the masks
        masked = jaxpruner.apply_state_masks(agent.target_params, agent.optimizer_state)
        assert jaxpruner.summarize_sparsity(agent.target_params, only_total_sparsity=True)["_total_sparsity"] < 0.1
        jaxpruner.check_sparse(masked, agent.optimizer_state)

    bundle = agent.bundle_and_checkpoint(str(tmp_path), 0)
    again = make(kind)
    assert again.unbundle(str(tmp_path), 0, bundle)
    for one in (agent, again):
        cases.feed(one, 16, seed=1)
    assert int(agent.optimizer_state.count) > int(bundle["optimizer_state"].count)
    cases.assert_same_bits(again.optimizer_state, agent.optimizer_state)
    cases.assert_same_bits(cases.params_of(again), cases.params_of(agent))


@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_every_algorithm_and_its_checkpoint(algorithm, tmp_path):
    packed = cases.ALGORITHMS.index(algorithm) % 2 == 0
    sparsity = cases.bind(algorithm=algorithm, use_packed_masks=packed)
    agent = make("dqn", *sparsity)
    cases.feed(agent, 40)
    cases.assert_exactly_sparse(agent, 0.9)
    bundle = agent.bundle_and_checkpoint(str(tmp_path), 0)
    again = make("dqn", *sparsity)
    assert again.unbundle(str(tmp_path), 0, bundle)
    for one in (agent, again):
        cases.feed(one, 12, seed=1)
    cases.assert_same_bits(again.optimizer_state, agent.optimizer_state)
    cases.assert_same_bits(again.online_params, agent.online_params)


def test_structures_and_patterns():
    agent = make("dqn", *cases.bind(
        sparsity_type={"*layers_1*": "nm_1,4"}, sparsity=0.75, dist_type="uniform", update_end_agent_step=0
    ))  # fmt: skip
    cases.feed(agent, 20)
    groups = np.asarray(agent.online_params["params"]["layers_1"]["kernel"]).reshape(16, 4, 4)
    assert ((groups != 0).sum(-1) == 1).all()


def test_no_prune_is_the_stock_agent_to_the_bit():
    with cases.configured([], bindings("sparsify.algorithm = 'no_prune'")):
        ours = AGENTS["dqn"]()
        stock = dqn_agent.JaxDQNAgent(network=classic, **CLASSIC)
    for agent in (ours, stock):
        cases.feed(agent, 20)
    assert ours.sparsity() == {}
    cases.assert_same_bits(ours.optimizer_state, stock.optimizer_state)
    cases.assert_same_bits(ours.online_params, stock.online_params)


def test_bindings_of_the_stock_class_hold():
    assert make("dqn", "JaxDQNAgent.gamma = 0.5").gamma == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["magnitude", "rigl", "magnitude_ste", "preserve"])
def test_a_dense_checkpoint_goes_on_sparse(algorithm, tmp_path):
    with cases.configured([], bindings()):
        dense = dqn_agent.JaxDQNAgent(network=classic, **CLASSIC)
    cases.feed(dense, 20)
    bundle = dense.bundle_and_checkpoint(str(tmp_path), 0)
    # Agent steps count from the start of the dense run: it has 21 behind it.
    agent = make("dqn", *cases.bind(algorithm=algorithm, update_start_agent_step=25, update_end_agent_step=37))
    assert agent.unbundle(str(tmp_path), 0, bundle)
    cases.assert_same_bits(cases.inner(agent.optimizer_state), dense.optimizer_state)
    cases.assert_same_bits(agent.online_params, dense.online_params)
    assert int(agent.optimizer_state.count) == 0
    if algorithm == "preserve":
        return
    assert agent.updater.scheduler.update_end_step == 4  # (37 - 21) / 4
    cases.feed(agent, 36, seed=1)
    cases.assert_exactly_sparse(agent, 0.9)

    sparse_bundle = agent.bundle_and_checkpoint(str(tmp_path / "."), 1)
    resumed = make("dqn", *cases.bind(algorithm=algorithm, update_start_agent_step=25, update_end_agent_step=37))
    assert resumed.unbundle(str(tmp_path), 1, sparse_bundle)
    assert resumed.updater.scheduler == agent.updater.scheduler


def test_a_young_dense_checkpoint_does_not_move_the_schedule(tmp_path):
    """It has no gradient steps behind it, so they begin where they would have begun."""
    with cases.configured([], bindings()):
        dense = dqn_agent.JaxDQNAgent(network=classic, **CLASSIC | {"min_replay_history": 100})
    cases.feed(dense, 20)
    bundle = dense.bundle_and_checkpoint(str(tmp_path), 0)
    agent = make("dqn", *cases.bind(update_start_agent_step=120, update_end_agent_step=160), min_replay_history=100)
    before = agent.updater.scheduler
    assert agent.unbundle(str(tmp_path), 0, bundle)
    assert agent.updater.scheduler == before


def snapshot(agent):
    return [agent.training_steps, agent.optimizer, *jax.tree.leaves((agent.optimizer_state, agent.online_params))]


def assert_unchanged(agent, before):
    assert all(a is b for a, b in zip(snapshot(agent), before, strict=True))


def test_a_dense_checkpoint_that_is_past_the_schedule_is_told(tmp_path):
    with cases.configured([], bindings()):
        dense = dqn_agent.JaxDQNAgent(network=classic, **CLASSIC)
    cases.feed(dense, 40)
    bundle = dense.bundle_and_checkpoint(str(tmp_path), 0)
    agent = make("dqn")
    before = snapshot(agent)
    with pytest.raises(ValueError, match=r"24 is over before the first gradient step of this training.* agent step 41"):
        agent.unbundle(str(tmp_path), 0, bundle)
    assert_unchanged(agent, before)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            cases.bind(algorithm="no_prune"),
            "sparsify.algorithm: 'magnitude' in the run of .*, 'no_prune' now.*preserve",
        ),
        (cases.bind(algorithm="preserve", use_packed_masks=True), "use_packed_masks: False in the run of .*, True now"),
        (cases.bind(use_packed_masks=True), "sparsify.use_packed_masks: False in the run of .*, True now"),
        (
            cases.bind(algorithm="magnitude_ste"),
            "sparsify.algorithm: 'magnitude' in the run of .*, 'magnitude_ste' now",
        ),
        (cases.bind(algorithm="saliency"), "Set algorithm='magnitude' to continue it"),
        (["JaxDQNAgent.optimizer = 'sgd'"], r"inner_state\[.* is int32\[\] there and nothing here.*the optimizer"),
        (["ClassicControlDQNNetwork.hidden_units = 12"], r"is bool\[16, 3\] there and bool\[12, 3\] here.*the network"),
    ],
)
def test_a_sparse_checkpoint_is_not_continued_as_something_else(now, message, tmp_path):
    agent = make("dqn")
    cases.feed(agent, 20)
    bundle = agent.bundle_and_checkpoint(str(tmp_path), 0)
    other = make("dqn", *now, network=networks.ClassicControlDQNNetwork if "hidden" in now[0] else classic)
    before = snapshot(other)
    with pytest.raises(ValueError, match=message):
        other.unbundle(str(tmp_path), 0, bundle)
    assert_unchanged(other, before)


def test_another_sparsity_holds_from_where_a_checkpoint_is_continued(tmp_path, caplog):
    caplog.set_level("WARNING", logger="absl")
    agent = make("dqn", *cases.bind(sparsity=0.75))
    cases.feed(agent, 24)
    bundle = agent.bundle_and_checkpoint(str(tmp_path), 0)
    again = make("dqn", *cases.bind(update_end_agent_step=48))
    assert again.unbundle(str(tmp_path), 0, bundle)
    assert "sparsify.sparsity: 0.75 in the run of" in caplog.text
    assert "0.9 now; the configuration at hand holds" in caplog.text
    cases.feed(again, 32, seed=1)
    cases.assert_exactly_sparse(again, 0.9)
    assert again.shortfall() is None

    late = make("dqn")
    cases.feed(agent, 12)  # the schedule is over
    assert late.unbundle(str(tmp_path), 1, agent.bundle_and_checkpoint(str(tmp_path / "."), 1))
    with pytest.raises(ValueError, match=r"asked 89.7%, masks hold 75.0%.*let update_end_agent_step be later"):
        late.check_sparse()


@pytest.mark.parametrize("algorithm", ["magnitude", "movement"])
def test_zeros_of_a_sparse_checkpoint_can_be_preserved(algorithm, tmp_path):
    agent = make("dqn", *cases.bind(algorithm=algorithm))
    cases.feed(agent, 32)
    bundle = agent.bundle_and_checkpoint(str(tmp_path), 0)
    kept = make("dqn", *cases.bind(algorithm="preserve"))
    assert kept.unbundle(str(tmp_path), 0, bundle)
    zeros = [leaf == 0 for leaf in jax.tree.leaves(kept.online_params) if leaf.ndim > 1]
    cases.feed(kept, 12, seed=1)
    after = [leaf for leaf in jax.tree.leaves(kept.online_params) if leaf.ndim > 1]
    assert sum(int(z.sum()) for z in zeros) > 100
    assert all(not np.any(np.asarray(leaf)[np.asarray(z)]) for leaf, z in zip(after, zeros, strict=True))


def test_a_missing_replay_buffer_leaves_the_agent_as_it_was(tmp_path):
    agent = make("dqn")
    state = agent.optimizer_state
    assert not agent.unbundle(str(tmp_path / "nowhere"), 0, None)
    assert agent.optimizer_state is state


@pytest.mark.parametrize(("kind", "loss"), [("dqn", "HuberLoss"), ("sac", "Losses/Actor"), ("ppo", "Losses/Actor")])
def test_sparsity_is_written_when_the_stock_agent_writes_its_losses(kind, loss, tmp_path):
    writer = tensorboard.SummaryWriter(str(tmp_path)) if kind == "sac" else str(tmp_path)
    frequency = 1 if kind == "ppo" else 16
    agent = make(kind, summary_writer=writer, summary_writing_frequency=frequency, collector_allowlist=("recorder",))
    cases.Recorder.written.clear()
    cases.collector_dispatcher.add_collector("recorder", cases.Recorder)
    try:
        agent.set_collector_dispatcher(cases.collector_dispatcher.CollectorDispatcher(str(tmp_path), ["recorder"]))
    finally:
        del cases.collector_dispatcher.AVAILABLE_COLLECTORS["recorder"]
    cases.feed(agent, 50)
    agent.summary_writer.flush()
    found = cases.scalars(tmp_path)
    due = [step for step, _ in found[loss]]
    assert len(due) >= 3
    leaves = [name for name in agent.sparsity() if name != "total"]
    assert leaves
    for name in ("total", *leaves):
        assert [step for step, _ in found[f"Sparsity/{name}"]] == due
    assert found["Sparsity/total"][-1][1] == pytest.approx(agent.sparsity()["total"], abs=1e-6)
    collected = [(s.step, s.value) for s in cases.Recorder.written if s.name == "Sparsity/total"]
    assert [step for step, _ in collected] == due
    assert collected[-1][1] == agent.sparsity()["total"]


@pytest.mark.parametrize("base", [tandem_dqn_agent.TandemDQNAgent, recycled_dqn_agents.RecycledDQNAgent])
def test_agents_that_cannot_be_sparse_say_why(base):
    agent = type("MyAgent", (jd.SparseAgent, base), {})
    with pytest.raises(ValueError, match=rf"MyAgent: {base.__name__} cannot be sparse, because"):
        agent(num_actions=2)


class Standardized(networks.ClassicControlDQNNetwork):
    """The stock network, with a layer whose weights are shifted."""

    def __call__(self, x):
        kernel = self.variables.get("params", {}).get("layers_1", {}).get("kernel", jnp.zeros((16, 16)))
        outputs = super().__call__(x)
        return outputs._replace(q_values=outputs.q_values + (jnp.ones(16) @ (kernel - kernel.mean())).mean())


class Careless(dqn_agent.JaxDQNAgent):
    """What goes wrong in agents of one's own."""

    def _train_step(self):
        super()._train_step()
        self.online_params = jax.tree.map(lambda p: p + 0.125, self.online_params)


def test_zeros_that_are_lost_are_told(caplog):
    """In the network when the agent is built; in the train step at the first summary after the first masks."""
    caplog.set_level("WARNING", logger="absl")
    network = functools.partial(Standardized, hidden_units=16)
    with cases.configured([], bindings()):
        agent = jd.sparse_agent(Careless)(**CLASSIC | {"network": network, "summary_writing_frequency": 16})
    assert "params/layers_1/kernel: the network shifts these pruned parameters" in caplog.text
    with pytest.raises(ValueError, match=r"/kernel: \d+ of the \d+ weights that its mask prunes are not zero"):
        cases.feed(agent, 40)
    assert agent.training_steps == 17
    assert "not zero" in agent.shortfall()


def test_a_train_step_that_passes_no_params_is_told():
    class Forgetful(jd.SparseJaxDQNAgent):
        def _train_step(self):
            grads = jax.tree.map(jnp.zeros_like, self.online_params)
            self.optimizer.update(grads, self.optimizer_state)

    with cases.configured([], bindings()):
        agent = Forgetful(network=classic, **CLASSIC)
    with pytest.raises(ValueError, match=r"needs the parameters.*call tx.update\(updates, state, params\)"):
        cases.feed(agent, 1)


def test_more_gradient_steps_than_the_schedule_was_made_for_are_told():
    class Eager(dqn_agent.JaxDQNAgent):
        def _train_step(self):
            super()._train_step()
            self.training_steps -= 1
            super()._train_step()

    class Told(jd.sparse_agent(Eager)):
        def _clock(self, first=None):
            return dataclasses.replace(super()._clock(first), per_update=2)

    arguments = CLASSIC | {"network": classic, "summary_writing_frequency": 16}
    with cases.configured([], bindings()):
        agent, told = jd.sparse_agent(Eager)(**arguments), Told(**arguments)
    with pytest.raises(ValueError, match=r"SparseEager: it took 2 gradient steps .* for 1, so that it would end early"):
        cases.feed(agent, 40)
    cases.feed(told, 40)
    cases.assert_exactly_sparse(told, 0.9)


def test_ppo_goes_on_from_a_checkpoint_that_is_due_for_training(tmp_path):
    """It trains at the start of the next episode, and records the last observation of the one before."""
    whole = make("ppo")
    cases.feed(whole, 8)
    whole.end_episode(1.0, True)
    bundle = whole.bundle_and_checkpoint(str(tmp_path), 0)
    resumed = make("ppo")
    assert resumed.unbundle(str(tmp_path), 0, bundle)
    for agent in (whole, resumed):
        before = int(agent.optimizer_state.count)
        cases.feed(agent, 12, seed=1)
        assert int(agent.optimizer_state.count) > before
    cases.assert_same_bits(resumed.network_params, whole.network_params)


def test_units_are_not_preserved_weight_by_weight(tmp_path):
    agent = make("dqn", *cases.bind(sparsity=0.5, sparsity_type="groups", dist_type="uniform"))
    cases.feed(agent, 32)
    bundle = agent.bundle_and_checkpoint(str(tmp_path), 0)
    kept = make("dqn", *cases.bind(algorithm="preserve"))
    with pytest.raises(ValueError, match=r"'preserve' does not go on with the whole units .*compact"):
        kept.unbundle(str(tmp_path), 0, bundle)


def test_priorities_that_dopamine_does_not_set_are_told(caplog):
    caplog.set_level("WARNING", logger="absl")
    make("dqn")
    assert "prioritized" not in caplog.text
    make("rainbow", replay_scheme="prioritized")
    assert "SparseJaxRainbowAgent: the replay buffer is prioritized" in caplog.text


class Space:
    """An environment as far as it decides about agents."""

    def __init__(self, action_space):
        self.action_space = action_space
        self.observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("jax_dqn", gymnasium.spaces.Box(-1, 1, (2,)), "does not take the actions of this environment"),
        ("sac", gymnasium.spaces.Discrete(2), "does not take the actions of this environment"),
        ("ppo", gymnasium.spaces.Discrete(2), "PPO takes continuous actions only"),
        ("dqn", gymnasium.spaces.Discrete(2), "'dqn' is no JAX agent that can be sparse.*jax_dqn, jax_quantile"),
        (None, gymnasium.spaces.Discrete(2), "None is no JAX agent"),
        ("dopamine_cases:Nobody", gymnasium.spaces.Discrete(2), "cannot be imported .*'module:Class' of a module"),
        ("nowhere:Agent", gymnasium.spaces.Discrete(2), "cannot be imported"),
        ("dopamine_cases:CONFIGS", gymnasium.spaces.Discrete(2), "is no class"),
        ("dopamine_cases:Recorder", gymnasium.spaces.Discrete(2), "is no JAX agent of Dopamine; derive it from one"),
        (
            "dopamine.labs.tandem_dqn.tandem_dqn_agent:TandemDQNAgent",
            gymnasium.spaces.Discrete(2),
            "gives the optimizer|give the",
        ),
    ],
)
def test_agents_and_environments_that_do_not_fit(name, space, message):
    with cases.configured([], bindings()), pytest.raises(ValueError, match=message):
        jd.create_sparse_agent(Space(space), agent_name=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sac", "ppo"])
def test_agents_of_continuous_actions_by_name(name):
    with cases.configured([], bindings("sparsify.update_end_agent_step = 40_000")):
        agent = jd.create_sparse_agent(Space(gymnasium.spaces.Box(-1, 1, (2,), np.float32)), agent_name=name)
    assert type(agent).__name__ == {"sac": "SparseSACAgent", "ppo": "SparsePPOAgent"}[name]


@pytest.mark.parametrize("name", ["'dopamine_cases:CautiousAgent'", "@CautiousAgent"])
def test_an_agent_of_ones_own_becomes_sparse_by_its_name_in_gin(name):
    """Its bindings, train step and network are its own; a filter and a map of gin keep its last layer dense."""
    own = [
        f"create_agent.agent_name = {name}",
        "CautiousAgent.caution = 0.25",
        "JaxDQNAgent.network = @ClassicControlDQNNetwork",
        "JaxDQNAgent.min_replay_history = 8",
        "ClassicControlDQNNetwork.hidden_units = 16",
    ]
    dense_last_layer = ["sparsify.custom_sparsity_map = {'*/final_layer/kernel': 0.0}"]
    if name.startswith("@"):
        dense_last_layer = ["sparsify.filter_fn = @all_but_the_last_layer"]
    with cases.configured([], bindings(*own, *dense_last_layer)):
        agent = jd.create_sparse_agent(Space(gymnasium.spaces.Discrete(2)))
        assert jd.sparse_agent(cases.CautiousAgent) is jd.sparse_agent(cases.CautiousAgent)
    assert isinstance(agent, cases.CautiousAgent)
    assert isinstance(agent, jd.SparseJaxDQNAgent)
    assert agent.gamma == 0.99 - 0.25
    cases.feed(agent, 40)
    assert agent.shortfall() is None
    layers = agent.online_params["params"]
    assert (np.asarray(layers["final_layer"]["kernel"]) != 0).all()
    assert np.mean([(layers[name]["kernel"] == 0).mean() for name in ("layers_0", "layers_1")]) > 0.7


@pytest.mark.slow
def test_names_in_gin_may_be_macros():
    with cases.configured([], bindings("NAME = 'jax_dqn'", "create_agent.agent_name = %NAME", *TINY_ATARI)):
        agent = jd.create_sparse_agent(Space(gymnasium.spaces.Discrete(2)))
    assert type(agent) is jd.SparseJaxDQNAgent
