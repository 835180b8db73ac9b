"""layer_norm_quantize against LayerNorm and quantization one after the other; bytes a second.

python benchmarks/layer_norm_quantize.py [--device cpu|cuda] [--batch N] [--out FILE.jsonl]
"""

from __future__ import annotations

import runner
import torch
import torch.nn.functional as F

from dfqvit import kernels

SHAPES = {"deit_tiny": (197, 192), "deit_base": (197, 768), "swin_tiny, stage 1": (3136, 96)}  # tokens, channels


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: float, zero: float) -> torch.Tensor:
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)
    return ((normed / scale).round() + zero).clamp(0, 255).to(torch.uint8)


def main() -> None:
    parser = runner.options(__doc__, 3.0, "shape")
    parser.add_argument("--batch", type=int, help="images; default 256 on a GPU, 8 on a CPU")
    args = parser.parse_args()
    batch = args.batch or (256 if args.device == "cuda" else 8)
    writer = runner.Writer("layer_norm_quantize", args.device, args.out)
    for name, (tokens, channels) in SHAPES.items():
        x = torch.randn(batch, tokens, channels, device=args.device)
        weight, bias = torch.randn(2, channels, device=args.device)
        scale, zero = torch.tensor(0.03, device=args.device), torch.tensor(128.0, device=args.device)

        def ours(x=x, w=weight, b=bias, s=scale, z=zero):
            return kernels.layer_norm_quantize(x, w, b, scale=s, zero_point=z)

        if (ours().int() - eager(x, weight, bias, 0.03, 128.0).int()).abs().max() > 1:
            raise SystemExit(f"{name}: fused and eager differ: nothing was timed")
        variants = {"ours": ours, "eager": lambda x=x, w=weight, b=bias: eager(x, w, b, 0.03, 128.0)}
        timings = runner.interleave(variants, args.device, args.seconds)
        for variant, timing in timings.items():
            rate = 5 * x.numel() / timing.median / 1e9  # what must be read and written
            writer.add(shape=name, batch=batch, variant=variant, **timing.row(), gb_per_s=rate)
    writer.show(["shape", "batch", "variant", "p20_ms", "p50_ms", "p80_ms", "calls", "gb_per_s"])


if __name__ == "__main__":
    main()
