"""The architectures of the breadth table as one would write them in PyTorch, for Torch-Pruning.

Shapes that attention needs are read off its layers, as Torch-Pruning asks for, so that its heads may shrink.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from jaxpruner_baselines.breadth.cases import Size
from jaxpruner_baselines.breadth.language import HEAD, KEYS, QUERIES, VOCABULARY
from jaxpruner_baselines.breadth.vision import CLASSES


class Network(NamedTuple):
    """A module, an example of what it takes, and what Torch-Pruning has to be told.

    Attributes:
      module: in evaluation mode.
      example: its argument.
      ignored: layers that must keep their outputs.
      heads: the heads of attention's projections.
    """

    module: nn.Module
    example: torch.Tensor
    ignored: list[nn.Module]
    heads: dict[nn.Module, int]


def _network(module: nn.Module, example: torch.Tensor) -> Network:
    heads = {}
    for part in module.modules():
        if isinstance(part, _Attention):
            heads[part.qkv] = part.heads
        if isinstance(part, _GroupedAttention):
            heads |= {part.query: part.keys * QUERIES, part.key: part.keys, part.value: part.keys}
    return Network(module.eval(), example, [module.head] if hasattr(module, "head") else [], heads)


def _images(size: Size) -> torch.Tensor:
    return torch.randn(size.batch, 3, size.image, size.image)


def _sequences(size: Size, width: int) -> torch.Tensor:
    return torch.randn(size.batch, size.tokens, width)


class _MLP(nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, 4 * width), nn.Linear(4 * width, 2 * width)])
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x)


def mlp(size: Size) -> Network:
    return _network(_MLP(3 * size.image**2, 32 * size.width), _images(size))


class _Attention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class _Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.attention = _Attention(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class _ViT(nn.Module):
    def __init__(self, image: int, dim: int):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, (image // 4) ** 2 + 1, dim))
        self.blocks = nn.ModuleList([_Block(dim) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vit(size: Size) -> Network:
    return _network(_ViT(size.image, 32 * size.width), _images(size))


class _ResNet(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module]):
        super().__init__()

        def conv(inputs, outputs, kernel=3, stride=1):
            layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(layer, norm(outputs))

        self.stem = conv(3, width)
        self.first = nn.ModuleList([conv(width, width), conv(width, 2 * width, stride=2)])
        self.second = nn.ModuleList([conv(width, width), conv(2 * width, 2 * width)])
        self.shortcut = conv(width, 2 * width, 1, 2)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            y = second(F.relu(first(x)))
            x = F.relu((self.shortcut(x) if i else x) + y)
        return self.head(x.mean((2, 3)))


def resnet_batch_norm(size: Size) -> Network:
    return _network(_ResNet(16 * size.width, nn.BatchNorm2d), _images(size))


def resnet_group_norm(size: Size) -> Network:
    return _network(_ResNet(16 * size.width, lambda channels: nn.GroupNorm(4, channels)), _images(size))


class _DenseNet(nn.Module):
    def __init__(self, growth: int):
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        widths = [growth * (i + 1) for i in range(3)]
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in widths])
        self.convs = nn.ModuleList([nn.Conv2d(width, growth, 3, padding=1) for width in widths])
        self.head = nn.Linear(4 * growth, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(x.mean((2, 3)))


def densenet(size: Size) -> Network:
    return _network(_DenseNet(8 * size.width), _images(size))


class _UNet(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.down = nn.ModuleList(
            [
                nn.Conv2d(3, width, 3, padding=1),
                nn.Conv2d(width, 2 * width, 3, 2, 1),
                nn.Conv2d(2 * width, 4 * width, 3, 2, 1),
            ]
        )
        self.larger = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.up = nn.ModuleList(
            [nn.Conv2d(4 * width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, width, 3, padding=1)]
        )
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        skipped = []
        for layer in self.down:
            x = F.relu(layer(x))
            skipped.append(x)
        for larger, layer, other in zip(self.larger, self.up, skipped[-2::-1], strict=True):
            x = F.relu(layer(torch.cat([larger(x), other], 1)))
        return self.head(x)


def unet(size: Size) -> Network:
    return _network(_UNet(8 * size.width), _images(size))


class _ConvNeXt(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, dim, 2, 2), nn.LayerNorm(dim)
        self.convs = nn.ModuleList([nn.Conv2d(dim, dim, 7, padding=3, groups=dim) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2)])
        self.ups = nn.ModuleList([nn.Linear(dim, 4 * dim) for _ in range(2)])
        self.downs = nn.ModuleList([nn.Linear(4 * dim, dim) for _ in range(2)])
        self.scales = nn.ParameterList([torch.ones(dim) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x):
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1))
        for conv, norm, up, down, scale in zip(self.convs, self.norms, self.ups, self.downs, self.scales, strict=True):
            y = norm(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            x = x + down(F.gelu(up(y))) * scale
        return self.head(self.norm(x.mean((1, 2))))


def convnext(size: Size) -> Network:
    return _network(_ConvNeXt(16 * size.width), _images(size))


class _MobileBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        wide = 4 * width
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide), nn.SiLU())
        self.squeeze = nn.Sequential(nn.Linear(wide, width), nn.SiLU(), nn.Linear(width, wide), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(wide, width, 1), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.deep(self.expand(x))
        return x + self.project(y * self.squeeze(y.mean((2, 3)))[:, :, None, None])


class _MobileNet(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU())
        self.blocks = nn.Sequential(_MobileBlock(width), _MobileBlock(width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def mobilenet(size: Size) -> Network:
    return _network(_MobileNet(8 * size.width), _images(size))


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.tokens = nn.Sequential(nn.Linear(tokens, dim), nn.GELU(), nn.Linear(dim, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class _Mixer(nn.Module):
    def __init__(self, image: int, dim: int):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(*[_MixerBlock((image // 4) ** 2, dim) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x):
        x = self.blocks(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


def mixer(size: Size) -> Network:
    return _network(_Mixer(size.image, 16 * size.width), _images(size))


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], inputs: int, width: int):
        super().__init__()
        self.first, self.cell = nn.Linear(inputs, width), cell(width, 2 * width, batch_first=True)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x):
        return self.head(self.cell(self.first(x))[0])


def gru(size: Size) -> Network:
    return _network(_Recurrent(nn.GRU, 8 * size.width, 16 * size.width), _sequences(size, 8 * size.width))


def lstm(size: Size) -> Network:
    return _network(_Recurrent(nn.LSTM, 8 * size.width, 16 * size.width), _sequences(size, 8 * size.width))


class _GroupedAttention(nn.Module):
    """Grouped queries and rotary embeddings."""

    def __init__(self, dim: int, keys: int):
        super().__init__()
        self.keys = keys
        self.query = nn.Linear(dim, keys * QUERIES * HEAD, bias=False)
        self.key, self.value = (nn.Linear(dim, keys * HEAD, bias=False) for _ in range(2))
        self.out = nn.Linear(keys * QUERIES * HEAD, dim, bias=False)

    def forward(self, x):
        batch, tokens, _ = x.shape

        def heads(layer, number):
            return layer(x).reshape(batch, tokens, number, -1).transpose(1, 2)

        query, key = _rotated(heads(self.query, self.keys * QUERIES)), _rotated(heads(self.key, self.keys))
        key, value = (y.repeat_interleave(QUERIES, 1) for y in (key, heads(self.value, self.keys)))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


def _rotated(x):
    entries = x.shape[-1]
    angles = torch.arange(x.shape[-2])[:, None] * 1e4 ** (-torch.arange(0, entries, 2) / entries)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class _GatedLayer(nn.Module):
    def __init__(self, dim: int, attention: nn.Module):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(dim), nn.RMSNorm(dim)])
        self.attention = attention
        self.gate, self.up = (nn.Linear(dim, 4 * dim, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class _LanguageModel(nn.Module):
    """Embeddings that are the classifier too."""

    def __init__(self, dim: int, attentions: list[nn.Module]):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.layers = nn.ModuleList([_GatedLayer(dim, attention) for attention in attentions])
        self.norm = nn.RMSNorm(dim)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embed.weight)


def _tokens(size: Size) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (size.batch, size.tokens))


def gated_language_model(size: Size) -> Network:
    dim = 32 * size.width
    return _network(_LanguageModel(dim, [_Attention(dim) for _ in range(2)]), _tokens(size))


def grouped_queries(size: Size) -> Network:
    dim = 32 * size.width
    attentions = [_GroupedAttention(dim, KEYS * size.width) for _ in range(2)]
    return _network(_LanguageModel(dim, attentions), _tokens(size))


class _Mixture(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.router = nn.Linear(dim, 4, bias=False)
        self.ups, self.downs = (
            nn.ModuleList([nn.Linear(*shape, bias=False) for _ in range(4)])
            for shape in ((dim, 4 * dim), (4 * dim, dim))
        )

    def forward(self, x):
        best, chosen = self.router(x).softmax(-1).topk(2, -1)
        weights = (F.one_hot(chosen, 4) * best[..., None]).sum(-2)
        outputs = [down(F.relu(up(x))) for up, down in zip(self.ups, self.downs, strict=True)]
        return sum(weights[..., i : i + 1] * output for i, output in enumerate(outputs))


def mixture_of_experts(size: Size) -> Network:
    dim = 16 * size.width
    network = _network(_Mixture(dim), _sequences(size, dim))
    return network._replace(ignored=[network.module.router, *network.module.downs])


class _Convolutions(nn.Module):
    """Convolutions, a flattened image, two dense layers."""

    def __init__(self, example: torch.Tensor, convs: list[nn.Module], width: int, outputs: int, pooled: bool):
        super().__init__()
        self.convs, self.pooled = nn.ModuleList(convs), pooled
        with torch.no_grad():
            self.dense = nn.Linear(self.features(example).shape[1], width)
        self.head = nn.Linear(width, outputs)

    def features(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return (F.max_pool2d(x, 2) if self.pooled else x).flatten(1)

    def forward(self, x):
        return self.head(F.relu(self.dense(self.features(x))))


def nature_dqn(size: Size) -> Network:
    example = torch.rand(2 * size.batch, 4, 84, 84)
    convs = [nn.Conv2d(4, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3)]
    return _network(_Convolutions(example, convs, 512, 6, pooled=False), example)


def emnist_conv(size: Size) -> Network:
    example = torch.rand(4 * size.batch, 1, 28, 28)
    return _network(_Convolutions(example, [nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)], 128, 62, pooled=True), example)


def scanned(size: Size) -> Network:
    """The same blocks, which PyTorch has no scan for."""

    class Stack(nn.Module):
        def __init__(self, dim: int):
            super().__init__()
            self.blocks = nn.Sequential(*[_Block(dim) for _ in range(3)])
            self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

        def forward(self, x):
            return self.head(self.norm(self.blocks(x)).mean(1))

    return _network(Stack(32 * size.width), _sequences(size, 32 * size.width))


NETWORKS: dict[str, Callable[[Size], Any]] = {
    "MLP": mlp,
    "ViT": vit,
    "ResNet, batch norm": resnet_batch_norm,
    "ResNet, group norm": resnet_group_norm,
    "DenseNet": densenet,
    "U-Net": unet,
    "ConvNeXt": convnext,
    "MobileNet, squeeze-excite": mobilenet,
    "MLP-Mixer": mixer,
    "transformer, nn.scan and remat": scanned,
    "GRU": gru,
    "LSTM": lstm,
    "language model, gated, tied (NNX)": gated_language_model,
    "language model, grouped queries, rotary": grouped_queries,
    "mixture of experts": mixture_of_experts,
    "Dopamine's Nature DQN": nature_dqn,
    "FedJAX's EMNIST convolutions": emnist_conv,
}
