"""The integer runtime: a frozen quantized model whose blocks run as chains of integer operators (see `chain`).

The blocks take another class; everything else of the timm model stays as it is: its forward, `forward_features` and
`forward_intermediates`, its state_dict. Hooks on the layers inside a block do not fire while its chain runs.
"""

from __future__ import annotations

from torch import nn

from ..errors import UsageError
from ..models.adapters import find_adapter
from .blocks import INTEGER, why_not_known
from .chain import OPERATORS, why_not

RUNTIMES = ("auto", "integer", "simulated")


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
    adapter = find_adapter(model)
    names = {module: name for name, module in model.named_modules()}
    for block in adapter.blocks():
        reason = why_not(block) or why_not_known(block)
        if reason:
            skipped[names[block]] = reason
        else:
            block.__class__ = INTEGER[type(block)]
    return skipped
