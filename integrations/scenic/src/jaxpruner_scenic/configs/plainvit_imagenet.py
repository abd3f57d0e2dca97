"""Plain ViT-S/16 on ImageNet (Beyer et al., 2022), pruned from a fifth to three quarters of the training.

python -m jaxpruner_scenic.main --config=.../configs/plainvit_imagenet.py:rigl,0.9 --workdir=...
"""

import ml_collections
from scenic.projects.baselines.plainvit.configs import imagenet_plainvit_config

from jaxpruner_scenic.configs import sparsity


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Scenic's configuration, sparse."""
    config = imagenet_plainvit_config.get_config()
    steps = config.schedule.all.lr_configs.total_steps
    config.sparsity_config = sparsity.parse(
        argument,
        algorithm="magnitude",
        sparsity=0.8,
        dist_type="erk",
        update_start_step=1_000 * round(0.2 * steps / 1_000),
        update_end_step=1_000 * round(0.75 * steps / 1_000),
        update_freq=1_000,
    )
    return config
