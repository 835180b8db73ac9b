"""Top-1 after quantization, by where the calibration images come from: the table of docs/accuracy.md.

Sources: "real" (of the evaluation images, evenly spread), "noise", "free" (synthetic images as they were optimised) and
"natural" (the same, finished with a photograph's spectrum: the default). Recipes: "default", and "paper", PSAQ-ViT's placement
and min-max ranges, without ACM, with ACM on the last block, and with ACM on every block, checked and shrunk. Noise and real
images are measured for the first seed only.

python benchmarks/accuracy.py deit_tiny_patch16_224 --checkpoint FILE --data FOLDER --wnids FILE --out FILE.jsonl
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import runner
import torch

import dfqvit
from dfqvit.cli.options import adjusted
from dfqvit.evaluation import evaluate
from dfqvit.evaluation.data import batches, open_images, spread_images
from dfqvit.models import Preprocessing, load_model
from dfqvit.studies.ablation import Gallery, weights_digest
from dfqvit.synthesis import SynthesisConfig

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"placement": "psaq", "quantizer": "minmax", "acm": "none"},
    "paper + ACM": {"placement": "psaq", "quantizer": "minmax", "acm": "sequential", "acm_blocks": [-1]},
    "paper + checked ACM": {
        "placement": "psaq",
        "quantizer": "minmax",
        "acm": "checked",
        "acm_blocks": None,
        "acm_shrink": True,
    },  # what "auto" is at 3 bits
}
REAL = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--mean")
    parser.add_argument("--std")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--wnids", type=Path)
    parser.add_argument("--limit", type=int, default=10_000, help="evaluation images, evenly spread")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--iters", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--sources", nargs="+", default=["real", "noise", "free", "natural"])
    parser.add_argument("--cache", type=Path, default=Path("out/accuracy"), help="where optimised images are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    model = load_model(options.model, options.checkpoint, num_classes=options.num_classes)
    preprocessing = adjusted(Preprocessing.of(model), options.mean, options.std)
    test = open_images(options.data, preprocessing, options.wnids)
    chosen = range(0, len(test), max(1, len(test) // options.limit))
    held = list(batches(torch.utils.data.Subset(test, chosen), 50))
    writer = runner.Writer("accuracy", "cpu", options.out)
    common = {"model": options.model, "data": options.data.name, "samples": options.samples, "iters": options.iters}
    floating = evaluate(model, held)
    writer.add(**common, recipe="float", images=floating.images, top1=floating.top1, top5=floating.top5)
    gallery = Gallery(model, preprocessing, options.cache, weights_digest(model, preprocessing))
    for seed in options.seeds:
        config = SynthesisConfig(samples=options.samples, iters=options.iters, seed=seed)
        images: dict[str, str | torch.Tensor] = {"noise": "noise"}
        if "real" in options.sources and seed == options.seeds[0]:
            images["real"] = spread_images(test, REAL)
        if {"free", "natural"} & set(options.sources):
            for spectrum in ("free", "natural"):
                images[spectrum], _ = gallery.images(replace(config, spectrum=spectrum))
        for source in options.sources:
            if source not in images or (source == "noise" and seed != options.seeds[0]):
                continue
            for recipe in options.recipes:
                for bits in options.bits:
                    count = REAL if source in ("real", "noise") else options.samples
                    qmodel = dfqvit.quantize(
                        model,
                        bits,
                        calib=images[source],
                        samples=count,
                        seed=seed,
                        preprocessing=preprocessing,
                        **RECIPES[recipe],
                    )
                    found = evaluate(qmodel, held)
                    row = {"recipe": recipe, "calibration": source, "w_bits": bits, "seed": seed}
                    writer.add(**common, **row, images=found.images, top1=found.top1, top5=found.top5)
                    print(f"{recipe:12} {source:8} W{bits}/A8 seed {seed}: {found.top1:.1f}", flush=True)
    print(writer.table(["recipe", "calibration", "w_bits", "seed", "top1", "top5", "images"]))


if __name__ == "__main__":
    main()
