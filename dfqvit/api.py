"""`quantize`: the whole method in one call."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from .calibration import calibrate, convert, freeze, in_fixed_order, observe
from .calibration.allocation import allocate_bits, check_budget, table_bytes
from .calibration.correction import (
    LAST_BLOCK,
    LEAST_CHECKED,
    add_corrections,
    check_blocks,
    check_correction,
    check_family,
    choose_blocks,
    correction_bytes,
    refuse_correction,
)
from .calibration.fisher import MOST_CLIPPED
from .calibration.given import given_images
from .calibration.health import measure, warn_of_results
from .calibration.images import calibration_images, check_calib, companion_count, with_companions
from .calibration.reconstruction import reconstruct_blocks
from .errors import UsageError, is_whole
from .models import ModelSpec, Preprocessing
from .models.adapters import find_adapter, is_network, rescaled_by
from .models.adapters.products import KNOWN
from .models.foreign import tell_hooks
from .models.frame import on_float_reference
from .models.network import Build, NetworkSpec, check_build
from .models.preprocessing import FEATURES, check_preprocessing, image_shape, normalises
from .models.spec import class_count
from .patching.fusable import is_patched
from .progress import Progress, showing
from .quantization.levels import NONUNIFORM
from .quantization.model import quantized
from .quantization.recipe import Recipe
from .runtime import check_runtime, set_runtime
from .runtime.record import QuantizationRecord, QuantizedModel
from .synthesis.config import SynthesisConfig, check_count, check_names, check_seed
from .synthesis.losses import Objective
from .synthesis.procedural import procedural_images


@on_float_reference
def quantize(
    model: nn.Module,
    w_bits: int = 4,
    a_bits: int = 8,
    *,
    samples: int = SynthesisConfig.samples,
    iters: int = SynthesisConfig.iters,
    gamma: int = 1,
    seed: int = 0,
    calib: Any = "synthetic",
    companions: int | None = None,
    placement: str = "gemm",
    scaling: str | None = None,
    quantizer: str = "mse",
    rounding: str | None = None,
    levels: str | None = None,
    edge_bits: int | None = None,
    softmax_bits: int = 8,
    layer_bits: dict[str, int] | None = None,
    size_budget: float | None = None,
    reconstruct: int = 0,
    acm: str = "auto",
    acm_blocks: Sequence[int] | None = LAST_BLOCK,
    acm_top: int | None = None,
    acm_shape: str = "element",
    acm_shrink: bool = False,
    preprocessing: Preprocessing | None = None,
    model_kwargs: dict[str, Any] | None = None,
    build: Build | None = None,
    objective: Objective | None = None,
    runtime: str = "auto",
    progress: bool = True,
    report: Callable[[Progress], None] | None = None,
    **synthesis: Any,
) -> QuantizedModel:
    """Quantizes a timm vision transformer without data and without fine-tuning.

    Args:
        model: a float timm model of those in docs/models.md, or a network around some (docs/dense.md); left as it was. It is
            read in eval mode and float32, also where it is in train mode, half or double, and under no_grad, inference_mode or
            autocast.
        w_bits: bits of the weights, 2 to 8.
        a_bits: bits of the activations, 2 to 8.
        samples: synthetic, procedural or noise images for calibration.
        iters: steps of synthesis.
        gamma: with `acm_blocks=None`, every gamma-th block is corrected, counted back from the last.
        seed: of the synthesis or of the noise.
        calib: "synthetic", "procedural" (dead leaves, which no model made: seconds instead of minutes), "noise" (the lower
            bound), or images [n, C, H, W], normalised as the model expects: a tensor, an array, or a list of them; a list of
            PIL images is prepared here.
        companions: procedural images beside the synthetic ones: variety for the statistics that weights are rounded by. Default 48
            where the rounding is second-order and `calib` "synthetic", else 0 (docs/accuracy.md has what they gain).
        placement: "gemm" quantizes the inputs and weights of every linear layer; "psaq" also quantizes their outputs, the
            attention scores, both residual sums and the embeddings, exactly where PSAQ-ViT does.
        scaling: "channels" makes ranges of channels alike where that is free, see `calibration.equalize`; "none" does not;
            default "channels" with "gemm" and "mse", else "none".
        quantizer: the rule for scales: "mse" searches those of the weights for the least squared error, "minmax" is the
            baseline of the literature.
        rounding: "nearest" or "second-order", which picks the integers that keep the layers' outputs on the calibration
            images; default second-order with "gemm" and "mse", else nearest.
        levels: the integers that weights of 2 to 4 bits may be: "uniform", or "nonuniform", closer together where most weights
            are, which is more accurate and multiplied as 7 bits (see `quantization.levels`); default nonuniform with "gemm" and
            "mse", else uniform. With activations of 2 to 6 bits nonuniform also lets what the second layers of MLPs take be
            those integers of 8 bits that cost least (see `calibration.levels`), where scaling is "channels".
        edge_bits: bits of the first and last layers' weights; default 8 with "gemm", w_bits with "psaq". Their inputs have
            a_bits or edge_bits, whichever is more, with "gemm", and a_bits with "psaq".
        softmax_bits: bits of attention's probabilities, 2 to 8; fewer than 8 are simulated, not run in integers.
        layer_bits: {timm's name of a linear layer: bits of its weights}, in place of w_bits and edge_bits.
        size_budget: megabytes (10^6 bytes) of the saved model; the bits of every layer are then chosen so that it fits and
            the network loses least, see `allocation`.
        reconstruct: steps of `reconstruction` for each block, after rounding: its weights' integers and scales are tuned
            until the block's output is the float one's. 0 is off; 300 are much. The only part that back-propagates.
        acm: "sequential", "checked", "independent" or "none", see `correction.add_corrections`; "auto" is "sequential"
            where blocks are chosen explicitly; "checked" and shrunk, on every gamma-th block, where rounding is "nearest" at
            3 bits or below, which is where it was measured to help (docs/ablations.md); else "none".
        acm_blocks: which blocks are corrected; the default is the last one. None leaves it to gamma.
        acm_top: this many blocks of the greatest divergence instead.
        acm_shape: "element", "channel" or "token": what has a correction of its own, see `correction.add_corrections`.
        acm_shrink: shrinks the corrections by their variance over the images.
        preprocessing: mean, std and input size; default the model's own.
        model_kwargs: what was given to timm.create_model, where neither the model nor its structure tells.
        build: for a network that is not timm's: "module:function" (or the function), which called without arguments makes its
            structure; kept in the file, for `load`. Without it the result cannot be saved.
        objective: of what the model gives for a batch of images, to a scalar loss that synthetic images shall lower, in place
            of the target classes.
        runtime: how the result computes, as in `dfqvit.load`: "auto", "integer" or "simulated".
        progress: shows a bar on stderr for each stage, with the time left.
        report: called with a `Progress` after every step of every stage: the synthesis, calibration, rounding, ...
        synthesis: further settings of `SynthesisConfig`.

    Returns:
        A quantized copy in eval mode; `dfqvit.save` writes it.

    Raises:
        UsageError: an argument does not fit; before any work is done.
        DfqvitError: NaN or Inf in weights or activations.

    Source: DFQ-ViT, arXiv 2507.14481.
    """
    check_names("quantize", synthesis, inspect.signature(quantize).parameters)
    if layer_bits is not None and not isinstance(layer_bits, Mapping):
        raise UsageError(f"layer_bits was {layer_bits!r}; it may be a dict of names of layers to bits")
    recipe = Recipe(
        w_bits=w_bits,
        a_bits=a_bits,
        placement=placement,
        quantizer=quantizer,
        rounding=rounding,
        edge_bits=edge_bits,
        layer_bits=layer_bits,
        scaling=scaling,
        softmax_bits=softmax_bits,
        levels=levels,
    )
    if size_budget is not None and layer_bits is not None:
        raise UsageError("size_budget and layer_bits were both given; give one of them")
    if size_budget is not None:
        recipe = replace(recipe, w_bits=Recipe.w_bits)  # "auto" of acm asks for them
    if is_patched(model):
        raise UsageError("model is patched; quantize() takes a float model, call unpatch() on the patch's handle first")
    check_runtime(runtime)
    check_preprocessing(preprocessing)
    if report is not None and not callable(report):
        raise UsageError(f"report was {report!r}; it may be a function of a Progress, or None")
    check_blocks(gamma, acm_blocks, acm_top)
    _check_images(calib, samples, iters, seed, synthesis)
    companions = companion_count(companions, calib, recipe)
    _check_steps(reconstruct, placement)
    assumed = preprocessing is None
    spec, preprocessing = spec_of(model, model_kwargs, build, preprocessing)
    tell_hooks(model)
    check_objective(objective, calib)
    calib = calib if isinstance(calib, str) else given_images(calib, preprocessing)
    count = len(calib) if isinstance(calib, torch.Tensor) else samples
    of_images = _idle_of_images(calib, count, samples=samples, iters=iters)
    of_bits = _idle_of_bits(recipe, size_budget is not None, w_bits=w_bits, edge_bits=edge_bits, levels=levels)
    for idle in (*of_bits, *of_images):
        warnings.warn(idle, stacklevel=3)
    acm, acm_blocks, acm_shrink = settle(
        model,
        recipe,
        count,
        acm=acm,
        acm_blocks=acm_blocks,
        acm_shape=acm_shape,
        acm_shrink=acm_shrink,
        acm_top=acm_top,
        reconstruct=reconstruct,
        size_budget=size_budget,
    )
    if acm_top is not None:
        acm_blocks = None
    qmodel = convert(model, recipe)
    if assumed and isinstance(spec, NetworkSpec) and not normalises(model):
        _tell_rescaled(model, preprocessing)
    chosen = choose_blocks(len(find_adapter(qmodel).blocks()), gamma, acm_blocks, acm_top)
    with showing(progress, report) as told:
        images, how = calibration_images(
            model,
            calib,
            samples=samples,
            iters=iters,
            seed=seed,
            preprocessing=preprocessing,
            report=told,
            objective=objective,
            **synthesis,
        )
        images = with_companions(images, companions, seed, preprocessing)
        images = in_fixed_order(images)
        if size_budget is not None:
            beside = 0 if acm == "none" else correction_bytes(model, images[:1], chosen, acm_top)
            recipe = allocate_bits(model, images, recipe, size_budget, beside + table_bytes(qmodel, spec))
            qmodel = convert(model, recipe)
        if reconstruct:
            observe(qmodel, images, recipe)
            reconstruct_blocks(model, qmodel, images, reconstruct, seed)
            freeze(qmodel)
        else:
            calibrate(qmodel, images, recipe)
        corrected = add_corrections(
            model, qmodel, images, acm, gamma=gamma, blocks=acm_blocks, top=acm_top, shape=acm_shape, shrink=acm_shrink
        )
    if isinstance(spec, NetworkSpec):
        spec = replace(spec, survey=qmodel.dfqvit_survey)  # type: ignore[arg-type]
    measured = measure(model, qmodel, images, preprocessing, corrected)
    warn_of_results(measured)
    qmodel.dfqvit_record = QuantizationRecord(  # type: ignore[assignment]
        spec=spec,
        preprocessing=preprocessing,
        recipe=recipe,
        calibration=how,
        samples=len(images),
        acm=acm,
        acm_blocks=sorted(corrected),
        settings=_settings(how, seed, {"iters": iters, **synthesis}, objective, companions, reconstruct),
        measured=measured,
    )
    qmodel.dfqvit_spec = spec  # type: ignore[assignment]
    if isinstance(spec, ModelSpec):
        preprocessing.write_to(qmodel)
    set_runtime(qmodel, runtime)
    return cast(QuantizedModel, quantized(qmodel, QuantizedModel))


def spec_of(
    model: nn.Module, model_kwargs: dict[str, Any] | None, build: Build | None, preprocessing: Preprocessing | None
) -> tuple[ModelSpec | NetworkSpec, Preprocessing]:
    """What rebuilds the model, checked, and what it expects of images; a network also knows both from now on.

    UsageError when one of them does not fit the model.
    """
    if is_network(model) and type(model).__module__ != FEATURES:  # timm makes its wrappers by a model's name
        preprocessing = preprocessing or Preprocessing.of(model)
        channels = image_shape(model)[0]
        if preprocessing.input_size[0] != channels:
            raise UsageError(f"preprocessing had {preprocessing.input_size[0]} channels; the network takes {channels}")
        if model_kwargs is not None:
            raise UsageError(
                "model_kwargs was given; a network that is not timm's is rebuilt by build='module:function'"
            )
        build = getattr(model, "dfqvit_build", None) if build is None else build  # the embedded ones say it themselves
        name = "" if build is None else check_build(model, build)
        network = NetworkSpec(name, preprocessing.input_size, function=build)
        model.dfqvit_spec = network  # type: ignore[assignment]
        return network, preprocessing
    if build is not None:
        raise UsageError(
            f"build was given; the model is timm's {type(model).__name__}, which timm rebuilds by its name"
        )
    spec, own = ModelSpec.of(model, model_kwargs), Preprocessing.of(model)
    preprocessing = preprocessing or own
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", False)
    if preprocessing.input_size != own.input_size and (strict or preprocessing.input_size[0] != own.input_size[0]):
        raise UsageError(f"preprocessing had input_size {preprocessing.input_size}; the model takes {own.input_size}")
    return spec, preprocessing


def _settings(
    how: str, seed: int, synthesis: dict[str, Any], objective: Objective | None, companions: int, reconstruct: int
) -> dict[str, Any]:
    """Of the arguments of `quantize`, what its record keeps beside the recipe: what the result depends on."""
    found: dict[str, Any] = {}
    if how != "images":
        found["seed"] = seed
    if objective is not None:
        found["objective"] = getattr(objective, "__qualname__", repr(objective))
    if how == "synthetic":
        found |= synthesis
    if companions:
        found["companions"] = companions
    if reconstruct:
        found["reconstruct"] = reconstruct
    return found


def _idle_of_images(calib: str | torch.Tensor, count: int, *, samples: int, iters: int) -> Iterator[str]:
    """What is said of arguments of `quantize` that change nothing, for `count` images of `calib`."""
    source = f"'{calib}'" if isinstance(calib, str) else "given images"
    if iters != SynthesisConfig.iters and source != "'synthetic'":
        yield f"iters was {iters} and calib {source}, which no synthesis makes; it changes nothing"
    if samples not in (count, SynthesisConfig.samples):
        yield f"samples was {samples} and calib {count} images; all that are given are taken"


def _idle_of_bits(
    recipe: Recipe, budgeted: bool, *, w_bits: int, edge_bits: int | None, levels: str | None
) -> Iterator[str]:
    """The same, of the bits of the weights, which a `size_budget` chooses where it is given."""
    if budgeted:
        for name, width, plain in (("w_bits", w_bits, Recipe.w_bits), ("edge_bits", edge_bits, None)):
            if width != plain:
                yield f"{name} was {width} and size_budget given, which chooses the bits of the weights itself"
        return
    few = {w_bits, recipe.edge_bits, *(recipe.layer_bits or {}).values()} & NONUNIFORM.keys()
    if levels is not None and not few and recipe.a_bits > MOST_CLIPPED:
        yield (
            f"levels was '{levels}'; it is for weights of {max(NONUNIFORM)} bits or fewer and activations of {MOST_CLIPPED} or "
            "fewer, and changes nothing"
        )


def _tell_rescaled(network: nn.Module, preprocessing: Preprocessing) -> None:
    """Warns of a network that normalises images in a way of its own."""
    images = procedural_images(1, 0, preprocessing).to(next(network.parameters()).device)
    if name := rescaled_by(network, images):
        warnings.warn(
            f"model gives its '{name}' images of another mean and deviation than it takes, so the mean {preprocessing.mean} and "
            f"std {preprocessing.std} of that model are hardly those of its images: give preprocessing",
            stacklevel=2,
        )


def settle(
    model: nn.Module,
    recipe: Recipe,
    count: int,
    *,
    acm: str,
    acm_blocks: Sequence[int] | None,
    acm_shape: str,
    acm_shrink: bool,
    acm_top: int | None,
    reconstruct: int,
    size_budget: float | None,
) -> tuple[str, Sequence[int] | None, bool]:
    """(acm, acm_blocks, acm_shrink) as `quantize` takes them for `count` images: with what "auto" means for this model.

    UsageError for all that the model or the other settings do not allow; it needs no images.
    """
    adapter, asked = find_adapter(model), acm
    if recipe.softmax_bits != 8 and not any(type(module) in KNOWN for module in model.modules()):
        raise UsageError(
            f"softmax_bits was {recipe.softmax_bits}; this {type(model).__name__} has no attention whose probabilities are "
            "quantized, so it may be 8"
        )
    if reconstruct and not adapter.whole_blocks:
        raise UsageError(f"reconstruct was {reconstruct}; in a {type(model).__name__} it may be 0")
    if acm == "auto":
        chosen = acm_top is not None or acm_blocks is not LAST_BLOCK
        low = recipe.w_bits <= 3 and recipe.rounding == "nearest"
        if low and count >= LEAST_CHECKED and not chosen and class_count(model) and adapter.blocks():
            acm, acm_blocks, acm_shrink = "checked", None, True
        else:
            acm = "sequential" if chosen else "none"
    if acm == "none":
        refuse_correction(asked, acm_blocks, acm_top, acm_shape, acm_shrink)
    check_correction(acm, acm_shape, count)
    check_family(adapter, acm, acm_shape)
    if acm == "checked" and not class_count(model):
        raise UsageError(
            "acm was 'checked'; it compares logits, and the model has no classifier: it may be 'sequential'"
        )
    if size_budget is not None:
        check_budget(model, recipe, size_budget)
        if not class_count(model):
            raise UsageError(f"size_budget was {size_budget:g}; it compares logits, and the model has no classifier")
    return acm, acm_blocks, acm_shrink


def _check_steps(reconstruct: Any, placement: str) -> None:
    if not is_whole(reconstruct) or reconstruct < 0:
        raise UsageError(f"reconstruct was {reconstruct!r}; it may be a number of steps, or 0")
    if reconstruct and placement != "gemm":
        raise UsageError(f"reconstruct was {reconstruct} and placement '{placement}'; it is for 'gemm'")


def _check_images(calib: Any, samples: Any, iters: Any, seed: Any, synthesis: Mapping[str, Any]) -> None:
    """UsageError unless the images that `calib` names can be made as the other arguments say."""
    check_seed(seed)
    if isinstance(calib, str) and calib == "synthetic":
        SynthesisConfig(samples=samples, iters=iters, seed=seed, **synthesis)
        return
    if isinstance(calib, str):
        check_calib(calib)
        check_count("samples", samples)
    for name, value in sorted(synthesis.items()):
        told = f"'{calib}'" if isinstance(calib, str) else "given images"
        raise UsageError(
            f"{name} was {value!r} and calib {told}; it is a setting of the synthesis, so calib must be 'synthetic'"
        )


def check_objective(objective: Any, calib: Any) -> None:
    """UsageError unless `objective` is None, or a function and `calib` is "synthetic"."""
    if objective is None:
        return
    if not callable(objective):
        raise UsageError(f"objective was {objective!r}; it may be a function of what the model gives, to a scalar loss")
    if not isinstance(calib, str) or calib != "synthetic":
        raise UsageError("objective was given; only synthetic images lower one, so calib must be 'synthetic'")
