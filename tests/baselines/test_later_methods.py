"""The loop behind lottery tickets, tiny. The other methods are those of the core, whose tests they have."""

from __future__ import annotations

import pytest

from jaxpruner_baselines import later_methods, rewinding
from jaxpruner_baselines.baseline import Outcome, Progress
from jaxpruner_baselines.checkpoint import Checkpoint


def test_a_fifth_of_what_is_left_goes_in_each_round():
    assert rewinding.sparsities_of_rounds(0.5) == pytest.approx([0, 0.2, 0.36, 0.488, 0.5])
    assert rewinding.sparsities_of_rounds(0.36) == pytest.approx([0, 0.2, 0.36])


@pytest.mark.slow
def test_a_ticket_is_found_and_an_interrupted_search_goes_on(tmp_path):
    run = later_methods.BASELINE.run("smoke", rewinding.METHOD, 0.36, seed=0)
    events = list(later_methods.train(run, Checkpoint(tmp_path / "whole")))
    whole = events.pop()
    assert isinstance(whole, Outcome)
    assert whole.sparsity_reached == pytest.approx(0.36, abs=1e-3)
    # One whole training, and two from where weights were after one of its two epochs.
    assert all(isinstance(event, Progress) for event in events)
    assert [event.done for event in events] == [22, 44, 66, 88]
    assert whole.steps == events[-1].total == 88
    # What the trainings cost together, each as sparse as it is: pruned weights are all that is spared.
    assert 1 + 0.5 * (0.8 + 0.64) < whole.details["training_flops_share"] < 2

    killed = later_methods.train(run, Checkpoint(tmp_path / "killed"))
    for _ in range(3):
        next(killed)
    assert Checkpoint(tmp_path / "killed").path.exists()
    *events, resumed = later_methods.train(run, Checkpoint(tmp_path / "killed"))
    assert [event.done for event in events] == [66, 88]
    assert resumed.value == whole.value
    assert resumed.sparsity_reached == whole.sparsity_reached
    assert resumed.details["train_loss"] == whole.details["train_loss"]
    assert resumed.details["training_flops_share"] == whole.details["training_flops_share"]
