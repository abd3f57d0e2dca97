"""Real trainings: CartPole learns, Pong is exactly sparse, kill -9 and resume to the bit, gin files, command lines."""

from __future__ import annotations

import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import dopamine_cases as cases
import jax
import numpy as np
import pytest
from PIL import Image

import jaxpruner
import jaxpruner_dopamine
from jaxpruner_dopamine import play, train

pytestmark = cases.quiet

ROOT = pathlib.Path(__file__).parents[3]
CONFIGS = pathlib.Path(jaxpruner_dopamine.__file__).parent / "configs"
PONG = (
    "JaxDQNAgent.seed = 3",
    "JaxDQNAgent.min_replay_history = 40",
    "JaxDQNAgent.update_period = 8",
    "ReplayBuffer.batch_size = 4",
    "ReplayBuffer.max_capacity = 2000",
    "sparsify.sparsity = 0.95",
    "sparsify.update_start_agent_step = 48",
    "sparsify.update_end_agent_step = 160",
    "sparsify.update_freq_agent_steps = 16",
    "Runner.training_steps = 100",
    "Runner.max_steps_per_episode = 100",
    *cases.QUIET,
)


def assert_same_agents(one, other):
    assert one.training_steps == other.training_steps
    cases.assert_same_bits(one.optimizer_state, other.optimizer_state)
    cases.assert_same_bits(one.online_params, other.online_params)
    cases.assert_same_bits(one.target_network_params, other.target_network_params)
    cases.assert_same_bits(one._rng, other._rng)
    cases.assert_same_bits(one._replay.sample(32), other._replay.sample(32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_cartpole_learns_at_90_percent(seed, tmp_path):
    """A loose bar: a random agent gets about 20."""
    runner = cases.run(
        tmp_path,
        ["dqn_cartpole.gin"],
        [
            f"JaxDQNAgent.seed = {seed}",
            "ClassicControlDQNNetwork.hidden_units = 128",
            "Runner.num_iterations = 8",
            "sparsify.update_start_agent_step = 2_000",
            "sparsify.update_end_agent_step = 5_000",
            *cases.QUIET,
        ],
        checkpoint_every=0,
    )
    cases.assert_exactly_sparse(runner.agent, 0.9)
    returns = runner.train_returns()
    assert len(returns) == 8
    assert np.mean(returns[-3:]) > 60


# One of each kind: all of them are trained in test_agents.
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["saliency", "global_magnitude", "magnitude_ste", "set"])
def test_pong_is_exactly_sparse(algorithm, tmp_path):
    """Real frames: 300 agent steps of 4 frames each."""
    more = ["Runner.num_iterations = 3", *cases.bind(algorithm=algorithm, drop_fraction=0.3)]
    runner = cases.run(tmp_path, ["dqn_pong.gin"], [*PONG, *more], checkpoint_every=0)
    agent = runner.agent
    assert runner._environment.environment.unwrapped.spec.id == "ALE/Pong-v5"
    assert 30 <= int(agent.optimizer_state.count) <= 40
    cases.assert_exactly_sparse(agent, 0.95)


@pytest.mark.slow
def test_pong_resumes_to_the_bit(tmp_path):
    """In the middle of its mask updates, with packed masks; sticky actions and the start of each game included."""
    more = cases.bind(algorithm="rigl", use_packed_masks=True)
    whole = cases.run(tmp_path / "whole", ["dqn_pong.gin"], [*PONG, "Runner.num_iterations = 3", *more])
    part = cases.run(tmp_path / "parts", ["dqn_pong.gin"], [*PONG, "Runner.num_iterations = 3", *more], stop=1)
    assert part.agent.shortfall() is None  # RigL is as sparse as asked throughout
    parts = cases.run(tmp_path / "parts", ["dqn_pong.gin"], [*PONG, "Runner.num_iterations = 3", *more])
    assert parts.iterations_done == 1
    assert parts.train_returns() == whole.train_returns()
    assert_same_agents(parts.agent, whole.agent)


@pytest.mark.slow
@pytest.mark.usefixtures("flags_of_play")
def test_killed_and_resumed_is_the_run_that_went_through(tmp_path, capsys):
    """From the repository's root, where a folder called `baselines` is on the path."""
    bindings = [*cases.CARTPOLE, *cases.ITERATIONS]
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "jaxpruner_dopamine.train", *cases.arguments(folder, bindings)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output, cwd=ROOT)
    deadline = time.monotonic() + 200
    while not list((folder / "checkpoints").glob("sentinel_checkpoint_complete.*")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

    resumed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "Reloaded checkpoint and will start from iteration" in resumed.stderr
    assert "sparsity of total: 0.8" in resumed.stderr
    assert "orbax" not in resumed.stderr.lower()
    whole = cases.run(tmp_path / "whole", ["dqn_cartpole.gin"], bindings)
    saved = pickle.loads((folder / "checkpoints" / "ckpt.3").read_bytes())
    cases.assert_same_bits(saved["optimizer_state"], whole.agent.optimizer_state)
    cases.assert_same_bits(saved["online_params"], whole.agent.online_params)
    assert [saved["logs"][f"iteration_{i}"]["train_average_return"][0] for i in range(4)] == whole.train_returns()

    # What was trained is shown at play.
    for output, in_strip in ((tmp_path / "strip.png", True), (tmp_path / "film.gif", False)):
        play.main(cases.parsed("play", folder, bindings, f"--output={output}", "--frames=4", "--height=60"))
        assert "steps, return" in capsys.readouterr().out
        with Image.open(output) as picture:
            assert picture.height == 60
            assert (picture.width > 3 * 60) == in_strip
            assert (getattr(picture, "n_frames", 1) > 1) != in_strip


@pytest.mark.parametrize(
    ("module", "bindings", "more", "message"),
    [
        (train, ["sparsify.sparsity = 1.5"], (), "Default sparsity"),
        (train, ["create_agent.agent_name = 'dqn'"], (), "is no JAX agent that can be sparse"),
        (train, ["create_runner.schedule = 'sometimes'"], (), "create_runner.schedule: 'sometimes' is not known"),
        # The closing $: nothing follows of where gin was.
        (train, ["sparsify.algorithm = 'magnitud'"], (), r"^algorithm: 'magnitud' is not known; [^\n]*synflow\.$"),
        (
            train,
            ["sparsify.algorithm = 'synflow'"],
            (),
            r"^algorithm: SynFlow scores with the loss, [^\n]*make masks b",
        ),
        (train, ["sparsify.agorithm = 'rigl'"], (), r"^agorithm: no such key [^\n]*update_end_agent_step[^\n]*\.$"),
        (train, ["sparsfy.algorithm = 'rigl'"], (), r"^No configurable matching 'sparsfy'[^\n]*$"),
        (train, ["JaxDQNAgent.gama = 1"], (), r"^[^\n]*a parameter named 'gama'[^\n]*$"),
        (train, ["import nothing.of.the.kind"], (), r"^[^\n]*No module named 'nothing'[^\n]*$"),
        (train, ["sparsify.sparsity ="], (), r"^[^\n]+$"),
        (train, ["create_gym_environment.environment_name = 'CartPol'"], (), r"^[^\n]*CartPol[^\n]*$"),
        (
            train,
            ["sparsify.update_end_agent_step = 30_000"],
            (),
            r"^[^\n]*step 29900, and this [^\n]* has 20000 a",
        ),
        (
            train,
            ["Runner.num_iterations = 3"],
            (),
            r"^[^\n]*first masks are made at agent step 4100, [^\n]* has 3000 a",
        ),
        (play, ["sparsify.algorithm = 'magnitud'"], (), r"^algorithm: 'magnitud' is not known; [^\n]*\.$"),
        (play, [], ("--output=agent.gif",), "no checkpoint in"),
        (play, [], ("--output=agent.jpg",), r"neither a \.gif nor a \.png"),
    ],
)
@pytest.mark.usefixtures("flags_of_play")
def test_command_lines_say_what_is_wrong_and_end(module, bindings, more, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as told:
        module.main(cases.parsed(module.__name__, tmp_path / "base", [*bindings, *cases.QUIET], *more))
    assert "\n" not in str(told.value)


FILES = sorted(path.name for path in CONFIGS.glob("*.gin") if not path.name.startswith("sparse"))
SMALL = ["ReplayBuffer.max_capacity = 1000", "PrioritizedSamplingDistribution.max_capacity = 1000", *cases.QUIET]
PAPER = jaxpruner.PolynomialSchedule(update_freq=250, update_start_step=120_000, update_end_step=495_000)
DYNAMIC = jaxpruner.PolynomialSchedule(update_freq=1_250, update_start_step=1_250, update_end_step=2_493_750)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_gin_files_make_the_agents_that_they_say(name, tmp_path):
    if "lunarlander" in name:
        pytest.importorskip("Box2D", reason="Box2D is not installed; `make setup` installs it")
    with cases.configured([name], SMALL if name.startswith("rainbow") else [SMALL[0], *cases.QUIET]):
        agent = jaxpruner_dopamine.create_runner(str(tmp_path)).agent
    assert type(agent).__name__ == ("SparseJaxRainbowAgent" if name.startswith("rainbow") else "SparseJaxDQNAgent")
    updater = agent.updater
    assert type(updater).__name__ == ("RigL" if "dynamic" in name else "MagnitudePruning")
    if "mspacman" in name or "pong" in name:
        assert updater.scheduler == (DYNAMIC if "dynamic" in name else PAPER)
        assert agent.num_actions == (6 if "pong" in name else 9)
        targets = [float(t) for t in jax.tree.leaves(agent.optimizer_state.target_sparsities)]
        sizes = [m.size for m in jax.tree.leaves(agent.optimizer_state.masks)]
        assert np.average(targets, weights=sizes) == pytest.approx(0.98, abs=1e-4)
        assert len(targets) == (17 if "resnet" in name else 5)


def test_a_run_that_ends_early_says_what_it_reached(tmp_path):
    """As where gradient steps begin late, since episodes are short; here it is stopped."""
    bindings = [*cases.CARTPOLE, *cases.ITERATIONS, "sparsify.update_end_agent_step = 200"]
    runner = cases.run(tmp_path, ["dqn_cartpole.gin"], bindings, checkpoint_every=0, stop=1)
    count, total = int(runner.agent.optimizer_state.count), runner.agent.sparsity()["total"]
    assert 0 < total < 0.89
    assert f"asked 89.9%, reached {total:.1%}, for the training ended after {count} grad" in runner.agent.shortfall()


def test_a_checkpoint_without_its_replay_buffer_is_not_trained_over(tmp_path):
    bindings = [*cases.CARTPOLE, *cases.ITERATIONS]
    cases.run(tmp_path, ["dqn_cartpole.gin"], bindings, stop=2).close()
    for folder in (path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"base_dir: the checkpoint of iteration 1 in .* without its replay buffer"):
        cases.run(tmp_path, ["dqn_cartpole.gin"], bindings)
    again = cases.run(tmp_path, ["dqn_cartpole.gin"], [*bindings, "JaxDQNAgent.allow_partial_reload = True"], stop=3)
    assert again.iterations_done == 2


def test_playing_does_not_change_the_training(tmp_path):
    bindings = [*cases.CARTPOLE, *cases.ITERATIONS]
    whole = cases.run(tmp_path / "whole", ["dqn_cartpole.gin"], bindings, checkpoint_every=0)
    with cases.configured(["dqn_cartpole.gin"], bindings):
        runner = jaxpruner_dopamine.create_runner(str(tmp_path / "played"))
        for done in runner.iterations(checkpoint_every=0):
            assert runner.play(done) > 0
            assert runner.play(done, seed=0) > 0
    assert_same_agents(runner.agent, whole.agent)


def test_games_of_a_seed_are_the_same_for_all_agents(tmp_path):
    """The same parameters, and agents of two seeds that often draw their actions."""
    runners = []
    for seed in (3, 4):
        with cases.cartpole(*cases.QUIET, "JaxDQNAgent.epsilon_eval = 0.5", f"JaxDQNAgent.seed = {seed}"):
            runners.append(jaxpruner_dopamine.create_runner(str(tmp_path / str(seed))))
    one, other = runners
    other.agent.online_params = one.agent.online_params
    games = [[[*runner.moves(number, seed=7)] for number in range(4)] for runner in runners]
    assert games[0] == games[1]
    assert len({str(game) for game in games[0]}) == 4
    assert [*one.moves(0, seed=8)] != games[0][0]
    assert [[*one.moves(number)] for number in range(4)] != [[*other.moves(number)] for number in range(4)]


def test_all_gin_files_are_tried():
    assert {
        "dqn_cartpole.gin", "dqn_acrobot.gin", "dqn_lunarlander.gin", "dqn_mspacman.gin", "dqn_mspacman_dynamic.gin",
        "dqn_resnet_mspacman.gin", "dqn_pong.gin", "rainbow_mspacman.gin",
    } == set(FILES)  # fmt: skip


def test_a_gin_file_of_dopamines_own_habits_becomes_sparse_by_one_file_more(tmp_path):
    """`create_agent` and `create_runner` are bound as stock files bind them."""
    stock = ["create_agent.agent_name = 'jax_dqn'", "create_runner.schedule = 'continuous_train_and_eval'"]
    with cases.configured(["dqn_pong.gin", "sparse_dynamic.gin"], [SMALL[0], *cases.QUIET, *stock]):
        runner = jaxpruner_dopamine.create_runner(str(tmp_path))
    assert isinstance(runner, cases.run_experiment.Runner)
    assert not isinstance(runner, cases.run_experiment.TrainRunner)
    assert isinstance(runner.agent.updater, jaxpruner.RigL)
