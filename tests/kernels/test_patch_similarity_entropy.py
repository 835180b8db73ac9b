"""patch_similarity_entropy and similarity_range on every backend that is live here, against loops in float64.

The entropy is a sum of terms of both signs, so its error is measured against the sum of their sizes: in float32, at most 1e-5 of
trapezoid(|p log p|), plus what two units of rounding (2^-22) in every similarity can do to the entropy, which exceeds the first
part only where the entropy is ill-conditioned (a range of little width, places that only tails reach). Gradients are compared by
norm. Seeds are fresh in every run and stand in the test's id; DFQVIT_TEST_SEED repeats one.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from dfqvit import kernels
from dfqvit.kernels import dispatch, extension
from dfqvit.kernels.patch_similarity_entropy import op, reference

from ..conftest import PATHS, on_path, threads
from .interpreter import INTERPRETED

SEED = int(os.environ.setdefault("DFQVIT_TEST_SEED", str(random.SystemRandom().randrange(10**6))))
FLOATS = [path for path in PATHS if path not in ("amx", "dotprod", "i8mm")]  # the others multiply integers otherwise
BACKENDS = [*(f"cpu-{path}" for path in reversed(FLOATS)), "reference", "triton", "cuda"]
SEEDS = [SEED + k for k in range(2 if INTERPRETED else 6)]


@dataclass(frozen=True)
class Live:
    """A backend in use, and the device whose tensors it takes."""

    name: str
    device: str


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, so that an element that a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Live]:
    name, _, path = request.param.partition("-")
    able, reason = dispatch._available(name)
    if not able:
        pytest.skip(f"{name}: {reason}")
    on_gpu = name == "cuda" or (name == "triton" and not INTERPRETED)
    with on_path(path) if path else nullcontext(), kernels.use_backend(name):
        yield Live(name, "cuda" if on_gpu else "cpu")


@dataclass
class Exact:
    entropy: np.ndarray  # [L, B]
    size: np.ndarray  # [L, B]: trapezoid(|p log p|)
    rounding: np.ndarray  # [L, B]: how far the entropy moves at most when every similarity moves by 2^-22
    ends: np.ndarray  # [L, 2]: the range


def oracle(features: np.ndarray, points: int, bandwidth: float, windows: int, ends: np.ndarray | None = None) -> Exact:
    """The definition, in loops, for features [L, B * windows, N, D] in float64."""
    layers, sets, n, _ = features.shape
    shape = layers, sets // windows
    exact = Exact(np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros((layers, 2)))
    for layer in range(layers):
        similarities = []
        for vectors in features[layer].astype(np.float64):
            unit = np.array([v / max(math.sqrt(float(v @ v)), 1e-8) for v in vectors])
            similarities.append(np.clip(unit @ unit.T, -1, 1))
        exact.ends[layer] = min(s.min() for s in similarities), max(s.max() for s in similarities)
        low, high = exact.ends[layer] if ends is None else ends[layer]
        if ends is None and high - low < 16 * 2.0**-23:
            low = high
        step = (high - low) / (points - 1)
        for image in range(sets // windows):
            own = similarities[image * windows : (image + 1) * windows]
            terms, slopes = [], []
            for j in range(points):
                away = [(s - (low + step * j)) / bandwidth for s in own]
                gaussians = [np.exp(-0.5 * z**2) / (windows * n * n * bandwidth * math.sqrt(2 * math.pi)) for z in away]
                p = sum(float(g.sum()) for g in gaussians) + 1e-4
                steepness = sum(float((g * np.abs(z)).sum()) for g, z in zip(gaussians, away, strict=True)) / bandwidth
                terms.append(-p * math.log(p))
                slopes.append(steepness * abs(math.log(p) + 1))
            exact.entropy[layer, image] = sum((a + b) / 2 * step for a, b in itertools.pairwise(terms))
            size = sum((abs(a) + abs(b)) / 2 * step for a, b in itertools.pairwise(terms))
            slope = sum((a + b) / 2 * step for a, b in itertools.pairwise(slopes))
            exact.size[layer, image] = size
            exact.rounding[layer, image] = 2.0**-22 * (2 * slope + (2 * size / (high - low) if high > low else 0))
    return exact


def exact_gradient(features, points, bandwidth, windows, grad, value_range=None) -> torch.Tensor:
    """The gradient by torch's autograd of the reference's formula, in float64."""
    leaf = features.detach().double().cpu().requires_grad_()
    ends = reference.similarity_range(leaf) if value_range is None else value_range.double().cpu()
    entropy, _ = reference.patch_similarity_entropy(leaf, ends, points, bandwidth, windows)
    (entropy * grad.double().cpu()).sum().backward()
    return leaf.grad


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, 0 where both are 0."""
    difference = float((actual.detach().double().cpu() - expected).norm())
    return difference / max(float(expected.norm()), 1e-30) if difference else 0.0


@dataclass(frozen=True)
class Case:
    features: torch.Tensor
    points: int
    bandwidth: float
    windows: int


@dataclass(frozen=True)
class Solution:
    """What every backend must give for a case; `gradient` is for `grad`, the gradient of the entropy."""

    exact: Exact
    grad: torch.Tensor
    gradient: torch.Tensor


_solutions: dict[tuple, Solution] = {}


def solve(case: Case, dtype: torch.dtype) -> Solution:
    """Kept for the next backend: the seeds are the same for all of them within a run."""
    features = case.features.to(dtype).double()
    key = (features.numpy().tobytes(), case.points, case.bandwidth, case.windows)
    if key not in _solutions:
        exact = oracle(features.numpy(), case.points, case.bandwidth, case.windows)
        grad = (torch.rand(exact.entropy.shape, generator=torch.Generator().manual_seed(SEED)) + 0.5).to(dtype)
        gradient = exact_gradient(features, case.points, case.bandwidth, case.windows, grad)
        _solutions[key] = Solution(exact, grad, gradient)
    return _solutions[key]


def sensitivity(case: Case, solution: Solution) -> float:
    """How far of its norm the gradient moves at most, in four draws, when the features move by their last bit in float32."""
    features, generator, moves = case.features.double(), torch.Generator().manual_seed(SEED), []
    for _ in range(4):
        bits = 2 * torch.rand(features.shape, generator=generator, dtype=torch.float64) - 1
        moved = exact_gradient(
            features * (1 + 2.0**-23 * bits), case.points, case.bandwidth, case.windows, solution.grad
        )
        moves.append(distance(moved, solution.gradient))
    return max(moves)


def normal(*shape: int) -> torch.Tensor:
    """Standard normal numbers, the same for every backend, others in the next run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED + math.prod(shape)))


def random_case(seed: int, limit: int = 120) -> Case:
    """Any shape, and features as models give them: around a common mean, or in clusters with duplicates."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    windows = rng.choice([1, 1, 2, 4])
    shape = (rng.randint(1, 3), rng.randint(1, 3) * windows, rng.randint(1, limit), rng.randint(2, limit))
    noise = torch.randn(shape, generator=generator)
    common = torch.randn(shape[0], shape[1], 1, shape[3], generator=generator) * rng.choice([0.0, 1.0, 3.0])
    features = noise + common
    if rng.random() < 0.5:  # clusters: some patches are copies of others, some nearly
        source = torch.randint(0, shape[2], (shape[2],), generator=generator)
        features = features[:, :, source] + noise * rng.choice([0.0, 0.05])
    bandwidth = rng.choice([0.01, 0.01, 10 ** rng.uniform(-2, 0), 1.0])
    return Case(features * 10 ** rng.uniform(-3, 3), rng.choice([2, 3, 10, 10, 40]), bandwidth, windows)


def check(case: Case, live: Live, dtype: torch.dtype = torch.float32) -> None:
    """Range, entropy and gradient of a case against the oracles."""
    features = case.features.to(live.device, dtype, copy=True).requires_grad_()
    solution = solve(case, dtype)
    exact = solution.exact
    found = kernels.similarity_range(features)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.cpu().numpy(), exact.ends, rtol=0, atol=2e-6)

    result = kernels.patch_similarity_entropy(features, case.points, case.bandwidth, windows=case.windows)
    assert result.dtype == dtype
    assert_close(result, exact, 1e-5 if dtype == torch.float32 else 1e-2)

    (result * solution.grad.to(live.device)).sum().backward()
    gradient = solution.gradient.to(dtype).double()  # in float16, what is small is lost in any case
    off = distance(features.grad, gradient)
    width = float((exact.ends[:, 1] - exact.ends[:, 0]).min())
    if width > 1e-4 and float(gradient.norm()) * float(case.features.norm()) > 1e-9:  # else it is the rounding of zero
        limit = 1e-4 + 2e-6 / width if dtype == torch.float32 else 1e-2
        if off > limit and dtype == torch.float32:  # a gradient that is what is left of terms that cancel each other?
            limit += 8 * sensitivity(case, solution)
        assert off <= limit, f"gradient off by {off:.2e} of its norm, {limit:.1e} allowed"


def assert_close(result: torch.Tensor, exact: Exact, tolerance: float) -> None:
    error = np.abs(result.detach().double().cpu().numpy() - exact.entropy)
    allowed = tolerance * exact.size + exact.rounding
    assert (error <= allowed + 1e-30).all(), f"error {error.tolist()}, allowed {allowed.tolist()}"


@pytest.mark.parametrize("seed", SEEDS)
def test_random_cases(backend: Live, seed: int) -> None:
    case = random_case(seed, 70 if INTERPRETED else 120)
    if INTERPRETED:  # one image of one layer: other tests have several
        case = replace(case, features=case.features[:1, : case.windows])
    check(case, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: Live, dtype: torch.dtype) -> None:
    layers, sets = (1, 1) if INTERPRETED else (2, 3)
    features = normal(layers, sets, 70, 33) + 2 * normal(layers, sets, 1, 33)
    check(Case(features, 10, 0.01, 1), backend, dtype)


@pytest.mark.parametrize(
    ("shape", "points", "bandwidth", "windows"),
    [
        ((1, 2, 64, 64), 10, 0.01, 1),  # whole tiles
        ((1, 2, 65, 17) if INTERPRETED else (2, 20, 65, 17), 10, 0.01, 1),  # one row over; many sets
        ((1, 1, 129, 130), 10, 0.01, 1),  # one set for all threads
        ((1, 4 if INTERPRETED else 8, 49, 32), 10, 0.01, 4),  # Swin
        ((1, 1, 17, 260) if INTERPRETED else (1, 2, 33, 1024), 10, 0.01, 1),  # the deepest
        ((1, 1, 40, 3), 300, 0.01, 1),  # many places
        ((1, 1, 9, 41), 10, 100.0, 1),  # a bandwidth beyond the range
        ((1, 1, 17, 1), 10, 0.01, 1),  # similarities are 1 and -1
    ],
)
def test_shapes(backend: Live, shape: tuple[int, ...], points: int, bandwidth: float, windows: int) -> None:
    features = normal(*shape) + 0.5
    check(Case(features, points, bandwidth, windows), backend)


def test_many_vectors(backend: Live) -> None:
    if backend.name == "triton" and INTERPRETED:
        pytest.skip("triton: the interpreter is slow")
    check(Case(normal(1, 1, 1000, 24) + 0.7, 10, 0.01, 1), backend)


def test_non_contiguous_inputs(backend: Live) -> None:
    features = torch.randn(1 if INTERPRETED else 2, 3, 20, 41, device=backend.device).transpose(2, 3)[:, :, ::2]
    assert not features.is_contiguous()
    leaf, copy = features.detach().requires_grad_(), features.detach().contiguous().requires_grad_()
    ours, theirs = kernels.patch_similarity_entropy(leaf), kernels.patch_similarity_entropy(copy)
    # A batched matmul, which the reference is, takes another algorithm for other strides.
    tolerance = 1e-4 if backend.name == "reference" else 0.0
    assert distance(ours, theirs.detach().double().cpu()) <= tolerance
    grad = torch.rand(3, len(features), device=backend.device).t()
    ours.backward(grad)
    theirs.backward(grad.contiguous())
    assert distance(leaf.grad, copy.grad.double().cpu()) <= tolerance


def test_zero_vectors_have_similarity_0(backend: Live) -> None:
    features = normal(1, 2, 30, 12) + 1
    features[0, 0, 3] = 0
    features[0, 1, ::4] = 0
    check(Case(features, 10, 0.05, 1), backend)  # here the rows of zero vectors, 1e8 times the others, decide
    leaf = features.to(backend.device, copy=True).requires_grad_()
    kernels.patch_similarity_entropy(leaf, bandwidth=0.05).sum().backward()
    exact = exact_gradient(features, 10, 0.05, 1, torch.ones(1, 2))
    others = features.abs().sum(-1) > 0
    assert distance(leaf.grad.cpu()[others], exact[others]) < 1e-4


def test_vectors_shorter_than_the_floor(backend: Live) -> None:
    features = normal(1, 1, 9, 12)
    features[0, 0, 2] *= 5e-9 / features[0, 0, 2].norm()
    check(Case(features, 10, 0.1, 1), backend)


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 1, 70, 100), (2, 2, 1, 8)])
def test_equal_patches_have_entropy_0_and_gradient_0(backend: Live, shape: tuple[int, ...]) -> None:
    row = torch.randn(shape[0], shape[1], 1, shape[3])
    features = row.expand(shape).to(backend.device).clone().requires_grad_()
    entropy = kernels.patch_similarity_entropy(features)
    entropy.sum().backward()
    assert (entropy == 0).all()
    assert (features.grad == 0).all()


def test_all_zero_vectors(backend: Live) -> None:
    features = torch.zeros(1, 2, 6, 4, device=backend.device, requires_grad=True)
    entropy = kernels.patch_similarity_entropy(features)
    entropy.sum().backward()
    assert (entropy == 0).all()
    assert (features.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (0, 2, 5, 3), (2, 0, 5, 3)])
def test_empty_batches(backend: Live, shape: tuple[int, ...]) -> None:
    features = torch.empty(shape, device=backend.device, requires_grad=True)
    entropy = kernels.patch_similarity_entropy(features)
    assert entropy.shape == shape[:-2]
    entropy.sum().backward()
    assert features.grad.shape == shape
    assert (kernels.similarity_range(features.detach()) == 0).all()


def test_one_layer_is_the_same_as_a_batch_of_layers(backend: Live) -> None:
    features = torch.randn(3, 1 if INTERPRETED else 4, 21, 10, device=backend.device) + 1
    together = kernels.patch_similarity_entropy(features)
    ends = kernels.similarity_range(features)
    for layer in range(3):
        torch.testing.assert_close(kernels.patch_similarity_entropy(features[layer]), together[layer], rtol=0, atol=0)
        assert torch.equal(kernels.similarity_range(features[layer]), ends[layer])


def test_explicit_range(backend: Live) -> None:
    features = torch.randn(2, 3, 9 if INTERPRETED else 40, 20) + 0.5
    ends = torch.tensor([[-0.3, 0.8], [0.1, 1.3]])
    expected = oracle(features.numpy(), 7, 0.03, 1, ends.double().numpy())
    leaf = features.to(backend.device, copy=True).requires_grad_()
    result = kernels.patch_similarity_entropy(leaf, 7, 0.03, value_range=ends.to(backend.device))
    assert_close(result, expected, 1e-5)
    result.sum().backward()
    exact = exact_gradient(features, 7, 0.03, 1, torch.ones(2, 3), ends)
    assert distance(leaf.grad, exact) < 1e-4
    zero_width = torch.full((2, 2), 0.5, device=backend.device)
    assert (kernels.patch_similarity_entropy(leaf, value_range=zero_width) == 0).all()


@pytest.mark.parametrize("part", [2] if INTERPRETED else [1, 5, 17])
def test_micro_batches_with_the_range_of_the_whole(backend: Live, part: int) -> None:
    features = (
        (torch.randn((2, 3, 9, 12) if INTERPRETED else (2, 36, 26, 12)) + 0.8).to(backend.device).requires_grad_()
    )
    whole = kernels.patch_similarity_entropy(features)
    whole.sum().backward()
    parts = features.detach().split(part, dim=1)
    ranges = torch.stack([kernels.similarity_range(p) for p in parts])
    ends = torch.stack([ranges[..., 0].amin(0), ranges[..., 1].amax(0)], dim=1)
    entropies, gradients = [], []
    for p in parts:
        leaf = p.clone().requires_grad_()
        entropies.append(kernels.patch_similarity_entropy(leaf, value_range=ends))
        entropies[-1].sum().backward()
        gradients.append(leaf.grad)
    # The compiled kernels treat each image alone. A batched matmul does not: torch picks another algorithm for other sizes.
    tolerance = 1e-4 if backend.name == "reference" else 1e-6
    assert distance(torch.cat(entropies, dim=1), whole.detach().double().cpu()) <= tolerance
    assert distance(torch.cat(gradients, dim=1), features.grad.double().cpu()) <= tolerance


def test_gradcheck_of_the_reference() -> None:
    features = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    ends = kernels.similarity_range(features)
    assert torch.autograd.gradcheck(
        lambda x: kernels.patch_similarity_entropy(x, 6, 0.1, windows=2, value_range=ends), (features,)
    )


def test_no_gradient_flows_through_the_range() -> None:
    features = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    ends = kernels.similarity_range(features)
    assert not ends.requires_grad
    ends.requires_grad_()
    kernels.patch_similarity_entropy(features, value_range=ends).sum().backward()
    assert ends.grad is None


def test_opcheck(backend: Live) -> None:
    features = torch.randn((1, 2, 5, 3) if INTERPRETED else (2, 4, 12, 9), device=backend.device)
    ends = kernels.similarity_range(features)
    entropy, density = op.forward(features, ends, 10, 0.01, 2)
    assert density.shape == (len(features), features.shape[1] // 2, 10)
    torch.library.opcheck(torch.ops.dfqvit.similarity_range.default, (features,))
    torch.library.opcheck(torch.ops.dfqvit.patch_similarity_entropy.default, (features, ends, 10, 0.01, 2))
    backward = torch.ops.dfqvit.patch_similarity_entropy_backward.default
    torch.library.opcheck(backward, (torch.ones_like(entropy), features, ends, density, 0.01, 2))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend: Live, compiler: str) -> None:
    if backend.name == "triton" and INTERPRETED:
        pytest.skip("triton: its interpreter and the compiler do not mix")

    def loss(x: torch.Tensor) -> torch.Tensor:
        return -kernels.patch_similarity_entropy(x * 2, windows=2).mean(dim=-1).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    leaf = torch.randn(2, 4, 12, 9, device=backend.device, requires_grad=True)
    twin = leaf.detach().clone().requires_grad_()
    ours, theirs = compiled(leaf), loss(twin)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


def test_the_density_is_the_same_on_any_number_of_threads() -> None:
    if not extension.supports_cpu()[0]:
        pytest.skip(extension.supports_cpu()[1])
    features = torch.randn(1, 3, 150, 20) + 1
    results = []
    for count in (1, 2, 3):
        with threads(count):
            leaf = features.clone().requires_grad_()
            entropy = kernels.patch_similarity_entropy(leaf)
            entropy.sum().backward()
        results.append((entropy.detach(), leaf.grad))
    for entropy, grad in results[1:]:
        assert torch.equal(entropy, results[0][0])
        assert torch.equal(grad, results[0][1])


F = torch.ones(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": [1.0]}, TypeError, "features was a list"),
        ({"features": F.long()}, TypeError, "features had dtype torch.int64"),
        ({"features": F[0, 0]}, ValueError, r"features had shape \(4, 5\)"),
        ({"features": F[..., :0]}, ValueError, "N and D must be at least 1"),
        ({"features": F * math.nan}, ValueError, "features held NaN or Inf"),
        ({"features": F * math.inf}, ValueError, "features held NaN or Inf"),
        ({"points": 1}, ValueError, "points was 1"),
        ({"points": 2.5}, ValueError, "points was 2.5"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth was 0.0"),
        ({"bandwidth": math.nan}, ValueError, "bandwidth was nan"),
        ({"windows": 2}, ValueError, "windows was 2; it must divide"),
        ({"windows": 0}, ValueError, "windows was 0"),
        ({"value_range": (0, 1)}, TypeError, "value_range was a tuple"),
        ({"value_range": torch.zeros(2)}, ValueError, r"value_range had shape \(2,\); it must be \(2, 2\)"),
        ({"value_range": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}, ValueError, "must not be greater than the second"),
        ({"value_range": torch.full((2, 2), math.nan)}, ValueError, "value_range held NaN or Inf"),
        ({"value_range": torch.zeros(2, 2, device="meta")}, ValueError, "value_range was on meta"),
    ],
)
def test_bad_input(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kernels.patch_similarity_entropy(**{"features": F, **arguments})


def test_large_finite_values_are_not_taken_for_infinity() -> None:
    features = torch.randn(1, 2, 9, 7) * 1e18
    features[0, 0, 0] = 3e38
    kernels.patch_similarity_entropy(features.double())  # the sum of the check must not decide
    kernels.similarity_range(features)


def test_backends_decline_with_the_reason() -> None:
    with kernels.use_backend("cpu"):
        if extension.supports_cpu()[0]:
            with pytest.raises(kernels.BackendError, match="float64 runs on the reference"):
                kernels.patch_similarity_entropy(F.double())
            with pytest.raises(kernels.BackendError, match="bandwidth was 1e-09"):
                kernels.patch_similarity_entropy(F, bandwidth=1e-9)
    assert op._supports_cuda(F, F, 513, 0.01, 1) == (False, "points was 513; the CUDA kernel has room for 512")


def test_the_reference_is_the_oracle_of_itself() -> None:
    features = torch.randn(2, 4, 11, 6, dtype=torch.float64)
    entropy, density = reference.patch_similarity_entropy(features, reference.similarity_range(features), 10, 0.02, 2)
    np.testing.assert_allclose(entropy.numpy(), oracle(features.numpy(), 10, 0.02, 2).entropy, rtol=1e-11)
    assert density.dtype == torch.float64
