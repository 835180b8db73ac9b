"""round_second_order on layers of DeiT-T and DeiT-B against its plain-torch form, and what it gains over the nearest integers.

python benchmarks/round_second_order.py [--out FILE.jsonl]
"""

from __future__ import annotations

import runner
import torch

from dfqvit import kernels
from dfqvit.quantization.rounding import INPUT_DAMPING, OUTPUT_DAMPING, damped

LAYERS = {"DeiT-T qkv": (576, 192), "DeiT-T fc1": (768, 192), "DeiT-T fc2": (192, 768), "DeiT-B fc1": (3072, 768)}
MOST_PLAIN = 1 << 18  # weights of a layer that the plain form is timed on
BITS, SWEEPS = 4, 8


def moment(size: int, damping: float) -> torch.Tensor:
    """Of correlated vectors, damped."""
    x = torch.randn(2 * size, size // 3) @ torch.randn(size // 3, size) + 0.1 * torch.randn(2 * size, size)
    return damped(x.T @ x, damping)


def cost(weight: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, *moments: torch.Tensor) -> float:
    """trace(O E I E^T)."""
    e = weight - integers * scale[:, None]
    return float(((moments[1] @ e @ moments[0]) * e).sum(dtype=torch.float64))


def main() -> None:
    args = runner.options(__doc__, 10.0, "layer", device=False).parse_args()
    torch.manual_seed(0)
    writer = runner.Writer("round_second_order", "cpu", args.out)
    for name, (rows, columns) in LAYERS.items():
        weight = torch.randn(rows, columns)
        scale = weight.abs().amax(dim=1) / (1 << (BITS - 1))
        moments = moment(columns, INPUT_DAMPING), moment(rows, OUTPUT_DAMPING)
        arguments = weight, scale, *moments
        found = kernels.round_second_order(*arguments, bits=BITS, sweeps=SWEEPS)
        half = 1 << (BITS - 1)
        nearest = (weight / scale[:, None]).round().clamp(-half, half - 1)
        share = cost(weight, found, scale, *moments) / cost(weight, nearest, scale, *moments)

        def run(backend: str, arguments: tuple[torch.Tensor, ...] = arguments) -> torch.Tensor:
            with kernels.use_backend(backend):
                return kernels.round_second_order(*arguments, bits=BITS, sweeps=SWEEPS)

        variants = {"dfqvit": lambda run=run: run("cpu")}
        if rows * columns <= MOST_PLAIN:
            variants["plain torch"] = lambda run=run: run("reference")
        products = SWEEPS * rows * columns * (rows + columns)  # multiply-adds of the matrix products, in full sweeps
        for variant, timing in runner.interleave(variants, "cpu", args.seconds, least_rounds=2).items():
            row = {**timing.row(), "gmac_per_s": products / timing.median / 1e9, "cost_of_nearest": share}
            writer.add(layer=name, variant=variant, **row)
    writer.show(["layer", "variant", "p20_ms", "p50_ms", "p80_ms", "calls", "gmac_per_s", "cost_of_nearest"])


if __name__ == "__main__":
    main()
