"""timm's ConvNeXt in integers: its blocks, and the layers between its stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import GlobalResponseNormMlp, LayerNorm2d, Mlp
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import nn

from ..kernels.layer_norm_quantize.op import forward as layer_norm_quantize
from ..kernels.quant_conv_block.op import forward as operator
from ..models.adapters.scalings import NORMS
from ..quantization.layers import QuantLinear, QuantPatchProjection, expect_floats
from .block import IntegerBlock
from .parts import activation_of, folded, hidden_scale, other_norm, replaced_forward, watched_or_differentiated


@dataclass(frozen=True)
class ConvParts:
    """The parts of a block of a depthwise convolution, a norm and a two-layer MLP."""

    conv: nn.Conv2d
    norms: tuple[nn.LayerNorm]
    linears: tuple[QuantLinear, QuantLinear]  # fc1, fc2; of 1x1 convolutions too
    activation: str
    gain: torch.Tensor | None  # of the result of fc2
    response: GlobalResponseNorm | None  # of V2, before fc2

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the operator `quant_conv_block` after x, as its schema orders them."""
        (norm,), sites = self.norms, [linear.input for linear in self.linears]
        biases, scales = folded(self.linears, (None, self.gain))
        grn = self.response
        return (
            self.conv.weight,
            self.conv.bias,
            norm.weight,
            norm.bias,
            norm.eps,
            [linear.operands()[0] for linear in self.linears],
            biases,
            scales,
            [linear.packed_bits for linear in self.linears],
            [site.scale for site in sites],
            [site.zero_point for site in sites],
            [site.bits for site in sites],
            hidden_scale(self.linears[1]),
            self.activation,
            *((None, None, 0.0) if grn is None else (grn.weight, grn.bias, grn.eps)),
        )

    def values(self) -> Iterator[torch.Tensor]:
        """The tensors among the arguments, but for the packed weights."""
        (norm,) = self.norms
        found = [self.conv.weight, self.conv.bias, norm.weight, norm.bias, self.gain]
        found += [] if self.response is None else [self.response.weight, self.response.bias]
        for linear in self.linears:
            found += [linear.bias, linear.weight_scale, linear.exponents, linear.input.scale, linear.input.zero_point]
        yield from (tensor for tensor in found if tensor is not None)


def parts_of(block: Any) -> ConvParts | str:
    """The parts of a ConvNeXt block, asked by exact class, or why it cannot run in integers."""
    conv, norm, mlp = block.conv_dw, block.norm, block.mlp
    if type(mlp) not in (Mlp, GlobalResponseNormMlp):
        return f"its MLP is a {type(mlp).__name__}"
    response = mlp.grn if type(mlp) is GlobalResponseNormMlp else None
    fc1, fc2 = linears = (mlp.fc1, mlp.fc2)
    if not all(type(layer) in (QuantLinear, QuantPatchProjection) and layer.frozen for layer in linears):
        return "its linear layers are not all quantized"
    if fc1.acm is not None or fc2.acm is not None:
        return "it has a correction"
    if fc1.exponents is not None:
        return "a layer before the last has factors for its channels"
    if any(layer.input.table is not None for layer in linears):
        return "what a layer takes has levels of its own"
    if type(conv) is not nn.Conv2d or conv.groups != conv.in_channels or conv.groups != conv.out_channels:
        return "its convolution is not one of each channel alone"
    size = conv.kernel_size[0]
    plain = (conv.kernel_size, conv.stride, conv.dilation, conv.padding, conv.padding_mode)
    if size % 2 == 0 or plain != ((size, size), (1, 1), (1, 1), (size // 2, size // 2), "zeros"):
        return "its convolution moves, dilates or pads in a way that the operator does not"
    if reason := other_norm(norm, (*NORMS, LayerNorm2d)):
        return f"its norm {reason}"
    if response is not None and type(response) is not GlobalResponseNorm:
        return f"its MLP has a {type(response).__name__} where its response norm was"
    floats = [conv.weight, conv.bias, block.gamma]
    floats += [] if response is None else [response.weight, response.bias]
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in floats):
        return "its convolution, response norm or gamma are not float32"
    if response is None and type(mlp.norm) is not nn.Identity:
        return "its MLP has a norm"
    if type(block.shortcut) is not nn.Identity:
        return "its shortcut is a layer"
    activation = activation_of(mlp.act)
    if activation is None:
        return f"its activation is {type(mlp.act).__name__}"
    return replaced_forward(block) or ConvParts(conv, (norm,), linears, activation, block.gamma, response)


class IntegerConvNeXtBlock(IntegerBlock, ConvNeXtBlock):
    """timm's block in integers; its results have channels last in memory, as its operator takes them."""

    family: ClassVar = ConvNeXtBlock
    operator: ClassVar = operator
    compiled: ClassVar = "QuantConvBlock"
    dims: ClassVar = 4

    @classmethod
    def parts(cls, block: Any) -> Any:
        """As IntegerBlock's."""
        return parts_of(block)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to float32 [B, C, H, W]."""
        found = self.integer(x.permute(0, 2, 3, 1))
        return super().forward(x) if found is None else found.permute(0, 3, 1, 2)

    def geometry(self) -> tuple[()]:
        """None."""
        return ()


class IntegerDownsample(nn.Sequential):
    """A stage's norm and the patches that it projects, with bytes between them; takes the class of timm's Sequential.

    As simulated in training, where a gradient is wanted and where a hook waits on one of the two.
    """

    @classmethod
    def take_all(cls, model: nn.Module) -> None:
        """Turns those of all stages of a model into these, in place."""
        for stage in model.modules():
            plain = isinstance(stage, ConvNeXtStage) and type(stage.downsample) is nn.Sequential
            if plain and not cls.why_not(stage.downsample):
                stage.downsample.__class__ = cls

    @classmethod
    def why_not(cls, downsample: Any) -> str:
        """Why these layers stay one by one, or ""."""
        if [type(layer) for layer in downsample] != [LayerNorm2d, QuantPatchProjection] or not downsample[1].frozen:
            return "they are not a norm and a quantized projection"
        norm, projection = downsample
        if reason := other_norm(norm, (LayerNorm2d,)):
            return f"the norm {reason}"
        if projection.exponents is not None or projection.input.table is not None:
            return "the projection has factors for its channels, or levels of its own"
        return replaced_forward(downsample)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to float32 [B, C', H / patch, W / patch]."""
        expect_floats(x)
        if watched_or_differentiated(self, x) or self.why_not(self):
            return super().forward(x)
        norm: Any = self[0]
        projection: Any = self[1]
        site = projection.input
        last = x.permute(0, 2, 3, 1).float()
        q = layer_norm_quantize(last, norm.weight, norm.bias, norm.eps, site.scale, site.zero_point, site.bits)
        return projection.product(q.permute(0, 3, 1, 2))
