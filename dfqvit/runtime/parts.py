"""What a quantized block is made of, recognised by the exact classes of its parts; and these as arguments of `quant_block`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import GELU, DropPath, GELUTanh, GluMlp, LayerScale, Mlp, QuickGELU, SwiGLU
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from torch import nn
from torch.nn.modules import module as torch_module

from ..kernels.quant_linear.blocked import OUTPUTS
from ..models.adapters.attentions import QuantWindowAttentionV2
from ..models.adapters.scalings import NORMS
from ..quantization.attention import STEPS, AttentionOperands
from ..quantization.layers import QuantLinear
from ..quantization.quantizers import ActivationQuantizer

_LEAST = 1e-20
_ACTIVATIONS = {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.SiLU: "silu", nn.Identity: "none"}
_DROPPED = ("drop", "drop1", "drop2", "proj_drop", "attn_drop", "drop_path", "drop_path1", "drop_path2")
_DROPS = (nn.Identity, nn.Dropout, DropPath)  # nothing, in eval


@dataclass(frozen=True)
class Joined:
    """Two layers that read the same as one: the outputs of the first, then those of the second.

    For calls that are prepared under a watch over both: weights are copied, and values are compared.
    """

    first: QuantLinear
    second: QuantLinear

    @property
    def why_not(self) -> str:
        """Why they cannot be one, or ""."""
        if self.first.packed_bits != self.second.packed_bits:
            return "the weights of its MLP's first layers differ in bits"
        if not alike(self.first.input, self.second.input):
            return "the inputs of its MLP's first layers are rounded differently"
        return ""

    @property
    def input(self) -> ActivationQuantizer:
        return self.first.input

    @property
    def packed_bits(self) -> int:
        return self.first.packed_bits

    @property
    def weight_scale(self) -> torch.Tensor:
        return torch.cat((self.first.weight_scale, self.second.weight_scale))

    @property
    def bias(self) -> torch.Tensor | None:
        layers = (self.first, self.second)
        if all(layer.bias is None for layer in layers):
            return None
        return torch.cat([torch.zeros_like(each.weight_scale) if each.bias is None else each.bias for each in layers])

    @property
    def acm(self) -> torch.Tensor | None:
        return self.first.acm if self.second.acm is None else self.second.acm

    @property
    def exponents(self) -> torch.Tensor | None:
        return self.first.exponents if self.second.exponents is None else self.second.exponents

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As QuantLinear's, without a correction."""
        first, second = self.first.operands()[0], self.second.operands()[0]
        blocked = first.dtype == second.dtype == torch.int32
        if not blocked or self.first.out_features % OUTPUTS:  # the second begins within a block of outputs
            first, second = self.first.weight_packed, self.second.weight_packed
        return torch.cat((first, second)), None, None


@dataclass(frozen=True)
class Parts:
    """The parts of a block with one attention and one two-layer MLP."""

    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    linears: tuple[QuantLinear, QuantLinear, QuantLinear | Joined, QuantLinear]  # qkv, proj, fc1, fc2
    operands: AttentionOperands
    heads: int
    scale: float
    activation: str
    gains: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # LayerScale, of the results of proj and fc2
    head_scale: torch.Tensor | None = None  # [heads], of attention by cosines
    post_norm: bool = False  # whether the norms come last within the residual sums
    half: bool = False  # whether the partners that a rope turns lie half a head apart
    gate: str = "none"  # or "first" or "last": the half of fc1's result that goes through the activation

    @property
    def sites(self) -> tuple[ActivationQuantizer, ...]:
        """In the order of `quant_block`'s grids."""
        qkv, proj, fc1, fc2 = self.linears
        return (qkv.input, self.operands.q, self.operands.k, self.operands.v, proj.input, fc1.input, fc2.input)

    def arguments(
        self,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
        rope: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The arguments of the operator `quant_block` after x, as its schema orders them."""
        operands = [linear.operands() for linear in self.linears]
        biases, scales = folded(self.linears, (None, self.gains[0], None, self.gains[1]))
        return (
            [tensor for norm in self.norms for tensor in (norm.weight, norm.bias)],
            [norm.eps for norm in self.norms],
            [weight for weight, _, _ in operands],
            biases,
            scales,
            [linear.packed_bits for linear in self.linears],
            [site.scale for site in self.sites],
            [site.zero_point for site in self.sites],
            [site.grid_bits for site in self.sites],
            self.heads,
            self.scale,
            bias,
            mask,
            index,
            operands[-1][1],
            hidden_scale(self.linears[-1]),
            self.activation,
            self.head_scale,
            self.post_norm,
            self.half,
            self.gate,
            rope,
            self.linears[-1].input.table,
        )

    def values(self) -> Iterator[torch.Tensor]:
        """The small tensors among the arguments: all but the packed weights."""
        for norm in self.norms:
            yield from (norm.weight, norm.bias)
        for linear in self.linears:
            yield from (
                tensor
                for tensor in (linear.bias, linear.weight_scale, linear.acm, linear.exponents, linear.input.table)
                if tensor is not None
            )
        for site in self.sites:
            yield from (site.scale, site.zero_point)
        yield from (gain for gain in self.gains if gain is not None)


def scaled(tensor: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """LayerScale multiplies a layer's result, which is its scale times whole numbers plus its bias: so it multiplies these.

    Scales must not be 0: a gain of nothing is one of _LEAST, which no residual sum feels.
    """
    return tensor if gain is None else tensor * torch.where(gain.abs() < _LEAST, _LEAST, gain)


def folded(
    linears: Sequence[QuantLinear | Joined], gains: Sequence[torch.Tensor | None]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(biases, of no values for none; scales of the weights) of layers, with what multiplies their results."""
    pairs = list(zip(linears, gains, strict=True))
    biases = [
        linear.weight_scale.new_empty(0) if linear.bias is None else scaled(linear.bias, gain) for linear, gain in pairs
    ]
    return biases, [scaled(linear.weight_scale, gain) for linear, gain in pairs]


def gains_of(block: Any) -> tuple[Any, Any]:
    """LayerScale of both results of a block, as its class computes it: tensors, or None; anything else is not known."""
    if isinstance(block, BeitBlock):  # which asks the first alone
        first, second = block.gamma_1, block.gamma_2
        return (None, None) if first is None else (first, _NOTHING if second is None else second)
    if isinstance(block, EvaBlock):
        return block.gamma_1, block.gamma_2
    return _gain_of(getattr(block, "ls1", None)), _gain_of(getattr(block, "ls2", None))


def _gain_of(scale: nn.Module | None) -> Any:
    if scale is None or type(scale) is nn.Identity:
        return None
    return scale.gamma if type(scale) is LayerScale else scale


def hidden_scale(fc2: QuantLinear) -> torch.Tensor | None:
    """[H], what fc1 rounds its result by where fc2 has factors of its own for the channels."""
    return None if fc2.factor is None else fc2.input.scale * fc2.factor


def parts_of(block: Any, *, post_norm: bool = False, join: bool = False) -> Parts | str:
    """The parts of a block whose own class and attention are known, or why it cannot run in integers.

    `post_norm`: whether its norms come last within its residual sums. `join`: whether two first layers of an MLP (SwiGLU) may be
    taken as one, see `Joined`. Every part is asked what it is, by exact class: a part that is not known could compute anything.
    """
    attention, mlp = block.attn, block.mlp
    if not isinstance(getattr(attention, "operands", None), AttentionOperands):
        return "its attention is not quantized (placement 'psaq', or an attention of another kind)"
    apart = join and type(mlp) is SwiGLU
    if type(mlp) not in (Mlp, GluMlp) and not apart:
        return f"its MLP is a {type(mlp).__name__}"
    first = (mlp.fc1_g, mlp.fc1_x) if apart else (mlp.fc1,)
    if not all(type(each) is QuantLinear and each.frozen for each in (attention.qkv, attention.proj, *first, mlp.fc2)):
        return "its linear layers are not all quantized"
    if apart and (reason := Joined(*first).why_not):
        return reason
    linears = (attention.qkv, attention.proj, Joined(*first) if apart else mlp.fc1, mlp.fc2)
    if linears[0].out_features != 3 * linears[1].in_features:
        return "its attention has fewer heads of keys than of queries"
    if linears[0].acm is not None or linears[1].acm is not None or linears[2].acm is not None:
        return "a layer before the last has a correction"
    if post_norm and linears[3].acm is not None:
        return "a correction lies before a norm"
    if any(layer.exponents is not None for layer in linears[:3]):
        return "a layer before the last has factors for its channels"
    if any(layer.input.table is not None for layer in linears[:3]):
        return "what a layer before the last takes has levels of its own"
    if attention.operands.steps != STEPS:
        return "its attention's probabilities have fewer than 8 bits"
    norms = (block.norm1, block.norm2)
    for norm in norms:
        if reason := other_norm(norm):
            return f"a norm {reason}"
    for parent, name in ((attention, "q_norm"), (attention, "k_norm"), (attention, "norm"), (mlp, "norm")):
        if type(getattr(parent, name, _NOTHING)) is not nn.Identity:
            return f"it has a {name}"
    gains = gains_of(block)
    for name, gain, linear in zip(("ls1", "ls2"), gains, (attention.proj, mlp.fc2), strict=True):
        if isinstance(gain, nn.Module):
            return f"it has a {name} of class {type(gain).__name__}"
        if gain is not None and gain.dtype != torch.float32:
            return f"its {name} holds {gain.dtype}, not float32"
        if gain is not None and linear.acm is not None:
            return f"a correction lies before its {name}"
    if getattr(attention, "gate", None) is not None:
        return "its attention has a gate"
    activation = activation_of(mlp.act)
    if activation is None:
        return f"its activation is {type(mlp.act).__name__}"
    if other := replaced_forward(block):
        return other
    cosines = isinstance(attention, QuantWindowAttentionV2)
    return Parts(
        norms,
        linears,
        attention.operands,
        attention.num_heads,
        1.0 if cosines else float(attention.scale),
        activation,
        gains,
        attention.scales_of_heads().float() if cosines else None,
        post_norm,
        bool(getattr(attention, "rotate_half", False)),
        gate_of(mlp),
    )


_NOTHING = nn.Identity()


def other_norm(norm: Any, kinds: Sequence[type] = NORMS) -> str:
    """What a norm does that `layer_norm_quantize` does not, as its class, one of `kinds` or not, and its tensors tell; or ""."""
    if type(norm) not in kinds or norm.weight is None or norm.bias is None:
        return f"is a {type(norm).__name__}, not a LayerNorm with weight and bias"
    others = [tensor.dtype for tensor in (norm.weight, norm.bias) if tensor.dtype != torch.float32]
    return f"holds {others[0]}, not float32" if others else ""


def gate_of(mlp: nn.Module) -> str:
    """Which half of fc1's result goes through the activation, as `quant_block` has it."""
    if type(mlp) is SwiGLU:
        return "first"
    if type(mlp) is not GluMlp:
        return "none"
    return "last" if mlp.gate_last else "first"


def alike(first: ActivationQuantizer, second: ActivationQuantizer) -> bool:
    """Whether two quantizers round to the same grid; reads values."""
    same = first.bits == second.bits and torch.equal(first.scale, second.scale)
    return same and torch.equal(first.zero_point, second.zero_point) and first.table is second.table is None


def all_of(module: nn.Module) -> list[nn.Module]:
    """`module` and what is inside it; torch.compile traces `module.modules()` in several times as many steps."""
    found, last = [module], [module]
    while last:
        last = [child for each in last for child in each._modules.values() if child is not None]
        found += last
    return found


def watched_or_differentiated(module: nn.Module, *given: torch.Tensor) -> bool:
    """Whether a module must compute as simulated: something of it in training, as dropout may be alone, with a gradient wanted, or
    with a hook on a module inside. `given`: what it is called with."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    differentiates = torch.is_grad_enabled()
    if differentiates and any(tensor.requires_grad for tensor in given):
        return True
    for child in all_of(module):
        if child.training or (child is not module and (child._forward_hooks or child._forward_pre_hooks)):
            return True
        if differentiates and (_requires_gradient(child._parameters) or _requires_gradient(child._buffers)):
            return True
    return False


def _requires_gradient(table: Mapping[str, torch.Tensor | None]) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in table.values())


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of a call."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def replaced_forward(module: nn.Module) -> str:
    """Why a module is not what its class says, or "": a forward of its own was given to one inside it, or one that computes stands
    where dropout stood."""
    for child in all_of(module):
        # torch.compile guards an attribute that is read, and no look into a module's __dict__
        if child is not module and (child.forward is None or "forward" in vars(child)):
            return f"the forward of a {type(child).__name__} was replaced"
        for name, found in child._modules.items():
            if name in _DROPPED and found is not None and type(found) not in _DROPS:
                return f"its {name} is a {type(found).__name__}"
    return ""


def activation_of(module: nn.Module) -> str | None:
    """The name of an activation for `quant_linear`, or None."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))
