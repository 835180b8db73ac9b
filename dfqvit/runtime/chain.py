"""The chain of fused operators that a quantized block becomes in the integer runtime, with 8-bit integers between them.

    x -> LayerNorm + quantize -> qkv -> attention -> proj + residual -> LayerNorm + quantize -> fc1 + GELU -> fc2 + ACM + residual

A chain computes what the simulated block computes. It keeps no state of its own but tensors made from the block's, remade
when the block moves to another device or another backend is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..kernels import extension
from ..kernels.dispatch import Operator, choices
from ..kernels.layer_norm_quantize.op import forward as norm_operator
from ..kernels.quant_attention.op import forward as attention_operator
from ..kernels.quant_linear.op import forward as linear_operator
from ..quantization.layers import AttentionOperands, QuantLinear, check_tokens, exporting
from ..quantization.quantizers import ActivationQuantizer

OPERATORS = (norm_operator, linear_operator, attention_operator)
Grid = tuple[torch.Tensor, torch.Tensor, int]  # scale, zero point, bits


def why_not(block: Any) -> str:
    """Why this block cannot run as a chain, or "": what the blocks of all families have in common."""
    if not isinstance(getattr(block.attn, "operands", None), AttentionOperands):
        return "its attention is not quantized (placement 'psaq', or an attention of another kind)"
    if block.attn.operands.steps != 255:
        return "its attention's probabilities have fewer than 8 bits"
    linears = (block.attn.qkv, block.attn.proj, getattr(block.mlp, "fc1", None), getattr(block.mlp, "fc2", None))
    if not all(type(layer) is QuantLinear and layer.frozen for layer in linears):
        return "its linear layers are not all quantized"
    norms = (block.norm1, block.norm2)
    if not all(isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None for norm in norms):
        return "a norm is not a LayerNorm with weight and bias"
    between = (block.attn, "q_norm"), (block.attn, "k_norm"), (block.attn, "norm"), (block.mlp, "norm")
    for parent, name in (*between, (block, "ls1"), (block, "ls2")):
        if not isinstance(getattr(parent, name, nn.Identity()), nn.Identity):
            return f"it has a {name}"
    if getattr(block.attn, "gate", None) is not None:
        return "its attention has a gate"
    if activation_of(block.mlp.act) is None:
        return f"its activation is {type(block.mlp.act).__name__}"
    return ""


def activation_of(module: nn.Module) -> str | None:
    """The name of an activation for `quant_linear`, or None."""
    kind = type(module).__name__
    if kind == "GELUTanh" or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_tanh"
    return "gelu" if kind == "GELU" else None


class Linear:
    """A frozen QuantLinear on integers: uint8 [..., K] to float32 [..., N], or to the integers of `out`."""

    def __init__(self, layer: QuantLinear, out: list[Grid] | None = None, activation: str = "none") -> None:
        self.run = bound(linear_operator)
        bias = None if layer.bias is None else layer.bias.detach()
        self.head = (layer.kernel_weight(), bias, layer.acm, *grid(layer.input)[:2], layer.weight_scale)
        self.middle = (layer.input.bits, layer.w_bits, activation)
        self.tail: tuple[Any, ...] = (None, None, 8, torch.float32)
        if out is not None:
            share = layer.out_features // len(out)
            scale, zero = (torch.cat([g[i].expand(share) for g in out]) for i in (0, 1))  # type: ignore[union-attr]
            self.tail = (scale, zero, out[0][2], torch.uint8)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.run(x, *self.head, *self.middle, residual, *self.tail)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What is the same in every call."""
        return (*self.head, *self.middle, *self.tail)


class Norm:
    """LayerNorm straight to the integers that the next layer takes."""

    def __init__(self, norm: nn.LayerNorm, to: ActivationQuantizer) -> None:
        self.run = bound(norm_operator)
        self.arguments = (norm.weight.detach(), norm.bias.detach(), norm.eps, *grid(to))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, *self.arguments)


class Attention:
    """Attention on the integers of qkv, to the integers that proj takes."""

    def __init__(
        self,
        attention: Any,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> None:
        self.run = bound(attention_operator)
        sites = [grid(site) for site in (attention.operands.q, attention.operands.k, attention.operands.v)]
        self.arguments = (
            attention.num_heads,
            torch.stack([scale for scale, _, _ in sites]),
            torch.stack([zero_point for _, zero_point, _ in sites]),
            float(attention.scale),
            bias,
            mask,
            index,
            *grid(attention.proj.input),
        )

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        return self.run(qkv, *self.arguments)


class Chain:
    """A block's operators, ready to run on float32 [B, T, C]; the result is the block's output."""

    def __init__(self, block: Any, **windows: torch.Tensor | None) -> None:
        attention, mlp = block.attn, block.mlp
        operands = [grid(site) for site in (attention.operands.q, attention.operands.k, attention.operands.v)]
        self.norm1 = Norm(block.norm1, attention.qkv.input)
        self.qkv = Linear(attention.qkv, operands)
        self.attention = Attention(attention, **windows)
        self.proj = Linear(attention.proj)
        self.norm2 = Norm(block.norm2, mlp.fc1.input)
        self.fc1 = Linear(mlp.fc1, [input_grid(mlp.fc2)], activation_of(mlp.act) or "none")
        self.fc2 = Linear(mlp.fc2)
        self.acm = mlp.fc2.acm
        self.whole = self._in_one_call()

    def _in_one_call(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The same chain as one compiled call, which saves calls and memory traffic; None where there is none."""
        module, _ = extension.load()
        elsewhere = any(backend != "cpu" for _, backend in choices()) or self.norm1.arguments[0].device.type != "cpu"
        if module is None or elsewhere or exporting():
            return None
        steps = (self.norm1, self.qkv, self.attention, self.proj, self.norm2, self.fc1, self.fc2)
        return module.QuantBlock(*(step.arguments for step in steps))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "whole": None}  # cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.whole = self._in_one_call()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        check_tokens(self.acm, x)
        x = x.detach().float()
        if self.whole is not None and not torch.compiler.is_compiling():
            return self.whole(x)
        x = self.proj(self.attention(self.qkv(self.norm1(x))), x)
        return self.fc2(self.fc1(self.norm2(x)), x)


def chain_of(block: Any, make: Callable[[], Chain], geometry: Any = None) -> Chain:
    """The block's chain, made at its first use on a device and in a geometry."""
    if exporting():
        return make()
    packed = block.attn.qkv.weight_packed
    key = (packed.device, packed.data_ptr(), packed._version, choices(), geometry)
    held = block.__dict__.get("_chain")
    if held is None or held[0] != key:
        held = block.__dict__["_chain"] = (key, make())
    return held[1]


def grid(site: ActivationQuantizer) -> Grid:
    """Scale, zero point and bits of a quantizer, as the operators take them."""
    return site.scale, site.zero_point, site.bits


def input_grid(layer: QuantLinear) -> Grid:
    """Of a layer's input as what comes before it rounds it: a scale for each channel where the layer has factors."""
    scale, zero_point, bits = grid(layer.input)
    return (scale if layer.factor is None else scale * layer.factor), zero_point, bits


def bound(operator: Operator) -> Callable[..., torch.Tensor]:
    """`operator` for many calls of one kind: the backend is chosen at the first, and torch's dispatch of Python is skipped."""
    chosen: list[Callable[..., torch.Tensor]] = []

    def run(*args: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return operator(*args)
        if not chosen:
            chosen.append(operator.resolve(*args).run)
        return chosen[0](*args)

    return run
