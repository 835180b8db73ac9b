"""The integer runtime: a frozen quantized model whose blocks run in integers, each as one operator (see `block`).

The blocks take another class; everything else of the timm model stays as it is: its forward, `forward_features` and
`forward_intermediates`, its state_dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import UsageError
from ..kernels.layer_norm_quantize.op import forward as norm_operator
from ..kernels.quant_attention.op import forward as attention_operator
from ..kernels.quant_linear.op import forward as linear_operator
from ..models.adapters import find_adapter
from ..quantization.model import QuantizedModel, quantized
from .block import IntegerBlock
from .company import SerialTorch
from .swin import IntegerSwinBlock
from .vit import IntegerVitBlock

RUNTIMES = ("auto", "integer", "simulated")
OPERATORS = (norm_operator, linear_operator, attention_operator)
FAMILIES: dict[type, type[IntegerBlock]] = {kind.family: kind for kind in (IntegerVitBlock, IntegerSwinBlock)}


def check_runtime(runtime: str) -> None:
    """UsageError unless `runtime` is one."""
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime was '{runtime}'; it may be {', '.join(map(repr, RUNTIMES))}")


def set_runtime(model: nn.Module, runtime: str) -> None:
    """Runs a frozen quantized model in integers as far as the runtime knows its blocks, or leaves it simulated.

    "auto" is "integer" where all operators have kernels: on CPUs with dfqvit._C, on GPUs with Triton.
    """
    devices = {buffer.device.type for buffer in model.buffers()}
    fused = all(operator.fused_on(device) for operator in OPERATORS for device in devices)
    if runtime == "integer" or (runtime == "auto" and fused):
        accelerate(model)


def accelerate(model: nn.Module) -> dict[str, str]:
    """Lets every block of a frozen quantized model that the runtime knows run in integers, in place.

    Returns:
        The blocks that stay simulated, by name, each with the reason; empty when all were taken.
    """
    skipped = {}
    for name, block in _blocks(model):
        reason = _why_not(block)
        if reason:
            skipped[name] = reason
        elif not isinstance(block, IntegerBlock):
            FAMILIES[type(block)].take(block)
    if not skipped and isinstance(model, QuantizedModel):
        quantized(model, SerialTorch)
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
    if not isinstance(model, QuantizedModel):
        raise UsageError(
            f"model was a {type(model).__name__} that dfqvit did not quantize; it may be what quantize or load gave"
        )
    simulated = "the model's runtime is simulated; dfqvit.load(path, runtime='integer') runs it in integers"
    return {
        name: _why_not(block) or ("" if isinstance(block, IntegerBlock) else simulated)
        for name, block in _blocks(model)
    }


def _blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    names = {module: name for name, module in model.named_modules()}
    return ((names[block], block) for block in find_adapter(model).blocks())


def _why_not(block: Any) -> str:
    kind = type(block) if isinstance(block, IntegerBlock) else FAMILIES.get(type(block))
    return f"it is a {type(block).__name__}" if kind is None else kind.why_not(block)
