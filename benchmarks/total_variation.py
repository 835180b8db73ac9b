"""total_variation against the sliced formula of PSAQ-ViT and DeepInversion, forward and backward; bytes a second.

python benchmarks/total_variation.py [--device cpu|cuda] [--out FILE.jsonl]
"""

from __future__ import annotations

import runner
import torch

from dfqvit import kernels

SHAPES = [(16, 3, 224, 224), (32, 3, 224, 224)]  # the images of a synthesis


def sliced(x: torch.Tensor) -> torch.Tensor:
    """Four differences, each a tensor of its own."""
    differences = (
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
    )
    return sum(d.flatten(1).norm(dim=1) for d in differences)


def main() -> None:
    args = runner.options(__doc__, 5.0, "shape").parse_args()
    writer = runner.Writer("total_variation", args.device, args.out)
    for shape in SHAPES:
        x = torch.randn(shape, device=args.device, requires_grad=True)
        if not torch.allclose(kernels.total_variation(x), sliced(x), rtol=1e-4):
            raise SystemExit("fused and sliced differ: nothing was timed")
        variants = {
            "forward": (lambda x=x: kernels.total_variation(x.detach()), 1),
            "forward, sliced": (lambda x=x: sliced(x.detach()), 1),
            "both": (lambda x=x: torch.autograd.grad(kernels.total_variation(x).sum(), x), 3),
            "both, sliced": (lambda x=x: torch.autograd.grad(sliced(x).sum(), x), 3),
        }
        timings = runner.interleave({name: run for name, (run, _) in variants.items()}, args.device, args.seconds)
        for name, timing in timings.items():
            moved = variants[name][1] * x.numel() * 4  # what must be read and written
            writer.add(variant=name, shape=shape, **timing.row(), gb_per_s=moved / timing.median / 1e9)
    writer.show(["shape", "variant", "p20_ms", "p50_ms", "p80_ms", "calls", "gb_per_s"])


if __name__ == "__main__":
    main()
