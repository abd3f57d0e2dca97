"""Agents that play: agent steps a second with a compact network, against the dense one at the same games."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import tempfile
from typing import Any

from jaxpruner_baselines.benchmarks.figures import Figure, Reach
from jaxpruner_baselines.benchmarks.masks import Events
from jaxpruner_baselines.hush import hushed

DENSE = "dense"
MISSING = "agent_steps: jaxpruner-dopamine is not installed, so no agent plays."


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Gin files of jaxpruner_dopamine, the share of the units that leave, and the agent steps of a turn."""

    games: tuple[str, ...] = ("dqn_cartpole", "dqn_mspacman")
    removed: float = 0.5
    steps: int = 1000
    repeats: int = 11
    bindings: tuple[str, ...] = ()


QUICK = Sizes(("dqn_cartpole",), steps=5, repeats=1, bindings=("ClassicControlDQNNetwork.hidden_units = 16",))


def agent_steps(sizes: Sizes) -> Events:
    """Untrained agents, pruned by magnitude to a share of the units of each group: how well they play is no matter."""
    if importlib.util.find_spec("jaxpruner_dopamine") is None:
        yield MISSING
        return
    for game in sizes.games:
        yield from _of(game, sizes)


def _of(game: str, sizes: Sizes) -> Events:
    with hushed():
        import jaxpruner_dopamine  # isort: skip  (Dopamine can be imported after it)
        import gin
        from absl import logging
        from dopamine.discrete_domains import run_experiment

        from jaxpruner_dopamine import compact, compaction
    import jaxpruner

    logging.set_verbosity(logging.ERROR)
    gin.clear_config()
    run_experiment.load_gin_configs(
        [f"jaxpruner_dopamine/configs/{game}.gin"],
        ["CollectorDispatcher.collectors = ()", "sparsify.algorithm = 'no_prune'", *sizes.bindings],
    )
    with tempfile.TemporaryDirectory() as folder:
        runner = jaxpruner_dopamine.create_runner(folder)
        agent = runner.agent
        fn, example = compaction.acting_function(agent)
        pruner = jaxpruner.create_updater_from_config(
            {
                "algorithm": "magnitude",
                "sparsity": sizes.removed,
                "sparsity_type": jaxpruner.find_groups(fn, agent.online_params, *example),
            }
        )
        agent.online_params, _ = pruner.instant_sparsify(agent.online_params)
        network = compaction.compacted(agent)
        rates: dict[str, list[float]] = {DENSE: [], "compact": []}
        for i in range(sizes.repeats):
            yield f"{game}: plays, {i + 1} of {sizes.repeats}"
            for name, played in compact.played_in_turn(runner, network, sizes.steps).items():
                rates[name].append(played.steps_per_second)
        runner.close()
    yield _figure(game, rates, sizes, network.small.report())


def _figure(game: str, rates: dict[str, list[float]], sizes: Sizes, report: Any) -> Figure:
    before, after = report.flops
    pairs = zip(rates["compact"], rates[DENSE], strict=True)
    return Figure(
        row=f"agent plays {game}, {sizes.removed:.0%} of units removed",
        ours=statistics.median(rates["compact"]),
        peer_name=DENSE,
        peer=statistics.median(rates[DENSE]),
        unit="agent steps/s",
        ratio=statistics.median(ours / peer for ours, peer in pairs),
        faster=True,
        reach=Reach(),
        config={
            "game": game,
            "steps": sizes.steps,
            "flops_ratio": round(before / after, 4),
            "repeats": [sizes.repeats] * 2,
        },
    )
