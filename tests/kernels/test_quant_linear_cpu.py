"""quant_linear's compiled CPU paths against the reference: the same bits, for every path, shape, width and dtype."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dfqvit.kernels import (
    BackendError,
    BackendFallbackWarning,
    block_weight,
    extension,
    pack_weight,
    quant_linear,
    use_backend,
)

from ..conftest import ACTIVATIONS, FUSING, each_path, mirrored, threads

pytestmark = pytest.mark.skipif(extension.load()[0] is None, reason=extension.load()[1])

IDENTITY = {"x_scale": 1.0, "x_zero": 0, "w_scale": torch.ones(1), "a_bits": 8, "w_bits": 8}


def both(*args, **kwargs):
    """The result of the compiled path in use, over poisoned memory, and that of the reference."""
    with use_backend("reference"):
        expected = quant_linear(*args, **kwargs)
    for _ in range(2):  # memory freed here is likely to be the result's
        torch.empty_like(expected).view(torch.uint8).fill_(0xAB)
    with use_backend("cpu"):
        return quant_linear(*args, **kwargs), expected


def random_call(rng, rows, outputs, depth):
    """Arguments of a call in which everything is drawn at random."""
    a_bits, w_bits, out_bits = (rng.randint(2, 8) for _ in range(3))
    steps = (1 << a_bits) - 1
    x = torch.randn(rows, depth) * 2
    weight = torch.randn(outputs, depth)
    w_scale = mirrored(weight.abs().amax(1) / (((1 << w_bits) - 1) / 2) * 0.8 + 1e-3)
    p = {"x_scale": 8 / steps, "x_zero": rng.choice([0, steps, steps // 2]), "a_bits": a_bits, "w_bits": w_bits}
    p["w_scale"] = w_scale
    kind = rng.choice(["float32", "bfloat16", "float16", "integers", "strided"])
    if kind == "integers":
        x = torch.randint(0, steps + 1, (rows, depth), dtype=torch.uint8)
    elif kind == "strided":
        x = torch.randn(depth, rows).t() * 2
    else:
        x = x.to(getattr(torch, kind))
    if (form := rng.choice(["float", "packed", "blocked"])) != "float":
        weight = pack_weight(weight, w_scale, w_bits)
    if form == "blocked":
        weight = block_weight(weight, depth, w_bits)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    bias = rng.choice([None, torch.randn(outputs)])
    tokens = rng.choice([t for t in range(1, rows + 1) if rows % t == 0])
    acm = rng.choice([None, torch.randn(tokens, outputs).to(dtype)])
    p["residual"] = rng.choice([None, torch.randn(rows, outputs).to(dtype)])
    if rng.random() < 0.5:
        p |= {"out_scale": torch.rand(outputs) * 0.2 + 0.01, "out_bits": out_bits}
        p["out_zero"] = rng.choice([0, (1 << out_bits) - 1, (1 << out_bits) // 2])
    else:
        p["out_dtype"] = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    return (x, weight, bias, acm), p


@pytest.mark.parametrize(
    "most", [(1, 1, 5000), (9, 9, 5000), (70, 90, 300), (300, 40, 70), (20, 3000, 20), (3000, 9, 9)]
)
def test_same_bits_as_the_reference(seed, isa, most):
    rng = random.Random(seed)
    for _ in range(12):
        rows, outputs, depth = (rng.randint(1, n) for n in most)
        arguments, p = random_call(rng, rows, outputs, depth)
        found, expected = both(*arguments, **p)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), (rows, outputs, depth, arguments[0].dtype, arguments[1].dtype, p)


@pytest.mark.parametrize(("images", "tokens"), [(1, 70), (90, 1), (70, 2), (40, 5), (2, 33), (9, 49), (16, 197)])
def test_tiles_in_the_order_of_their_tokens(seed, isa, images, tokens):
    """Many images, so that tiles are not computed in the order of their rows; by one thread and by several."""
    rng = random.Random(seed)
    for count in (1, 2, 3):
        arguments, p = random_call(rng, images * tokens, 37, 67)
        acm = torch.randn(tokens, 37)
        with threads(count):
            found, expected = both(*arguments[:3], acm, **p)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49])
@pytest.mark.parametrize("outputs", [1, 16, 17, 48])
def test_edges_of_the_tiles(seed, isa, rows, outputs):
    for depth in (1, 63, 64, 65, 128):
        arguments, p = random_call(random.Random(seed), rows, outputs, depth)
        found, expected = both(*arguments, **p)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [40, 700])
def test_any_number_of_threads_gives_the_same_bits(seed, rows, count):
    x, p = (
        torch.randn(rows, 100),
        {**IDENTITY, "x_scale": 0.03, "w_scale": torch.rand(70) + 0.1, "x_zero": 128, "w_bits": 4},
    )
    weight = block_weight(pack_weight(torch.randn(70, 100) * 3, p["w_scale"], 4), 100, 4)
    with threads(count):
        found, expected = both(x, weight, None, torch.randn(rows // 20, 70), **p)
    assert torch.equal(found, expected)


def test_calls_from_several_threads_at_once(seed, isa):
    calls = [random_call(random.Random(seed + i), 50 + 7 * i, 40, 130) for i in range(16)]
    with use_backend("reference"):
        expected = [quant_linear(*arguments, **p) for arguments, p in calls]
    with use_backend("cpu"), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: quant_linear(*call[0], **call[1]), calls))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_large_results_are_written_past_the_caches(seed, isa):
    """From 8 MB on, if every row starts at a multiple of 64 bytes."""
    for outputs in (512, 510):
        x, weight = torch.randn(4200, 3), torch.randn(outputs, 3)
        found, expected = both(
            x, weight, **IDENTITY | {"x_scale": 0.03, "x_zero": 128, "w_scale": torch.full((outputs,), 0.02)}
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("x_zero", [0, 255])
def test_sums_up_to_the_limit_of_int32(isa, x_zero):
    depth = 65793  # 65793 * 255 * 128 is just below 2^31
    x = torch.full((2, depth), 0 if x_zero else 255, dtype=torch.uint8)
    x[1, ::3] = 77
    weight = torch.full((2, depth), -128.0)
    weight[1] = 127.0
    found, expected = both(x, weight, **{**IDENTITY, "w_scale": torch.ones(2), "x_zero": x_zero})
    assert torch.equal(found, expected)
    assert abs(float(found[0, 0])) > 0.99 * 2**31


@pytest.mark.parametrize("w_bits", range(2, 9))
def test_the_greatest_values_and_weights_of_each_width(seed, isa, w_bits):
    """Where paths that add in 16 bits come nearest to their limit; exact, since all sums are integers below 2^24."""
    least, most = -(1 << (w_bits - 1)), (1 << (w_bits - 1)) - 1
    for depth in (1, 31, 32, 33, 511, 513):
        x = torch.full((7, depth), 255, dtype=torch.uint8)
        x[3:] = torch.randint(0, 256, (4, depth), dtype=torch.uint8)
        weight = torch.full((18, depth), float(least))
        weight[6:12] = most
        weight[12:] = torch.randint(least, most + 1, (6, depth)).float()
        packed = block_weight(pack_weight(weight, torch.ones(18), w_bits), depth, w_bits)
        with use_backend("cpu"):
            found = quant_linear(x, packed, **{**IDENTITY, "w_bits": w_bits, "w_scale": torch.ones(18)})
        assert torch.equal(found.double(), x.double() @ weight.double().T), depth


def test_sums_beyond_int32_are_left_to_the_reference():
    x, weight = torch.full((1, 65794), 255, dtype=torch.uint8), torch.full((1, 65794), -128.0)
    with pytest.warns(BackendFallbackWarning, match="sums of 65794 products of 8 and 8 bits do not fit in int32"):
        found = quant_linear(x, weight, out_dtype=torch.float32, **IDENTITY)
    assert float(found) == -255.0 * 128 * 65794
    with use_backend("cpu"), pytest.raises(BackendError, match="do not fit in int32"):
        quant_linear(x, weight, **IDENTITY)


def around_ties(scale):
    """Values whose quotient by `scale` lies at, just below and just above k + 1/2."""
    ties = (torch.arange(-300, 300).double() + 0.5) * float(scale)
    middle = ties.float()
    neighbours = [middle]
    for towards in (-1e30, 1e30):
        near = middle
        for _ in range(3):
            near = torch.nextafter(near, torch.tensor(towards))
            neighbours.append(near)
    return torch.cat(neighbours)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 0.1, 7.0, 1e20])
def test_quotients_near_ties_are_exact(seed, isa, size):
    for _ in range(20):
        scale = float((torch.rand(()) + 0.5) * size)
        values = around_ties(scale)
        found, expected = both(values.view(-1, 1), torch.ones(1, 1), **{**IDENTITY, "x_scale": scale, "x_zero": 100})
        assert torch.equal(found, expected)
        zeros = torch.zeros(len(values), 1, dtype=torch.uint8)
        found, expected = both(
            zeros, torch.ones(1, 1), None, values.view(-1, 1), **IDENTITY, out_scale=scale, out_zero=100
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [1.2e-38, 3e-34, 1e32, 3e38])
def test_scales_at_the_ends_of_float32(seed, isa, scale):
    x = (torch.randn(40, 5).double() * scale * 20).clamp(-3e38, 3e38).float()
    found, expected = both(
        x, torch.ones(3, 5), **{**IDENTITY, "x_scale": scale, "x_zero": 128, "w_scale": torch.ones(3)}
    )
    assert torch.equal(found, expected)


def test_huge_values_saturate(isa):
    x = torch.tensor([[3e38], [-3e38], [1e-45], [-0.0]])
    found, expected = both(x, torch.ones(1, 1), **{**IDENTITY, "x_scale": 1e-20, "x_zero": 7})
    assert torch.equal(found, expected)
    acm = torch.tensor([[3e38], [-3e38], [1e-45], [-0.0]])
    found, expected = both(torch.zeros(4, 1), torch.ones(1, 1), None, acm, **IDENTITY, out_scale=1e-20, out_zero=7)
    assert torch.equal(found, expected)
    assert found.flatten().tolist() == [255, 0, 7, 7]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(seed, isa, activation):
    y = torch.cat([torch.linspace(-12, 12, 20001), torch.randn(5000) * 3, torch.tensor([-1e30, 1e30, -0.0])])
    arguments = (torch.zeros(len(y), 1), torch.ones(1, 1), None, y.view(-1, 1))
    with use_backend("cpu"):
        found = quant_linear(*arguments, activation=activation, **IDENTITY).flatten().double()
        integers = quant_linear(*arguments, activation=activation, **IDENTITY, out_scale=0.04, out_zero=10).flatten()
    expected = ACTIVATIONS[activation](y.double())
    error = (found - expected).abs() / (1 + expected.abs())
    assert float(error.max()) < 2e-6
    exact = ((expected / 0.04).round() + 10).clamp(0, 255)
    differs = integers != exact
    tie = ((expected / 0.04) - (expected / 0.04).floor() - 0.5).abs()
    assert int((integers - exact).abs().max()) <= 1
    assert float(tie[differs].max() if differs.any() else 0.0) < 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_not_finite(isa, activation):
    """NaN stays NaN, and infinity is not turned into a number; minus infinity is as good as 0."""
    y = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(7)
    arguments = (torch.zeros(len(y), 1), torch.ones(1, 1), None, y.view(-1, 1))
    with use_backend("cpu"):
        found = quant_linear(*arguments, activation=activation, **IDENTITY).view(7, 3)
    assert bool(found[:, 0].isnan().all())
    assert bool((found[:, 1] == float("inf")).all())
    assert bool((found[:, 2] == 0).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_with_every_addend_in_every_dtype(seed, isa, activation, dtype):
    """Whole groups of rows and vectors, and what is left over of both, after a product and before a residual."""
    rows, outputs = 35, 41
    x, weight, bias = torch.randn(rows, 70) * 2, torch.randn(outputs, 70), torch.randn(outputs)
    p = IDENTITY | {"x_scale": 0.03, "x_zero": 120, "w_bits": 4, "w_scale": mirrored(torch.rand(outputs) * 0.1 + 0.2)}
    acm, residual = torch.randn(5, outputs), torch.randn(rows, outputs)
    with use_backend("reference"):
        y = quant_linear(x, weight, bias, acm, **p).double()
    expected = ACTIVATIONS[activation](y) + residual
    options = {"out_scale": 0.11, "out_zero": 30} if dtype == torch.uint8 else {"out_dtype": dtype}
    with use_backend("cpu"):
        found = quant_linear(x, weight, bias, acm, activation=activation, residual=residual, **p, **options)
    assert found.dtype == dtype
    if dtype == torch.uint8:
        off = 6e-6 * (1 + expected.abs()) / 0.11
        least, greatest = (((expected / 0.11 + side * off).round() + 30).clamp(0, 255) for side in (-1, 1))
        assert bool(((least <= found) & (found <= greatest)).all())
    else:
        off = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert float(((found - expected).abs() / (1 + expected.abs())).max()) <= off


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize(
    "result", [{"out_scale": 1e-3, "out_zero": 200}, {"out_dtype": torch.float32}], ids=["u8", "f32"]
)
def test_paths_that_fuse_give_the_same_bits(seed, activation, result):
    """Models on different processors agree to the bit; `portable` rounds multiply-adds twice."""
    y, found = torch.randn(4000, 33) * 4, []
    for _ in each_path(FUSING):
        p = {**IDENTITY, "w_scale": torch.ones(33), **result, "activation": activation}
        with use_backend("cpu"):
            found.append(quant_linear(torch.zeros(4000, 1), torch.ones(33, 1), None, y, **p))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_strange_value_anywhere_is_an_error(seed, isa, value, dtype):
    for rows, depth in ((3, 5), (40, 64), (300, 33)):
        x = torch.randn(rows, depth).to(dtype)
        x[random.randrange(rows), random.choice([0, depth - 1, random.randrange(depth)])] = value
        with use_backend("cpu"), pytest.raises(ValueError, match="x held NaN or Inf; every value must be finite"):
            quant_linear(x, torch.ones(2, depth), **{**IDENTITY, "w_scale": torch.ones(2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_scale": -1.0}, "x_scale held -1; every scale must be greater than 0"),
        ({"w_scale": torch.tensor([float("nan")])}, "w_scale held NaN or Inf"),
        ({"w_scale": torch.zeros(1)}, "w_scale held 0; no scale of a weight may be 0"),
        ({"x_zero": 2.5}, "x_zero held 2.5; it must be a whole number from 0 to 255"),
        ({"out_scale": 0.0, "out_zero": 0}, "out_scale held 0; every scale must be greater than 0"),
        ({"out_scale": 1.0, "out_zero": 64, "out_bits": 6}, "out_zero held 64; it must be a whole number from 0 to 63"),
    ],
)
def test_values_are_checked_as_by_the_reference(change, message):
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match=message):
            quant_linear(torch.zeros(2, 1), torch.ones(1, 1), **IDENTITY | change)
    near = {"out_scale": torch.ones(1), "out_zero": torch.tensor([127.0]).nextafter(torch.zeros(1)), "out_bits": 8}
    with use_backend("reference"), pytest.raises(ValueError, match=r"out_zero held 126.99999\d+; it must be a whole"):
        quant_linear(torch.zeros(2, 1), torch.ones(1, 1), **IDENTITY | near)
    x = torch.tensor([[3, 16]], dtype=torch.uint8)
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match="x held 16; it must be a whole number from 0 to 15"):
            quant_linear(x, torch.ones(1, 2), **IDENTITY | {"a_bits": 4})


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (3, 0), (7,)])
def test_empty_and_single_shapes(isa, shape):
    found, expected = both(
        torch.ones(shape), torch.ones(3, shape[-1]), torch.ones(3), **IDENTITY | {"w_scale": torch.ones(3)}
    )
    assert found.shape == (*shape[:-1], 3)
    assert torch.equal(found, expected)


def test_strided_arguments(seed, isa):
    x, residual = torch.randn(6, 8, 20)[:, ::2, 3:], torch.randn(4, 6, 9).transpose(0, 1)
    weight, bias, acm = torch.randn(17, 9).t(), torch.randn(18)[::2], torch.randn(9, 4).t()
    p = IDENTITY | {"x_scale": 0.02, "x_zero": 128, "w_scale": (torch.rand(18) + 0.01)[::2]}
    found, expected = both(x, weight, bias, acm, residual=residual, **p)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "silu"])
def test_operator_contract_on_this_backend(seed, activation):
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    scales = (torch.tensor(0.03), torch.tensor(128.0), torch.rand(5) + 0.1)
    arguments = (x, weight, torch.randn(5), torch.randn(3, 5), *scales, 8, 4, activation)
    requantized = (torch.randn(2, 3, 5), torch.full((5,), 0.1), torch.full((5,), 3.0), 6, "uint8")
    with use_backend("cpu", "quant_linear"):
        for rest in ((None, None, None, 8, "bfloat16"), requantized):
            torch.library.opcheck(
                torch.ops.dfqvit.quant_linear,
                (*arguments, *rest),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )


def test_the_operator_names_the_activations_it_has():
    """As a C++ program calls it, without the checks in Python."""
    scales = (torch.tensor(0.03), torch.tensor(128.0), torch.ones(5))
    arguments = (
        torch.randn(2, 8),
        torch.randn(5, 8),
        None,
        None,
        *scales,
        8,
        4,
        "relu",
        None,
        None,
        None,
        8,
        "float32",
    )
    message = "activation was 'relu'; it may be 'none', 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'"
    with use_backend("cpu"), pytest.raises(ValueError, match=message):
        torch.ops.dfqvit.quant_linear(*arguments)


def test_compiles_without_graph_breaks_and_gives_the_same_bits(seed):
    weight = block_weight(pack_weight(torch.randn(24, 20), 0.1, 4), 20, 4)
    p = {
        "x_scale": torch.tensor(0.03),
        "x_zero": torch.tensor(128.0),
        "w_scale": torch.full((24,), 0.1),
        "a_bits": 8,
        "w_bits": 4,
    }

    def step(x, residual):
        hidden = quant_linear(x, weight, out_scale=0.1, out_zero=100, **p)
        return quant_linear(x, weight, residual=residual + hidden, **p)

    x, residual = torch.randn(3, 5, 20), torch.randn(3, 5, 24)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, residual), step(x, residual))
