"""The integers that a weight of few bits may be: evenly spaced, or closer together where most weights are.

Small weights are many and large ones few, so at 2 to 4 bits evenly spaced integers leave most of the error where the weights are.
`NONUNIFORM` has the integers of least squared error for a density `exp(-|x|^1.5 / 1.5)`, halfway between a normal and a Laplace
distribution, 0 being one of them, found by Lloyd's algorithm and rounded to 7 bits. As in two's complement there is one more below
0 than above, and the sign of a row's scale turns that side to where the row needs it. They are the same for every layer and model.

A weight of them is multiplied as one of `PACKED` bits. A file holds its place among the levels, in its own bits.

Sources: S. Lloyd, Least squares quantization in PCM, 1982; QLoRA's NF4 (arXiv 2305.14314) has floats in place of integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.pack_weight import integers_of, pack_integers, unpack_weight

LEVELS = ("uniform", "nonuniform")
PACKED = 7
NONUNIFORM = {
    2: (-63, -26, 0, 43),
    3: (-63, -39, -24, -11, 0, 14, 31, 56),
    4: (-63, -46, -36, -28, -21, -15, -10, -5, 0, 5, 11, 17, 24, 32, 43, 60),
}


def levels_of(kind: str, bits: int) -> torch.Tensor:
    """int8 [2^bits], ascending, on the CPU: what a weight of `bits` bits may be, by an entry of `LEVELS`; beyond 4 bits uniform."""
    return torch.tensor(_levels(kind, bits), dtype=torch.int8, device="cpu")


def reach_of(kind: str, bits: int) -> float:
    """How far the levels reach from the middle between the least and the greatest of them."""
    levels = _levels(kind, bits)
    return (levels[-1] - levels[0]) / 2


def _levels(kind: str, bits: int) -> Sequence[int]:
    return NONUNIFORM[bits] if spaced_unevenly(kind, bits) else integers_of(bits)


def spaced_unevenly(kind: str, bits: int) -> bool:
    """Whether these are other integers than all of `bits` bits."""
    return kind == "nonuniform" and bits in NONUNIFORM


def packed_bits(kind: str, bits: int) -> int:
    """In which the integers are packed for the kernels."""
    return PACKED if spaced_unevenly(kind, bits) else bits


def narrowed(packed: torch.Tensor, levels: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """A weight of uneven levels, packed for the kernels, as a file holds it.

    Returns:
        uint8 [out_features, ceil(in_features / 8) * bits]: the places among the levels, counted from the middle.

    Raises:
        ValueError: an integer is none of the levels.
    """
    integers = unpack_weight(packed, PACKED, in_features)
    levels = levels.to(packed.device)
    places = torch.searchsorted(levels, integers.contiguous()).clamp_max(len(levels) - 1)
    if not torch.equal(levels[places], integers):
        raise ValueError(f"the weight held integers other than its {len(levels)} levels")
    return pack_integers(places - (1 << (bits - 1)), bits)


def widened(stored: torch.Tensor, levels: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """The inverse of `narrowed`."""
    places = unpack_weight(stored, bits, in_features).long() + (1 << (bits - 1))
    return pack_integers(levels.to(stored.device)[places], PACKED)
