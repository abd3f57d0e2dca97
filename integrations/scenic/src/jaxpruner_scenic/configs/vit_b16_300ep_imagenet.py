"""ViT-B/16 on ImageNet, 300 epochs, pruned to 80 % as in the paper; see `vit_b16_imagenet`."""

import ml_collections

from jaxpruner_scenic.configs import vit_b16_imagenet


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The configuration of 90 epochs, for 300."""
    return vit_b16_imagenet.configure(argument, epochs=300)
