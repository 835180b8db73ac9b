"""The operator `quant_attention`: public function, checks, registration."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, Verdict, anything, compiled, in_triton, not_float64
from . import reference


def quant_attention(
    qkv: torch.Tensor,
    heads: int,
    *,
    in_scale: torch.Tensor,
    in_zero: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    out_scale: torch.Tensor | float | None = None,
    out_zero: torch.Tensor | float | None = None,
    out_bits: int = 8,
    head_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head self-attention on integers, for whole images or windows; no gradient.

        s_ij  = scale * head_scale * q_scale * k_scale * sum_d (q_id - q_zero) * (k_jd - k_zero) + bias_ij + mask_ij
        p_ij  = round(255 * exp(s_ij - max_j s_ij))
        y_i   = v_scale * (sum_j p_ij * (v_j - v_zero)) / sum_j p_ij
        result = y, or with out_scale: clamp(round(y / out_scale) + out_zero, 0, 2^out_bits - 1)

    The integer sums are exact, rounding is half to even. Backends may approximate the exponentials to 3e-6 of their size, so
    a p_ij may be one step apart where 255 exp(...) lies that close to the middle between two.

    Args:
        qkv: uint8 [B, T, 3 * heads * D], as timm's qkv layer lays it out.
        heads: number of heads.
        in_scale: [3], positive: of q, k and v.
        in_zero: [3], whole numbers in [0, 255].
        scale: of the softmax, usually D^-0.5.
        bias: float [heads, N, N] or None: Swin's relative position bias.
        mask: float [W, N, N] or None, added in window w; -inf hides a key. Every query must see a key.
        index: int32 [W, N] or None: the tokens of each window; every token of an image in exactly one. So windows are
            shifted and partitioned by reading. None: one window of all tokens, N = T.
        out_scale: scalar, positive; None (default) for a float32 result.
        out_zero: scalar, a whole number in [0, 2^out_bits - 1]; given if out_scale is.
        out_bits: 2 to 8.
        head_scale: float [heads], positive, or None: a factor of each head's scores, as cosine attention learns it.

    Returns:
        [B, T, heads * D], float32 or with out_scale uint8.

    Raises:
        TypeError: a tensor has a dtype that it may not have.
        ValueError: shapes, devices or values do not fit; or a gradient is wanted of a float result.

    Source: the online softmax's unnormalised form (arXiv 2205.14135), with its exponentials rounded as in arXiv 2410.02367.
    """
    checks.dense("qkv", qkv)
    if qkv.dtype != torch.uint8:
        raise TypeError(f"qkv had dtype {qkv.dtype}; it must be uint8")
    checks.bits("out_bits", out_bits)
    checks.integer("heads", heads)
    if not math.isfinite(scale):
        raise ValueError(f"scale was {scale}; it must be a finite number")
    checks.same_device(qkv=qkv, bias=bias, mask=mask, index=index, head_scale=head_scale)
    if heads < 1 or qkv.dim() != 3 or qkv.shape[2] % (3 * max(heads, 1)) or qkv.shape[2] == 0:
        raise ValueError(f"qkv had shape {tuple(qkv.shape)}; with {heads} heads it must be [B, T, 3 * {heads} * D]")
    check_windows("bias", heads, qkv.shape[1], bias, mask, index)
    grids = checks.grids_of_heads(in_scale, in_zero, qkv, 255)
    if (out_scale is None) != (out_zero is None):
        raise ValueError(f"out_zero was {out_zero!r}; it must be given if out_scale is, and only then")
    outs: list[Any] = [None, None]
    if out_scale is not None and out_zero is not None:
        outs = [checks.scalar("out_scale", out_scale, qkv), checks.scalar("out_zero", out_zero, qkv)]
        checks.positive("out_scale", outs[0])
        checks.whole("out_zero", outs[1], (1 << out_bits) - 1)
    else:
        checks.no_gradient("quant_attention", bias=bias, mask=mask, head_scale=head_scale)
    floats = [None if tensor is None else tensor.detach().float() for tensor in (bias, mask)]
    if head_scale is not None:
        if head_scale.shape != (heads,):
            raise ValueError(f"head_scale had shape {tuple(head_scale.shape)}; it must be [{heads}]")
        head_scale = checks.parameter("head_scale", head_scale.detach(), qkv)
        checks.positive("head_scale", head_scale)
    return forward(qkv, heads, *grids, float(scale), *floats, index, *outs, out_bits, head_scale)


def check_windows(
    bias_name: str,
    heads: int,
    image: int,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    index: torch.Tensor | None,
) -> None:
    """TypeError or ValueError unless these fit an attention of images of so many tokens."""
    windows, tokens = 1, image
    if index is not None:
        if index.dtype != torch.int32:
            raise TypeError(f"index had dtype {index.dtype}; it must be int32")
        if index.dim() != 2 or index.numel() != image:
            raise ValueError(f"index had shape {tuple(index.shape)}; it must be [W, N] with W * N = {image}")
        windows, tokens = index.shape
        _check_permutation(index)
    for name, tensor, first in ((bias_name, bias, heads), ("mask", mask, windows)):
        if tensor is None:
            continue
        checks.floating(name, tensor)
        if tensor.shape != (first, tokens, tokens):
            raise ValueError(f"{name} had shape {tuple(tensor.shape)}; it must be [{first}, {tokens}, {tokens}]")
        _check_addend(name, tensor)


def _check_permutation(index: torch.Tensor) -> None:
    """ValueError unless every token is in one window; like `checks.finite`, on CPUs only."""
    if not checks.readable(index):
        return
    if not torch.equal(index.flatten().sort().values.long(), torch.arange(index.numel(), device=index.device)):
        raise ValueError(f"index must hold every token from 0 to {index.numel() - 1} exactly once")


def _check_addend(name: str, tensor: torch.Tensor) -> None:
    """ValueError unless what is added to scores leaves each query a key; like `checks.finite`, on CPUs only."""
    if not checks.readable(tensor) or not tensor.numel():
        return
    most = tensor.detach().amax(dim=-1)
    if bool(torch.isfinite(most).all()):  # NaN is the most of a row that holds it
        return
    if bool((most == -float("inf")).any()):
        raise ValueError(f"{name} was -inf for all keys of a query; every query must see a key")
    raise ValueError(f"{name} held NaN or Inf; every value must be finite, or -inf to hide a key")


def _supports(qkv: torch.Tensor, heads: int, in_scale: torch.Tensor, *_: Any) -> Verdict:
    return not_float64(in_scale)


def _supports_cuda(
    qkv: torch.Tensor, heads: int, in_scale: torch.Tensor, in_zero: torch.Tensor, scale: float,
    bias: torch.Tensor | None, mask: torch.Tensor | None, index: torch.Tensor | None, *_: Any,
) -> Verdict:  # fmt: skip
    tokens, depth = (qkv if index is None else index).shape[1], qkv.shape[2] // 3 // heads
    if depth % _CHUNK or depth > _DEEPEST_CUDA:
        return False, f"a head had {depth} channels; the CUDA kernel takes multiples of {_CHUNK} up to {_DEEPEST_CUDA}"
    width = -(-depth // 32) * 32
    keys = 224 if width == 64 and 64 < tokens <= 208 else -(-tokens // 64) * 64
    needed, there = keys * (2 * width + 4) + 32 + 16 * width, _shared_memory(qkv.device)  # with one warp
    if needed > there:
        return (
            False,
            f"a window had {tokens} tokens; their keys and values take {needed} bytes of shared memory of {there}",
        )
    if not scale > 0:
        return False, f"scale was {scale:g}; the CUDA kernel looks for the greatest sum, which needs a positive one"
    return _supports(qkv, heads, in_scale)


def _supports_triton(
    qkv: torch.Tensor, heads: int, in_scale: torch.Tensor, in_zero: torch.Tensor, scale: float,
    bias: torch.Tensor | None, mask: torch.Tensor | None, index: torch.Tensor | None, *_: Any,
) -> Verdict:  # fmt: skip
    tokens, depth = (qkv if index is None else index).shape[1], qkv.shape[2] // 3 // heads
    if tokens > _MOST_TOKENS:
        return False, f"a window had {tokens} tokens; their sums fit in int32 up to {_MOST_TOKENS}"
    if depth > _DEEPEST:
        return False, f"a head had {depth} channels; a Triton program holds up to {_DEEPEST}"
    return _supports(qkv, heads, in_scale)


_MOST_TOKENS = ((1 << 31) - 1) // (255 * 255)
_DEEPEST = 256
_CHUNK = 16
_DEEPEST_CUDA = 128


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def _fake(
    qkv: torch.Tensor, heads: int, in_scale: torch.Tensor, in_zero: torch.Tensor, scale: float,
    bias: torch.Tensor | None, mask: torch.Tensor | None, index: torch.Tensor | None, out_scale: torch.Tensor | None, *_: Any,
) -> torch.Tensor:  # fmt: skip
    shape = (*qkv.shape[:2], qkv.shape[2] // 3)
    return qkv.new_empty(shape, dtype=in_scale.dtype if out_scale is None else torch.uint8)


forward = Operator(
    "quant_attention(Tensor qkv, int heads, Tensor in_scale, Tensor in_zero, float scale, Tensor? bias, Tensor? mask, "
    "Tensor? index, Tensor? out_scale, Tensor? out_zero, int out_bits, Tensor? head_scale=None) -> Tensor",
    fake=_fake,
    backends=[
        compiled("quant_attention", "cuda", _supports_cuda),
        in_triton("quant_attention", __package__, _supports_triton),
        compiled("quant_attention", "cpu", _supports),
        Backend("reference", reference.quant_attention, anything),
    ],
)
