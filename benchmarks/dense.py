"""Detection and segmentation after quantization: the rows of docs/dense.md.

Each row is one quantized model of the two embedded ones, with mAP@50 and mAP, or mIoU and pixel accuracy, on held-out scenes,
beside the float model's. Calibrations, 16 images each: "synthetic" (no class term: the backbone's entropy alone), "objective"
(synthetic, with an objective of the outputs beside it), "procedural", "noise", and "real" (scenes of training items, which
favours its own rows). Recipes: "default" of the software, and "paper" (min-max, psaq placement); each without ACM and with it on
every block. A row that is in --out is not made again.

python benchmarks/dense.py --out FILE.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import runner
import torch

import dfqvit
from dfqvit.evaluation import scenes
from dfqvit.evaluation.dense import evaluate_dense
from dfqvit.evaluation.dense_data import SceneImages
from dfqvit.models import Preprocessing, demo, load_model

RECIPES: dict[str, dict[str, Any]] = {"default": {}, "paper": {"placement": "psaq", "quantizer": "minmax"}}
SOURCES = ("synthetic", "objective", "procedural", "noise", "real")
TASKS = {"demo-detector": "detection", "demo-segmenter": "segmentation"}
REAL_SEED = 1000  # of the scenes that "real" calibrates on, to which a row's seed is added
KEY = ("model", "recipe", "acm", "calibration", "samples", "iters", "w_bits", "a_bits", "seed", "scenes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--acm", nargs="+", choices=["none", "sequential"], default=["none", "sequential"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3], help="of the weights; activations have 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    there = {key_of(json.loads(line)) for line in lines}
    for name in options.models:
        bench = None
        for run in runs(options, name):
            if key_of(run) not in there:
                bench = bench or Bench(name, options.scenes)
                bench.add_row(run, runner.Writer("dense", "cpu", options.out))


def runs(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    for seed in options.seeds:
        for source in options.sources:
            for recipe in options.recipes:
                for acm in options.acm:
                    for bits in options.bits:
                        iters = options.iters if source in ("synthetic", "objective") else 0
                        own = {"model": name, "recipe": recipe, "acm": acm, "calibration": source, "seed": seed}
                        own |= {"samples": options.samples, "iters": iters, "w_bits": bits, "a_bits": 8}
                        yield {**own, "scenes": options.scenes}


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def confident(outputs: Any) -> torch.Tensor:
    """An objective for dense outputs: every image shall hold all classes, each with confidence somewhere.

    For a segmenter the entropy of each pixel's classes less that of their mean over an image; for a detector the cross-entropy
    of each class at the 5 places that have most of it.
    """
    if isinstance(outputs, tuple):
        best = outputs[0].float().topk(5, dim=1).values
        return -torch.nn.functional.logsigmoid(best).mean()
    p = outputs.float().softmax(dim=1)
    mean = p.mean((2, 3))
    return -(p * p.clamp_min(1e-8).log()).sum(1).mean() + (mean * mean.clamp_min(1e-8).log()).sum(1).mean()


class Bench:
    """One float model, the held-out scenes and the images of each calibration."""

    def __init__(self, name: str, count: int) -> None:
        self.task = TASKS[name]
        self.network = load_model(name)
        self.preprocessing = Preprocessing.of(self.network)
        self.held = SceneImages(scenes.compose(count), self.preprocessing, self.task)
        self.items = scenes.items_of(demo.TRAIN_SAMPLE)
        self.base = self.measured(self.network)
        self.made: dict[tuple[Any, ...], torch.Tensor] = {}

    def measured(self, network: torch.nn.Module) -> dict[str, float]:
        found = evaluate_dense(network, self.held.batches(50), self.task).figures
        return {name: round(value, 3) for name, value in found.items()}

    def images(self, run: dict[str, Any]) -> torch.Tensor | str:
        source, seed = run["calibration"], run["seed"]
        if source in ("procedural", "noise"):
            return source
        if source == "real":
            return self.preprocessing.normalise(scenes.compose(run["samples"], REAL_SEED + seed, self.items).images)
        key = (source, run["samples"], run["iters"], seed)
        if key not in self.made:
            objective = confident if source == "objective" else None
            self.made[key] = dfqvit.synthesize(self.network, run["samples"], run["iters"], seed, objective=objective)
        return self.made[key]

    def add_row(self, run: dict[str, Any], writer: runner.Writer) -> None:
        """Quantizes, measures, and adds a row."""
        qmodel = dfqvit.quantize(
            self.network,
            run["w_bits"],
            run["a_bits"],
            calib=self.images(run),
            samples=run["samples"],
            seed=run["seed"],
            acm=run["acm"],
            acm_blocks=None,
            progress=False,
            **RECIPES[run["recipe"]],
        )
        figures = self.measured(qmodel)
        base = {f"float {name}": value for name, value in self.base.items()}
        writer.add(**run, **figures, **base)
        shown = ", ".join(f"{name} {value:.2f} ({value - self.base[name]:+.2f})" for name, value in figures.items())
        print(
            f"{', '.join(str(run[key]) for key in KEY[:4])}, W{run['w_bits']}, seed {run['seed']}: {shown}", flush=True
        )


if __name__ == "__main__":
    main()
