"""Makes a compact agent from a sparse one: removes the dead units of its network.

    python -m jaxpruner_dopamine.compact --base_dir=runs/cartpole \
        --gin_files=jaxpruner_dopamine/configs/dqn_cartpole.gin \
        --gin_files=jaxpruner_dopamine/configs/sparse_groups.gin

Give the gin files and bindings of the training. The command takes the latest checkpoint, writes `compact/agent.npz` and
`compact/report.json` into the base directory, and plays the same games with both agents in turn.
`jaxpruner_dopamine.play --compact` shows the compact agent.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
from absl import app, flags, logging

from jaxpruner.compaction import files
from jaxpruner.inspection import timing
from jaxpruner_dopamine import compaction, train
from jaxpruner_dopamine.experiment import Reproducible

FLAGS = flags.FLAGS
BATCH = 32


def define_flags() -> None:
    """Those of training, and its own."""
    train.define_flags()
    flags.adopt_module_key_flags(train)  # so that --help lists them
    define_own_flags()


def define_own_flags() -> None:
    """How long to play."""
    flags.DEFINE_integer("steps", 1000, "Agent steps that each agent plays at least.", lower_bound=1)


def file_of(base_dir: str) -> pathlib.Path:
    """Where the compact agent of a base directory is."""
    return pathlib.Path(base_dir) / "compact" / "agent.npz"


def restored(argv: list[str]) -> Reproducible:
    """The runner of the flags with its latest checkpoint; exits with a message if there is none."""
    runner = train.create_runner_from_flags(argv)
    if not runner.iterations_done:
        raise SystemExit(
            f"--base_dir: no checkpoint in {FLAGS.base_dir}. Train first: python -m jaxpruner_dopamine.train"
        )
    return runner


@dataclasses.dataclass
class Played:
    """What an agent did in a number of games.

    Attributes:
      actions: one per step.
      returns: one per game.
      seconds: the time of all this, environment included, but without compilation.
    """

    actions: list[Any] = dataclasses.field(default_factory=list)
    returns: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps_per_second(self) -> float:
        """Agent steps."""
        return len(self.actions) / self.seconds

    def play(self, runner: Reproducible, game: int) -> None:
        """Plays one more game."""
        started, total = time.perf_counter(), 0.0
        for action, reward in runner.moves(game):
            self.actions.append(jax.device_get(action).tolist())
            total += reward
        self.returns.append(total)
        self.seconds += time.perf_counter() - started


def played_in_turn(runner: Reproducible, network: compaction.CompactNetwork, steps: int) -> dict[str, Played]:
    """Plays the same games with both agents, in turn, until each has this many steps."""
    with compaction.acting_with(runner.agent, network):
        next(runner.moves())  # compiles
    next(runner.moves())
    played = {"dense": Played(), "compact": Played()}
    game = 0
    while min(len(each.actions) for each in played.values()) < steps:
        played["dense"].play(runner, game)
        with compaction.acting_with(runner.agent, network):
            played["compact"].play(runner, game)
        game += 1
    return played


def forward_seconds(agent: Any, network: compaction.CompactNetwork) -> dict[int, dict[str, float]]:
    """Seconds of one forward pass, dense and compact in turn, for one state and for a batch by `vmap`."""
    fn, ((state,), arrays) = compaction.acting_function(agent)
    measured = {}
    for batch in (1, BATCH):
        states = jax.numpy.broadcast_to(state, (batch, *state.shape))
        calls = {}
        for name, whole, params in (("dense", fn, agent._params), ("compact", network.small.fn, network.small.params)):
            forward = jax.jit(jax.vmap(lambda p, s, a, whole=whole: whole(p, (s,), a), (None, 0, None)))
            calls[name] = lambda forward=forward, params=params, states=states: forward(params, states, arrays)
        measured[batch] = timing.alternate(calls, repeats=101)
    return measured


def main(argv: list[str]) -> None:
    """Compacts, saves, reports and measures."""
    logging.set_verbosity(logging.ERROR)
    runner = restored(argv)
    path = file_of(FLAGS.base_dir)
    path.parent.mkdir(exist_ok=True)
    network = compaction.compacted(runner.agent)
    files.save_compact(path, network.small)
    report = network.small.report()
    print(report)
    told: dict[str, Any] = {"report": dataclasses.asdict(report)}
    told["forward_seconds"] = forward_seconds(runner.agent, network)
    for batch, seconds in told["forward_seconds"].items():
        dense, small = seconds["dense"], seconds["compact"]
        ratio = f"{dense / small:.2f} times as fast"
        print(f"forward pass of {batch}: dense {dense * 1e6:.0f} us, compact {small * 1e6:.0f} us, {ratio}")
    played = played_in_turn(runner, network, FLAGS.steps)
    dense, small = played["dense"], played["compact"]
    same = sum(a == b for a, b in zip(dense.actions, small.actions, strict=False))
    told["play"] = {
        name: {"steps": len(p.actions), "steps_per_second": p.steps_per_second, "returns": p.returns}
        for name, p in played.items()
    } | {"same_actions": same}
    rates = f"dense {dense.steps_per_second:.0f}, compact {small.steps_per_second:.0f}"
    print(f"play: {same} of {len(dense.actions)} actions the same; agent steps per second: {rates}")
    (path.parent / "report.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{path}: the compact agent")


if __name__ == "__main__":
    define_flags()
    app.run(main)
