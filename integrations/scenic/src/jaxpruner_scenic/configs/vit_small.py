r"""A ViT on small real images, sparse: `:rigl,0.9,natural_crops`. Minutes on a CPU with `digits`.

    python -m jaxpruner_scenic.main --config=.../configs/vit_small.py:rigl,0.9,digits --workdir=runs/vit

`digits`, `mnist_5k` and `fashion_mnist` get a narrow model; `natural_crops` ViT-Ti, which takes hours on a CPU.
"""

import ml_collections

from jaxpruner_scenic.configs import small

# Width, MLP, heads, layers, patch; epochs, learning rate.
MODELS = {
    "digits": (32, 128, 4, 2, 4, 60, 1e-2),
    "mnist_5k": (64, 256, 4, 4, 7, 60, 3e-3),
    "fashion_mnist": (64, 256, 4, 4, 7, 7, 3e-3),
    "natural_crops": (192, 768, 3, 12, 4, 30, 1e-3),
}


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Scenic's ViT with a class token and learned positions, which stay dense."""
    _, dataset, _ = small.parse(argument)
    hidden, mlp, heads, layers, patch, epochs, learning_rate = MODELS[dataset]
    config = small.configure(argument, epochs, learning_rate)
    config.experiment_name = f"{config.dataset_name}-vit"
    config.model_name = "vit_multilabel_classification"
    config.model = ml_collections.ConfigDict()
    config.model.hidden_size = hidden
    config.model.mlp_dim = mlp
    config.model.num_heads = heads
    config.model.num_layers = layers
    config.model.patches = ml_collections.ConfigDict({"size": [patch, patch]})
    config.model.representation_size = hidden
    config.model.classifier = "token"
    config.model.attention_dropout_rate = 0.0
    config.model.dropout_rate = 0.0
    config.init_head_bias = -2.2  # each class at about its share of the data, as Scenic's -10 for ImageNet
    config.optimizer = "adam"
    config.optimizer_configs = ml_collections.ConfigDict({"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1})
    return config
