"""dqn: sparse DQN agents with Dopamine, the reinforcement learning rows of the paper.

    jaxpruner-baselines run dqn --preset cartpole      # 63 runs, about 40 minutes on one core; dense: 200.0
    jaxpruner-baselines run dqn --preset acrobot       # 63 runs, about 45 minutes on one core; dense: -89.1
    jaxpruner-baselines run dqn --preset lunarlander --sparsities 0.98 --seeds 5   # 55 runs, two hours on a core
    jaxpruner-baselines run dqn --preset atari_small --methods dense,magnitude --sparsities 0.98 --seeds 1
    jaxpruner-baselines run dqn --preset paper         # days a run on 2 cores; meant for an accelerator

Dopamine's own agents, networks and runners from the gin files of jaxpruner_dopamine; a run binds the algorithm and
the sparsity. The return of a run is the mean of its last iterations' training episodes, as Dopamine reports it; that of
`lunarlander` the mean of episodes which the trained agent plays, the same ones for all methods and seeds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner_baselines import intervals
from jaxpruner_baselines.baseline import Baseline, Curve, NotReady, Outcome, Program, Progress, Run, TrainStep
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.costs import DEAD, SHARES, costs, dead_units
from jaxpruner_baselines.hush import hushed
from jaxpruner_baselines.methods import GROWS, is_dense
from jaxpruner_baselines.pretrained import installed

# Importing Dopamine brings TensorFlow and takes some seconds, so that happens when a run starts.
for package in ("dopamine", "jaxpruner_dopamine"):
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"No module named {package!r}", name=package)

CONFIGS = "jaxpruner_dopamine/configs"
BOX2D = "box2d==2.3.10"
# The candidates, and the first of seeds that no run of the results has: a game has no data to hold out.
LEARNING_RATES = (0.0003, 0.001, 0.003)
HELD_OUT = 100


@dataclasses.dataclass(frozen=True)
class Preset:
    gin_file: str
    iterations: int
    agent_steps: int  # an iteration
    last: int  # iterations whose mean is the result
    bindings: tuple[str, ...] = ()
    dynamic: bool = False  # methods that replace weights have a schedule of their own
    checkpoint_every: int = 0  # iterations; 0: a run is so short that it starts anew


@dataclasses.dataclass(frozen=True)
class Evaluated(Preset):
    """The result is the mean return of episodes that the trained agent plays, without learning.

    There is no test set in a game, so that choices are made on other seeds, and by other episodes.
    """

    last: int = 0  # of no effect here
    episodes: int = 100
    growing: tuple[str, ...] = ()  # bindings of methods that replace weights
    first_seed: int = 0  # added to the seed of a run


# A quarter of Dopamine's width: pruning the wide one to 98 % costs little, and its runs take twice as long.
_SMALL_NETWORK = ("ClassicControlDQNNetwork.hidden_units = 128",)
_SMALL_ATARI = (
    # Of the 100k benchmark (van Hasselt et al., 2019) what a DQN has: n-step returns and early updates.
    "JaxDQNAgent.update_horizon = 10",
    "JaxDQNAgent.min_replay_history = 1_600",
    "JaxDQNAgent.target_update_period = 2_000",
    "JaxDQNAgent.epsilon_decay_period = 5_000",
    "create_optimizer.learning_rate = 1e-4",
    "ReplayBuffer.max_capacity = 50_000",
    "sparsify.update_start_agent_step = 4_000",
    "sparsify.update_end_agent_step = 12_000",
    "sparsify.update_freq_agent_steps = 400",
)
_PAPER = Preset(
    gin_file="dqn_mspacman.gin", iterations=40, agent_steps=250_000, last=5, dynamic=True, checkpoint_every=1
)

PRESETS = {
    "cartpole": Preset("dqn_cartpole.gin", iterations=30, agent_steps=1_000, last=5, bindings=_SMALL_NETWORK),
    "acrobot": Preset("dqn_acrobot.gin", iterations=30, agent_steps=1_000, last=5, bindings=_SMALL_NETWORK),
    "atari_small": Preset(
        gin_file="dqn_mspacman.gin",
        iterations=10,
        agent_steps=2_000,
        last=3,
        bindings=_SMALL_ATARI,
        checkpoint_every=2,
    ),
    "lunarlander": Evaluated(
        gin_file="dqn_lunarlander.gin",
        iterations=40,
        agent_steps=2_000,
        dynamic=True,
        # The paper's schedule of these methods, 0.05 % of its training from one update to the next, would leave 10
        # gradient steps of so short a training between them; here it is 0.1 %.
        growing=("sparsify.update_end_agent_step = 80_000", "sparsify.update_freq_agent_steps = 80"),
    ),
    "paper": _PAPER,
    "paper_resnet": dataclasses.replace(_PAPER, gin_file="dqn_resnet_mspacman.gin"),
    "smoke": Preset(
        gin_file="dqn_cartpole.gin",
        iterations=3,
        agent_steps=100,
        last=1,
        checkpoint_every=1,
        bindings=(
            "ClassicControlDQNNetwork.hidden_units = 16",
            "JaxDQNAgent.min_replay_history = 40",
            "ReplayBuffer.batch_size = 8",
            "sparsify.update_start_agent_step = 100",
            "sparsify.update_end_agent_step = 200",
            "sparsify.update_freq_agent_steps = 20",
        ),
    ),
}


def candidates(preset: Preset) -> Mapping[str, Preset]:
    """Learning rates, of presets whose agents are evaluated."""
    if not isinstance(preset, Evaluated):
        return {}
    return {
        f"learning rate {rate}, seeds from {HELD_OUT}": dataclasses.replace(
            preset, bindings=(*preset.bindings, f"create_optimizer.learning_rate = {rate}"), first_seed=HELD_OUT
        )
        for rate in LEARNING_RATES
    }


def prepare(preset: Preset) -> None:
    """Raises if the simulation of the game is not installed."""
    if preset.gin_file == "dqn_lunarlander.gin" and importlib.util.find_spec("Box2D") is None:
        raise NotReady(
            f"LunarLander needs Box2D: pip install {BOX2D} (extra lunarlander; make setup installs it).\n"
            "The presets cartpole and acrobot need no more than Dopamine."
        )


def gin_config(run: Run) -> tuple[list[str], list[str]]:
    """The gin files and bindings of a run."""
    preset, dense = run.preset, is_dense(run.method)
    grows = preset.dynamic and run.method in GROWS
    files = [preset.gin_file, *(["sparse_dynamic.gin"] if grows else [])]
    return [f"{CONFIGS}/{name}" for name in files], [
        *preset.bindings,
        *(preset.growing if grows and isinstance(preset, Evaluated) else ()),
        f"Runner.num_iterations = {preset.iterations}",
        f"Runner.training_steps = {preset.agent_steps}",
        f"JaxDQNAgent.seed = {run.seed + (preset.first_seed if isinstance(preset, Evaluated) else 0)}",
        "create_agent.debug_mode = False",
        "CollectorDispatcher.collectors = ()",
        f"sparsify.algorithm = {'no_prune' if dense else run.method!r}",
        *([] if dense else [f"sparsify.sparsity = {run.sparsity}"]),
    ]


def start(run: Run, folder: str) -> Any:
    """The runner of a run, which continues the checkpoint in the folder."""
    with hushed():
        import jaxpruner_dopamine  # isort: skip  (Dopamine can be imported after it)
        import gin
        import tensorflow as tf
        from absl import logging
        from dopamine.discrete_domains import run_experiment

        tf.config.set_visible_devices([], "GPU")
    logging.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gymnasium and orbax, about what Dopamine calls
        gin.clear_config()
        run_experiment.load_gin_configs(*gin_config(run))
        return jaxpruner_dopamine.create_runner(folder)


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    preset = run.preset
    total = preset.iterations * preset.agent_steps
    yield Progress(0, total)
    runner = start(run, str(checkpoint.folder))
    for done in runner.iterations(preset.checkpoint_every):
        yield Progress(done * preset.agent_steps, total, f"return {runner.train_returns()[-1]:.1f}")
    returns = runner.train_returns()
    scored, examples = returns[-preset.last :], {}
    if isinstance(preset, Evaluated):
        yield Progress(total, total, f"{preset.episodes} episodes of evaluation")
        scored = [runner.play(number, seed=preset.first_seed) for number in range(preset.episodes)]
        examples = {"examples": intervals.pack(np.asarray(scored))}
    runner.close()
    sparsity = runner.agent.sparsity()
    yield Outcome(
        value=sum(scored) / len(scored),
        sparsity_reached=sparsity.get("total", 0.0),
        steps=total,
        details={"returns": [round(value, 3) for value in returns], **examples, **_costs(runner.agent)},
    )


def abstract(run: Run) -> TrainStep:
    """Dopamine's jitted `train`, on one device. Its agent and its game are made, which takes megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        runner = start(run, folder)
        agent, batch = runner.agent, _batch_size()
        from dopamine.jax.agents.dqn import dqn_agent

        def sampled(dtype: Any, shape: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, *shape), jax.dtypes.canonicalize_dtype(dtype))

        states = sampled(agent.observation_dtype, agent.state.shape)
        lowered = dqn_agent.train.lower(
            agent.network_def,
            agent.online_params,
            agent.target_network_params,
            agent.optimizer,
            agent.optimizer_state,
            states,
            sampled(jnp.int32),
            states,
            sampled(jnp.float32),
            sampled(jnp.bool_),
            agent.cumulative_gamma,
            agent._loss_type,
        )
        runner.close()
    steps = _gradient_steps(agent, runner.agent_steps)
    return TrainStep([Program(lowered)], agent.online_params, agent.optimizer_state, agent.updater, steps, devices=1)


def _costs(agent: Any) -> dict[str, Any]:
    """Those of acting, and of the gradient steps, without those of target networks; and the units that are dead."""
    network = agent.network_def.apply, agent.online_params, agent.preprocess_fn(agent.state)
    return costs(
        *network, updater=agent.updater, steps=_gradient_steps(agent, agent.training_steps), batch=_batch_size()
    ) | dead_units(*network)


def _gradient_steps(agent: Any, agent_steps: int) -> int:
    return (agent_steps - agent.min_replay_history) // agent.update_period


def _batch_size() -> int:
    import gin

    return gin.query_parameter("ReplayBuffer.batch_size")


BASELINE = Baseline(
    name="dqn",
    summary="deep Q-learning on CartPole, Acrobot, LunarLander and Atari (Dopamine)",
    metric="return",
    also=(*SHARES, DEAD),
    presets=PRESETS,
    train=train,
    prepare=prepare,
    abstract=abstract,
    candidates=candidates,
    settings=lambda run: "".join(map(installed.gin_text, gin_config(run)[0])),
    sparsities=(0.9, 0.98),
    curve=Curve("returns", "agent steps"),
)
