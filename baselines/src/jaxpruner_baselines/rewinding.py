"""Iterative magnitude pruning with rewinding, the loop behind lottery tickets, from the core's pieces.

Train; prune a fifth of what is left, the smallest weights of all layers together; take the others back to what they
were after a few epochs; train again; and so on until the sparsity is reached (Frankle & Carbin, 2019; Frankle et al.,
2020, for the rewinding). A ticket costs as many trainings as there are rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpruner
from jaxpruner_baselines import data, digits_vit
from jaxpruner_baselines.baseline import Outcome, Progress, Run
from jaxpruner_baselines.checkpoint import Checkpoint
from jaxpruner_baselines.costs import costs
from jaxpruner_baselines.methods import DENSE

METHOD = "lottery_ticket"
SHARE = 0.2  # of the weights that are left, pruned in each round
REWIND = 1 / 30  # the part of a training after which weights are those that a ticket starts from


class Ticket(digits_vit.Training):
    """Trains what is not zero."""

    @property
    def sparsity_config(self) -> dict[str, Any]:
        return {"algorithm": "preserve"}


def sparsities_of_rounds(sparsity: float) -> list[float]:
    """Those of the trainings: dense, then `1 - (1 - SHARE) ** i`, and what was asked for in the end."""
    rounds = int(np.ceil(np.log1p(-sparsity) / np.log1p(-SHARE) - 1e-9))
    return [1 - (1 - SHARE) ** i for i in range(rounds)] + [sparsity]


def train(run: Run, checkpoint: Checkpoint) -> Iterator[Progress | Outcome]:
    """The trainings of all rounds; a round that was finished is not repeated."""
    preset = run.preset
    dataset = data.DATASETS[preset.dataset](validation=preset.validation)
    steps_per_epoch = len(dataset.train) // preset.batch_size
    rewind = max(1, round(REWIND * preset.epochs))
    rounds = sparsities_of_rounds(run.sparsity)
    steps = preset.epochs * steps_per_epoch
    dense, ticket = (
        make(preset, method, run.sparsity, steps) for make, method in ((digits_vit.Training, DENSE), (Ticket, METHOD))
    )
    total = steps + (len(rounds) - 1) * (steps - rewind * steps_per_epoch)

    params = digits_vit.init_params(dense.model, run.seed, dataset.train.images[: preset.batch_size])
    inner_state = digits_vit.init_optimizer(dense, run.seed, params).inner_state
    # What the next round starts from, the trained weights, and the training FLOPs so far.
    first, (start, params, spent) = checkpoint.load(like=((params, inner_state), params, 0.0))
    done = 0 if not first else steps + (first - 1) * (steps - rewind * steps_per_epoch)
    for i in range(first, len(rounds)):
        training, weights = (ticket if i else dense), start[0]
        if i:
            pruner = jaxpruner.create_updater_from_config({"algorithm": "global_magnitude", "sparsity": rounds[i]})
            weights = jaxpruner.apply_mask(weights, pruner.instant_sparsify(params)[1])
        opt_state = digits_vit.init_optimizer(training, run.seed, weights)
        state = _copied((weights, opt_state._replace(inner_state=start[1])))
        for epoch in range(rewind if i else 0, preset.epochs):
            batches = digits_vit.batches_of(dataset.train, run.seed, epoch, steps_per_epoch, preset.batch_size)
            state, loss = digits_vit.train_epoch(training, state, run.seed, batches.images, batches.labels)
            done += steps_per_epoch
            if not i and epoch + 1 == rewind:
                start = _copied((state[0], state[1].inner_state))
            yield Progress(done, total, f"round {i + 1} of {len(rounds)}, loss {loss:.3f}")
        params = state[0]
        cost = costs(
            training.model.apply,
            params,
            dataset.test.images[:1],
            updater=jaxpruner.create_updater_from_config(training.sparsity_config),
            steps=steps,
            batch=preset.batch_size,
        )
        spent += cost["inference_flops_share"] * (1 if not i else 1 - rewind / preset.epochs)
        if i + 1 < len(rounds):
            checkpoint.save(i + 1, (start, params, spent))

    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    yield Outcome(
        value=float(digits_vit.accuracy(dense.model, params, dataset.test.images, dataset.test.labels)),
        sparsity_reached=jaxpruner.summarize_sparsity(kernels, only_total_sparsity=True)["_total_sparsity"],
        steps=total,
        # Of one dense training, which all rounds together pass.
        details={"train_loss": float(loss), **cost, "training_flops_share": round(float(spent), 6)},
    )


def _copied(tree: Any) -> Any:
    """Arrays of its own, since a training takes those that it is given."""
    return jax.tree.map(jnp.copy, tree)
