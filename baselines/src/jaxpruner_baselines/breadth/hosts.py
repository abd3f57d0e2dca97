"""Stock models of Scenic, T5X, Dopamine and FedJAX; an ImportError says which host is missing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxpruner_baselines.breadth.cases import Case, Size, images, of_module, tokens


def scenic_vit(size: Size) -> Case:
    import ml_collections
    from scenic.projects.baselines import vit

    model = vit.ViT(
        num_classes=10, mlp_dim=128 * size.width, num_layers=2, num_heads=4,
        patches=ml_collections.ConfigDict({"size": (4, 4)}), hidden_size=32 * size.width,
        representation_size=32 * size.width, dropout_rate=0.0, attention_dropout_rate=0.0, classifier="token",
    )  # fmt: skip
    return of_module(model, images(size), train=False)


def scenic_resnet(size: Size) -> Case:
    from scenic.projects.baselines import resnet

    model = resnet.ResNet(num_outputs=10, num_filters=8 * size.width, num_layers=50)
    # Its stem halves images twice.
    x = images(size).repeat(2, 1).repeat(2, 2)
    return of_module(model, x, train=False)


def t5(size: Size) -> Case:
    from t5x.examples.t5 import network

    dim = 32 * size.width
    model = network.Transformer(
        network.T5Config(
            vocab_size=64, emb_dim=dim, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, head_dim=dim // 4,
            mlp_dim=4 * dim, mlp_activations=("gelu", "linear"), dropout_rate=0.0,
        )
    )  # fmt: skip
    inputs = tokens(size, 63) + 1  # 0 pads
    case = of_module(model, inputs, inputs, inputs, enable_dropout=False)
    # Beside the parameters, T5X notes names of axes.
    return case._replace(
        fn=lambda params, *args: model.apply({"params": params}, *args, enable_dropout=False),
        params=case.params["params"],
    )


def nature_dqn(size: Size) -> Case:
    from dopamine.jax import networks

    import jaxpruner_dopamine  # noqa: F401, with which Dopamine can be imported

    network = networks.NatureDQNNetwork(num_actions=6)
    shape = 2 * size.batch, 84, 84, 4
    frames = jnp.asarray(np.random.default_rng(1).integers(0, 256, shape), jnp.float32)
    params = jax.jit(network.init)(jax.random.key(0), frames[0])
    return Case(
        lambda params, frames: jax.vmap(lambda one: network.apply(params, one).q_values)(frames), params, (frames,)
    )


def emnist_conv(size: Size) -> Case:
    from fedjax.models import emnist

    model = emnist.create_conv_model()
    x = jnp.asarray(np.random.default_rng(1).random((4 * size.batch, 28, 28, 1), dtype=np.float32))
    return Case(lambda params, x: model.apply_for_eval(params, {"x": x}), model.init(jax.random.key(0)), (x,))
