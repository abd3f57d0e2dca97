"""What the small configurations share: data from packages, and a training of a few epochs."""

from __future__ import annotations

import ml_collections

from jaxpruner_scenic.configs import sparsity

# To train on; and without those held out for validation.
TRAIN_EXAMPLES = {
    "digits": (1_414, 1_158),
    "mnist_5k": (4_000, 3_000),
    "natural_crops": (6_006, 3_936),
    "fashion_mnist": (60_000, 50_000),
}
VALIDATION = "validation"


def parse(argument: str) -> tuple[str, str, bool]:
    """Splits `algorithm,sparsity,dataset,validation` into the sparsity, the dataset, and whether to validate."""
    *chosen, dataset, validation = (*argument.split(","), "", "", "")[:4]
    dataset = dataset or "digits"
    if dataset not in TRAIN_EXAMPLES:
        raise ValueError(f"--config: dataset {dataset!r} is not known; use one of {', '.join(TRAIN_EXAMPLES)}.")
    if validation not in ("", VALIDATION) or argument.count(",") > 3:
        raise ValueError(f"--config: {argument!r} is not 'algorithm,sparsity,dataset' or that and ',{VALIDATION}'.")
    return ",".join(chosen).rstrip(","), dataset, bool(validation)


def configure(argument: str, epochs: int, base_learning_rate: float, batch_size: int = 64) -> ml_collections.ConfigDict:
    """Data, schedule, logging and sparsity.

    Args:
      argument: `algorithm,sparsity,dataset`, of which all may be left out; `,validation` after it tests on held-out
        training data.
      epochs: passes over the training data.
      base_learning_rate: the rate after the warmup; a cosine follows.
      batch_size: over all devices.
    """
    chosen, dataset, validation = parse(argument)
    config = ml_collections.ConfigDict()
    config.dataset_name = dataset
    config.data_dtype_str = "float32"
    config.dataset_configs = ml_collections.ConfigDict({"validation": validation})
    config.model_dtype_str = "float32"
    config.trainer_name = "classification_trainer"
    config.batch_size = batch_size
    config.eval_batch_size = 256
    config.num_training_epochs = epochs
    config.rng_seed = 0
    config.l2_decay_factor = None
    config.max_grad_norm = 1.0
    config.label_smoothing = None

    steps_per_epoch = TRAIN_EXAMPLES[dataset][validation] // batch_size
    steps = epochs * steps_per_epoch
    config.lr_configs = ml_collections.ConfigDict()
    config.lr_configs.learning_rate_schedule = "compound"
    config.lr_configs.factors = "constant*linear_warmup*cosine_decay"
    config.lr_configs.total_steps = steps
    config.lr_configs.steps_per_cycle = steps
    config.lr_configs.warmup_steps = steps // 10
    config.lr_configs.base_learning_rate = base_learning_rate

    freq = 20
    config.sparsity_config = sparsity.parse(
        chosen,
        algorithm="magnitude",
        sparsity=0.8,
        dist_type="erk",
        update_start_step=freq * round(0.2 * steps / freq),
        update_end_step=freq * round(0.75 * steps / freq),
        update_freq=freq,
    )

    config.log_eval_steps = steps
    config.log_summary_steps = max(steps // 20, 1)
    config.write_summary = True
    config.xprof = False
    config.checkpoint = True
    config.replay_data_on_resume = False
    config.checkpoint_steps = max(steps // 4, 1)
    config.debug_train = False
    config.debug_eval = False
    return config
