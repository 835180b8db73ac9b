"""Weights of 2 to 8 bits in memory: `pack_weight`, `unpack_weight`. Plain torch: it runs once for each layer.

Layout: a row is a sequence of groups of eight values, and a group is `bits` bytes: value i of the group stands in bits
`[i * bits, (i + 1) * bits)` of the group read as a little-endian integer, in two's complement. So 8-bit weights are plain
int8, 4-bit weights are two to a byte (the even one low), and eight 3-bit weights fill three bytes. Rows are padded with
zeros to a whole group.
"""

from __future__ import annotations

import torch

from .. import checks

_GROUP = 8


def integers_of(bits: int) -> range:
    """What a weight of `bits` bits may be, ascending: all of two's complement."""
    return range(-(1 << (bits - 1)), 1 << (bits - 1))


def packed_row_bytes(in_features: int, bits: int) -> int:
    """Bytes that one row of `in_features` weights takes."""
    return -(-in_features // _GROUP) * bits


def pack_weight(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantizes and packs a weight matrix: `q = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)`, half to even.

    Args:
        w: [out_features, in_features], float.
        scale: [out_features] or a scalar, not 0; a negative one mirrors its row's grid.
        bits: 2 to 8.

    Returns:
        uint8 [out_features, ceil(in_features / 8) * bits], the weight that `quant_linear` takes in place of a float one.

    Raises:
        TypeError: w is not a float tensor.
        ValueError: w is not a matrix or holds NaN or Inf, scale does not fit, or bits is outside 2..8.
    """
    checks.floating("w", w)
    checks.bits("bits", bits)
    if w.dim() != 2:
        raise ValueError(f"w had shape {tuple(w.shape)}; it must be [out_features, in_features]")
    checks.finite("w", w)
    scale = checks.parameter("scale", scale, w)
    if scale.numel() not in (1, w.shape[0]):
        raise ValueError(f"scale had {scale.numel()} values; it must have 1 or {w.shape[0]}, one for each row of w")
    checks.nonzero("scale", scale)
    return pack_integers(round_nearest(w, scale, bits), bits)


def round_nearest(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [rows, columns]: the integers of `pack_weight`, unpacked."""
    integers = integers_of(bits)
    q = (w.to(scale.dtype) / scale.reshape(-1, 1)).round().clamp(integers[0], integers[-1])
    return q.to(torch.int8)


def pack_integers(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs int8 [rows, columns] whose values fit in `bits` bits; see `pack_weight` for the result."""
    rows, columns = q.shape
    groups = -(-columns // _GROUP)
    padded = torch.zeros(rows, groups * _GROUP, dtype=torch.int64, device=q.device)
    padded[:, :columns] = q
    fields = (padded & ((1 << bits) - 1)).view(rows, groups, _GROUP)
    shifts = torch.arange(_GROUP, device=q.device) * bits
    words = (fields << shifts).sum(-1, keepdim=True)  # the fields do not overlap, so the sum is their union
    packed = (words >> (torch.arange(bits, device=q.device) * 8)) & 255
    return packed.to(torch.uint8).view(rows, groups * bits)


def unpack_weight(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """The inverse of `pack_weight`'s packing.

    Args:
        packed: uint8 [out_features, ceil(in_features / 8) * bits].
        bits: 2 to 8.
        in_features: columns of the result.

    Returns:
        int8 [out_features, in_features].

    Raises:
        TypeError: packed is not uint8.
        ValueError: its row length does not fit in_features and bits.
    """
    checks.bits("bits", bits)
    checks.integer("in_features", in_features)
    checks.dense("packed", packed)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed had dtype {packed.dtype}; it must be uint8")
    if packed.dim() != 2 or packed.shape[1] != packed_row_bytes(in_features, bits):
        raise ValueError(
            f"packed had shape {tuple(packed.shape)}; {in_features} weights of {bits} bits "
            f"take rows of {packed_row_bytes(in_features, bits)} bytes"
        )
    rows, groups = packed.shape[0], packed.shape[1] // bits
    fields = packed.view(rows, groups, bits).to(torch.int64)
    words = (fields << (torch.arange(bits, device=packed.device) * 8)).sum(-1, keepdim=True)
    values = (words >> (torch.arange(_GROUP, device=packed.device) * bits)) & ((1 << bits) - 1)
    sign = 1 << (bits - 1)
    return ((values ^ sign) - sign).to(torch.int8).view(rows, groups * _GROUP)[:, :in_features]
