"""quantize_heads on every backend and CPU path: timm's rotation, and numpy's rounding in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

from dfqvit.kernels import quantize_heads, use_backend

from ..conftest import DTYPES

# batch, heads, tokens, depth, rotated tokens, heads of the rotation (0: none, 1: shared)
CASES = [
    (2, 3, 17, 64, 16, 1),
    (1, 2, 9, 32, 9, 2),
    (3, 4, 5, 8, 0, 0),
    (1, 1, 1, 2, 1, 1),
    (2, 2, 7, 10, 3, 1),
    (1, 2, 6, 5, 0, 0),
    (0, 2, 4, 8, 4, 1),
    (1, 6, 201, 64, 196, 1),
]


def sample(case, dtype=torch.float32, packed=True):
    """(q, k, v, options): cut from one tensor, as timm's qkv layer gives them, or apart."""
    batch, heads, tokens, depth, rotated, shared = case
    if packed:
        q, k, v = torch.randn(batch, tokens, 3, heads, depth).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (torch.randn(batch, heads, depth, tokens).to(dtype).mT for _ in range(3))
    options = {"in_scale": torch.rand(3) * 0.02 + 0.01, "in_zero": torch.randint(0, 256, (3,)).float()}
    if shared:
        angles = torch.rand(*((heads,) if shared > 1 else ()), rotated, depth) * 7
        options["rope"] = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return q, k, v, options


def turned(part, rope, half):
    """By timm, in float64."""
    if rope is None:
        return part.double()
    prefix = part.shape[2] - rope.shape[-2]
    last = apply_rot_embed_cat(part[:, :, prefix:].double(), rope.double(), half=half)
    return torch.cat([part[:, :, :prefix].double(), last], dim=2)


def oracle(q, k, v, in_scale, in_zero, rope=None, half=False, bits=8):
    """(integers, how far each lies from the middle between two)."""
    values = torch.stack([turned(q, rope, half), turned(k, rope, half), v.double()], dim=0)
    ratio = (values / in_scale.double().view(3, 1, 1, 1, 1)).numpy()
    whole = np.clip(np.rint(ratio) + in_zero.numpy().reshape(3, 1, 1, 1, 1), 0, 2**bits - 1)
    margin = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5)
    return tuple(torch.from_numpy(each).permute(1, 3, 0, 2, 4).flatten(2) for each in (whole, margin))


def check(found, q, k, v, options, half, bits):
    expected, margin = oracle(q, k, v, **options, half=half, bits=bits)
    assert found.dtype == torch.uint8
    assert found.shape == expected.shape
    assert bool((margin[found.double() != expected] < 1e-3).all())
    assert bool(((found.double() - expected).abs() <= 1).all())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_matches_timm_and_numpy_but_for_ties(seed, isa, backend, case, dtype, half, packed):
    q, k, v, options = sample(case, dtype, packed)
    bits = 4 if half else 8
    options["in_zero"] = options["in_zero"] % 2**bits
    with use_backend(backend):
        found = quantize_heads(q, k, v, **options, half=half, bits=bits)
    check(found, q, k, v, options, half, bits)


@pytest.mark.parametrize("half", [False, True])
def test_all_paths_give_the_references_bits(seed, isa, half):
    q, k, v, options = sample((2, 3, 19, 36, 12, 3))
    options["in_scale"][1] = 1e-30  # which no reciprocal serves
    with use_backend("cpu"):
        found = quantize_heads(q, k, v, **options, half=half)
    with use_backend("reference"):
        assert torch.equal(found, quantize_heads(q, k, v, **options, half=half))


def test_operator_contract(seed):
    q, k, v, options = sample((2, 2, 5, 8, 4, 1))
    fixed = (q, k, v, options["in_scale"], options["in_zero"], 8)
    torch.library.opcheck(torch.ops.dfqvit.quantize_heads.default, (*fixed, options["rope"], True))
    torch.library.opcheck(torch.ops.dfqvit.quantize_heads.default, (*fixed, None, False))


def test_bad_input(seed):
    q, k, v, options = sample((2, 2, 5, 8, 4, 1))
    for change, error, message in (
        ({"q": q.byte()}, TypeError, r"q had dtype torch.uint8; it may be float32"),
        ({"q": q[0]}, ValueError, r"q had shape \(2, 5, 8\); it must be \[B, heads, N, D\]"),
        ({"k": k[:, :, :4]}, ValueError, r"k had shape \(2, 2, 4, 8\); it must be that of q, \[2, 2, 5, 8\]"),
        ({"v": v.double()}, TypeError, r"v had dtype torch.float64; it must be that of q, torch.float32"),
        ({"rope": options["rope"][:, :8]}, ValueError, r"rope had shape \(4, 8\); it must be \[R, 16\]"),
        ({"rope": torch.ones(6, 16)}, ValueError, r"rope had shape \(6, 16\); it must be \[R, 16\] .* R up to 5"),
        ({"rope": torch.ones(3, 4, 16)}, ValueError, r"rope had shape \(3, 4, 16\); it must be .* \[2, R, 16\]"),
        ({"in_scale": torch.ones(2)}, ValueError, r"in_scale had shape \(2,\); it must be \[3\], for q, k and v"),
        ({"in_scale": -torch.ones(3)}, ValueError, r"in_scale held -1; every scale must be greater than 0"),
        ({"in_zero": torch.full((3,), 16.0), "bits": 4}, ValueError, r"in_zero held 16; it must be a whole number"),
        ({"bits": 9}, ValueError, r"bits was 9"),
    ):
        arguments = {"q": q, "k": k, "v": v, **options, **change}
        with pytest.raises(error, match=message):
            quantize_heads(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    odd = torch.randn(1, 2, 5, 7)
    with pytest.raises(ValueError, match=r"rope was given and a head had 7 channels"):
        quantize_heads(odd, odd, odd, **{**options, "rope": torch.ones(4, 14)})


def test_values_that_are_not_finite_are_refused(seed, isa):
    q, k, v, options = sample((2, 2, 5, 8, 4, 1))
    for part in (q, k, v):
        before = part[1, 1, 3, 2].clone()
        part[1, 1, 3, 2] = float("nan")
        with use_backend("cpu"), pytest.raises(ValueError, match="q, k, v or rope held NaN or Inf"):
            quantize_heads(q, k, v, **options)
        part[1, 1, 3, 2] = before
