"""quant_attention against float attention of the same shape, windows included; and what it reads and writes a second.

python benchmarks/quant_attention.py [--device cpu|cuda] [--batch N] [--out FILE.jsonl]

Float attention is torch's scaled_dot_product_attention on q, k and v that stand ready in heads; for Swin, in windows too, the
bias as its mask. What it leaves out (partition, shift, reverse, quantization) is in ours.
"""

from __future__ import annotations

import runner
import torch
import torch.nn.functional as F

from dfqvit import kernels

SHAPES = {  # heads, depth, windows, tokens of a window
    "deit_tiny": (3, 64, 1, 197),
    "deit_base": (12, 64, 1, 197),
    "swin_tiny, stage 1": (3, 32, 64, 49),
    "swin_tiny, stage 3": (12, 32, 4, 49),
}


def main() -> None:
    parser = runner.options(__doc__, 5.0, "shape")
    parser.add_argument("--batch", type=int, help="images; default 256 on a GPU, 8 on a CPU")
    args = parser.parse_args()
    batch = args.batch or (256 if args.device == "cuda" else 8)
    writer = runner.Writer("quant_attention", args.device, args.out)
    for name, (heads, depth, windows, tokens) in SHAPES.items():
        whole = (batch, windows * tokens, 3 * heads * depth)
        qkv = torch.randint(0, 256, whole, dtype=torch.uint8, device=args.device)
        options = {"in_scale": torch.full((3,), 0.02), "in_zero": torch.full((3,), 128.0), "scale": depth**-0.5}
        if windows > 1:
            options["index"] = torch.randperm(windows * tokens, dtype=torch.int32).view(windows, tokens)
            options["bias"] = torch.randn(heads, tokens, tokens)
        options = {key: t.to(args.device) if isinstance(t, torch.Tensor) else t for key, t in options.items()}
        out = {"out_scale": torch.tensor(0.01, device=args.device), "out_zero": torch.tensor(128.0, device=args.device)}
        with kernels.use_backend("reference"):
            expected = kernels.quant_attention(qkv[:1], heads, **options)
        if (kernels.quant_attention(qkv[:1], heads, **options) - expected).abs().max() > 0.1:
            raise SystemExit(f"{name}: fused and reference differ: nothing was timed")
        variants = {"ours": lambda q=qkv, h=heads, o=options | out: kernels.quant_attention(q, h, **o)}
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = torch.randn(3, batch * windows, heads, tokens, depth, device=args.device, dtype=dtype)
            bias = options["bias"].to(dtype)[None] if windows > 1 else None
            variants[str(dtype)[6:]] = lambda q=q, k=k, v=v, m=bias: F.scaled_dot_product_attention(q, k, v, m)
        timings = runner.interleave(variants, args.device, args.seconds)
        moved = qkv.numel() * 4 / 3  # bytes that ours must read and write
        for variant, timing in timings.items():
            ratio = timing.median / timings["ours"].median
            rate = moved / timing.median / 1e9 if variant == "ours" else None
            writer.add(shape=name, batch=batch, variant=variant, **timing.row(), times_ours=ratio, gb_per_s=rate)
    writer.show(["shape", "batch", "variant", "p20_ms", "p50_ms", "p80_ms", "calls", "times_ours", "gb_per_s"])


if __name__ == "__main__":
    main()
