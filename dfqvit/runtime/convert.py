"""The integer runtime: a frozen quantized model whose blocks run in integers.

A block of a family that is known runs as one operator (see `block`). In every other block the parts run in integers: the
linear layers as they are, the products of attention (see `attention`), the MLPs (see `mlp`), and the norms and residual sums
where the block is one of these two (see `residual`). What is taken gets another
class; everything else of the timm model stays as it is: its forward, `forward_features` and `forward_intermediates`, its
state_dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.layers import Mlp
from torch import nn

from ..errors import UsageError, expect_one_of
from ..kernels.layer_norm_quantize.op import forward as norm_operator
from ..kernels.quant_attention.op import forward as attention_operator
from ..kernels.quant_linear.op import forward as linear_operator
from ..models.adapters import find_adapter, is_network
from ..models.adapters.attentions import CONSTANT
from ..models.foreign import expect_unwrapped
from ..quantization.attention import AttentionOperands
from ..quantization.layers import QuantLinear
from ..quantization.model import QuantizedForward, quantized
from .attention import IntegerOperands
from .block import IntegerBlock
from .convnext import IntegerConvNeXtBlock, IntegerDownsample
from .mlp import IntegerMlp
from .residual import RESIDUAL, IntegerResidual
from .rotary import IntegerRotaryBlock
from .swin import IntegerSwinBlock, IntegerSwinV2Block, take_mergings
from .threads import SerialTorch
from .vit import IntegerVitBlock

RUNTIMES = ("auto", "integer", "simulated")
OPERATORS = (norm_operator, linear_operator, attention_operator)
FAMILIES: dict[type, type[IntegerBlock]] = {
    kind.family: kind
    for kind in (IntegerVitBlock, IntegerRotaryBlock, IntegerSwinBlock, IntegerSwinV2Block, IntegerConvNeXtBlock)
}


def check_runtime(runtime: str) -> None:
    """UsageError unless `runtime` is one."""
    expect_one_of("runtime", runtime, RUNTIMES)


def set_runtime(model: nn.Module, runtime: str) -> None:
    """Runs a frozen quantized model in integers as far as the runtime knows its blocks, or leaves it simulated.

    "auto" is "integer" where all operators have kernels: on CPUs with dfqvit._C, on GPUs with Triton.
    """
    devices = {buffer.device.type for buffer in model.buffers()}
    fused = all(operator.fused_on(device) for operator in OPERATORS for device in devices)
    if runtime == "integer" or (runtime == "auto" and fused):
        accelerate(model)


def accelerate(model: nn.Module) -> dict[str, str]:
    """Lets a frozen quantized model run in integers as far as the runtime knows its parts, in place.

    Returns:
        The blocks of which something stays simulated or float, by name, each with the reason; empty when there is none.
    """
    skipped, named = {}, list(_blocks(model))
    for name, block in named:
        if _whole(block):
            if not isinstance(block, IntegerBlock):
                FAMILIES[type(block)].take(block)
        elif reason := parts_not_integer(block):
            skipped[name] = reason
    inside = {module for _, block in named if isinstance(block, IntegerBlock) for module in block.modules()}
    for module in model.modules():
        if module in inside:
            continue
        if type(module) is AttentionOperands and not IntegerOperands.why_not(module):
            IntegerOperands.take(module)
        elif type(module) is Mlp and not IntegerMlp.why_not(module):
            IntegerMlp.take(module)
    for _, block in named:
        kind = RESIDUAL.get(type(block))
        if kind is not None and not kind.why_not(block):
            kind.take(block)
    IntegerDownsample.take_all(model)
    take_mergings(model)
    kinds = [isinstance(block, (IntegerBlock, IntegerResidual)) for _, block in named]
    if isinstance(model, QuantizedForward) and kinds and all(kinds) and not is_network(model):
        quantized(model, SerialTorch)  # of other models torch computes more than torch's threads cost
    return skipped


def integer_report(model: nn.Module) -> dict[str, str]:
    """For every block of a quantized model, by name: "" if it runs in integers, or why it does not.

    Args:
        model: from `dfqvit.quantize` or `dfqvit.load`.

    Returns:
        {timm's name of a block: "" or the reason in a sentence}.

    Raises:
        UsageError: the model was not quantized by dfqvit.
    """
    expect_unwrapped("model", model)
    if not isinstance(model, QuantizedForward):
        raise UsageError(
            f"model was a {type(model).__name__} that dfqvit did not quantize; it may be what quantize or load gave"
        )
    simulated = "the model's runtime is simulated; dfqvit.load(path, runtime='integer') runs it in integers"
    return {name: _reason(block, simulated) for name, block in _blocks(model)}


def _blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    names = {module: name for name, module in model.named_modules()}
    return ((names[block], block) for block in find_adapter(model).blocks())


def _whole(block: Any) -> bool:
    """Whether the block can run as one operator."""
    kind = type(block) if isinstance(block, IntegerBlock) else FAMILIES.get(type(block))
    return kind is not None and not kind.why_not(block)


def _reason(block: Any, simulated: str) -> str:
    if isinstance(block, IntegerBlock):
        return type(block).why_not(block)
    reason = parts_not_integer(block)
    if reason:
        return reason
    products = [module for module in block.modules() if isinstance(module, AttentionOperands)]
    taken = all(isinstance(each, IntegerOperands) for each in products)
    return "" if taken and not (_whole(block) and products) else simulated


def parts_not_integer(block: nn.Module) -> str:
    """Why a block, taken part by part, does not compute all its products on integers, or ""."""
    layers = 0
    for name, module in block.named_modules():
        where = f"its {name}" if name else "it"
        if isinstance(module, QuantLinear):
            layers += 1
            if not module.frozen:
                return f"{where} is not quantized yet"
        elif type(module) in (nn.Linear, nn.Conv2d) and not _is_depthwise(module):
            if set(name.split(".")) & set(CONSTANT):
                continue
            return f"{where} stays float"
        elif isinstance(module, AttentionOperands):
            reason = IntegerOperands.why_not(module)
            if reason:
                return reason
        elif getattr(module, "use_rel_pos", False):
            return f"{where} adds positions that depend on the image, which no integer operator has"
        elif _attends(module) and not isinstance(getattr(module, "operands", None), AttentionOperands):
            return f"{where} is a {type(module).__name__}, whose own products stay float"
    return "nothing of it is quantized" if _multiplies(block) and not layers else ""


def _multiplies(block: nn.Module) -> bool:
    """Whether it may hold products: weights other than those of norms and depthwise convolutions."""
    return any(
        parameter.dim() > 1
        for module in block.modules()
        if not _is_depthwise(module)
        for parameter in module.parameters(recurse=False)
    )


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _attends(module: nn.Module) -> bool:
    """Whether a module multiplies queries and keys itself, as far as its attributes tell: it has heads, and a scale of scores."""
    names = vars(module)
    heads = any(isinstance(names.get(name), int) for name in ("num_heads", "heads", "n_heads"))
    parts = ("fused_attn", "scale", "attn_drop", "qkv", "logit_scale", "temperature")
    return heads and any(name in names or name in module._modules or name in module._parameters for name in parts)
