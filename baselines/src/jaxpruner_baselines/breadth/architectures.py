"""The architectures of the breadth table, by name."""

from __future__ import annotations

from collections.abc import Callable

from jaxpruner_baselines.breadth import hosts, language, vision
from jaxpruner_baselines.breadth.cases import Case, Size

# An ImportError of one says what it needs that is not installed.
ARCHITECTURES: dict[str, Callable[[Size], Case]] = {
    "MLP": vision.mlp,
    "ViT": vision.vit,
    "ResNet, batch norm": vision.resnet_batch_norm,
    "ResNet, group norm": vision.resnet_group_norm,
    "DenseNet": vision.densenet,
    "U-Net": vision.unet,
    "ConvNeXt": vision.convnext,
    "MobileNet, squeeze-excite": vision.mobilenet,
    "MLP-Mixer": vision.mixer,
    "transformer, nn.scan and remat": vision.scanned,
    "GRU": language.gru,
    "LSTM": language.lstm,
    "language model, gated, tied (NNX)": language.gated_language_model,
    "language model, grouped queries, rotary": language.grouped_queries,
    "decoding with a cache (scan)": language.decoding,
    "generation with a cache (while)": language.generation,
    "mixture of experts": language.mixture_of_experts,
    "convolutions (Haiku)": vision.haiku_conv,
    "MLP (Equinox)": vision.equinox_mlp,
    "Scenic's ViT": hosts.scenic_vit,
    "Scenic's ResNet-50": hosts.scenic_resnet,
    "T5X's T5": hosts.t5,
    "Dopamine's Nature DQN": hosts.nature_dqn,
    "FedJAX's EMNIST convolutions": hosts.emnist_conv,
}
