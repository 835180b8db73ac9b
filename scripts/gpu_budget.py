"""What the GPU kernels cost on a GPU that is not there: counted in their machine code, times predicted.

    python scripts/gpu_budget.py [--out FILE] [--only linear attention entropy model]

Compiles the kernels for sm_90a with nvcc (and LayerNorm by Triton), disassembles them with cuobjdump (the toolkit's, or the one
that Triton brings along) and follows a warp's way through them. For attention, the entropy and LayerNorm a multiprocessor is then
run cycle by cycle with what the compiler says of each instruction (scripts/budget/machine.py), so that waiting is in the time; for
quant_linear the busiest part counts (scripts/budget/linear.py). `floor` is the busiest part of this code. Nothing is measured: the
simulation of attention's kernel as it was when an H100 took 310 us for a layer gives 260 us. Exit status 1 without tools.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from budget import attention, entropy, layer_norm, linear, sass, whole
from budget.kernel import Prediction
from budget.machine import H200

PARTS = ("linear", "attention", "entropy", "model")
HEADS = 256 * 12  # of DeiT-B at batch 256
TOKENS, DEPTH = 197, 64
# Of a block and of a multiprocessor (`warps_for`, asserted by the tests of the kernel).
ATTENTION_WARPS, ATTENTION_BLOCKS = 3, 5


def vit_attention() -> Prediction:
    """One layer of DeiT-B at batch 256."""
    kernel = attention.kernel(TOKENS, DEPTH)
    return attention.predict(kernel, TOKENS, DEPTH, ATTENTION_WARPS, ATTENTION_BLOCKS, HEADS, H200)


def table(rows: list[Prediction]) -> str:
    """Markdown."""
    lines = [
        "| us | issue | tensor cores | special functions | arithmetic | shared memory | bytes | floor | predicted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = (row.issue, row.tensor, row.special, row.arithmetic, row.shared, row.memory, row.floor, row.time)
        lines.append(f"| {row.name} | " + " | ".join(f"{part:.0f}" for part in parts) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines of every kernel are written here too")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these alone")
    args = parser.parse_args()
    if sass.tools() is None:
        print("gpu_budget: no nvcc, or no cuobjdump: nothing can be counted", file=sys.stderr)
        return 1
    records: list[dict[str, object]] = []
    if "linear" in args.only:
        for bits, tiles in ((8, True), (8, False), (4, False)):
            counts = linear.count(bits, tiles)
            print(linear.table(counts, bits, tiles), end="\n\n")
            for layer in linear.layers(counts, 768, 256 * TOKENS):
                records.append({"bits": bits, "tiles": tiles, **asdict(counts), **asdict(layer), "time": layer.time})
    rows = [vit_attention()] if {"attention", "model"} & set(args.only) else []
    norms = {}
    if "model" in args.only:
        norms = {name: layer_norm.predict(256 * TOKENS, width, H200) for name, width in whole.MODELS.items()}
        rows += norms.values()
    if "entropy" in args.only:
        found = entropy.predictions(H200)
        rows += found.values()
        times = entropy.times(found)
    print(table(rows), end="\n\n")
    records += [asdict(row) for row in rows]
    if "entropy" in args.only:
        print(
            f"Entropy, 12 layers x 32 images: forward {times['forward']:.0f} us, backward {times['backward']:.0f} us.\n"
        )
        records.append({"name": "entropy", **times})
    if "model" in args.only:
        print("| ms, batch 256 | linear | attention | norms | rest | together | bf16 |\n|---|---|---|---|---|---|---|")
        counts = linear.count(8, True)
        for name, norm in norms.items():
            one = whole.model(name, counts, rows[0].time, norm.time)
            parts = (one.linear, one.attention, one.norms, one.rest, one.total, one.bf16)
            print(f"| {name} | " + " | ".join(f"{part:.2f}" for part in parts) + " |")
            records.append({**asdict(one), "total": one.total})
    if args.out:
        args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
