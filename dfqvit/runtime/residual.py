"""Blocks of an attention and an MLP, each after a norm and within a residual sum, whatever these two are.

The norms give bytes to the layers that read them, and the residual sums ride in the epilogues of the last layers, as in
`quant_block`; between them the attention (see `attention`) and the MLP compute part by part. Where nothing watches, a block with
two first layers in its MLP (SwiGLU) runs whole on CPUs, as `quant_block` of both joined: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from timm.models.vision_transformer_relpos import RelPosBlock
from torch import nn

from ..kernels import extension
from ..kernels.gate_quantize.op import forward as gate_quantize
from ..models.adapters.attentions import QUANTIZED, AttentionParts
from ..quantization.layers import expect_floats
from ..quantization.prepared import (
    Bind,
    Call,
    Prepares,
    Trying,
    compiled,
    may_prepare,
    preparing,
    small_tensors,
    through_torch,
    watch,
)
from .attention import IntegerOperands
from .linear import linear, normed, product, quantized
from .mlp import IntegerMlp, hidden_bytes
from .own import expect_alone
from .parts import (
    activation_of,
    alike,
    gains_of,
    parts_of,
    replaced_forward,
    tensors_of,
    watched_or_differentiated,
)
from .threads import give_threads_back

_UNPREPARED: tuple[Any, Any, Any] = None, None, None
_GATED = (GluMlp, SwiGLU)
_PROJECTIONS = ("qkv", "q_proj", "k_proj", "v_proj")


class IntegerResidual(Prepares):
    """Mixed in before timm's block class. As simulated in training, with a gradient, and while a hook waits on a part."""

    family: ClassVar[type]
    whole: ClassVar[bool] = False  # whether `quant_block` computes what the family's forward does

    @classmethod
    def take(cls, block: nn.Module) -> None:
        """Turns a block of `family` into one of this class, in place."""
        block.__class__ = cls

    @classmethod
    def why_not(cls, block: Any) -> str:
        """Why the parts of this block cannot be run this way, or ""."""
        attention, mlp = block.attn, block.mlp
        if type(attention) not in QUANTIZED.values() or not isinstance(attention.operands, IntegerOperands):
            return "the products of its attention are not in integers"
        if type(mlp) not in (Mlp, IntegerMlp, *_GATED):
            return f"its MLP is a {type(mlp).__name__}"
        if type(mlp) is IntegerMlp and (reason := IntegerMlp.why_not(mlp)):
            return reason
        gains = gains_of(block)
        for layer, gain in zip((attention.proj, mlp.fc2), gains, strict=True):
            if not quantized(layer):
                return "a last layer is not quantized"
            if gain is not None and (layer.acm is not None or gain.dtype != torch.float32):
                return "a correction lies before a LayerScale"
        if not all(isinstance(gain, (torch.Tensor, type(None))) for gain in gains):
            return "a LayerScale is not known"
        return replaced_forward(block)

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[B, N, C] to float32 [B, N, C]; further arguments as timm's block takes them, for the attention."""
        expect_alone(self)
        prepare = preparing()
        if prepare:
            watching, steps, whole = self.__dict__.get("_prepared", _UNPREPARED)
            turns = None if whole is None else _turns(args, kwargs)
            if turns is not None:
                found = whole(x, *turns)
                if found is not None:
                    return found
            if watching is not None and watching(x, *tensors_of(args, kwargs)):
                return steps(x, *args, **kwargs)
        expect_floats(x)
        if watched_or_differentiated(self, x, *tensors_of(args, kwargs)) or self.why_not(self):
            give_threads_back()
            return super().forward(x, *args, **kwargs)
        if not prepare or not may_prepare(self, x) or x.dim() != 3:
            return _Steps(self, through_torch)(x, *args, **kwargs)
        trying = Trying()
        result = _Steps(self, trying)(x, *args, **kwargs)
        if trying.on_cpu:
            with torch.no_grad():
                watching = watch(self, small_tensors(self), x.shape[2])
                whole = _whole(self, watching, _turns(args, kwargs)) if self.whole else None
                self.__dict__["_prepared"] = watching, _Steps(self, compiled), whole
        return result


def _turns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...] | None:
    """What a whole block takes beside x: a rope that all images share, or nothing. None where a call gives more."""
    rope = kwargs.get("rope")
    if args or any(value is not None and value is not False for name, value in kwargs.items() if name != "rope"):
        return None
    if rope is None:
        return ()
    return (rope,) if isinstance(rope, torch.Tensor) and rope.dim() in (2, 3) else None


def _whole(block: Any, watching: Any, turns: tuple[torch.Tensor, ...] | None) -> Any:
    """The block as one prepared call of `quant_block`, of x and what `_turns` gives; None where it is not one."""
    module, _ = extension.load()
    parts = parts_of(block, join=True)
    if module is None or turns is None or isinstance(parts, str):
        return None
    return module.QuantBlock(watching, parts.arguments(None, None, None, *turns))


class _Steps:
    """What a residual block computes, one function a step, with all that is constant in it taken from the block once."""

    def __init__(self, block: Any, bind: Bind) -> None:
        attention, mlp, (first, second) = block.attn, block.mlp, gains_of(block)
        alone = getattr(attention, "gate", None) is None
        self.attention = attention
        self.norm1 = normed(block.norm1, getattr(attention, "qkv", None) if alone else None, bind)
        projections = {name: getattr(attention, name, None) for name in _PROJECTIONS}
        found = {name: None if layer is None else linear(layer, bind) for name, layer in projections.items()}
        self.parts = AttentionParts(
            attention.operands.bound(bind), **found, position_bias=_once(attention.position_bias, bind)
        )
        self.proj = product(attention.proj, gain=first, bind=bind)
        apart = isinstance(mlp, SwiGLU)
        self.norm2 = _normed_for_both(block.norm2, mlp, bind) if apart else normed(block.norm2, mlp.fc1, bind)
        self.hidden = _hidden(mlp, bind)
        self.fc2 = product(mlp.fc2, gain=second, bind=bind)

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = x.float()
        x = self.proj(self.attention.mixed(self.norm1(x), *args, parts=self.parts, **kwargs), x)
        return self.fc2(self.hidden(self.norm2(x)), x)


def _once(function: Callable[[], torch.Tensor | None], bind: Bind) -> Callable[[], torch.Tensor | None]:
    """The function, or what it gives now where constants are bound: a watch then stands over what it is made from."""
    if bind is not compiled:
        return function
    value = function()
    return lambda: value


def _normed_for_both(
    norm: nn.Module, mlp: Any, bind: Bind
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The norm as a function to what each of the first layers of a SwiGLU takes.

    Both saw the same values and have the same grid, which a trace cannot ask: it has a norm for each.
    """
    first, second = normed(norm, mlp.fc1_g, bind), normed(norm, mlp.fc1_x, bind)
    floats = isinstance(first, nn.Module), isinstance(second, nn.Module)  # else bytes
    one_grid = bind is compiled and not any(floats) and alike(mlp.fc1_g.input, mlp.fc1_x.input)
    once = all(floats) or one_grid

    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = first(x)
        return y, y if once else second(x)

    return call


def _hidden(mlp: Any, bind: Bind) -> Call:
    """What the last layer of one of timm's MLPs takes, as a function of what `norm2` gives: bytes for quantized layers."""
    if type(mlp) is IntegerMlp:
        return hidden_bytes(mlp, bind)
    if isinstance(mlp, Mlp):
        fc1 = linear(mlp.fc1, bind)
        return lambda x: mlp.norm(mlp.act(fc1(x)))
    halves, activation = _halves(mlp, bind), activation_of(mlp.act)
    if activation is None or type(mlp.norm) is not nn.Identity or mlp.fc2.input.table is not None:
        norm = normed(mlp.norm, mlp.fc2, bind)

        def through_norm(x: torch.Tensor) -> torch.Tensor:
            gate, value = halves(x)
            return norm(mlp.act(gate) * value)

        return through_norm
    site, factor = mlp.fc2.input, mlp.fc2.factor
    scale = (site.scale if factor is None else site.scale * factor).reshape(-1)
    run = bind(gate_quantize, (None, None, scale, site.zero_point, site.bits, activation), (0, 1))
    return lambda x: run(*halves(x))


def _halves(mlp: Any, bind: Bind) -> Callable[[Any], tuple[torch.Tensor, torch.Tensor]]:
    """(what goes through the activation, what that is multiplied by) of a gated MLP."""
    if isinstance(mlp, SwiGLU):
        gate, value = linear(mlp.fc1_g, bind), linear(mlp.fc1_x, bind)
        return lambda both: (gate(both[0]), value(both[1]))
    both, last = linear(mlp.fc1, bind), mlp.gate_last

    def packed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = both(x).chunk(2, dim=-1)
        return (second, first) if last else (first, second)

    return packed


class IntegerEvaBlock(IntegerResidual, EvaBlock):
    """Of EVA, DINOv3, the Perception Encoder."""

    family: ClassVar = EvaBlock
    whole: ClassVar = True


class IntegerBeitBlock(IntegerResidual, BeitBlock):
    """Of BEiT."""

    family: ClassVar = BeitBlock


class IntegerRelPosBlock(IntegerResidual, RelPosBlock):
    """Of the ViTs with relative positions."""

    family: ClassVar = RelPosBlock


class IntegerPlainBlock(IntegerResidual, Block):
    """Of ViTs whose parts `quant_block` does not have."""

    family: ClassVar = Block
    whole: ClassVar = True


RESIDUAL: dict[type, type[IntegerResidual]] = {
    kind.family: kind for kind in (IntegerEvaBlock, IntegerBeitBlock, IntegerRelPosBlock, IntegerPlainBlock)
}
