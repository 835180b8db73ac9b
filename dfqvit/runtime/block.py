"""What the integer blocks of all families have in common: when they run in integers, and how.

An integer block is timm's block under another class: its layers, parameters and state_dict stay. It computes
`quant_block` of what it holds at that moment, through torch's dispatcher, so that a trace, a mode or a transform sees one
registered operator. Where nothing watches, a compiled object with prepared constants stands for the same call; it looks
first whether all that it was made from is still there and as it was (csrc/module.cpp).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..kernels import extension
from ..kernels.dispatch import asked_table
from ..kernels.quant_block.op import forward as operator
from ..quantization.layers import check_tokens
from .company import lift
from .parts import Parts, parts_of, watched_or_differentiated
from .prepared import may_prepare, watch

_ASKED = asked_table()


class IntegerBlock(nn.Module):
    """Mixed in before a family's block class; see `take`.

    It computes as simulated, layer by layer, in training, where a gradient is wanted, where a hook waits on a layer inside, and
    where a part is not what it knows.
    """

    family: ClassVar[type]  # timm's class of the block

    @classmethod
    def take(cls, block: nn.Module) -> None:
        """Turns a block of `family` into one of this class, in place."""
        block.__class__ = cls

    @classmethod
    def why_not(cls, block: Any) -> str:
        """Why this block of the family does not run in integers, or ""."""
        parts = parts_of(block)
        return parts if isinstance(parts, str) else ""

    def geometry(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """(bias, mask, index) of `quant_attention`, of the block as it is now."""
        return None, None, None

    def sources(self) -> list[torch.Tensor]:
        """What `geometry` is computed from, beyond buffers."""
        return []

    def integer(self, x: torch.Tensor) -> torch.Tensor | None:
        """[B, T, C] to float32 [B, T, C] in integers, or None where the block is to compute as simulated."""
        prepare = not _ASKED and not torch.compiler.is_compiling()
        if prepare:
            prepared = self.__dict__.get("_prepared")
            found = None if prepared is None else prepared(x)
            if found is not None:
                return found
        if watched_or_differentiated(self, x) or self.why_not(self):
            lift()
            return None
        parts = parts_of(self)
        assert isinstance(parts, Parts)
        check_tokens(parts.linears[-1].acm, x)
        arguments = parts.arguments(*self.geometry())
        if prepare:
            found = self._prepare(parts, arguments, x)
            if found is not None:
                return found
        return operator(x.float(), *arguments)

    def _prepare(self, parts: Parts, arguments: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor | None:
        """The result by a prepared call that later calls find too; None where there can be none, or something watches."""
        module, _ = extension.load()
        if module is None or not may_prepare(x):
            return None
        held = self.__dict__.get("_prepared")
        if held is None or not held.current():
            watching = watch(self, [*parts.values(), *self.sources()], parts.norms[0].weight.numel())
            held = module.QuantBlock(watching, arguments)
            self.__dict__["_prepared"] = held
        return held(x)

    def __getstate__(self) -> dict[str, Any]:
        """Without the prepared call, which a copy makes for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}
