"""Accuracy after quantization over models, image sets, calibrations, bits and seeds: the rows of docs/accuracy.md.

Every row compares a quantized model with its float model on the same images: top-1 of both, their difference with a paired
95 % interval (bootstrap over the images), the share of images of one first class, and the KL divergence of the probabilities.
A row that is in --out is not made again, so that a long run can be taken up; synthetic images are made once and kept in --cache.
Calibrations: "synthetic" (the default of the software: 16 images and 48 procedural ones), "procedural" (32 dead-leaves images:
`--fast`), "noise" (32), "real" (32 of the first set, evenly spread, which favours its own rows a little), and "ceiling" (500 of
the model's other set: real images without end, as far as the quantizer is concerned).

python benchmarks/accuracy.py --data FOLDER --out FILE.jsonl     FOLDER as in shared/data
python benchmarks/accuracy_tables.py FILE.jsonl                  writes the tables into docs/accuracy.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import runner
import torch

import dfqvit
from dfqvit.calibration.images import COMPANIONS, with_companions
from dfqvit.cli.options import adjusted
from dfqvit.evaluation.data import open_images, spread_images
from dfqvit.models import Preprocessing, load_model
from dfqvit.studies.ablation import Gallery, score, weights_digest
from dfqvit.synthesis import SynthesisConfig

CIFAR = ("0.4914,0.4822,0.4465", "0.2470,0.2435,0.2616")  # mean and std
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"levels": "uniform"},
    "unscaled": {"scaling": "none"},
    "paper": {"placement": "psaq", "quantizer": "minmax", "acm": "none"},
    "reconstructed": {"reconstruct": 100},
    "alone": {"companions": 0},
}
FEW = {"synthetic": 16, "procedural": 32, "noise": 32, "real": 32, "ceiling": 500}
DRAWS = 2000  # of the bootstrap
BATCH = 25


@dataclass(frozen=True)
class Subject:
    """A model of --data and the sets it is measured on."""

    architecture: str
    checkpoint: str
    sets: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    normalised: tuple[str | None, str | None] = (None, None)


IMAGENET = ("imagenet500", "nips17_500")
SUBJECTS = {
    "DeiT-T": Subject("deit_tiny_patch16_224", "deit_tiny_patch16_224.in1k.safetensors", IMAGENET),
    "ViT-Ti": Subject("vit_tiny_patch16_224", "vit_tiny_patch16_224.in1k.safetensors", IMAGENET),
    "DeiT-T CIFAR-10": Subject(
        "deit_tiny_patch16_224",
        "deit_tiny_patch16_224.cifar10.safetensors",
        ("cifar10_test_517.npz", "cifar10_test_500.npz"),
        {"num_classes": 10},
        CIFAR,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=["default"])
    parser.add_argument("--sources", nargs="+", choices=list(FEW), default=list(FEW)[:4])
    parser.add_argument("--bits", nargs="+", default=["8/8", "6/6", "4/8", "3/8", "4/4"], help="weights/activations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="real images have one only")
    parser.add_argument("--iters", type=int, default=SynthesisConfig.iters)
    parser.add_argument("--precision", default="float32", help="of the synthesis")
    parser.add_argument("--limit", type=int, default=10_000, help="evaluation images of a set, evenly spread")
    parser.add_argument("--cache", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    there = {key_of(row) for row in read(options.out)}
    for name in options.models:
        bench = None
        for run in runs(options, name):
            if key_of(run) in there:
                continue
            bench = bench or Bench(options, name)
            writer = runner.Writer("accuracy", "cpu", options.out)
            bench.add_rows(run, writer)


def runs(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """What tells the rows of one model apart, but for the set."""
    for seed in options.seeds:
        for bits in options.bits:
            w_bits, a_bits = (int(text) for text in bits.split("/"))
            for source in options.sources:
                if source in ("real", "ceiling") and seed != options.seeds[0]:
                    continue
                iters = options.iters if source == "synthetic" else 0
                precision = options.precision if source == "synthetic" else ""
                for recipe in options.recipes:
                    if recipe == "alone" and source != "synthetic":
                        continue
                    yield {
                        "model": name,
                        "recipe": recipe,
                        "calibration": source,
                        "samples": FEW[source],
                        "iters": iters,
                        "precision": precision,
                        "w_bits": w_bits,
                        "a_bits": a_bits,
                        "seed": seed,
                    }


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("model", "recipe", "calibration", "samples", "iters", "precision", "w_bits", "a_bits", "seed")
    return tuple(row.get(name) for name in names)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Bench:
    """One model with its sets in memory and what the float model makes of them."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        subject = SUBJECTS[name]
        self.options = options
        self.model = load_model(subject.architecture, options.data / subject.checkpoint, **subject.arguments)
        self.preprocessing = adjusted(Preprocessing.of(self.model), *subject.normalised)
        self.sets: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for place in subject.sets:
            images = open_images(options.data / place, self.preprocessing, self._classes(place))
            if place == subject.sets[0]:
                self.real = spread_images(images, FEW["real"])
            chosen = range(0, len(images), max(1, -(-len(images) // options.limit)))
            items = [images[index] for index in chosen]
            pixels, labels = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
            self.sets[Path(place).stem] = pixels, labels, logits_of(self.model, pixels)
        self.gallery = Gallery(
            self.model, self.preprocessing, options.cache, weights_digest(self.model, self.preprocessing)
        )

    def _classes(self, place: str) -> Path | None:
        return self.options.data / "imagenet_wnids.txt" if place in IMAGENET else None

    def add_rows(self, run: dict[str, Any], writer: runner.Writer) -> None:
        """Quantizes, once but for the ceiling, and adds a row for every set."""
        if run["calibration"] == "ceiling":
            for place in self.sets:
                (other,) = set(self.sets) - {place}
                images = self.sets[other][0]
                spread = images[:: max(1, len(images) // run["samples"])][: run["samples"]]
                self.measure(run, self.quantized(run, spread), [place], writer)
            return
        calib: str | torch.Tensor = run["calibration"]
        if calib == "real":
            calib = self.real
        elif calib == "synthetic":
            wanted = {name: run[name] for name in ("samples", "iters", "seed", "precision")}
            calib, _ = self.gallery.images(SynthesisConfig(**wanted))
        self.measure(run, self.quantized(run, calib), list(self.sets), writer)

    def quantized(self, run: dict[str, Any], calib: str | torch.Tensor) -> torch.nn.Module:
        """The model by the run's recipe."""
        settings = dict(RECIPES[run["recipe"]])
        if run["calibration"] == "synthetic":  # made beforehand, so what `quantize` puts beside them is put here
            companions = settings.pop("companions", 0 if run["recipe"] == "paper" else COMPANIONS)
            calib = with_companions(calib, companions, run["seed"], self.preprocessing)
        return dfqvit.quantize(
            self.model,
            run["w_bits"],
            run["a_bits"],
            calib=calib,
            samples=run["samples"] if isinstance(calib, str) else len(calib),
            seed=run["seed"],
            preprocessing=self.preprocessing,
            **settings,
        )

    def measure(self, run: dict[str, Any], qmodel: torch.nn.Module, places: list[str], writer: runner.Writer) -> None:
        """Adds a row for each of the sets."""
        for place in places:
            images, labels, wanted = self.sets[place]
            found = logits_of(qmodel, images)
            top1, top5, agreement, kl = score(found, wanted, labels)
            float_top1 = score(wanted, wanted, labels)[0]
            low, high = paired_interval(found.argmax(1) == labels, wanted.argmax(1) == labels)
            figures = {"float_top1": float_top1, "top1": top1, "top5": top5, "low": low, "high": high}
            figures = {key: round(value, 3) for key, value in figures.items()}
            writer.add(**run, data=place, images=len(labels), **figures, agreement=round(agreement, 2), kl=round(kl, 5))
            print(
                f"{run['model']}, {run['recipe']}, {run['calibration']}, W{run['w_bits']}/A{run['a_bits']}, seed "
                f"{run['seed']}, {place}: {top1:.1f} ({top1 - float_top1:+.1f}, {low:+.1f} to {high:+.1f}), KL {kl:.4f}",
                flush=True,
            )


@torch.no_grad()
def logits_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).float() for part in images.split(BATCH)])


def paired_interval(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The 95 % interval, in points, of the difference of two accuracies [n] on the same images: bootstrap, percentiles."""
    difference = ours.double() - theirs.double()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(difference), (DRAWS, len(difference)), generator=generator)
    means = 100 * difference[draws].mean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


if __name__ == "__main__":
    main()
