"""From a float model and calibration images to a quantized model: convert, observe, freeze."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import UsageError
from ..models import check_finite
from ..models.adapters import find_adapter, flattened, is_network
from ..models.copying import copied
from ..models.preprocessing import image_shape
from ..models.spec import class_count, said
from ..progress import tracked
from ..quantization.layers import quantized_layers
from ..quantization.model import quantized
from ..quantization.quantizers import ActivationQuantizer
from ..quantization.recipe import Recipe
from ..synthesis.curriculum import DRAWS, JITTER, crop_shift_flip
from .correction import block_outputs
from .equalize import equalize
from .fisher import BATCH, MOST_CLIPPED, what_matters
from .rotate import rotate_heads

VIEWS = 192  # random crops of the images, in all, for second-order rounding
MOST_VIEWS = 12  # of one image; the least is one
LEAST_CROP = 0.08  # of the area
_NUDGE = 1e-6  # of an image, about what float rounds off


def convert(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of `model` with quantized layers that still compute in float and observe ranges; `calibrate` comes next.

    Raises:
        UsageError: the model does not fit.
        DfqvitError: NaN or Inf in the weights.
    """
    check_finite(model)
    qmodel = copied(model).eval().requires_grad_(False)
    for module in qmodel.modules():
        if getattr(module, "grad_checkpointing", False):  # layers would be called twice, and seen twice
            module.grad_checkpointing = False  # type: ignore[assignment]
    adapter = find_adapter(qmodel)
    adapter.convert(recipe)
    qmodel = quantized(qmodel, *adapter.mixins).to(next(model.parameters()).device)
    if not adapter.is_known():
        _expect_equal(model, qmodel)
    return qmodel


@torch.no_grad()
def _expect_equal(model: nn.Module, qmodel: nn.Module) -> None:
    """UsageError unless the converted model computes what the float one does, by all of its parts: it was found, not known.

    On an image whose values any normalised image may have, and as exactly as the float model answers to an image that is the same
    but for rounding: StarNet multiplies features, and blows up what is far from its images, its errors with it.
    """
    parameter = next(model.parameters())
    if parameter.is_meta:
        return
    image = _any_image(model)
    twin = copied(qmodel)  # which alone observes this image
    wanted, nudged = _results_of(model, image), _results_of(model, image * (1 + _NUDGE))
    with _left_alone(model):
        found = _results_of(twin, image)
    if not wanted:
        raise UsageError(f"model was a {type(model).__name__}, which gives no tensors; it must give one, or several")
    if not _alike(found, wanted, nudged):
        raise UsageError(
            f"model was a {type(model).__name__}, which computes something else once its layers are replaced; it may be a model "
            "that calls its layers as modules"
        )
    for name, module in twin.named_modules():
        if isinstance(module, ActivationQuantizer) and module.range.least is None:
            part = name.rpartition(".")[0].removesuffix(".operands")
            raise UsageError(
                f"model was a {type(model).__name__} that never calls '{part}' for an image; take that away, or let a module of "
                "your own hold the timm model and compute what this one does (docs/dense.md)"
            )


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """UsageError where a module of the model is called within the block, in which its copy runs: a function that was put into a
    method's place holds on to the model that it was made for."""
    called: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    with contextlib.ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(lambda module, _: called.append(names[module])))
        yield
    if called:
        raise UsageError(
            f"model was a {type(model).__name__} of which a copy calls {said(called[0])} of the model itself, by a function that "
            "was put into the place of a method; it may be a method of a class, or one that types.MethodType binds"
        )


@contextlib.contextmanager
def _kept(qmodel: nn.Module) -> Iterator[None]:
    """UsageError unless a converted model computes after the block, which scales and turns its channels, what it did before.

    Asked where a network may read what is scaled at a further place, which no structure shows.
    """
    if find_adapter(qmodel).is_known():
        yield
        return
    image = _any_image(qmodel)
    twin = copied(qmodel)
    wanted, nudged = _results_of(twin, image), _results_of(twin, image * (1 + _NUDGE))
    del twin
    yield
    if not _alike(_results_of(copied(qmodel), image), wanted, nudged):
        raise UsageError(
            f"scaling was 'channels' and the model a {type(qmodel).__name__}, which reads at a further place what is scaled "
            "between a norm and the layer after it; it may be 'none'"
        )


def _any_image(model: nn.Module) -> torch.Tensor:
    parameter = next(model.parameters())
    return 2 * torch.rand(1, *image_shape(model), generator=torch.Generator().manual_seed(0)).to(parameter) - 1


def _alike(found: list[torch.Tensor], wanted: list[torch.Tensor], nudged: list[torch.Tensor]) -> bool:
    """Whether outputs are the same but for rounding, of which those for a nudged image tell."""
    return all(
        float((f - w).norm()) <= 1e-3 * float(w.norm()) + 10 * float((n - w).norm()) + 1e-6
        for w, n, f in zip(wanted, nudged, found, strict=True)
    )


def _results_of(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """What a model gives for one image [1, C, H, W]; of detections, whose order hangs on a hair, its blocks' outputs instead."""
    outputs = [each for each in flattened(model(image)) if each.is_floating_point()]
    if is_network(model) and any(len(each) != 1 for each in outputs if each.dim()):
        return block_outputs(find_adapter(model), image)
    return outputs


@torch.no_grad()
def calibrate(qmodel: nn.Module, images: torch.Tensor, recipe: Recipe) -> None:
    """Runs the images [n, C, H, W] through a converted model, then freezes every quantizer, rounds and packs the weights."""
    observe(qmodel, images, recipe)
    freeze(qmodel)
    if recipe.placement == "psaq":
        find_adapter(qmodel).quantize_constants(recipe.a_bits)


@torch.no_grad()
def observe(qmodel: nn.Module, images: torch.Tensor, recipe: Recipe) -> None:
    """Lets the quantizers of a converted model see the images, and gathers what the recipe's rounding needs.

    Channels are scaled and heads rotated first, where the recipe says so (see `equalize`, `rotate`).

    Second-order rounding also sees crops of the images, since its statistics need more variety than a few images have, and
    the gradients of each layer's outputs.
    """
    if recipe.scaling == "channels":
        # Turned heads hide which of their channels are wide; but where ranges are searched, it must be for the heads as turned.
        steps = [lambda: equalize(qmodel, images), lambda: rotate_heads(qmodel)]
        with _kept(qmodel):
            for step in steps if recipe.a_bits > MOST_CLIPPED else reversed(steps):
                step()
    if recipe.rounding != "second-order":
        for batch in tracked(images.split(BATCH), "calibrate"):
            qmodel(batch)
        return
    for layer in quantized_layers(qmodel).values():
        layer.observe_inputs()
    generator = torch.Generator().manual_seed(0)
    classes = bool(class_count(qmodel))
    for batch in tracked(torch.cat([images, crops(images)]).split(BATCH), "calibrate"):
        with torch.enable_grad():
            what_matters(qmodel, batch, generator, classes).backward()


def in_fixed_order(images: torch.Tensor) -> torch.Tensor:
    """The images [n, C, H, W] sorted by their bytes: whatever order they came in, what is drawn for them or summed is the same."""
    keys = [hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).digest() for image in images]
    return images[sorted(range(len(images)), key=keys.__getitem__)]


def crops(images: torch.Tensor) -> torch.Tensor:
    """About VIEWS random crops of the images [n, C, H, W], flipped and resized; the same for the same images.

    The shares of the area of an image's crops spread evenly over the curriculum's range.
    """
    count = min(max(1, round(VIEWS / len(images))), MOST_VIEWS)
    generator = torch.Generator().manual_seed(0)
    found = []
    for image in images:
        for k in range(count):
            draws = torch.rand(1, DRAWS, generator=generator).to(images.device)
            share = LEAST_CROP + (1 - LEAST_CROP) * (k + torch.rand((), generator=generator).item()) / count
            found.append(crop_shift_flip(image[None], draws, share, JITTER))
    return torch.cat(found)


def freeze(qmodel: nn.Module) -> None:
    """Rounds and packs the weights of a model that has observed, and freezes every quantizer, in place."""
    for layer in tracked(list(quantized_layers(qmodel).values()), "round weights"):
        layer.freeze()
    for module in qmodel.modules():
        if isinstance(module, ActivationQuantizer) and not module.frozen:
            module.freeze()
