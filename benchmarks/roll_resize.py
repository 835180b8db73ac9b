"""roll_resize against torch's own roll and grid_sample, forward and backward, on the crops of a synthesis; bytes a second.

python benchmarks/roll_resize.py [--device cpu|cuda] [--out FILE.jsonl]
"""

from __future__ import annotations

import runner
import torch
import torch.nn.functional as F

from dfqvit import kernels

SIDE, BATCH = 224, 16
SHARES = [1.0, 0.08]  # of the area: the first and the last crop of the curriculum


def grid_sampled(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The same by two operators of torch; the grid names every pixel, though it is separable."""
    rolled = torch.stack(
        [i.roll((-down, -across), (1, 2)) for i, (down, across) in zip(x, shift.tolist(), strict=True)]
    )
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)
    return F.grid_sample(rolled, 2 * grid / (SIDE - 1) - 1, align_corners=True, padding_mode="border")


def main() -> None:
    args = runner.options(__doc__, 5.0, "crop").parse_args()
    writer = runner.Writer("roll_resize", args.device, args.out)
    for share in SHARES:
        x = torch.randn(BATCH, 3, SIDE, SIDE, device=args.device, requires_grad=True)
        crop = (SIDE - 1) * share**0.5
        start = torch.rand(2, BATCH, 1, device=args.device) * (SIDE - 1 - crop)
        rows, columns = (start + torch.linspace(0, crop, SIDE, device=args.device)).unbind(0)
        shift = torch.randint(-16, 17, (BATCH, 2), device=args.device)
        sample = (rows, columns, shift)
        if not torch.allclose(kernels.roll_resize(x, *sample), grid_sampled(x, *sample), atol=1e-3):
            raise SystemExit("roll_resize and grid_sample differ: nothing was timed")
        gradient = torch.randn_like(x)

        def both(function, x=x, sample=sample, gradient=gradient):
            return torch.autograd.grad(function(x, *sample), x, gradient)

        variants = {
            "forward": (lambda x=x, s=sample: kernels.roll_resize(x.detach(), *s), 1 + share),
            "forward, grid_sample": (lambda x=x, s=sample: grid_sampled(x.detach(), *s), 1 + share),
            "both": (lambda both=both: both(kernels.roll_resize), 3 + share),
            "both, grid_sample": (lambda both=both: both(grid_sampled), 3 + share),
        }
        timings = runner.interleave({name: run for name, (run, _) in variants.items()}, args.device, args.seconds)
        for name, timing in timings.items():
            moved = variants[name][1] * x.numel() * 4  # what must be read and written
            writer.add(variant=name, share=share, **timing.row(), gb_per_s=moved / timing.median / 1e9)
    writer.show(["share", "variant", "p20_ms", "p50_ms", "p80_ms", "calls", "gb_per_s"])


if __name__ == "__main__":
    main()
