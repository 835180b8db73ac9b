"""The known ways in which a data-free quantization goes wrong, recognised in a saved model; `dfqvit diagnose`.

Thresholds lie between what healthy runs and broken ones show: docs/ablations.md has the figures.
"""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.correction import STORED, block_outputs, divergence
from ..calibration.given import MOST_OUTSIDE, judge
from ..errors import UsageError
from ..models.adapters import Adapter, find_adapter
from ..models.adapters.scalings import scalings
from ..quantization.layers import QuantLinear, quantized_layers
from ..runtime.record import QuantizationRecord
from ..synthesis.config import SynthesisConfig
from ..synthesis.curriculum import crop_ratio

MOST_HIGH = 0.5  # share of energy at high frequencies: healthy images up to 0.3, noise 0.8
LEAST_CONTRAST = 0.03  # of pixels from 0 to 1: healthy 0.1 and more
MOST_LIKENESS = 0.8  # correlation between images: healthy up to 0.35
LEAST_SAMPLES = 8
LEAST_STEPS = 50
MOST_BLOCK = 0.25  # divergence of a block's output, as a share of its energy
MOST_RESULTS = 0.5  # of what tells one image's results from another's: 0.2 of DeiT-T at W4/A8, 0.46 at W3/A8
MOST_LAYER = 0.25  # the same of a linear layer's
OUTLIER = 4.0  # a layer stands out when it is this many times the median
OTHER = 10.0  # so many times as far as when it was made: a layer of another model
MOST_LEFT = 1.0  # of the divergence, after a correction on its own images
MOST_FOREIGN = 1.2  # the same on images it was not made from
MOST_CORRECTION = 1.0  # a correction's root mean square as a share of its block's output's
MOST_STORED = torch.finfo(STORED).max / 2


@dataclass(frozen=True)
class Finding:
    """One failure: its name, what was measured against which threshold, and what to do; a `weight` of 1 is just over it."""

    signature: str
    weight: float
    measured: float
    threshold: float
    what: str
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def diagnose(
    qmodel: nn.Module, model: nn.Module | None = None, images: torch.Tensor | None = None
) -> tuple[list[Finding], dict[str, Any]]:
    """(findings, gravest first; measurements) for a model from `dfqvit.load(..., runtime="simulated")`.

    Args:
        qmodel: has a `dfqvit_record`.
        model: the float model, to measure layers and corrections on `images`; without it the record alone speaks.
        images: [n, C, H, W], normalised; needed with `model`.

    Raises:
        UsageError: `model` has other layers or blocks than `qmodel` was made from.
    """
    record: QuantizationRecord = qmodel.dfqvit_record  # type: ignore[assignment]
    measured: dict[str, Any] = dict(record.measured)
    findings = [
        *_samples(record, measured),
        *_normalisation(record, measured),
        *_schedule(record),
        *_correction(qmodel, measured),
    ]
    if model is not None:
        assert images is not None
        _expect_layers(model, qmodel)
        measured["layers"] = layer_divergence(model, qmodel, images)
        _tell_another_model(measured)
        measured["foreign"] = correction_effect(model, qmodel, images)
        findings += _foreign(measured["foreign"])
    findings += _divergence(measured)
    return sorted(findings, key=lambda finding: -finding.weight), measured


def _expect_layers(model: nn.Module, qmodel: nn.Module) -> None:
    """UsageError unless `model` has every layer that was quantized, of its shape, and as many blocks."""
    modules = dict(model.named_modules())
    kinds = f"{type(model).__name__} is not what the quantized {type(qmodel).__name__} was made from"
    for name, twin in quantized_layers(qmodel).items():
        weight = getattr(modules.get(name), "weight", None)
        shape = None if weight is None else (weight.shape[0], weight[0].numel())
        if shape != (twin.out_features, twin.in_features):
            has = "no such layer" if shape is None else f"{shape[1]} to {shape[0]} features there"
            raise UsageError(
                f"against: this {kinds}: '{name}' is {twin.in_features} to {twin.out_features} features, and it has {has}"
            )
    depths = [len(find_adapter(each).blocks()) for each in (model, qmodel)]
    if depths[0] != depths[1]:
        raise UsageError(f"against: this {kinds}: it has {depths[0]} blocks, and that one {depths[1]}")


def _tell_another_model(measured: dict[str, Any]) -> None:
    """Warns where the layers lie far from the float model's, and the blocks lay close to those of the one that was quantized."""
    usual, blocks = statistics.median(measured["layers"].values()), measured.get("divergence") or [1.0]
    if usual > MOST_LAYER and max(blocks) < usual / OTHER:
        warnings.warn(
            f"half of the layers are {usual:.0%} of their energy or more off those of against, where the blocks were at most "
            f"{max(blocks):.2%} off when FILE was made: against looks like another model, or one of other weights (--checkpoint)",
            stacklevel=3,
        )


def _over(
    signature: str, value: float, threshold: float, what: str, advice: str, scale: float = 1.0
) -> Iterator[Finding]:
    if not value <= threshold:  # NaN is a finding too
        weight = scale * (value / threshold if value == value else 100.0)
        yield Finding(signature, round(weight, 3), value, threshold, what, advice)


def _under(signature: str, value: float, threshold: float, what: str, advice: str) -> Iterator[Finding]:
    if value < threshold:
        yield Finding(signature, round(threshold / max(value, 1e-3), 3), value, threshold, what, advice)


def _samples(record: QuantizationRecord, measured: dict[str, Any]) -> Iterator[Finding]:
    images = measured.get("images", {})
    again = f"quantize again with --iters {SynthesisConfig.iters} and the default schedule"
    if record.calibration == "noise":
        yield Finding("noisy samples", 10.0, 1.0, 0.0, "the calibration images were noise (--calib noise)", again)
    elif images:
        share = f"{images['high']:.0%} of the images' energy is beyond 0.25 cycles a pixel; noise has 80 %, photographs a few"
        yield from _over("noisy samples", images["high"], MOST_HIGH, share, again, scale=4.0)
    if images and record.samples > 1:
        alike = f"the mean correlation between two calibration images is {images['likeness']:.2f}"
        other = "use images that differ: more --samples, another --seed, or real images of several scenes"
        yield from _over("collapsed samples", images["likeness"], MOST_LIKENESS, alike, other, scale=4.0)
    if images:
        flat = f"the images' pixels spread by {images['contrast']:.3f} on average, of 1"
        other = "look at samples.png; quantize again, with the default --spectrum natural or more --iters"
        yield from _under("collapsed samples", images["contrast"], LEAST_CONTRAST, flat, other)
    own = record.samples - record.companions
    count = f"{own} calibration image{'s' if own != 1 else ''}"
    count += f" beside {record.companions} procedural ones" if record.companions else ""
    yield from _under("too few samples", own, LEAST_SAMPLES, count, "quantize again with --samples 16 or more")
    steps = record.settings.get("iters")
    if steps is not None:
        few = f"the synthesis took {steps} steps"
        yield from _under("too few steps", steps, LEAST_STEPS, few, again)


def _normalisation(record: QuantizationRecord, measured: dict[str, Any]) -> Iterator[Finding]:
    """Given images that were not normalised as the model expects: ranges from them fit nothing that it will see."""
    images = measured.get("images", {})
    if record.calibration != "images" or "outside" not in images:
        return
    ends = torch.tensor([images["least"], images["greatest"]])
    said = " ".join(
        judge(ends.view(2, 1, 1, 1).expand(2, *record.preprocessing.input_size), record.preprocessing)
    ).strip()
    if images["outside"] > MOST_OUTSIDE or said.startswith("held values from"):
        low, high = record.preprocessing.channel_bounds()
        what = (
            f"the calibration images lie between {images['least']:.3g} and {images['greatest']:.3g}, {images['outside']:.0%} of "
            f"their values outside what pixels become: {float(low.min()):.2f} to {float(high.max()):.2f}"
        )
        again = "quantize again with images that are normalised: Preprocessing.of(model).normalise(images), or --calib FOLDER"
        weight = round(2.0 + 4.0 * images["outside"], 3)  # noise, which also lies outside, weighs more
        yield Finding("images not normalised", weight, images["outside"], MOST_OUTSIDE, what, again)


def _schedule(record: QuantizationRecord) -> Iterator[Finding]:
    settings = record.settings
    if record.calibration != "synthetic" or "iters" not in settings:
        return
    schedule, steps = settings.get("schedule", SynthesisConfig.schedule), settings["iters"]
    bounds = [settings.get(name, getattr(SynthesisConfig, name)) for name in ("crop_lower", "crop_upper")]
    first, last = (crop_ratio(schedule, step, steps, *bounds) for step in (0, steps - 1))
    what = f"crops grow from {first:.2f} to {last:.2f} of the area ({schedule}); easy to hard shrinks them"
    if last > first:
        yield Finding(
            "inverted schedule", round(2 * last / first, 3), last, first, what, "quantize again with --schedule e2h"
        )


def _corrections(qmodel: nn.Module) -> dict[int, torch.Tensor]:
    adapter = find_adapter(qmodel)
    found = {index: adapter.get_acm(index) for index in range(len(adapter.blocks()))}
    return {index: acm for index, acm in found.items() if acm is not None}


def _correction(qmodel: nn.Module, measured: dict[str, Any]) -> Iterator[Finding]:
    off = "quantize again with --acm none, or with --acm checked, which keeps only corrections that carry over"
    for index, acm in _corrections(qmodel).items():
        values = acm.float()
        greatest = float(values.abs().max()) if bool(torch.isfinite(values).all()) else float("nan")
        what = f"the correction of block {index} reaches {greatest:.3g}; {STORED} ends at {torch.finfo(STORED).max:.3g}"
        yield from _over("overflowing ACM", greatest, MOST_STORED, what, off, scale=20.0)
        size = float(values.square().mean().sqrt())
        if "rms" in measured:
            share = size / max(measured["rms"][index], 1e-12)
            what = f"the correction of block {index} is {share:.2f} times as large as the block's output"
            yield from _over("overflowing ACM", round(share, 4), MOST_CORRECTION, what, off, scale=4.0)
    for index, share in measured.get("acm_left", {}).items():
        what = (
            f"with its correction, block {index} is {share:.2f} times as far from float as without, on its own images"
        )
        yield from _over("misaligned ACM", share, MOST_LEFT, what, off, scale=3.0)


def _foreign(effect: dict[int, float]) -> Iterator[Finding]:
    off = "its tokens may be permuted or it may not carry over: quantize again with --acm checked or --acm none"
    for index, share in effect.items():
        what = (
            f"with its correction, block {index} is {share:.2f} times as far from float as without, on the given images"
        )
        yield from _over("misaligned ACM", share, MOST_FOREIGN, what, off, scale=2.0)


def _divergence(measured: dict[str, Any]) -> Iterator[Finding]:
    more = "give these layers more bits (layer_bits, or --size-budget for all), or --reconstruct"
    if "results" in measured:
        what = f"the results are off by {measured['results']:.0%} of what tells one image's from another's"
        other = "more bits, or --placement gemm with the default quantizer"
        yield from _over("large divergence", measured["results"], MOST_RESULTS, what, other)
    blocks = measured.get("divergence", [])
    if blocks:
        worst = max(range(len(blocks)), key=lambda index: blocks[index])
        steps = [after - before for before, after in zip([0.0, *blocks], blocks, strict=False)]
        jump = max(range(len(blocks)), key=lambda index: steps[index])
        what = f"block {worst}'s output is off by {blocks[worst]:.0%} of its energy; the greatest step up is in block {jump}"
        yield from _over("large divergence", blocks[worst], MOST_BLOCK, what, more)
    layers = measured.get("layers", {})
    if layers:
        median = sorted(layers.values())[len(layers) // 2]
        for name, value in sorted(layers.items(), key=lambda item: -item[1])[:3]:
            if value > OUTLIER * median:
                what = f"the output of {name} is off by {value:.0%} of its energy, {value / max(median, 1e-9):.0f} times the median"
                yield from _over("large divergence", value, MOST_LAYER, what, more)


@torch.no_grad()
def layer_divergence(model: nn.Module, qmodel: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """{timm's name: divergence of the layer's own output}, every quantized layer fed the float model's inputs.

    Where channels were scaled and heads rotated (see `calibration.equalize`, `calibration.rotate`), inputs come from the quantized
    model's own norms, and what was done to queries, keys and values is done to the float ones: a linear map fitted to both.
    """
    found: dict[str, float] = {}
    scaled = qmodel.dfqvit_record.recipe.scaling == "channels"  # type: ignore[union-attr]
    places = scalings(model)
    norm_of = {layer: norm for norm, layer in places.norms}
    qkv_of = {proj: qkv for qkv, proj in places.values}
    maps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with contextlib.ExitStack() as hooks:
        for name, twin in quantized_layers(qmodel).items():

            def compare(
                _: nn.Module, inputs: Any, output: torch.Tensor, name: str = name, twin: QuantLinear = twin
            ) -> None:
                x = inputs[0]
                if name in norm_of:
                    slope, offset = _norms_line(model.get_submodule(norm_of[name]), qmodel.get_submodule(norm_of[name]))
                    x = slope * x + offset
                if name in qkv_of and qkv_of[name] in maps:
                    x = _mapped(x, *(part.chunk(3)[2] for part in maps.pop(qkv_of[name])))
                acm, twin.acm = twin.acm, None  # a correction is not the layer's own
                result = twin(x)
                twin.acm = acm
                if scaled and (name in places.scores or name in qkv_of.values()):
                    attention: Any = model.get_submodule(name.rpartition(".")[0])
                    maps[name] = _head_maps(output, result, 3 * attention.num_heads)
                    output = _mapped(output, *maps[name])
                found[name] = round(divergence(output, result), 5)

            hooks.enter_context(model.get_submodule(name).register_forward_hook(compare))
        model(images)
    return found


def _norms_line(norm: Any, twin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(slope, offset), [C] each: from the output of a LayerNorm to that of its scaled and shifted twin."""
    slope = torch.where(norm.weight == 0, torch.zeros_like(norm.weight), twin.weight / norm.weight)
    return slope, twin.bias - slope * norm.bias


def _head_maps(x: torch.Tensor, y: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrix [heads, D, D], offset [heads, D]): of the least squares maps from x to y [..., heads * D], head by head."""
    x, y = (each.flatten(0, -2).unflatten(-1, (heads, -1)).transpose(0, 1).double() for each in (x, y))
    middle_x, middle_y = x.mean(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)
    matrix = torch.linalg.lstsq(x - middle_x, y - middle_y, driver="gelsd").solution
    return matrix, (middle_y - middle_x @ matrix).squeeze(1)


def _mapped(x: torch.Tensor, matrix: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """X [..., heads * D] through the map of each head."""
    heads = x.double().unflatten(-1, (len(matrix), -1)).unsqueeze(-2)
    return (heads @ matrix).squeeze(-2).add(offset).flatten(-2).to(x.dtype)


@torch.no_grad()
def correction_effect(model: nn.Module, qmodel: nn.Module, images: torch.Tensor) -> dict[int, float]:
    """{block: divergence of its output with its correction as a share of that without it}, the other corrections active."""
    adapter: Adapter = find_adapter(qmodel)
    corrections = _corrections(qmodel)
    if not corrections:
        return {}
    wanted, found = block_outputs(find_adapter(model), images), block_outputs(adapter, images)
    effect = {}
    for index, acm in corrections.items():
        adapter.set_acm(index, None)
        without = block_outputs(adapter, images, stop_after=index)[index]
        adapter.set_acm(index, acm)
        effect[index] = round(
            round(divergence(wanted[index], found[index]), 5) / max(round(divergence(wanted[index], without), 5), 1e-5),
            4,
        )
    return effect
