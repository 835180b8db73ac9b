# mypy: allow-untyped-defs
"""`patch_similarity_entropy` in Triton: for GPUs that the compiled kernel is not built for, and in the interpreter on CPUs.

A program owns BLOCK rows of one set (an image, or a window of one) and walks tiles of BLOCK columns. The tile of similarities
is never written. Products are float32 in full precision; sums over tiles are float64. Loops whose bounds are known only on the
device are `while` loops: Triton's interpreter takes no `range` of such values under recent NumPy. Sizes are no constants of the
kernels, which would be compiled anew for each; only the powers of two that hold them are.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .reference import FLAT_ULPS, NORM_FLOOR, SMOOTHING

BLOCK = 64  # rows and columns of a tile
DEPTH = 32  # depth of an operand chunk
OUT = 64  # columns of the gradient that one program makes
CUTOFF = 13.3  # bandwidths from which the Gaussian is 0 in float32
NO_PAIR = tl.constexpr(1e18)


@triton.jit
def _normalise_kernel(x, inverse, diagonal, depth, floor, WIDTH: tl.constexpr):
    """inverse = 1 / max(|x|, floor) and the squared length of the unit vector, of one row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    value = tl.load(x + row * depth + d, mask=d < depth, other=0.0).to(tl.float64)
    squares = tl.sum(value * value, axis=0)
    norm = tl.sqrt(squares)
    scale = 1.0 / tl.maximum(norm, floor)
    tl.store(inverse + row, scale.to(tl.float32))
    tl.store(diagonal + row, tl.where(norm >= floor, 1.0, squares * scale * scale).to(tl.float32))


@triton.jit
def _units(x, inverse, base, rows, columns, n, depth):
    """The unit vectors of `rows`, columns `columns`; zero outside the set, which starts at row `base`."""
    inside = rows < n
    scale = tl.load(inverse + base + rows, mask=inside, other=0.0)
    value = tl.load(
        x + (base + rows)[:, None] * depth + columns[None, :],
        mask=inside[:, None] & (columns < depth)[None, :],
        other=0.0,
    )
    return value.to(tl.float32) * scale[:, None]


@triton.jit
def _similarities(x, inverse, base, rows, columns, n, depth, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """The similarities of rows with columns, and which cells are pairs of distinct vectors."""
    s = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    start = tl.program_id(0) * 0
    while start < depth:
        d = start + tl.arange(0, DEPTH)
        a = _units(x, inverse, base, rows, d, n, depth)
        b = _units(x, inverse, base, columns, d, n, depth)
        s = tl.dot(a, tl.trans(b), s, input_precision="ieee")
        start += DEPTH
    pair = (rows < n)[:, None] & (columns < n)[None, :] & (rows[:, None] != columns[None, :])
    return s, pair


@triton.jit
def _span(s, pair, places, points, cutoff):
    """The first place, and the one after the last, at which the Gaussian of a similarity in the tile is not 0."""
    low = tl.min(tl.min(tl.where(pair, s, NO_PAIR), axis=1), axis=0)
    high = tl.max(tl.max(tl.where(pair, s, -NO_PAIR), axis=1), axis=0)
    least = tl.load(places)
    width = tl.load(places + points - 1) - least
    step_inverse = (points - 1) / tl.maximum(width, 1e-30)
    begin = tl.ceil((low - cutoff - least) * step_inverse - 1e-3)
    end = tl.floor((high + cutoff - least) * step_inverse + 1e-3) + 1.0
    begin = tl.where(width > 1e-30, tl.minimum(tl.maximum(begin, 0.0), points), 0.0)
    end = tl.where(width > 1e-30, tl.minimum(tl.maximum(end, 0.0), points), points)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _range_kernel(x, inverse, diagonal, ends, n, depth, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """ends [programs, 2]: the least and the greatest similarity in the tiles of this program."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(n, BLOCK)
    base = program // tiles * n
    panel = (program % tiles).to(tl.int32)
    rows = panel * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(diagonal + base + rows, mask=rows < n, other=0.0)
    low = tl.min(tl.where(rows < n, own, NO_PAIR), axis=0)
    high = tl.max(tl.where(rows < n, own, -NO_PAIR), axis=0)
    tile = panel
    while tile < tiles:
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        s, pair = _similarities(x, inverse, base, rows, columns, n, depth, BLOCK, DEPTH)
        low = tl.minimum(low, tl.min(tl.min(tl.where(pair, s, NO_PAIR), axis=1), axis=0))
        high = tl.maximum(high, tl.max(tl.max(tl.where(pair, s, -NO_PAIR), axis=1), axis=0))
        tile += 1
    tl.store(ends + 2 * program, low)
    tl.store(ends + 2 * program + 1, high)


@triton.jit
def _density_kernel(
    x, inverse, diagonal, places, parts, n, batch, scale, cutoff,
    depth, points, BLOCK: tl.constexpr, DEPTH: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """parts [programs, points]: the Gaussians around each place of the pairs in the tiles of this program."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(n, BLOCK)
    base = program // tiles * n
    places += program // tiles // batch * points
    panel = (program % tiles).to(tl.int32)
    rows = panel * BLOCK + tl.arange(0, BLOCK)
    index = tl.arange(0, POINTS)
    sums = tl.zeros([POINTS], dtype=tl.float64)
    own = tl.load(diagonal + base + rows, mask=rows < n, other=0.0)
    j = tl.program_id(0) * 0
    while j < points:
        d = own - tl.load(places + j)
        total = tl.sum(tl.where(rows < n, tl.exp2(d * d * scale), 0.0), axis=0)
        sums += tl.where(index == j, total, 0.0).to(tl.float64)
        j += 1
    tile = panel
    while tile < tiles:
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        s, pair = _similarities(x, inverse, base, rows, columns, n, depth, BLOCK, DEPTH)
        weight = tl.where(tile == panel, 1.0, 2.0)
        j, end = _span(s, pair, places, points, cutoff)
        while j < end:
            d = s - tl.load(places + j)
            total = tl.sum(tl.sum(tl.where(pair, tl.exp2(d * d * scale), 0.0), axis=1), axis=0)
            sums += tl.where(index == j, total * weight, 0.0).to(tl.float64)
            j += 1
        tile += 1
    tl.store(parts + program * points + index, sums, mask=index < points)


@triton.jit
def _backward_kernel(
    x, inverse, diagonal, places, factors, out, n, batch, windows, scale, cutoff,
    depth, points, BLOCK: tl.constexpr, DEPTH: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """out [rows, depth] float32: the gradient of the unit vectors; a program makes BLOCK rows of OUT columns."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(n, BLOCK)
    base = program // tiles * n
    places += program // tiles // batch * points
    factors += program // tiles // windows * points
    panel = (program % tiles).to(tl.int32)
    rows = panel * BLOCK + tl.arange(0, BLOCK)
    out_columns = tl.program_id(1) * OUT + tl.arange(0, OUT)

    # The diagonal of a vector as long as the floor is constant; that of a shorter one is not.
    own = tl.load(diagonal + base + rows, mask=rows < n, other=1.0)
    slope = tl.zeros([BLOCK], dtype=tl.float32)
    j = tl.program_id(0) * 0
    while j < points:
        d = own - tl.load(places + j)
        slope += tl.load(factors + j) * (d * tl.exp2(d * d * scale))
        j += 1
    grad = tl.where(own == 1.0, 0.0, slope)[:, None] * _units(x, inverse, base, rows, out_columns, n, depth)

    tile = panel * 0
    while tile < tiles:
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        s, pair = _similarities(x, inverse, base, rows, columns, n, depth, BLOCK, DEPTH)
        slopes = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        j, end = _span(s, pair, places, points, cutoff)
        while j < end:
            d = s - tl.load(places + j)
            slopes += tl.load(factors + j) * (d * tl.exp2(d * d * scale))
            j += 1
        slopes = tl.where(pair, slopes, 0.0)
        others = _units(x, inverse, base, columns, out_columns, n, depth)
        grad = tl.dot(slopes, others, grad, input_precision="ieee")
        tile += 1
    tl.store(
        out + (base + rows)[:, None] * depth + out_columns[None, :],
        grad,
        mask=(rows < n)[:, None] & (out_columns < depth)[None, :],
    )


@triton.jit
def _finish_kernel(x, inverse, diagonal, unit_grad, out, depth, WIDTH: tl.constexpr):
    """One row of the gradient back through x / max(|x|, floor)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    scale = tl.load(inverse + row)
    unit = tl.load(x + row * depth + d, mask=d < depth, other=0.0).to(tl.float32) * scale
    grad = tl.load(unit_grad + row * depth + d, mask=d < depth, other=0.0)
    along = tl.where(tl.load(diagonal + row) == 1.0, tl.sum(unit * grad, axis=0), 0.0)
    tl.store(out + row * depth + d, ((grad - unit * along) * scale).to(out.dtype.element_ty), mask=d < depth)


@dataclass(frozen=True)
class _Sets:
    """The vectors of all sets, contiguous, and what normalises them."""

    x: torch.Tensor  # [L, B, N, D]
    inverse: torch.Tensor  # [L * B * N]
    diagonal: torch.Tensor  # [L * B * N]

    @property
    def count(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    @property
    def programs(self) -> int:
        return self.count * triton.cdiv(self.x.shape[2], BLOCK)


def similarity_range(features: torch.Tensor) -> torch.Tensor:
    """As `reference.similarity_range`."""
    layers, batch, n, depth = features.shape
    if layers * batch == 0:
        return features.new_zeros(layers, 2, dtype=torch.float32)
    with _on(features):
        sets = _sets(features)
        ends = sets.inverse.new_empty(sets.programs, 2)
        _range_kernel[(sets.programs,)](
            sets.x, sets.inverse, sets.diagonal, ends, n, depth=depth, BLOCK=BLOCK, DEPTH=DEPTH
        )
    ends = ends.view(layers, -1, 2).clamp(-1, 1)
    least, greatest = ends[..., 0].amin(dim=1), ends[..., 1].amax(dim=1)
    flat = greatest - least <= FLAT_ULPS * torch.finfo(torch.float32).eps
    return torch.stack([torch.where(flat, greatest, least), greatest], dim=1)


def patch_similarity_entropy(
    features: torch.Tensor, value_range: torch.Tensor, points: int, bandwidth: float, windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.patch_similarity_entropy`."""
    layers, batch, n, depth = features.shape
    images = batch // windows
    if layers * images == 0:
        return features.new_empty(layers, images), value_range.new_empty(layers, images, points)
    places, weights = _places(value_range, points)
    with _on(features):
        sets = _sets(features)
        parts = sets.inverse.new_empty(sets.programs, points, dtype=torch.float64)
        _density_kernel[(sets.programs,)](
            sets.x, sets.inverse, sets.diagonal, places, parts, n, batch, _scale(bandwidth), CUTOFF * bandwidth,
            depth=depth, points=points, BLOCK=BLOCK, DEPTH=DEPTH, POINTS=triton.next_power_of_2(points),
        )  # fmt: skip
    peak = 1.0 / (math.sqrt(2.0 * math.pi) * bandwidth * n * n * windows)
    density = parts.view(layers, images, -1, points).sum(dim=2) * peak + SMOOTHING
    entropy = -(density * density.log() * weights[:, None]).sum(dim=2)
    return entropy.to(features.dtype), density.to(value_range.dtype)


def patch_similarity_entropy_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    value_range: torch.Tensor,
    density: torch.Tensor,
    bandwidth: float,
    windows: int,
) -> torch.Tensor:
    """As `reference.patch_similarity_entropy_backward`."""
    result = torch.empty_like(features, memory_format=torch.contiguous_format)
    if result.numel() == 0:
        return result
    _, batch, n, depth = features.shape
    points = density.shape[2]
    places, weights = _places(value_range, points)
    factor = 2.0 / (math.sqrt(2.0 * math.pi) * bandwidth**3 * n * n * windows)  # 2: both orders of a pair
    factors = grad.double().unsqueeze(2) * weights[:, None] * (density.double().log() + 1.0) * factor
    factors = factors.float().contiguous()
    with _on(features):
        sets = _sets(features)
        unit_grad = torch.empty_like(sets.x, dtype=torch.float32)
        _backward_kernel[(sets.programs, triton.cdiv(depth, OUT))](
            sets.x, sets.inverse, sets.diagonal, places, factors, unit_grad, n, batch, windows,
            _scale(bandwidth), CUTOFF * bandwidth,
            depth=depth, points=points, BLOCK=BLOCK, DEPTH=DEPTH, OUT=OUT,
        )  # fmt: skip
        _finish_kernel[(sets.count * n,)](
            sets.x, sets.inverse, sets.diagonal, unit_grad, result, depth, WIDTH=triton.next_power_of_2(depth)
        )
    return result


def _sets(features: torch.Tensor) -> _Sets:
    x = features.contiguous()
    rows, depth = x.shape[0] * x.shape[1] * x.shape[2], x.shape[3]
    inverse, diagonal = x.new_empty(2, rows, dtype=torch.float32).unbind()
    _normalise_kernel[(rows,)](x, inverse, diagonal, depth, NORM_FLOOR, WIDTH=triton.next_power_of_2(depth))
    return _Sets(x, inverse, diagonal)


def _places(value_range: torch.Tensor, points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, points]: where the density is taken (float32), and the weights of the trapezoid rule (float64)."""
    least, greatest = value_range.double().unbind(dim=1)
    step = (greatest - least) / (points - 1)
    index = torch.arange(points, device=step.device)
    inner = ((index > 0) & (index < points - 1)).double()
    return (least[:, None] + step[:, None] * index).float().contiguous(), step[:, None] * (inner + 1.0) / 2.0


def _scale(bandwidth: float) -> float:
    """The Gaussian is 2^(scale (s - place)^2)."""
    return -0.5 * math.log2(math.e) / bandwidth**2


def _on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Launches go to the current device: makes it that of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
