"""fake_quantize against torch's own fake quantization and against plain torch, forward; bytes a second.

python benchmarks/fake_quantize.py [--device cpu|cuda] [--out FILE.jsonl]
"""

from __future__ import annotations

import functools

import runner
import torch

from dfqvit import kernels

SHAPES = [(32 * 197, 192), (32 * 197, 768)]  # block activations of DeiT-T, its hidden layer


def main() -> None:
    args = runner.options(__doc__, 10.0, "shape").parse_args()
    writer = runner.Writer("fake_quantize", args.device, args.out)
    for shape in SHAPES:
        x = torch.randn(shape, device=args.device)
        scale, zero = torch.tensor(6.0 / 255, device=args.device), torch.tensor(128.0, device=args.device)
        ours = functools.partial(kernels.fake_quantize, x, scale, zero, quant_min=0, quant_max=255)

        def reference(ours: functools.partial = ours) -> torch.Tensor:
            with kernels.use_backend("reference"):
                return ours()

        def torchs(x: torch.Tensor = x) -> torch.Tensor:
            return torch.fake_quantize_per_tensor_affine(x, 6.0 / 255, 128, 0, 255)

        if not torch.equal(ours(), reference()):
            raise SystemExit("fused and reference differ: nothing was timed")
        timings = runner.interleave({"fused": ours, "torch": torchs, "reference": reference}, args.device, args.seconds)
        for variant, timing in timings.items():
            rate = 2 * x.numel() * 4 / timing.median / 1e9
            writer.add(variant=variant, shape=shape, dtype="float32", **timing.row(), gb_per_s=rate)
    writer.show(["shape", "variant", "p20_ms", "p50_ms", "p80_ms", "calls", "gb_per_s"])


if __name__ == "__main__":
    main()
