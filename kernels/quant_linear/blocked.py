"""The weights of `quant_linear` in the order that the CPU kernels read: `block_weight`. Plain torch: once for each layer.

A block is 16 outputs, one row of int32: their 16 sums of integers, then the integers, K padded with zeros to whole chunks
of 64. A chunk is 16 vectors of 64 bytes; vector i holds weights 4i to 4i + 3 of output 0, then of output 1, ... 15: what
one AMX tile, or one AVX-512 VNNI operand, takes. In 8 bits a chunk is these vectors. In 4 bits it is 8 vectors, vector i
with q + 8 of the vectors 2i (low half of each byte) and 2i + 1. In 3 bits it is 6: q + 4 is split into its low two bits,
four vectors in a vector of bit pairs, and its high bit, eight vectors in a vector; earlier ones in lower bits. Other widths
are stored in the next of 3, 4 and 8 bits. `csrc/include/dfqvit/quant_linear.h` reads this layout.
"""

from __future__ import annotations

import torch

from .. import checks
from ..pack_weight import unpack_weight

OUTPUTS = 16  # of a block
DEPTH = 64  # of a chunk


def stored_bits(w_bits: int) -> int:
    """The width in which weights of `w_bits` bits stand in blocks."""
    return 3 if w_bits <= 3 else 4 if w_bits == 4 else 8


def blocked_shape(out_features: int, in_features: int, w_bits: int) -> tuple[int, int]:
    """The shape of the blocked form of a weight [out_features, in_features]."""
    depth = -(-in_features // DEPTH) * DEPTH
    return -(-out_features // OUTPUTS), OUTPUTS + depth * OUTPUTS * stored_bits(w_bits) // 32


def block_weight(packed: torch.Tensor, in_features: int, w_bits: int) -> torch.Tensor:
    """Rearranges a packed weight into the form that `quant_linear` runs fastest with on a CPU.

    Args:
        packed: uint8 [out_features, ceil(in_features / 8) * w_bits], from `pack_weight`.
        in_features: K.
        w_bits: 2 to 8.

    Returns:
        int32 [ceil(out_features / 16), 16 + ceil(in_features / 64) * 32 * s], with s = 3, 4 or 8 for w_bits up to 3, 4
        and 8. Outputs beyond out_features are zero.

    Raises:
        TypeError: packed is not uint8.
        ValueError: its row length does not fit in_features and w_bits.
    """
    q = unpack_weight(packed, w_bits, in_features)
    blocks, row = blocked_shape(q.shape[0], in_features, w_bits)
    chunks = -(-in_features // DEPTH)
    padded = q.new_zeros(blocks * OUTPUTS, chunks * DEPTH)
    padded[: q.shape[0], :in_features] = q
    sums = padded.sum(1, dtype=torch.int32).view(blocks, OUTPUTS)
    vectors = padded.view(blocks, OUTPUTS, chunks, 16, 4).permute(0, 2, 3, 1, 4).reshape(blocks, chunks, 16, 64)
    bits = stored_bits(w_bits)
    if bits == 8:
        values = vectors.view(torch.uint8)
    elif bits == 4:
        values = _join(vectors + 8, 4)
    else:
        values = torch.cat([_join((vectors + 4) & 3, 2), _join((vectors + 4) >> 2, 1)], 2)
    result = torch.empty(blocks, row, dtype=torch.int32, device=packed.device)
    result[:, :OUTPUTS] = sums
    result.view(torch.uint8)[:, 4 * OUTPUTS :] = values.flatten(1)
    return result


def weight_sums(packed: torch.Tensor, in_features: int, w_bits: int) -> torch.Tensor:
    """The sums of a packed weight's rows of integers, which `quant_linear` takes as `w_sums`.

    Args:
        packed: uint8 [out_features, ceil(in_features / 8) * w_bits], from `pack_weight`.
        in_features: K.
        w_bits: 2 to 8.

    Returns:
        int32 [out_features].

    Raises:
        TypeError: packed is not uint8.
        ValueError: its row length does not fit in_features and w_bits.
    """
    return unpack_weight(packed, w_bits, in_features).sum(1, dtype=torch.int32)


def unblock_weight(blocked: torch.Tensor, in_features: int, w_bits: int) -> torch.Tensor:
    """The inverse of `block_weight`'s rearrangement.

    Args:
        blocked: int32 [blocks, row], from `block_weight`.
        in_features: K.
        w_bits: 2 to 8.

    Returns:
        int8 [16 * blocks, in_features]; the rows beyond the layer's outputs are zero.

    Raises:
        TypeError: blocked is not int32.
        ValueError: its row length does not fit in_features and w_bits.
    """
    checks.bits("w_bits", w_bits)
    if blocked.dtype != torch.int32:
        raise TypeError(f"blocked had dtype {blocked.dtype}; it must be int32")
    row = blocked_shape(1, in_features, w_bits)[1]
    if blocked.dim() != 2 or blocked.shape[1] != row:
        raise ValueError(
            f"blocked had shape {tuple(blocked.shape)}; blocks of {in_features} weights of {w_bits} bits are rows of {row}"
        )
    blocks, chunks, bits = blocked.shape[0], -(-in_features // DEPTH), stored_bits(w_bits)
    values = blocked.contiguous().view(torch.uint8)[:, 4 * OUTPUTS :].reshape(blocks, chunks, 2 * bits, 64)
    if bits == 8:
        vectors = values.view(torch.int8)
    elif bits == 4:
        vectors = _split(values, 4) - 8
    else:
        vectors = _split(values[:, :, :4], 2) + 4 * _split(values[:, :, 4:], 1) - 4
    ordered = vectors.view(blocks, chunks, 16, OUTPUTS, 4).permute(0, 3, 1, 2, 4)
    return ordered.reshape(blocks * OUTPUTS, chunks * DEPTH)[:, :in_features]


def _join(vectors: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., 16, 64] fields of `bits` bits, int8, to [..., 2 * bits, 64] bytes."""
    fields = vectors.unflatten(-2, (2 * bits, 8 // bits)).to(torch.int32)
    shifts = (torch.arange(8 // bits, device=vectors.device) * bits).view(-1, 1)
    return (fields << shifts).sum(-2).to(torch.uint8)


def _split(joined: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_join`."""
    shifts = (torch.arange(8 // bits, device=joined.device) * bits).view(-1, 1)
    fields = (joined.to(torch.int32).unsqueeze(-2) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(-3, -2).to(torch.int8)
