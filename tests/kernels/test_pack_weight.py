"""Packed weights against Python's own big integers."""

from __future__ import annotations

import pytest
import torch

from dfqvit.kernels import pack_weight, unpack_weight
from dfqvit.kernels.pack_weight.op import pack_integers, packed_row_bytes

from ..conftest import mirrored


def bits_of_row(values, bits):
    """The row as bytes: groups of eight values, each group one little-endian integer of 8 * bits bits."""
    result = b""
    for start in range(0, len(values), 8):
        word = 0
        for position, value in enumerate(values[start : start + 8]):
            word |= (value & ((1 << bits) - 1)) << (position * bits)
        result += word.to_bytes(bits, "little")
    return list(result)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 64])
def test_layout_and_round_trip(seed, bits, columns):
    q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (5, columns), dtype=torch.int8)
    q[0] = -(1 << bits - 1)
    q[1] = (1 << bits - 1) - 1
    packed = pack_integers(q, bits)
    assert packed.shape == (5, packed_row_bytes(columns, bits))
    assert packed.tolist() == [bits_of_row(row, bits) for row in q.tolist()]
    assert torch.equal(unpack_weight(packed, bits, columns), q)


def test_sizes_are_what_the_bit_width_says():
    assert packed_row_bytes(192, 4) == 96  # two to a byte
    assert packed_row_bytes(192, 3) == 72  # eight in three bytes
    assert packed_row_bytes(192, 8) == 192


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantizes_half_to_even_and_clamps(seed, bits):
    w = torch.randn(6, 21)
    scale = mirrored(w.abs().amax(1) / ((2**bits - 1) / 2) * 0.7)  # 0.7: some values clamp
    found = unpack_weight(pack_weight(w, scale, bits), bits, 21)
    for row in range(6):
        for column in range(21):
            expected = round(float((w[row, column] / scale[row]).item()))
            expected = max(-(1 << bits - 1), min((1 << bits - 1) - 1, expected))
            assert found[row, column] == expected


def test_no_columns_and_no_rows():
    assert pack_weight(torch.zeros(0, 9), torch.ones(1), 4).shape == (0, 8)
    assert unpack_weight(pack_weight(torch.zeros(3, 0), torch.ones(1), 4), 4, 0).shape == (3, 0)


@pytest.mark.parametrize(
    ("w", "scale", "bits", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2), 1, "bits was 1; it may be a whole number from 2 to 8"),
        (torch.zeros(2, 3), torch.ones(2), 9, "bits was 9"),
        (torch.zeros(2, 3), torch.ones(3), 4, "scale had 3 values; it must have 1 or 2"),
        (torch.zeros(6), torch.ones(1), 4, "w had shape"),
        (torch.full((2, 3), float("nan")), torch.ones(2), 4, "w held NaN or Inf"),
        (torch.zeros(2, 3), torch.zeros(2), 4, "scale held 0; no scale of a weight may be 0"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), 4, "w had dtype torch.int8"),
    ],
)
def test_bad_input(w, scale, bits, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pack_weight(w, scale, bits)


def test_bad_packed_input():
    with pytest.raises(TypeError, match="packed had dtype"):
        unpack_weight(torch.zeros(2, 4), 4, 8)
    with pytest.raises(ValueError, match="9 weights of 4 bits take rows of 8 bytes"):
        unpack_weight(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)
