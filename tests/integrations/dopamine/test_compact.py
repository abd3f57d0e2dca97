"""From a sparse agent's checkpoint to a compact agent that plays the same games."""

from __future__ import annotations

import json

import dopamine_cases as cases
import jax
import numpy as np
import pytest

import jaxpruner_dopamine
from jaxpruner.compaction import files
from jaxpruner_dopamine import compact, compaction, play

pytestmark = cases.quiet

GROUPS = cases.bind(sparsity_type="groups", sparsity=0.75, dist_type="uniform")
BINDINGS = [*cases.CARTPOLE, *cases.ITERATIONS, *GROUPS]
LEFT = {"params/layers_0/kernel[1]": 8, "params/layers_1/kernel[1]": 8}  # of 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training whose checkpoint lacks three units of four, and its agent."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, cases.run(folder, ["dqn_cartpole.gin"], BINDINGS, checkpoint_every=4).agent


def states(agent, count=8):
    return np.random.default_rng(1).normal(size=(count, *agent.state.shape)).astype(np.float32)


def q_values(agent, params, network_def):
    return jax.jit(jax.vmap(lambda state: network_def.apply(params, state).q_values))(states(agent))


@pytest.mark.slow
@pytest.mark.usefixtures("flags_of_play")
def test_a_checkpoint_becomes_a_compact_agent_that_plays_the_same(trained, tmp_path, capsys):
    folder, agent = trained
    assert agent.shortfall() is None
    compact.main(cases.parsed("compact", folder, BINDINGS, "--steps=30"))
    told = json.loads((folder / "compact" / "report.json").read_text())
    assert told["report"]["units"] == {name: [32, left] for name, left in LEFT.items()}
    assert told["report"]["params"][1] == 4 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2
    dense, small = told["play"]["dense"], told["play"]["compact"]
    assert dense["steps"] == small["steps"] == told["play"]["same_actions"] >= 30
    assert dense["returns"] == small["returns"]
    assert min(dense["steps_per_second"], small["steps_per_second"]) > 0
    output = capsys.readouterr().out
    assert "forward pass of 32: dense" in output
    assert "actions the same; agent steps per second: dense" in output

    # What was saved is what was compacted.
    network = compaction.load(agent, compact.file_of(folder))
    assert network.small.sizes == LEFT
    expected = q_values(agent, agent.online_params, agent.network_def)
    np.testing.assert_allclose(q_values(agent, network.small.params, network), expected, rtol=1e-5, atol=1e-6)

    play.main(cases.parsed("play", folder, BINDINGS, f"--output={tmp_path}/strip.png", "--compact"))
    assert "compact, {'params/layers_" in capsys.readouterr().out


@pytest.mark.usefixtures("flags_of_play")
def test_what_is_not_there_is_told(trained, tmp_path):
    with pytest.raises(SystemExit, match=r"no checkpoint in .* Train first"):
        compact.main(cases.parsed("compact", tmp_path / "empty", BINDINGS))
    folder, agent = trained
    path = compact.file_of(folder)
    before = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    with pytest.raises(SystemExit, match=r"no .*agent\.npz\. Make it first: python -m jaxpruner_dopamine\.compact"):
        play.main(cases.parsed("play", folder, BINDINGS, "--output=a.png", "--compact"))
    if before is not None:
        path.write_bytes(before)

    files.save_compact(tmp_path / "agent.npz", compaction.compacted(agent).small)
    with cases.cartpole("ClassicControlDQNNetwork.hidden_units = 16"):
        other = jaxpruner_dopamine.create_sparse_agent(cases.environment("CartPole", "v1"))
    with pytest.raises(ValueError, match=r"agent\.npz: of another function or other parameters"):
        compaction.load(other, tmp_path / "agent.npz")
    (tmp_path / "other.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"other\.npz: no file of save_compact"):
        compaction.load(other, tmp_path / "other.npz")
    # Nothing is dead: no error.
    assert "Nothing was removed: no unit is dead." in str(compaction.compacted(other).small.report())


def test_groups_are_those_of_the_agents_network(trained):
    _, agent = trained
    assert {group.name for group in agent.groups().pruned} == set(LEFT)
    hidden = np.asarray(agent.online_params["params"]["layers_1"]["kernel"])
    assert (hidden.any(0).sum(), hidden.any(1).sum()) == (8, 8)


def test_the_agent_is_as_before_after_it_acted_compact(trained):
    _, agent = trained
    network, params = agent.network_def, agent.online_params
    with compaction.acting_with(agent, compaction.compacted(agent)):
        assert agent.online_params is not params
    assert agent.network_def is network
    assert agent.online_params is params
