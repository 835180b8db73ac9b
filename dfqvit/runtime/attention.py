"""The products of any attention in integers: quantized, rotated and laid out by one operator, multiplied by another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.quant_attention.op import forward as quant_attention
from ..kernels.quantize_heads.op import forward as quantize_heads
from ..quantization.attention import STEPS, AttentionOperands
from ..quantization.prepared import Bind, Call, through_torch
from .parts import replaced_forward, tensors_of, watched_or_differentiated


class IntegerOperands(AttentionOperands):
    """AttentionOperands that computes by `quantize_heads` and `quant_attention`; takes the class of an instance.

    As simulated where a gradient is wanted, where queries are more than keys or fewer and biased, where every image has a bias
    of its own, and where the probabilities go through something (see `drop_of`), since the operator has none of these.
    """

    @classmethod
    def take(cls, operands: AttentionOperands) -> None:
        """Turns operands into these, in place."""
        operands.__class__ = cls

    @classmethod
    def why_not(cls, operands: AttentionOperands) -> str:
        """Why these products do not run in integers, or ""."""
        if type(operands) not in (AttentionOperands, cls):
            return f"its products are those of a {type(operands).__name__}"
        if operands.steps != STEPS:
            return "its attention's probabilities have fewer than 8 bits"
        sites = (operands.q, operands.k, operands.v)
        if not all(site.frozen for site in sites) or len({site.bits for site in sites}) > 1:
            return "its attention's operands are not quantized alike"
        return ""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As AttentionOperands, float32 [B, heads, N, D]."""
        dropped = kwargs.get("drop") is not None
        if dropped or watched_or_differentiated(self, *tensors_of(args, kwargs)) or replaced_forward(self):
            return super().forward(*args, **kwargs)
        kwargs.pop("drop", None)
        return self.bound(through_torch)(*args, **kwargs)

    def bound(self, bind: Bind) -> Call:
        """`forward` as a function whose operators have their constants; see `prepared`."""
        in_scale = torch.stack((self.q.scale, self.k.scale, self.v.scale))
        in_zero = torch.stack((self.q.zero_point, self.k.zero_point, self.v.zero_point))
        grid = (in_scale, in_zero, self.q.bits)
        quantize = bind(quantize_heads, (None, None, None, *grid, None, False), (0, 1, 2, 6, 7))
        given = (None, None, in_scale, in_zero, None, None, None, None, None, None, 8, None)
        attend = bind(quant_attention, given, (0, 1, 4, 5, 6, 7, 11))

        def call(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            scale: float | torch.Tensor,
            bias: torch.Tensor | None = None,
            mask: torch.Tensor | None = None,
            rope: torch.Tensor | None = None,
            half: bool = False,
        ) -> torch.Tensor:
            heads, tokens, asked = q.shape[1], k.shape[2], q.shape[2]
            if asked < tokens and bias is None and mask is None and rope is None:
                # they were pooled: as many as keys, and the results of what is added go
                q = F.pad(q, (0, 0, 0, tokens - asked))
            common = bias is None or (bias.dim() == 3 or (bias.dim() == 4 and bias.shape[0] == 1))
            turned = rope is None or rope.dim() in (2, 3)
            served = common and turned and q.shape == k.shape == v.shape
            if not served or _differentiated(q, k, v, scale, bias, mask, rope):
                return AttentionOperands.forward(self, q[:, :, :asked], k, v, scale, bias, mask, rope, half)
            qkv = quantize(q, k, v, None if rope is None else rope.float(), half)
            index = None
            if mask is not None:  # the windows of an image are its tokens, one window after the other
                windows = mask.shape[0]
                qkv = qkv.view(-1, windows * tokens, qkv.shape[2])
                index = torch.arange(windows * tokens, dtype=torch.int32, device=qkv.device).view(windows, tokens)
                mask = mask.float()
            if bias is not None:
                bias = bias.view(-1, *bias.shape[-2:]).expand(heads, tokens, tokens).float().contiguous()
            each = scale.float() if isinstance(scale, torch.Tensor) else None
            once = 1.0 if isinstance(scale, torch.Tensor) else float(scale)
            y = attend(qkv, heads, once, bias, mask, index, each)
            return y.view(-1, tokens, heads, q.shape[3])[:, :asked].transpose(1, 2)

        return call


def _differentiated(*values: torch.Tensor | float | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)
