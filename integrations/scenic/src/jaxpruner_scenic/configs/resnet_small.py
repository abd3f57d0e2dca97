r"""A small ResNet on small real images, sparse: `:rigl,0.9,natural_crops`.

    python -m jaxpruner_scenic.main --config=.../configs/resnet_small.py:rigl,0.9,digits --workdir=runs/resnet

Uniform sparsity and a dense stem, as the paper's ResNet-50.
"""

import ml_collections

from jaxpruner_scenic.configs import small


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Scenic's ResNet of 18 layers, 16 filters in the first ones."""
    config = small.configure(argument, epochs=30, base_learning_rate=0.1)
    config.experiment_name = f"{config.dataset_name}-resnet"
    config.model_name = "resnet_classification"
    config.num_filters = 16
    config.num_layers = 18
    config.init_head_bias = 0.0
    config.l2_decay_factor = 1e-4
    config.optimizer = "momentum"
    config.optimizer_configs = ml_collections.ConfigDict({"momentum": 0.9})
    if config.sparsity_config is not None:
        config.sparsity_config.dist_type = "uniform"
        config.sparsity_config.exclude_reg_exp = "stem_conv"
    return config
