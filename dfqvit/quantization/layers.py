"""Quantized stand-ins for the linear layers of a timm model, and the hooks that quantize or correct a module's output."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UsageError
from ..kernels import block_weight, checks, extension, quant_linear, weight_sums
from ..kernels.pack_weight import pack_integers, packed_row_bytes, unpack_weight
from ..kernels.quant_linear.op import forward as linear_operator
from ..kernels.round_second_order.reference import nearest
from .levels import levels_of, packed_bits
from .precision import KeepsPrecision
from .prepared import PREPARED, SOURCES, Call, Prepares, compiled, may_prepare, preparing, small_tensors, watch
from .quantizers import WEIGHT_RULES, ActivationQuantizer
from .rounding import SecondMoments, round_together

_UNPREPARED: tuple[Any, Any] = None, None
_MANY_CHANNELS = 8  # an image has 1 to 4


class QuantLinear(Prepares, KeepsPrecision):
    """A linear layer with a quantized input and packed weights, run by `kernels.quant_linear`.

    Until `freeze()` it computes in float and its input quantizer observes; afterwards it holds `weight_packed` (uint8, see
    `pack_weight`) and `weight_scale` ([out_features]) in place of `weight`. `acm`, where set, is [tokens, out_features] and
    is added in the epilogue. `exponents`, where set, is int8 [in_features]: the layer takes `x / 2^exponents`, and its weight's
    columns were multiplied by as much (see `calibration.equalize`).
    `packed_bits` is what the integers are packed in: `w_bits`, or more where its `levels` are no even ones (see `levels`).

    What the kernels of its device want beside these it prepares as buffers that are in no state_dict: `weight_blocked` on
    CPUs, `weight_sums` and `acm_float` elsewhere. They are made anew when the layer is moved, loaded into, unpickled, or
    given another tensor, and before a call where torch counted a write to `weight_packed` itself; who writes past torch, by
    `.data` or numpy, calls `prepare()` afterwards. What they are made from is in the layer's state_dict and yet no persistent
    buffer: so torch.export leaves it out of the state_dict of a program, which computes with the prepared ones, and a program
    refuses to load it.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    acm: torch.Tensor | None
    weight_blocked: torch.Tensor | None
    weight_sums: torch.Tensor | None
    acm_float: torch.Tensor | None
    exponents: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        w_bits: int,
        a_bits: int,
        quantizer: str,
        levels: str = "uniform",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.w_bits = w_bits
        self.quantizer, self.levels = quantizer, levels
        self.packed_bits = packed_bits(levels, w_bits)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        # a copy: calibration writes into it, and another layer may share the one that is given
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.input = ActivationQuantizer(a_bits, quantizer).to(weight.device)
        for name in ("acm", *PREPARED):
            self.register_buffer(name, None, persistent=False)
        self.register_buffer("exponents", None)
        self._moments: SecondMoments | None = None
        self._decided: tuple[torch.Tensor, torch.Tensor] | None = None
        self._prepared_from: tuple[torch.Tensor | None, torch.Tensor | None, int] = None, None, 0

    @classmethod
    def from_float(cls, layer: Any, w_bits: int, a_bits: int, quantizer: str, levels: str = "uniform") -> QuantLinear:
        """The stand-in for an `nn.Linear`; of QuantPatchProjection, for an `nn.Conv2d`."""
        return cls(layer.weight, layer.bias, w_bits, a_bits, quantizer, levels)

    @property
    def frozen(self) -> bool:
        """Whether the weights are packed."""
        return self._parameters["weight"] is None

    @property
    def factor(self) -> torch.Tensor | None:
        """[in_features], what every channel of the input is divided by: powers of two, exactly; None where there are none."""
        if self.exponents is None:
            return None
        return self.exponents.double().exp2().float()  # exact; torch.jit.trace has no shifts into the bits of a float

    def allocate(self) -> None:
        """Replaces the float weight by empty packed buffers of the right shape, to be filled by load_state_dict."""
        weight = self.weight
        assert weight is not None
        self.weight = None
        row_bytes = packed_row_bytes(self.in_features, self.packed_bits)
        empty = torch.zeros(self.out_features, row_bytes, dtype=torch.uint8, device=weight.device)
        self.register_buffer("weight_packed", empty, persistent=False)
        self.register_buffer("weight_scale", torch.zeros(self.out_features, device=weight.device))
        self.input.frozen = True

    def observe_inputs(self) -> None:
        """Gathers from now on what `freeze` needs to round the weights to second order, see `rounding`."""
        together = self.out_features if self.w_bits < 8 else None  # at 8 bits the inputs' share is all that can be told
        self._moments = SecondMoments(self.in_features, together, self.input.scale.device)

    def decide(self, integers: torch.Tensor, scale: torch.Tensor) -> None:
        """Sets the integers [out_features, in_features] and scales [out_features] that `freeze` takes, and computes with them."""
        assert self.weight is not None
        self._decided, self._moments = (integers.to(torch.int8), scale), None
        self.weight = nn.Parameter(integers * scale[:, None], requires_grad=False)

    def round_weight(self, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(integers int8 [out_features, in_features], scale [out_features]): to second order after `observe_inputs`."""
        weight = self.weight
        assert weight is not None
        if self._decided is not None and bits == self.w_bits:
            return self._decided
        levels = levels_of(self.levels, bits)
        if self._moments is not None:
            return round_together(weight, *self._moments.damped(), levels)
        scale = WEIGHT_RULES[self.quantizer](weight, bits, self.levels)
        return nearest(weight.float() / scale[:, None], levels).to(torch.int8), scale

    def freeze(self) -> None:
        """Quantizes and packs the weights and freezes the input quantizer."""
        integers, scale = self.round_weight(self.w_bits)
        self._moments = self._decided = None
        self.allocate()
        self.weight_scale.copy_(scale)
        self.weight_packed.copy_(pack_integers(integers, self.packed_bits))
        self.input.freeze()
        self.prepare()

    def prepare(self) -> None:
        """Makes the buffers that the kernels of this device want from the weight and the ACM as they are now."""
        packed, acm, made = self._buffers.get("weight_packed"), self._buffers["acm"], dict.fromkeys(PREPARED)
        if packed is not None and packed.device.type == "cpu" and extension.supports_cpu()[0]:
            made["weight_blocked"] = block_weight(self.arranged(packed), self.in_features, self.packed_bits)
        elif packed is not None and packed.device.type == "cuda":
            made["weight_sums"] = weight_sums(packed, self.in_features, self.packed_bits)
            made["acm_float"] = None if acm is None else acm.float()
        self._buffers.update(made)
        self._prepared_from = packed, acm, _writes(packed)

    def _is_prepared(self) -> bool:
        """Whether the prepared buffers are those of the tensors that are here now; `functional_call` puts others in their place."""
        packed, acm, writes = self._prepared_from
        here = self._buffers.get("weight_packed")
        return packed is here and acm is self._buffers["acm"] and writes == _writes(here)

    def _prepare_anew(self) -> None:
        """As `prepare`; warns where something else than `load_state_dict` wrote other codes into the packed weight."""
        packed, _, writes = self._prepared_from
        before = [self._buffers[name] for name in PREPARED[:2]]
        self.prepare()
        if packed is None or packed is not self._buffers.get(SOURCES[0]) or writes == _writes(packed):
            return
        pairs = zip(before, [self._buffers[name] for name in PREPARED[:2]], strict=True)
        if any(old is not None and new is not None and not torch.equal(old, new) for old, new in pairs):
            warnings.warn(
                "the packed weights of a quantized layer were written to in place: they are codes, of which another model's may be "
                "copied whole, and averages (an EMA's, AveragedModel's with use_buffers) are other weights; average the parameters "
                "alone",
                stacklevel=2,
            )

    def arranged(self, packed: torch.Tensor) -> torch.Tensor:
        """The packed weight with its inputs in the order that `weight_blocked` has them."""
        return packed

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(weight, acm, w_sums) in the form that the kernels of this device run fastest with."""
        if not checks.tracing() and not self._is_prepared():
            # of many layers at once, each of another weight
            if torch._C._functorch.is_batchedtensor(self.weight_packed):
                return self.weight_packed, self.acm, None
            self._prepare_anew()
        blocked = None if linear_operator.asked in ("triton", "cuda") else self.weight_blocked
        acm = self.acm if self.acm_float is None else self.acm_float
        return self.weight_packed if blocked is None else blocked, acm, self.weight_sums

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As nn.Module's; the prepared buffers are made anew where the layer is then, rather than carried along."""
        before = {name: self._buffers.get(name) for name in (*SOURCES, *PREPARED)}
        self._buffers.update(dict.fromkeys(PREPARED))
        try:
            super()._apply(fn, recurse)
        finally:
            if all(self._buffers.get(name) is before[name] for name in SOURCES):
                self._buffers.update({name: before[name] for name in PREPARED})
            else:
                self.prepare()
        return self

    @contextlib.contextmanager
    def _whole_state(self) -> Iterator[None]:
        """In which torch takes `SOURCES` for persistent, as they are for state_dicts."""
        self._non_persistent_buffers_set = {*PREPARED}
        try:
            yield
        finally:
            self._non_persistent_buffers_set = {*PREPARED, *SOURCES}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._whole_state():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        with self._whole_state():
            super()._load_from_state_dict(state_dict, prefix, *args)
        if self.frozen and f"{prefix}weight" in state_dict and f"{prefix}{SOURCES[0]}" not in state_dict:
            args[-1].append(
                f"the state_dict holds '{prefix}weight', of a float model, whose norms and biases are not those of a "
                "quantized one: quantize the float model with these weights"
            )
        self.prepare()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in SOURCES and PREPARED[0] in self._buffers:
            self.prepare()

    def __getattr__(self, name: str) -> Any:
        """As nn.Module's; a packed weight is no tensor of floats, as prune, weight_norm and fuse_linear_bn_eval would have it."""
        found = super().__getattr__(name)
        if found is None and name == "weight":
            raise AttributeError(
                "a quantized layer has no weight of floats, to be pruned, normalised, fused or parametrized: do that to the float "
                "model, and quantize it"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without what `__setstate__` prepares."""
        return {**super().__getstate__(), "_buffers": {**self._buffers, **dict.fromkeys(PREPARED)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()

    @property
    def divisor(self) -> torch.Tensor | None:
        """`factor`, in the order of the weight's inputs as the layer multiplies by them now."""
        return self.factor

    def divided(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] by the factors of its channels, if there are any."""
        divisor = self.divisor
        return x if divisor is None else x / divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features].

        Raises:
            UsageError: x holds integers, or has not as many channels as the layer takes.
        """
        expect_floats(x)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """As `forward`, of floats, or of bytes that are on the grid of the layer's input."""
        prepare = preparing()
        watching, call = self.__dict__.get("_prepared", _UNPREPARED) if prepare else _UNPREPARED
        if watching is not None and watching(x):
            check_tokens(self._buffers["acm"], x)
            return call(x)
        self.expect_channels(x)
        given, x = x, self.divided(x)
        floats = self._parameters["weight"]
        if floats is not None:
            y = F.linear(self.input(x), floats, self.bias)
            if self._moments is not None and y.requires_grad:
                self._moments.watch(x, y)
            return y
        check_tokens(self.acm, x)
        weight, acm, w_sums = self.operands()
        if self.input.table is not None and x.is_floating_point():
            x = self.input(x)  # to its levels, which lie on the grid
        y = quant_linear(
            x,
            weight,
            self.bias,
            acm,
            x_scale=self.input.scale,
            x_zero=self.input.zero_point,
            w_scale=self.weight_scale,
            a_bits=self.input.grid_bits,
            w_bits=self.packed_bits,
            w_sums=w_sums,
        )
        if prepare and may_prepare(self, given) and (watching is None or not watching.current()):
            self._prepare_call(given, (weight, self.bias, acm), w_sums)
        return y

    def expect_channels(self, x: torch.Tensor) -> None:
        """UsageError for another width than the layer's: that of a blocked weight may have room for it."""
        if not torch.jit.is_tracing() and x.shape[-1] != self.in_features:
            raise UsageError(f"x had shape {list(x.shape)}; the layer takes [..., {self.in_features}]")

    def _prepare_call(self, x: torch.Tensor, operands: tuple[Any, ...], w_sums: torch.Tensor | None) -> None:
        """Keeps this layer's call of the CPU's operator, for x like this one, with a watch over what it is made from."""
        grid = (self.input.scale.reshape(()), self.input.zero_point.reshape(()), self.weight_scale)
        bits = (self.input.grid_bits, self.packed_bits)
        arguments = (None, *operands, *grid, *bits, "none", None, None, None, 8, "float32", w_sums)
        if (
            self.input.table is not None
            or x.dtype != torch.float32
            or linear_operator.resolve(x, *arguments[1:]).name != "cpu"
        ):
            return
        with torch.no_grad():
            run, divisor = compiled(linear_operator, arguments, (0,)), self.divisor
            call: Call = run if divisor is None else lambda x: run(x / divisor)
            self.__dict__["_prepared"] = watch(self, small_tensors(self), self.in_features, x.dim()), call

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, w_bits={self.w_bits}"


class QuantPatchProjection(QuantLinear):
    """Stands in for a convolution whose patches do not overlap (stride = kernel size): a linear layer over flattened patches.

    A patch is flattened channel by channel, as the convolution's weight is. `weight_blocked` has the pixels' channels together
    instead where there are many, as inside a network: patches of channels-last memory are then whole runs of it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> None:
        super().__init__(weight.flatten(1), bias, *args)
        self.kernel_size = (weight.shape[2], weight.shape[3])

    @property
    def in_channels(self) -> int:
        """The convolution's; UsageError for patches of many pixels: timm asks for it before it makes such of another size."""
        if self.kernel_size == (1, 1):
            return self.in_features
        raise UsageError(
            f"patch_size was another one; a quantized model keeps its {self.kernel_size}: set it on the float model, and quantize "
            "that"
        )

    def __dir__(self) -> list[str]:
        """Without `in_channels`: torch.jit.trace asks for all that is listed."""
        return [name for name in super().__dir__() if name != "in_channels"]

    @property
    def by_pixels(self) -> bool:
        """Whether the weight that it multiplies by now has a pixel's channels together."""
        return self.weight_blocked is not None and self.operands()[0] is self.weight_blocked and self._many()

    def _many(self) -> bool:
        area = self.kernel_size[0] * self.kernel_size[1]
        return area > 1 and self.in_features // area >= _MANY_CHANNELS

    def _pixels_first(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., channels * pixels] to [..., pixels * channels]."""
        area = self.kernel_size[0] * self.kernel_size[1]
        return inputs.unflatten(-1, (-1, area)).transpose(-1, -2).flatten(-2)

    def arranged(self, packed: torch.Tensor) -> torch.Tensor:
        """As QuantLinear's."""
        if not self._many():
            return packed
        integers = unpack_weight(packed, self.packed_bits, self.in_features)
        return pack_integers(self._pixels_first(integers), self.packed_bits)

    @property
    def divisor(self) -> torch.Tensor | None:
        """As QuantLinear's."""
        factor = self.factor
        return self._pixels_first(factor) if factor is not None and self.by_pixels else factor

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, embed_dim, H / patch, W / patch], in channels-last memory."""
        (height, width), batch = self.kernel_size, x.shape[0]
        if height == width == 1 and self.acm is None:
            pixels = x.permute(0, 2, 3, 1)  # a pixel is a patch: no copy, in channels-last memory
            return super().product(pixels if pixels.is_contiguous() else extension.gathered(pixels)).permute(0, 3, 1, 2)
        rows, columns = x.shape[2] // height, x.shape[3] // width
        tokens = super().product(self._patches(x, rows, columns))
        return tokens.transpose(1, 2).reshape(batch, self.out_features, rows, columns)

    def _patches(self, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """[B, rows * columns, in_features], contiguous."""
        (height, width), (batch, channels, *_) = self.kernel_size, x.shape
        x = x[:, :, : rows * height, : columns * width]
        patches = x.reshape(batch, channels, rows, height, columns, width)
        patches = patches.permute(*((0, 2, 4, 3, 5, 1) if self.by_pixels else (0, 2, 4, 1, 3, 5)))
        return extension.gathered(patches).view(batch, rows * columns, self.in_features)


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """{name: layer} of a model's quantized layers, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def allocate(model: nn.Module) -> None:
    """Gives a converted model the shapes of a frozen one, in place and without values, which load_state_dict fills in."""
    for layer in quantized_layers(model).values():
        layer.allocate()
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.frozen = True


def _writes(packed: torch.Tensor | None) -> int:
    """How often torch saw it written to; what is made in inference mode is not counted."""
    return 0 if packed is None or packed.is_inference() else packed._version


def expect_floats(x: torch.Tensor) -> None:
    """UsageError for integers: operators take bytes for values that are quantized already."""
    if not x.is_floating_point():
        raise UsageError(f"x had dtype {x.dtype}; it must hold floats, which are quantized here")


def check_tokens(acm: torch.Tensor | None, x: torch.Tensor) -> None:
    """ValueError unless the images in x [B, T, ...] have as many tokens as the correction [T, N] was made for."""
    if acm is not None and x.dim() > 2:
        _check_count(acm, x.shape[-2])


def _check_count(acm: torch.Tensor, tokens: int) -> None:
    if tokens != acm.shape[0]:
        raise ValueError(
            f"acm was made for {acm.shape[0]} tokens an image; these have {tokens}: quantize for this input size"
        )


def quantize_output(module: nn.Module, name: str, bits: int, quantizer: str) -> ActivationQuantizer:
    """Adds an ActivationQuantizer as the child `name` of `module` and applies it to the module's output from now on."""
    site = ActivationQuantizer(bits, quantizer)
    module.add_module(name, site)
    module.register_forward_hook(_QuantizeOutput(name))
    return site


class _QuantizeOutput:
    """The hook of `quantize_output`; finds its quantizer by name so that deepcopy of the module stays whole."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return getattr(module, self.name)(output)


def correct_output(module: Any, acm: torch.Tensor | None) -> None:
    """Adds `acm` [tokens, channels] to the module's output [B, ..., channels] from now on; None takes it away."""
    if "acm" not in module._buffers:
        module.register_buffer("acm", None)
        module.register_forward_hook(_add_acm)
    module.acm = acm


def _add_acm(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    if module.acm is None:
        return output
    _check_count(module.acm, math.prod(output.shape[1:-1]))
    if output.shape[-1] != module.acm.shape[-1]:  # of images, where channels come first
        raise ValueError(
            f"acm was made for outputs of width {module.acm.shape[-1]}; these have {output.shape[-1]}: quantize for this input size"
        )
    return output + module.acm.to(output.dtype).view(output.shape[1:])
