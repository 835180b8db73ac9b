"""What every quantized model is, whatever its family: the entry that images come through, and float32 inside."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from ..errors import UsageError
from ..kernels import flops  # noqa: F401 (torch's counter of operations finds ours)
from ..kernels.pack_weight import packed_row_bytes
from .layers import QuantLinear, QuantPatchProjection
from .precision import KeepsPrecision
from .prepared import SOURCES
from .quantizers import TellsBits

BITS = "dfqvit_bits"  # beside a model's tensors in its state_dict, and in no file
_BIASES = "attention_bias_cache"  # timm's attribute
_OF_TIMM = ("forward_features", "forward_intermediates", "forward_head")  # not every class has them


class QuantizedForward(KeepsPrecision):
    """Mixed in before a timm model's class by `quantized`. The model stays timm's in all else.

    It computes in float32 with float32 scales: images of other float dtypes are brought to float32, and what comes out is
    brought back; `half()`, autocast and the like leave the model as it is. Images that cannot be normalised ones are refused.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Images [B, C, H, W], normalised, to logits [B, classes] of the images' dtype.

        Raises:
            UsageError: the images have an integer dtype, or not the channels that the model takes.
        """
        refuse_fx(self, x)
        like = _like(x)
        return like(self._entered(super().forward, x, *args, **kwargs))

    def forward_features(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's."""
        like = _like(x)
        return like(self._entered(super().forward_features, x, *args, **kwargs))  # type: ignore[misc]

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's; float32."""
        return self._entered(super().forward_intermediates, x, *args, **kwargs)  # type: ignore[misc]

    def forward_head(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As timm's."""
        return _undisturbed(super().forward_head, x, *args, **kwargs)  # type: ignore[misc]

    def _entered(self, method: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What `method` gives for the images, in float32; for none, what it gives for one of zeros, without that one.

        Many timm models reshape in a way that needs an image.
        """
        images = self._admitted(x)
        of_timm = not isinstance(self, QuantizedNetwork) or type(self).__module__.startswith("timm.")
        empty = of_timm and not torch.jit.is_tracing() and images.shape[:1] == (0,)
        if empty:
            images = torch.cat([images, images.new_zeros(1, *images.shape[1:])])
        found = _undisturbed(method, images, *args, **kwargs)
        return _each_tensor(found, lambda tensor: tensor[:0]) if empty else found

    def _admitted(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise UsageError(f"images were a {type(x).__name__}; they must be a float tensor [B, C, H, W], normalised")
        _refuse_onnx(self)
        _expect_normalised(x, "model")
        channels = getattr(self, "in_chans", None)
        if channels is not None and (x.dim() != 4 or x.shape[1] != channels):
            raise UsageError(f"images had shape {list(x.shape)}; they must be [B, {channels}, H, W]")
        return _floats(x, self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """With the bits that scales and zero points are for, of which a file of tensors alone knows nothing else."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        bits = [each.told for _, each in _telling(self)]
        destination[prefix + BITS] = torch.tensor(bits, dtype=torch.uint8, device="cpu")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        told = state_dict.pop(prefix + BITS, None)
        for (name, module), bits in zip(_telling(self), [] if told is None else told.tolist(), strict=False):
            if bits != module.told:
                args[-1].append(module.said_of(f"{prefix}{name}", bits))
        # `assign` would take another dtype as it comes
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            given = state_dict.get(prefix + name)
            if isinstance(given, torch.Tensor) and given.is_floating_point() and tensor.is_floating_point():
                state_dict[prefix + name] = given.to(tensor.dtype)
        if any(_others_hold(each) for each in self.modules()) and not args[0].get("assign_to_params_buffers"):
            warnings.warn(
                "the quantized model is in shared memory, and is loaded into: other processes that hold it go on with the packed "
                "weights of before; send them the model again",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks first."""
        raise UsageError(
            "a quantized model cannot be scripted (torch.jit.script); torch.jit.trace, torch.compile and torch.export take it"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as timm's class and what is mixed into it, since the class itself is made at run time."""
        *mixins, kind = type(self).__bases__
        return _empty, (kind, tuple(mixins)), super().__reduce_ex__(protocol)[2]


class KeepsPatches(nn.Module):
    """Mixed in where timm's class can be set to another input size: its packed weights are for patches of one size."""

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As timm's.

        Raises:
            UsageError: patch_size is another one.
        """
        set_size = super().set_input_size  # type: ignore[misc]
        asked = inspect.signature(set_size).bind(*args, **kwargs).arguments.get("patch_size")
        now: Any = getattr(getattr(self, "patch_embed", None), "patch_size", None)
        if asked is not None and now is not None and asked not in (now, list(now)) and (asked, asked) != now:
            raise UsageError(
                f"patch_size was {asked}; a quantized model keeps its {now}: set it on the float model, and quantize that"
            )
        set_size(*args, **kwargs)


class Forgetting(dict):
    """In place of the dict in which timm's attentions keep the biases that they looked up (LeViT, EfficientFormer).

    In eval mode they would go on with those of before `load_state_dict`, or with those that `torch.func.functional_call` gave
    them. This one says that it holds nothing, so they look them up in every call.
    """

    def __contains__(self, key: object) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def __reduce__(self) -> Any:
        return Forgetting, ()


class QuantizedNetwork(nn.Module):
    """Mixed in before `QuantizedModel` where the model is a network around timm models: it may take and give what it likes."""

    def _admitted(self, x: Any) -> Any:
        """Tensors of floats, also in lists, in float32; the rest as it is."""
        _refuse_onnx(self)
        if isinstance(x, (list, tuple)):
            return type(x)(self._admitted(each) for each in x)
        if not isinstance(x, torch.Tensor):
            return x
        _expect_normalised(x, "network")
        return _floats(x, self)


def refuse_fx(model: nn.Module, images: Any) -> None:
    """UsageError for what torch.fx gives in place of images: it would follow none of the checks that a call begins with."""
    if isinstance(images, torch.fx.Proxy):
        left = "; it is in train mode now, as torchvision left it: call eval()" if model.training else ""
        raise UsageError(
            "a quantized model cannot be traced by torch.fx, as create_feature_extractor does; forward_intermediates and timm's "
            f"FeatureGetterNet give its features, torch.export and torch.jit.trace a program{left}"
        )


def _refuse_onnx(model: nn.Module) -> None:
    """ONNX has no nodes for the operators; what `export_onnx` gives torch has none of these layers any more."""
    kinds = (QuantLinear, QuantPatchProjection)
    if _writing_onnx() and any(type(module) in kinds for module in model.modules()):
        raise UsageError(
            "a quantized model cannot be written by torch.onnx.export, which has no nodes for its operators; "
            "dfqvit.storage.export.export_onnx(model, path) writes it, and `dfqvit export FILE --onnx OUT`"
        )


@torch.compiler.assume_constant_result  # torch.compile takes torch's own answer to be no
def _writing_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def kind_of(tensor: torch.Tensor) -> str:
    """ "strided", of a tensor whose values lie in rows; or what it is instead, as "nested" or "sparse_coo"."""
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")


def _expect_normalised(images: torch.Tensor, taker: str) -> None:
    """UsageError for a tensor that cannot hold normalised images: `taker`, "model" or "network", is what they were given to."""
    if images.layout is not torch.strided or images.is_nested:
        raise UsageError(
            f"images were a tensor of kind '{kind_of(images)}'; they must be a dense float tensor [B, C, H, W], normalised"
        )
    if not images.is_floating_point():
        raise UsageError(
            f"images had dtype {images.dtype}; they must be floats, normalised as the {taker} expects "
            f"({taker}.dfqvit_record.preprocessing.normalise(images) does that to pixels)"
        )
    # rounding has a gradient of its own, straight-through; torch would take a tangent of it as 0, without a word
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(images).tangent is not None:
        raise UsageError(
            "images had a tangent (torch.func.jvp, forward-mode derivatives), which rounding has not; differentiate backward"
        )


def _floats(images: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """In float32. A trace keeps no check of Python's, so one of TorchScript goes into it: pixels are refused there too."""
    if torch.jit.is_tracing():
        channels, height, width = _constant_size(images, model) if images.dim() == 4 else (0, 0, 0)
        images = _traced(_refuse_others)(images, images.dim(), channels, height, width)
    return images.float()


def _of_one_size(model: nn.Module) -> bool:
    """Whether a trace of it is for images of the size that it was traced with: positions, corrections are constants in it.

    So is the number of patches along each side in a MobileViT, which has a `patch_area`.
    """
    names = [name.rpartition(".")[2] for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    sized = any(
        getattr(each, name, None) is not None for each in model.modules() for name in ("img_size", "patch_area")
    )
    return sized or any(name == "acm" or "pos" in name for name in names)


def _constant_size(images: torch.Tensor, model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of all images that a trace of it takes, each 0 where they may differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # that these are constants, which is what is wanted
        channels, height, width = (int(size) for size in images.shape[1:])
    channels = 0 if isinstance(model, QuantizedNetwork) else channels
    return (channels, height, width) if _of_one_size(model) else (channels, 0, 0)


@functools.cache
def _traced(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which who traces has read already
        return torch.jit.script(function)


def _refuse_others(images: torch.Tensor, dims: int, channels: int, height: int, width: int) -> torch.Tensor:
    if not images.is_floating_point():
        raise ValueError("images had an integer dtype; they must be floats, normalised as the model expects")
    if images.dim() != dims:
        raise ValueError(f"images had shape {images.size()}; the model was traced for tensors of {dims} dimensions")
    if channels > 0 and images.size(1) != channels:
        raise ValueError(f"images had shape {images.size()}; they must be [B, {channels}, H, W]")
    if height > 0 and (images.size(-2) != height or images.size(-1) != width):
        raise ValueError(
            f"images were {images.size(-2)} x {images.size(-1)}; the model was traced for {height} x {width}: trace it for these"
        )
    return images


def _in_dtype_of(tensor: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return tensor.to(images) if tensor.is_floating_point() else tensor  # of a dtype the trace would make a constant


def _undisturbed(method: Callable[..., Any], images: Any, *args: Any, **kwargs: Any) -> Any:
    """What `method` gives where neither autocast nor a default device of torch's changes it."""
    with _autocast_off("cpu"), _autocast_off("cuda"), _at(images):
        found = method(images, *args, **kwargs)
    return found  # torch.compile takes no return from within


def _autocast_off(device: str) -> AbstractContextManager[Any]:
    """Nothing where it is off anyhow: exported programs would hold it."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _at(images: Any) -> AbstractContextManager[Any]:
    """Where the tensors that timm makes in a call lie with the images: on meta, indices have no values and torch reads any.

    Nothing where there is no default device, and in a program, which knows its own.
    """
    if torch.compiler.is_dynamo_compiling() or not torch._C._len_torch_function_stack():
        return nullcontext()
    return images.device if isinstance(images, torch.Tensor) else nullcontext()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of its state_dict as a file holds them: without the bits, which stand in the record."""
    return {key: value for key, value in model.state_dict().items() if key.rpartition(".")[2] != BITS}


def file_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of each of these tensors in a file, where every packed weight takes its own bits (see `levels`)."""
    packed = {
        f"{name}.weight_packed": layer.out_features * packed_row_bytes(layer.in_features, layer.w_bits)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, QuantLinear)
    }
    return {key: packed.get(key, tensor.numel() * tensor.element_size()) for key, tensor in state_of(model).items()}


def _others_hold(module: nn.Module) -> bool:
    """Whether it is a layer whose packed weights other processes may hold too: they do not see that these were written to."""
    packed = module._buffers.get(SOURCES[0]) if isinstance(module, QuantLinear) else None
    return packed is not None and packed.device.type == "cpu" and packed.is_shared()


def _telling(model: nn.Module) -> list[tuple[str, TellsBits]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TellsBits)]


def quantized(model: nn.Module, *mixins: type) -> nn.Module:
    """`model`, whose class is from now on also QuantizedForward (and `mixins`, before it); in place."""
    *held, kind = type(model).__bases__ if isinstance(model, QuantizedForward) else _entered(type(model))
    for module in model.modules():
        if _BIASES in vars(module):
            setattr(module, _BIASES, Forgetting())
    model.__class__ = _class_of(kind, (*(mixin for mixin in mixins if mixin not in held), *held))
    return model


def _entered(kind: type) -> tuple[type, ...]:
    """The bases that a timm class has from the beginning, itself the last."""
    return (*((KeepsPatches,) if hasattr(kind, "set_input_size") else ()), QuantizedForward, kind)


@functools.cache
def _class_of(kind: type, mixins: tuple[type, ...]) -> type:
    absent = {name: _Absent() for name in _OF_TIMM if not hasattr(kind, name)}
    return type(kind.__name__, (*mixins, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__, **absent})


class _Absent:
    """A method that the class does not have, though a mixin has: `hasattr` and an error say what they say of the float model."""

    def __get__(self, model: Any, kind: type) -> Any:
        raise AttributeError(f"type object '{kind.__name__}' has no such attribute")


def _empty(kind: type, mixins: tuple[type, ...]) -> nn.Module:
    cls: Any = _class_of(kind, mixins)
    return cls.__new__(cls)


def _like(images: Any) -> Callable[[Any], Any]:
    """Brings what is found, as far as it holds tensors of floats, to the dtype of the images, in a trace of those that come.

    To be called first: a trace knows images that were brought to float32 in place of those that came.
    """
    if not isinstance(images, torch.Tensor):
        return lambda found: found
    if torch.jit.is_tracing():
        came = images[:0]
        return lambda found: _each_tensor(found, lambda tensor: _traced(_in_dtype_of)(tensor, came))
    if images.dtype == torch.float32:
        return lambda found: found
    return lambda found: _each_tensor(
        found, lambda tensor: tensor.to(images.dtype) if tensor.is_floating_point() else tensor
    )


def _each_tensor(found: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`found` with each tensor in it changed, also those in lists, tuples and mappings."""
    if isinstance(found, dict):
        return type(found)({key: _each_tensor(value, change) for key, value in found.items()})
    if type(found) in (list, tuple):
        return type(found)(_each_tensor(value, change) for value in found)
    return change(found) if isinstance(found, torch.Tensor) else found
