"""The patch-similarity entropy of a synthesis step, against two ways to write it in torch.

eager     PSAQ-ViT's way: cosine_similarity of [B, N, 1, D] with [B, 1, N, D], differences [B, points, N^2], the ends of
          the range read back to the host, layer by layer
gram      S = X X^T, the same density, no host read; layer by layer
compiled  gram under torch.compile
fused     dfqvit.kernels.patch_similarity_entropy, all layers at once

python benchmarks/patch_similarity_entropy.py [--device cpu|cuda] [--out FILE.jsonl] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable

import runner
import torch
import torch.nn.functional as F

from dfqvit import kernels
from dfqvit.kernels.patch_similarity_entropy import op

POINTS, BANDWIDTH = 10, 0.01
# L, B, N, D
SHAPES = [
    (12, 16, 196, 64),  # a step of DeiT, 16 images
    (12, 32, 196, 64),
    (12, 16, 49, 64),
    (12, 4, 196, 192),
    (1, 1, 785, 64),
    (1, 1, 4096, 64),
]
QUICK = [(2, 4, 196, 64), (12, 4, 49, 32)]
SKIP_ABOVE = {"eager": 12 << 30, "gram": 12 << 30, "compiled": 12 << 30}  # bytes that autograd would keep, estimated


def eager(features: torch.Tensor) -> torch.Tensor:
    return torch.stack([_eager_layer(layer) for layer in features])


def _eager_layer(layer: torch.Tensor) -> torch.Tensor:
    similarity = F.cosine_similarity(layer.unsqueeze(2), layer.unsqueeze(1), dim=-1).flatten(1)
    least, greatest = similarity.min().item(), similarity.max().item()
    places = torch.linspace(least, greatest, POINTS, device=layer.device)
    away = (similarity.unsqueeze(1) - places[None, :, None]) / BANDWIDTH
    density = (torch.exp(-0.5 * away**2) / (math.sqrt(2 * math.pi) * BANDWIDTH)).mean(dim=2) + 1e-4
    return torch.trapezoid(-density * density.log(), places, dim=1)


def gram(features: torch.Tensor) -> torch.Tensor:
    return torch.stack([_gram_layer(layer) for layer in features])


def _gram_layer(layer: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(layer, dim=-1, eps=1e-8)
    similarity = (unit @ unit.mT).flatten(1)
    least, greatest = similarity.detach().aminmax()
    step = (greatest - least) / (POINTS - 1)
    places = least + step * torch.arange(POINTS, device=layer.device)
    away = (similarity.unsqueeze(1) - places[None, :, None]) / BANDWIDTH
    density = (torch.exp(-0.5 * away**2) / (math.sqrt(2 * math.pi) * BANDWIDTH)).mean(dim=2) + 1e-4
    terms = -density * density.log()
    return (terms[:, :-1] + terms[:, 1:]).sum(dim=1) * (0.5 * step)


def fused(features: torch.Tensor) -> torch.Tensor:
    return kernels.patch_similarity_entropy(features, POINTS, BANDWIDTH)


def sample(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Vectors around a common mean, as patches of one image are: similarities from about 0.3 to 1."""
    generator = torch.Generator().manual_seed(0)
    layers, batch, _, depth = shape
    noise = torch.randn(shape, generator=generator)
    mean = 1.5 * torch.randn(layers, batch, 1, depth, generator=generator)
    return (noise + mean).to(device, dtype)


def kept_bytes(variant: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    layers, batch, n, depth = shape
    pairs = 4 * layers * batch * n * n
    return {"eager": pairs * (depth + 3 * POINTS), "gram": pairs * 3 * POINTS, "compiled": pairs * 3 * POINTS}.get(
        variant, 0
    )


def step(function: Callable, features: torch.Tensor) -> Callable[[], None]:
    leaf = features.detach().clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        function(leaf).sum().backward()

    return run


def measure_memory(variant: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> int:
    """Peak growth over a forward and backward, after a small one has loaded what is loaded once."""
    functions = {"eager": eager, "gram": gram, "fused": fused}
    step(functions[variant], sample((1, 1, 8, 8), device, dtype))()
    return runner.peak_memory(step(functions[variant], sample(shape, device, dtype)), device)


def main() -> None:
    parser = runner.options(__doc__, 20.0, "shape and direction")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--shapes", type=json.loads, help="JSON list of [L, B, N, D], in place of the default ones")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    shapes = [tuple(shape) for shape in args.shapes] if args.shapes else QUICK if args.quick else SHAPES

    if args.memory_of:
        print(json.dumps({"bytes": measure_memory(args.memory_of, shapes[0], dtype, args.device)}))
        return

    variants = {"eager": eager, "gram": gram, "fused": fused}
    if not args.no_compile:
        variants["compiled"] = torch.compile(gram, dynamic=False)
    writer = runner.Writer("patch_similarity_entropy", args.device, args.out)
    for shape in shapes:
        torch.compiler.reset()
        features = sample(shape, args.device, dtype)
        used = {n: f for n, f in variants.items() if kept_bytes(n, shape, dtype) <= SKIP_ABOVE.get(n, 1 << 62)}
        check(features, used)
        forwards = {name: functools.partial(f, features) for name, f in used.items()}
        both = {name: step(f, features) for name, f in used.items()}
        ends = kernels.similarity_range(features)
        resolved = op.forward.resolve(features, ends, POINTS, BANDWIDTH, 1).name
        memory = {name: peak(name, shape, args) for name in used if name != "compiled"}
        for direction, calls in (("forward", forwards), ("forward+backward", both)):
            timings = runner.interleave(calls, args.device, args.seconds)
            for name, timing in timings.items():
                writer.add(
                    variant=name,
                    shape=shape,
                    dtype=args.dtype,
                    direction=direction,
                    backend_asked="auto" if name == "fused" else None,
                    backend=resolved if name == "fused" else "torch",
                    **timing.row(),
                    times_fused=timing.median / timings["fused"].median,
                    peak_mb=memory[name] / 1e6 if memory.get(name) is not None else None,
                )
    columns = ["shape", "direction", "variant", "backend", "p20_ms", "p50_ms", "p80_ms", "times_fused", "peak_mb"]
    writer.show(columns)


def check(features: torch.Tensor, variants: dict[str, Callable]) -> None:
    """The variants agree; in float32 within what float32 allows."""
    expected = fused(features).float()
    tolerance = 1e-4 if features.dtype == torch.float32 else 0.1  # torch's own bfloat16 arithmetic is that coarse
    for name, function in variants.items():
        found = function(features).float()
        error = float((found - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise SystemExit(f"{name} and fused differ by {error:.1e} on {tuple(features.shape)}: nothing was timed")


def peak(variant: str, shape: tuple[int, ...], args: argparse.Namespace) -> int | None:
    if args.device == "cuda":
        return measure_memory(variant, shape, getattr(torch, args.dtype), args.device)
    arguments = ["--memory-of", variant, "--shapes", json.dumps([shape]), "--dtype", args.dtype, "--device", "cpu"]
    answer = runner.in_child(arguments)
    return answer["bytes"] if answer else None


if __name__ == "__main__":
    main()
