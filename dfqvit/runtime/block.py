"""What the integer blocks of all families have in common: when they run in integers, and how.

An integer block is timm's block under another class: its layers, parameters and state_dict stay. It computes its operator
(`quant_block`, or another that its family names) of what it holds at that moment, through torch's dispatcher, so that a trace,
a mode or a transform sees one registered operator. Where nothing watches, a compiled object with prepared constants stands
for the same call; it looks first whether all that it was made from is still there and as it was (csrc/module.cpp).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..kernels import extension
from ..kernels.dispatch import Operator
from ..kernels.quant_block.op import forward as quant_block
from ..quantization.layers import check_tokens, expect_floats
from ..quantization.prepared import Prepares, may_prepare, preparing, watch
from .own import expect_alone
from .parts import parts_of, watched_or_differentiated
from .threads import give_threads_back


class IntegerBlock(Prepares):
    """Mixed in before a family's block class; see `take`.

    It computes as simulated, layer by layer, in training, where a gradient is wanted, where a hook waits on a layer inside, and
    where a part is not what it knows.
    """

    family: ClassVar[type]  # timm's class of the block
    operator: ClassVar[Operator] = quant_block
    compiled: ClassVar[str] = "QuantBlock"  # the class of dfqvit._C that prepares a call of the operator
    dims: ClassVar[int] = 3  # of what the operator takes

    @classmethod
    def take(cls, block: nn.Module) -> None:
        """Turns a block of `family` into one of this class, in place."""
        block.__class__ = cls

    @classmethod
    def parts(cls, block: Any) -> Any:
        """What the block is made of, with `arguments` and `values`, or why it cannot run in integers."""
        return parts_of(block)

    @classmethod
    def why_not(cls, block: Any) -> str:
        """Why this block of the family does not run in integers, or ""."""
        parts = cls.parts(block)
        return parts if isinstance(parts, str) else ""

    def geometry(self) -> tuple[torch.Tensor | None, ...]:
        """What the arguments need beyond the parts, of the block as it is now: (bias, mask, index) of `quant_attention`."""
        return None, None, None

    def sources(self) -> list[torch.Tensor]:
        """What `geometry` is computed from, beyond buffers."""
        return []

    def integer(self, x: torch.Tensor, *rope: torch.Tensor) -> torch.Tensor | None:
        """What the operator takes to what it gives, or None where the block is to compute as simulated.

        `rope`: one, or none, of this call; the last of the operator's arguments.
        """
        expect_alone(self)
        prepare = preparing()
        if prepare:
            prepared = self.__dict__.get("_prepared")
            found = None if prepared is None else prepared(x, *rope)
            if found is not None:
                return found
        expect_floats(x)
        parts = "it is watched" if watched_or_differentiated(self, x) else self.parts(self)
        if isinstance(parts, str):
            give_threads_back()
            return None
        check_tokens(parts.linears[-1].acm, x)
        arguments = parts.arguments(*self.geometry(), *rope)
        if prepare:
            found = self._prepare(parts, arguments, x, *rope)
            if found is not None:
                return found
        return self.operator(x.float(), *arguments)

    def _prepare(
        self, parts: Any, arguments: tuple[Any, ...], x: torch.Tensor, *rope: torch.Tensor
    ) -> torch.Tensor | None:
        """The result by a prepared call that later calls find too; None where there can be none, or something watches."""
        module, _ = extension.load()
        if module is None or not may_prepare(self, x):
            return None
        held = self.__dict__.get("_prepared")
        if held is None or not held.current():
            channels = parts.norms[0].weight.numel()
            watching = watch(self, [*parts.values(), *self.sources()], channels, self.dims)
            held = getattr(module, self.compiled)(watching, arguments)
            self.__dict__["_prepared"] = held
        return held(x, *rope)
