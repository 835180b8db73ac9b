"""The products of attention with quantized operands, as simulated; `runtime.attention` computes the same on integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..kernels.quantize_heads.reference import rotate
from .quantizers import ActivationQuantizer, TellsBits

STEPS = 255  # of the probabilities in 8 bits, as `quant_attention` has them


class AttentionOperands(TellsBits):
    """The products of attention, `softmax(scale Q K^T + bias) V`, with quantized operands.

    Q, K and V are quantized like any activation. The exponentials are rounded to whole steps of 1/255 of each row's
    greatest, and divided by the sum of what was rounded: their range needs no calibration, and rows still sum to 1. `steps`
    is STEPS, or what the recipe's `softmax_bits` make of it.
    """

    _BITS = "steps"

    def __init__(self, bits: int, quantizer: str) -> None:
        super().__init__()
        self.steps = STEPS
        self.q, self.k, self.v = (ActivationQuantizer(bits, quantizer) for _ in range(3))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        rope: torch.Tensor | None = None,
        half: bool = False,
        drop: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The mixed values of every token.

        Args:
            q: [B, heads, N, D].
            k: [B, heads, M, D].
            v: likewise.
            scale: of the scores; or [heads].
            bias: added to the scores, of a shape that goes with [B, heads, N, M].
            mask: [W, N, M] or None, added in window w, for batches of windows, those of an image one after the other.
            rope: sines and cosines that turn the last tokens of q and k, see `kernels.quantize_heads`.
            half: as there.
            drop: what the probabilities [B, heads, N, M] go through, see `drop_of`.

        Returns:
            [B, heads, N, D].
        """
        if rope is not None:
            q, k = rotate(q, rope, half), rotate(k, rope, half)
        q, k, v = self.q(q), self.quantized_keys(k), self.v(v)
        scores = scored(q @ k, scale, bias, mask)
        if not self.q.frozen:
            shares = scores.softmax(dim=-1)
            return (shares if drop is None else drop(shares)) @ v
        steps = self.rounded(self.steps * (scores - scores.amax(dim=-1, keepdim=True)).exp())
        total = steps.sum(dim=-1, keepdim=True)
        return (steps @ v) / total if drop is None else drop(steps / total) @ v

    def quantized_keys(self, k: torch.Tensor) -> torch.Tensor:
        """[B, heads, M, D] to [B, heads, D, M], quantized."""
        return self.k(k).mT

    def rounded(self, shares: torch.Tensor) -> torch.Tensor:
        """Shares from 0 to `steps` to whole ones."""
        steps = shares.round()
        if shares.requires_grad:  # straight through, for `reconstruction`
            steps = shares + (steps - shares).detach()
        return steps


def scored(
    products: torch.Tensor, scale: float | torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """The scores [B, heads, N, M] from products of queries and keys; the rest as in `AttentionOperands.forward`."""
    scores = products * (scale.view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
    return scores


def drop_of(attention: Any) -> nn.Module | None:
    """The `attn_drop` of one of timm's attentions where timm would call it and that does something: in training, hooked, or another
    module in its place, as those do who look at the probabilities or change them.

    UsageError where the same was done to the softmax before it, which is no module of a quantized attention.
    """
    drop, softmax = getattr(attention, "attn_drop", None), getattr(attention, "softmax", None)
    if drop is not None and drop.training and getattr(drop, "p", 0):
        return drop
    if getattr(attention, "fused_attn", False):  # timm calls neither
        return None
    if softmax is not None and _does_more(softmax, nn.Softmax):
        raise UsageError(
            f"the softmax of a {type(attention).__name__} was hooked or replaced, and a quantized attention does not call it; put "
            "that on its attn_drop, which takes the same probabilities"
        )
    return drop if drop is not None and _does_more(drop, nn.Dropout, nn.Identity) else None


def _does_more(module: nn.Module, *kinds: type) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    # torch.compile guards an attribute that is read, and no look into a module's __dict__
    return bool(type(module) not in kinds or hooked or module.forward is None or "forward" in vars(module))
