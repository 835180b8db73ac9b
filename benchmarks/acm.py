"""What the activation correction costs: the same computation with and without it, in pairs.

python benchmarks/acm.py [--device cpu|cuda] [--models NAME ...] [--batches 1 32] [--gammas 0 1 2 3 4 6 12] [--out FILE.jsonl]

Operators: quant_linear on the shapes of each ViT (int8 in; fc2 and proj give float32 and add a residual, as in the runtime).
Networks: the integer runtime with every gamma-th block corrected; gamma 0 is a copy without any, which
shows how far two equal models differ by where they lie in memory. A pair is the two variants one after the other, in
an order drawn for each pair; `cost` is the median over the pairs of (with - without) / without, with its 95 % interval by order
statistics, which asks nothing of the distribution.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import runner
import torch
from contenders.serve import open_float
from quant_linear import vit

import dfqvit
from dfqvit import kernels
from dfqvit.models import Preprocessing
from dfqvit.models.adapters import find_adapter

WIDTHS = {"deit_tiny_patch16_224": 192, "deit_small_patch16_224": 384, "deit_base_patch16_224": 768}


def pairs(without: Callable[[], object], with_acm: Callable[[], object], device: str, seconds: float) -> list[float]:
    """Relative costs of as many pairs as fit, at least 15."""
    draw, found = random.Random(0), []
    runner.timed(without, device), runner.timed(with_acm, device)
    start = time.perf_counter()
    while len(found) < 15 or time.perf_counter() - start < seconds:
        first = draw.random() < 0.5
        order = (with_acm, without) if first else (without, with_acm)
        times = [runner.timed(variant, device) for variant in order]
        plain, corrected = reversed(times) if first else times
        found.append(corrected / plain - 1)
    return found


def summary(costs: list[float]) -> dict[str, object]:
    """In percent. The interval's ends are the order statistics that a fair coin's 95 % band reaches."""
    ordered, n = sorted(costs), len(costs)
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return {
        "pairs": n,
        "cost_percent": 100 * statistics.median(costs),
        "interval_percent": [100 * ordered[low], 100 * ordered[high]],
    }


def layer_case(
    rows: int, tokens: int, layer: str, outputs: int, inputs: int, device: str
) -> list[Callable[[], object]]:
    """Calls without and with the correction, the rest as the runtime has it."""
    weight = torch.randn(outputs, inputs, device=device) / inputs**0.5
    w_scale = weight.abs().amax(1) / 127.5
    packed = kernels.pack_weight(weight, w_scale, 8)
    packed = kernels.block_weight(packed, inputs, 8) if device == "cpu" else packed
    x = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8, device=device)
    bias = torch.randn(outputs, device=device)
    acm = torch.randn(tokens, outputs, device=device).half()  # as it is stored
    options: dict[str, object] = {
        "x_scale": torch.tensor(0.03, device=device),
        "x_zero": torch.tensor(128.0, device=device),
    }
    if layer in ("proj", "fc2"):
        options["residual"] = torch.randn(rows, outputs, device=device)
    else:
        options["out_scale"] = torch.full((outputs,), 0.05, device=device)
        options["out_zero"] = torch.full((outputs,), 128.0, device=device)
        options["activation"] = "gelu" if layer == "fc1" else None

    def call(correction: torch.Tensor | None) -> Callable[[], object]:
        return partial(
            kernels.quant_linear, x, packed, bias, correction, w_scale=w_scale, a_bits=8, w_bits=8, **options
        )

    return [call(None), call(acm)]


def network(name: str, device: str) -> torch.nn.Module:
    """A quantized model in the integer runtime, random weights: times do not depend on them."""
    recipe = {"calib": "noise", "samples": 2, "quantizer": "minmax", "rounding": "nearest", "acm": "none"}
    return dfqvit.quantize(open_float(name, None).to(device), 8, 8, runtime="integer", **recipe)


def corrected(model: torch.nn.Module, gamma: int) -> tuple[torch.nn.Module, int]:
    """A copy with every gamma-th block corrected, counted back from the last; and how many those are. With gamma 0 none."""
    model = copy.deepcopy(model)
    if gamma == 0:
        return model, 0
    adapter = find_adapter(model)
    shapes: dict[int, torch.Size] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, y, i=i: shapes.update({i: y.shape}))
        for i, block in enumerate(adapter.blocks())
    ]
    device = next(model.buffers()).device
    model(torch.zeros(1, *Preprocessing.of(model).input_size, device=device))
    for hook in hooks:
        hook.remove()
    chosen = range(len(shapes) - 1, -1, -gamma)
    for index in chosen:
        tokens, channels = shapes[index][1:-1].numel(), shapes[index][-1]
        adapter.set_acm(index, 1e-3 * torch.randn(tokens, channels, device=device).half())
    return model, len(chosen)


def compare_layers(name: str, args: argparse.Namespace, writer: runner.Writer) -> None:
    for layer, (tokens, outputs, inputs) in vit(WIDTHS[name]).items():
        for batch in args.batches:
            case = layer_case(batch * tokens, tokens, layer, outputs, inputs, args.device)
            costs = pairs(*case, args.device, args.seconds)
            writer.add(model=name, layer=layer, batch=batch, **summary(costs))


def compare_networks(name: str, args: argparse.Namespace, writer: runner.Writer) -> None:
    model = network(name, args.device)
    size = Preprocessing.of(model).input_size
    for gamma in args.gammas:
        other, blocks = corrected(model, gamma)
        for batch in args.batches:
            x = torch.randn(batch, *size, device=args.device)
            costs = pairs(partial(model, x), partial(other, x), args.device, args.seconds)
            writer.add(model=name, gamma=gamma, blocks=blocks, batch=batch, **summary(costs))


def main() -> None:
    parser = runner.options(__doc__, 4.0, "comparison")
    parser.add_argument("--models", nargs="+", default=list(WIDTHS), help="timm names")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--gammas", nargs="+", type=int, default=[0, 1, 2, 3, 4, 6, 12])
    parser.add_argument("--parts", nargs="+", default=["layers", "networks"], choices=["layers", "networks"])
    args = parser.parse_args()
    writer = runner.Writer("acm", args.device, args.out)
    with torch.no_grad():
        for name in args.models:
            if "layers" in args.parts and name in WIDTHS:
                compare_layers(name, args, writer)
            if "networks" in args.parts:
                compare_networks(name, args, writer)
    writer.show(["model", "layer", "gamma", "blocks", "batch", "pairs", "cost_percent", "interval_percent"])


if __name__ == "__main__":
    main()
