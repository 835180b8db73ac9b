"""Runs the studies of `studies`: every run is one row of a CSV, and a row that is there is not run again.

Synthetic images are made once for each seed and setting of the synthesis, kept as they were optimised, and finished when they
are read, so that bit widths, corrections and spectra reuse them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from ..api import quantize
from ..errors import DfqvitError
from ..evaluation import count_hits
from ..evaluation.accuracy import logits_of
from ..models import Preprocessing
from ..storage.atomic import atomic
from ..synthesis import Progress, Synthesis, SynthesisConfig
from ..synthesis.loop import structure_of
from ..synthesis.writing import write_tensors
from .named import Setting

REAL_IMAGES = 32  # and of noise: as in PSAQ-ViT's comparison


@dataclass(frozen=True)
class Row:
    """One run. The fields up to `iters` say which; the others what was found: percent of the evaluation images, nats, seconds."""

    model: str
    weights: str  # digest
    data: str
    images: int  # for evaluation
    study: str
    recipe: str
    setting: str
    x: float | None
    seed: int
    w_bits: int
    a_bits: int
    samples: int
    iters: int
    float_top1: float
    top1: float
    top5: float
    agreement: float  # percent of images of the float model's first class
    kl: float  # mean, of the float model's class probabilities from the quantized one's
    seconds: float  # of the calibration
    synthesis_seconds: float  # 0 when the images were there

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells runs apart."""
        names = [field.name for field in fields(Row)]
        return tuple(getattr(self, name) for name in names[: names.index("float_top1")])


class Table:
    """The rows of a CSV file, rewritten atomically with every new row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path) if path.exists() else []

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return any(row.key == key for row in self.rows)

    def expect_same(self, model: str, weights: str, data: str, images: int, float_top1: float) -> None:
        """DfqvitError where a row of this model and data has another accuracy of the float model: its images were others."""
        for row in self.rows:
            same = (row.model, row.weights, row.data, row.images) == (model, weights, data, images)
            if same and abs(row.float_top1 - float_top1) > 1e-3:  # the file holds six digits
                raise DfqvitError(
                    f"'{self.path}' has rows of other images under the name '{data}': the float model had {row.float_top1:.2f} % "
                    f"of them right, and has {float_top1:.2f} % now; give another --out"
                )

    def add(self, row: Row) -> None:
        """Appends a row and writes the file."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [field.name for field in fields(Row)]
        writer.writerow(names)
        for each in self.rows:
            values = (getattr(each, name) for name in names)
            writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
        with atomic(self.path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV of `Table`; DfqvitError when it is none."""
    kinds = {field.name: str(field.type) for field in fields(Row)}
    read: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "float": float,
        "float | None": lambda text: float(text) if text else None,
    }
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Row(**{name: read[kinds[name]](text) for name, text in row.items()}) for row in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise DfqvitError(f"'{path}' is no table of `dfqvit ablate`; give another --out") from error


def weights_digest(model: nn.Module, preprocessing: Preprocessing) -> str:
    """Eight hexadecimal digits that tell one set of weights from another, the structure it is in, and what normalised its input."""
    digest = hashlib.sha256(json.dumps([asdict(preprocessing), structure_of(model)]).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


class Gallery:
    """Synthetic images of one model in a folder, each run made once. An interrupted one goes on from its snapshot."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, folder: Path, weights: str) -> None:
        self.model, self.preprocessing, self.folder, self.weights = model, preprocessing, folder, weights

    def images(self, config: SynthesisConfig, report: Callable[[Progress], None] | None = None) -> tuple[Any, float]:
        """(finished images [samples, C, H, W], seconds that it took to make them)."""
        settings = {key: value for key, value in config.to_dict().items() if key != "spectrum"}
        digest = hashlib.sha256(json.dumps([self.weights, settings], sort_keys=True).encode()).hexdigest()[:8]
        path = self.folder / f"{config.samples}x{config.iters}_seed{config.seed}_{digest}.safetensors"
        seconds = 0.0
        if not path.exists():
            started = time.perf_counter()
            self.folder.mkdir(parents=True, exist_ok=True)
            steps = replace(config, spectrum="free")  # the finish is not theirs, and a snapshot serves any
            run = Synthesis(self.model, steps, self.preprocessing, path.with_suffix(".snapshot"))
            run.resume()
            run.run(report)
            seconds = time.perf_counter() - started
            write_tensors(path, {"images": run.images.detach().cpu()}, {})
            path.with_suffix(".snapshot").unlink(missing_ok=True)
        try:
            kept = safetensors.torch.load_file(path)["images"]
        except (safetensors.SafetensorError, KeyError) as error:
            raise DfqvitError(f"'{path}' could not be read: {error}; remove it to have it made again") from error
        finishing = Synthesis(self.model, config, self.preprocessing)
        finishing.images.copy_(kept)
        return finishing.advance.finished(), seconds


@dataclass
class Bench:
    """The images to evaluate on, and what the float model makes of them."""

    name: str
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
    real: torch.Tensor  # of "real" calibration

    @torch.no_grad()
    def logits(self, model: nn.Module) -> torch.Tensor:
        """[images, classes]."""
        return torch.cat([logits_of(model, images, "a model of the study") for images, _ in self.batches])

    @property
    def labels(self) -> torch.Tensor:
        """[images]."""
        return torch.cat([labels for _, labels in self.batches])


def run_study(
    model: nn.Module,
    preprocessing: Preprocessing,
    bench: Bench,
    table: Table,
    gallery: Gallery,
    settings: Iterable[Setting],
    *,
    study: str,
    recipe: str,
    architecture: str,
    seeds: Sequence[int],
    bits: Sequence[int],
    samples: int,
    iters: int,
    report: Callable[[Progress], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Adds the missing rows of a study to the table. Noise and real images, which no seed changes much, run for the first seed.

    DfqvitError where the table has rows of other images, or of another order of the classes, under the same name.
    """
    wanted, labels = bench.logits(model), bench.labels
    float_top1 = count_hits(wanted, labels, 1) * 100 / len(labels)
    table.expect_same(architecture, gallery.weights, bench.name, len(labels), float_top1)
    same: dict[str, Any] = {
        "model": architecture,
        "weights": gallery.weights,
        "data": bench.name,
        "images": len(labels),
        "study": study,
        "recipe": recipe,
    }
    for setting, config, own in _runs(settings, seeds, bits, samples, iters, len(bench.real)):
        run = same | own
        if tuple(run.values()) in table:
            continue
        spent = 0.0
        calib: str | torch.Tensor = bench.real if setting.source == "real" else "noise"
        if setting.source == "synthetic":
            calib, spent = gallery.images(config, report)
        started = time.perf_counter()
        qmodel = quantize(
            model,
            run["w_bits"],
            calib=calib,
            samples=run["samples"],
            seed=run["seed"],
            preprocessing=preprocessing,
            progress=False,
            **setting.quantization,
        )
        seconds = time.perf_counter() - started
        top1, top5, agreement, kl = score(bench.logits(qmodel), wanted, labels)
        row = Row(
            **run,
            float_top1=float_top1,
            top1=top1,
            top5=top5,
            agreement=agreement,
            kl=kl,
            seconds=round(seconds, 2),
            synthesis_seconds=round(spent, 2),
        )
        table.add(row)
        if announce is not None:
            announce(f"{study}: {setting.name}, W{row.w_bits}/A{row.a_bits}, seed {row.seed}: top-1 {row.top1:.2f}")


def _runs(
    settings: Iterable[Setting], seeds: Sequence[int], bits: Sequence[int], samples: int, iters: int, real: int
) -> Iterator[tuple[Setting, SynthesisConfig, dict[str, Any]]]:
    """Of each run the setting, its synthesis, and what tells it from others of the study; `real`: count of real images."""
    for seed in seeds:
        for setting in settings:
            if setting.source != "synthetic" and seed != seeds[0]:
                continue
            config = SynthesisConfig(**{"samples": samples, "iters": iters, **setting.synthesis, "seed": seed})
            counts = {"synthetic": (config.samples, config.iters), "noise": (REAL_IMAGES, 0), "real": (real, 0)}
            count, steps = counts[setting.source]
            a_bits = int(setting.quantization.get("a_bits", 8))
            for w_bits in bits:
                yield (
                    setting,
                    config,
                    {
                        "setting": setting.name,
                        "x": setting.x,
                        "seed": seed,
                        "w_bits": w_bits,
                        "a_bits": a_bits,
                        "samples": count,
                        "iters": steps,
                    },
                )


def score(logits: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float, float]:
    """(top-1, top-5, agreement, KL) of logits [n, classes] against the float model's and the labels."""
    kl = (wanted.softmax(1) * (wanted.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    share = 100 / max(len(labels), 1)
    agreement = int((logits.argmax(1) == wanted.argmax(1)).sum())
    return count_hits(logits, labels, 1) * share, count_hits(logits, labels, 5) * share, agreement * share, float(kl)
