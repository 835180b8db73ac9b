"""`dfqvit.patch`: fused quantized layers in place of a timm model's, and back, exactly.

The layers of this one model change their class (`live.py`, `fusable.py`); objects stay, timm and torch are not touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..calibration import BATCH
from ..calibration.given import judge
from ..errors import UsageError
from ..models import Preprocessing
from ..models.adapters import find_adapter
from ..models.frame import evaluating
from ..quantization.recipe import Recipe
from .fusable import MLP_LAYERS, FusedMlp, can_fuse, is_patched, linear_layers
from .live import LiveQuantLinear, LiveSettings, new_range


def patch(
    model: nn.Module,
    w_bits: int = 8,
    a_bits: int = 8,
    *,
    calib: torch.Tensor | None = None,
    quantizer: str = "minmax",
    trainable: bool = True,
    exclude: Iterable[str] = (),
) -> PatchHandle:
    """Makes the linear layers of a float timm model's attention, MLPs and patch merging quantize, in place.

    Each computes `kernels.quant_linear` of its input and its live float weight, with GELU fused into fc1. state_dict,
    parameters, hooks, train/eval, deepcopy and timm's options stay as they are; gradients go straight through the
    rounding to the float weights. Patch embedding, heads and products inside attention stay float.

        handle = dfqvit.patch(model, w_bits=4)      with dfqvit.patch(model, w_bits=4) as handle:
        ...                                             ...
        handle.unpatch()

    Args:
        model: a timm model of the ViT, DeiT or Swin families.
        w_bits: bits of the weights, 2 to 8; symmetric, a scale for each output channel.
        a_bits: bits of the layers' inputs, 2 to 8; asymmetric, a scale for each tensor.
        calib: images [n, C, H, W], normalised as the model expects, that set the ranges of the inputs once. The default is
            the range of each input itself, anew at every call.
        quantizer: the rule of scales and ranges, "minmax" or "mse"; see `quantize`. Scales of trainable weights are found
            anew at every call, which "mse" takes long for.
        trainable: False packs the weights once, for speed: they get no gradient, and changes to them are taken up only
            where torch counts them (not those through `.data`, and none under torch.compile).
        exclude: names of layers to leave float, as `fnmatch` patterns: ["blocks.0.*", "*.fc2"].

    Returns:
        The handle: `patched` and `skipped` say what became of each layer, `unpatch()` or leaving the `with` block undoes it.

    Raises:
        UsageError: an argument does not fit, the model is patched already, or it has no layer to patch. The model is
            then as it was, also when calibration fails.
    """
    Recipe(w_bits, a_bits, quantizer=quantizer, rounding="nearest")  # checks them
    adapter = find_adapter(model)
    if is_patched(model):
        raise UsageError("model is patched already; call unpatch() on its handle first")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    layers, mlps, skipped = {}, [], {}
    for name, layer, parent, reason in linear_layers(model, {**adapter.patchable, **MLP_LAYERS}, patterns):
        if reason:
            skipped[name] = reason
            continue
        layers[name] = layer
        if can_fuse(parent, layer):
            mlps.append(parent)
    for pattern in patterns:
        if f"excluded by '{pattern}'" not in skipped.values():
            raise UsageError(f"exclude held '{pattern}'; it must match the name of a layer, as 'blocks.0.mlp.fc1'")
    if not layers:
        raise UsageError("model has no layer that can be patched; it may be quantized already, or all are excluded")
    handle = PatchHandle(model, layers, mlps, skipped, LiveSettings(w_bits, a_bits, quantizer, trainable))
    if calib is not None:
        try:
            handle.calibrate(calib)
        except BaseException:
            handle.unpatch()
            raise
    return handle


class PatchHandle:
    """What `patch` did to a model, and the way back.

    Attributes:
        patched: names of the layers that quantize.
        skipped: names of the other layers with weights, which stay float, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Any],
        mlps: list[Any],
        skipped: dict[str, str],
        settings: LiveSettings,
    ) -> None:
        self.patched = list(layers)
        self.skipped = skipped
        self._model = model
        self._layers = layers
        self._mlps = mlps
        self._settings = settings
        self._active = True
        try:
            for layer in layers.values():
                LiveQuantLinear.take(layer, settings)
            for mlp in mlps:
                FusedMlp.take(mlp)
        except BaseException:
            self.unpatch()
            raise

    @torch.no_grad()
    def calibrate(self, images: torch.Tensor) -> None:
        """Sets the input ranges of all patched layers, anew, from a float pass in eval mode over images [n, C, H, W].

        The pass is the model's own, so its hooks fire.

        Raises:
            UsageError: the images do not fit, or the model is no longer patched.
            DfqvitError: an activation holds NaN or Inf, or a layer was not reached.
        """
        if not self._active:
            raise UsageError("model is not patched any more; calibrate() is for a patched model")
        channels = int(self._model.in_chans)  # type: ignore[arg-type]
        shape = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        if not isinstance(images, torch.Tensor) or images.dim() != 4 or images.shape[1] != channels or not len(images):
            raise UsageError(f"calib was {shape}; it must be a tensor [n, {channels}, H, W], or None")
        if not images.is_floating_point() or not bool(torch.isfinite(images).all()):
            raise UsageError("calib must be a float tensor of finite values, normalised as the model expects")
        refusal, _ = judge(images, Preprocessing.of(self._model))
        if refusal:
            raise UsageError(f"calib {refusal}")
        ranges = {layer: new_range(layer) for layer in self._layers.values()}
        self._settings.observing = True
        try:
            with evaluating(self._model), contextlib.ExitStack() as hooks:
                for layer in ranges:  # with hooks, which also keep GELU out of fc1, see FusedMlp
                    watch = layer.register_forward_pre_hook(lambda layer, args: ranges[layer].observe(args[0]))
                    hooks.enter_context(watch)
                for batch in images.to(next(self._model.parameters())).split(BATCH):
                    self._model(batch)
        finally:
            self._settings.observing = False
        parameters = [inputs.parameters() for inputs in ranges.values()]  # all, before any layer changes
        for layer, (scale, zero_point) in zip(ranges, parameters, strict=True):
            layer.fix_range(scale, zero_point)

    def unpatch(self, model: nn.Module | None = None) -> None:
        """Gives every layer back its own forward; a second call does nothing.

        Args:
            model: a deep copy of the patched model to restore instead.

        Raises:
            UsageError: `model` is not patched, or a layer changed its class while patched (as by parametrize).
        """
        if model is not None:
            if not is_patched(model):
                raise UsageError("model is not patched; it may be a deep copy of a patched model, or None")
            _restore(list(model.modules()))
        elif self._active:
            _restore([*self._layers.values(), *self._mlps])
            self._active = False

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        state = f"W{self._settings.w_bits}/A{self._settings.a_bits}" if self._active else "unpatched"
        return f"PatchHandle({state}, {len(self.patched)} layers patched, {len(self.skipped)} skipped)"


def _restore(modules: list[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, LiveQuantLinear) and type(module) is not LiveQuantLinear:
            raise UsageError(f"a patched layer became a {type(module).__name__}; undo that before unpatch()")
    for module in modules:
        if isinstance(module, (LiveQuantLinear, FusedMlp)):
            module.release()
