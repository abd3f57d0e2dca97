r"""ResNet-50 on ImageNet, 100 epochs, pruned to 80 % as in the paper. Meant for a slice of TPUs.

    python -m jaxpruner_scenic.main --config=.../configs/resnet50_imagenet.py:magnitude,0.8 --workdir=...

Uniform sparsity with a dense stem; masks are made from step 10k to 25k, every 1000.
"""

import ml_collections
from scenic.projects.baselines.configs.imagenet import imagenet_resnet_config

from jaxpruner_scenic.configs import sparsity


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Scenic's configuration with the paper's training: momentum 0.9, rate 1.6 with a cosine, 5 epochs of warmup."""
    config = imagenet_resnet_config.get_config()
    config.experiment_name = "imagenet-resnet50-sparse"
    config.num_training_epochs = 100
    config.batch_size = 4096  # for which a learning rate of 0.1 a 256 images is 1.6
    config.l2_decay_factor = 1e-4
    steps_per_epoch = 1_281_167 // config.batch_size
    config.lr_configs.base_learning_rate = 1.6
    config.lr_configs.warmup_steps = 5 * steps_per_epoch
    config.lr_configs.steps_per_cycle = config.num_training_epochs * steps_per_epoch
    config.checkpoint_steps = 10 * steps_per_epoch
    config.sparsity_config = sparsity.parse(
        argument,
        algorithm="magnitude",
        sparsity=0.8,
        dist_type="uniform",
        exclude_reg_exp="stem_conv",
        update_start_step=10_000,
        update_end_step=25_000,
        update_freq=1_000,
    )
    return config
