from __future__ import annotations

import torch

from ..dispatch import Backend, Operator, anything


def ref(qkv, heads, in_scale, in_zero, scale, bias, mask, index, out_scale, out_zero, out_bits):
    b, t, _ = qkv.shape
    x = qkv.view(b, t, 3, heads, -1).float()
    x = (x - in_zero.view(1, 1, 3, 1, 1)) * in_scale.view(1, 1, 3, 1, 1)
    if index is not None:
        w, n = index.shape
        x = x[:, index.flatten().long()].view(b * w, n, *x.shape[2:])
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    s = (q @ k.mT) * scale
    if bias is not None:
        s = s + bias
    if mask is not None:
        s = (s.view(b, -1, *s.shape[1:]) + mask[:, None]).flatten(0, 1)
    p = (255 * (s - s.amax(-1, keepdim=True)).exp()).round()
    y = ((p @ v) / p.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)
    if index is not None:
        z = y.new_empty(b, t, y.shape[-1])
        z[:, index.flatten().long()] = y.reshape(b, t, -1)
        y = z
    if out_scale is not None:
        return ((y / out_scale).round() + out_zero).clamp(0, 2**out_bits - 1).to(torch.uint8)
    return y


forward = Operator(
    "quant_attention(Tensor qkv, int heads, Tensor in_scale, Tensor in_zero, float scale, Tensor? bias, Tensor? mask, Tensor? index, Tensor? out_scale, Tensor? out_zero, int out_bits) -> Tensor",
    fake=lambda q, h, *a: q.new_empty(*q.shape[:2], q.shape[2] // 3),
    backends=[Backend("reference", ref, anything)],
)
