"""Settings of a quantized model: what stands for a whole number."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dfqvit.errors import UsageError
from dfqvit.quantization.recipe import Recipe


def test_numpys_whole_numbers_are_bits():
    """Found here: "w_bits was np.int64(4); it may be a whole number from 2 to 8"."""
    bits = np.array([3, 5, 6, 7])
    found = Recipe(bits[0], bits[1], edge_bits=bits[2], softmax_bits=bits[3], layer_bits={"head": np.int8(4)})
    assert found == Recipe(3, 5, edge_bits=6, softmax_bits=7, layer_bits={"head": 4})
    assert json.loads(json.dumps(vars(found)))["layer_bits"] == {"head": 4}


@pytest.mark.parametrize("bits", [np.int64(9), np.float64(4), np.bool_(True), "4", None])
def test_others_are_not(bits):
    with pytest.raises(UsageError, match=r"w_bits was .*; it may be a whole number from 2 to 8"):
        Recipe(bits)
