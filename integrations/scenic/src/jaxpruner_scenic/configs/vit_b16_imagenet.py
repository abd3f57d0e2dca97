r"""ViT-B/16 on ImageNet, 90 epochs, pruned to 80 % as in the paper. Meant for a slice of TPUs.

    python -m jaxpruner_scenic.main --config=.../configs/vit_b16_imagenet.py:magnitude,0.8 --workdir=...

Position embeddings and the class token stay dense; masks are made from step 10k to 20k, every 1000.
Data: ImageNet, prepared by tensorflow_datasets, as for Scenic's own configuration, which this one extends.
"""

import ml_collections
from scenic.projects.baselines.configs.imagenet import imagenet_vit_config

from jaxpruner_scenic.configs import sparsity

EPOCHS = 90


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Scenic's configuration (batch 4096, Adam 3e-3, weight decay 0.3, warmup 10k, clip 1.0, dropout 0.1), sparse."""
    return configure(argument, EPOCHS)


def configure(argument: str, epochs: int) -> ml_collections.ConfigDict:
    """The same for another number of epochs."""
    config = imagenet_vit_config.get_config()
    config.experiment_name = f"imagenet-vit-b16-{epochs}-sparse"
    config.num_training_epochs = epochs
    steps = epochs * (1_281_167 // config.batch_size)
    config.lr_configs.total_steps = config.lr_configs.steps_per_cycle = steps
    config.sparsity_config = sparsity.parse(
        argument,
        algorithm="magnitude",
        sparsity=0.8,
        dist_type="erk",
        update_start_step=10_000,
        update_end_step=20_000,
        update_freq=1_000,
    )
    return config
