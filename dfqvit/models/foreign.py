"""What stands in the model's place and is none: one sentence that says what it is and what to do."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import UsageError
from ..quantization.layers import quantized_layers
from .adapters import find_adapter, is_network
from .adapters.generic import required
from .spec import expect_own_methods
from .twin_families import TWINS

# Weights of the Hugging Face Hub that timm has under a name of its own: (theirs, by a pattern; timm's).
_TWINS = (
    (r"google/vit-(base|large)-patch(16|32)-(224|384)", r"vit_\1_patch\2_\3"),
    (r"google/vit-(base|large|huge)-patch(14|16|32)-224-in21k", r"vit_\1_patch\2_224.orig_in21k"),
    (r"facebook/deit-(tiny|small|base)-patch16-(224|384)", r"deit_\1_patch16_\2.fb_in1k"),
    (r"facebook/deit-(tiny|small|base)-distilled-patch16-(224|384)", r"deit_\1_distilled_patch16_\2.fb_in1k"),
    (r"microsoft/swin-(tiny|small|base|large)-patch4-window(7|12)-(224|384)", r"swin_\1_patch4_window\2_\3"),
    (r"facebook/dinov2-(small|base|large|giant)", r"vit_\1_patch14_dinov2.lvd142m"),
    (r"facebook/dinov2-with-registers-(small|base|large|giant)", r"vit_\1_patch14_reg4_dinov2.lvd142m"),
    (r"facebook/dino-vits(8|16)", r"vit_small_patch\1_224.dino"),
    (r"facebook/dino-vitb(8|16)", r"vit_base_patch\1_224.dino"),
)
_AVERAGES = ("torch.optim.swa_utils", "timm.utils.model_ema")
_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


def expect_float_model(model: Any) -> None:
    """UsageError unless `model` is a float timm model that can be worked on; says what it is and what to do."""
    said = _not_a_model(model) or _wrapped(model)
    if not said:
        said = _of_another_library(model) or _not_float(model) or _takes_more(model)
    if said:
        raise UsageError(f"model was {said}")
    expect_own_methods(model)
    find_adapter(model)


def tell_hooks(model: nn.Module) -> None:
    """Warns of forward hooks: they may change what the float model gives, and a file keeps none."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            warnings.warn(
                f"model has a forward hook on '{name or type(model).__name__}', which a file of the quantized model does not keep: "
                "where it changes the output, the quantized model will give another",
                stacklevel=2,
            )
            return


def _not_a_model(model: Any) -> str:
    if isinstance(model, (str, Path)):
        call = (
            f"dfqvit.load('{model}')" if str(model).endswith(".safetensors") else f"dfqvit.models.load_model('{model}')"
        )
        return f"'{model}', a {'path' if isinstance(model, Path) or '/' in model else 'name'}; give the model itself, {call}"
    if isinstance(model, Mapping):
        return (
            f"a {type(model).__name__}, such as a state_dict; give the model that it is loaded into: "
            "dfqvit.models.load_model(NAME, checkpoint=FILE)"
        )
    if isinstance(model, type):
        return f"the class {model.__name__}; give a model made of it, by timm.create_model"
    if not isinstance(model, nn.Module):
        hint = "; call it" if callable(model) else ""
        return f"a {type(model).__name__}{hint}; it must be a timm model, as timm.create_model returns"
    return ""


def expect_unwrapped(argument: str, model: Any) -> None:
    """UsageError where the argument of that name has the quantized model inside, with a wrapper of PyTorch or timm around it."""
    if said := _wrapper(model):
        what, place, _ = said
        raise UsageError(f"{argument} was {what}; give {argument}.{place}")


def _wrapper(model: Any) -> tuple[str, str, str] | None:
    """What stands around a model, the attribute that is the model, and what to do with the result; None where nothing does."""
    kind, home = type(model).__name__, type(model).__module__
    if isinstance(model, (DataParallel, DistributedDataParallel)) or kind == "FullyShardedDataParallel":
        return f"wrapped in {kind}", "module", ", and wrap the result again"
    if home in _AVERAGES:
        return f"wrapped in {kind}, which averages weights", "module", ""
    if kind == "OptimizedModule" and hasattr(model, "_orig_mod"):
        return "compiled by torch.compile", "_orig_mod", ", and compile the result"
    return None


def _wrapped(model: nn.Module) -> str:
    kind, home = type(model).__name__, type(model).__module__
    if said := _wrapper(model):
        what, place, then = said
        return f"{what}; give model.{place}{then}"
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            return (
                f"a {kind} whose '{name}' is compiled by torch.compile; put model.{name}._orig_mod in its place, and compile the "
                "result"
            )
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return "compiled in place by compile(); give copy.deepcopy(model), which is not, and compile the result"
    if home.startswith("torch.jit") or kind in ("ScriptModule", "RecursiveScriptModule", "TopLevelTracedModule"):
        return f"a TorchScript module ({kind}); give the timm model that it was made from, and trace the result"
    if home.startswith("torch.fx") or kind.startswith("GraphModule"):
        return "a GraphModule of torch.fx or torch.export; give the timm model that it was made from, and export the result"
    return ""


def _takes_more(model: nn.Module) -> str:
    """A network around timm models whose forward asks for more than images."""
    needed = required(model.forward) if is_network(model) else 1
    if needed == 1:
        return ""
    names = ", ".join(inspect.signature(model.forward).parameters)
    return (
        f"a {type(model).__name__} whose forward takes ({names}); it must take images alone: wrap it in a module whose forward "
        "does"
    )


def _of_another_library(model: Any) -> str:
    kind, home = type(model).__name__, type(model).__module__
    if isinstance(model, nn.Module) and is_network(model) and not home.startswith("peft."):
        return ""
    if home.startswith("transformers.") or any(
        each.__module__.startswith("transformers.modeling_utils") for each in type(model).__mro__
    ):
        same = "give dfqvit.from_transformers(model), which has its weights, or " if kind in TWINS else ""
        return f"a {kind} of transformers; dfqvit takes timm's models: {same}{_twin_of(model)}"
    if home.startswith("torchvision."):
        twin = _twin_of_torchvision(model)
        return (
            f"a {kind} of torchvision, whose weights timm cannot load; dfqvit takes timm's models, such as "
            f"timm.create_model('{twin}', pretrained=True)"
        )
    if home.startswith("peft."):
        return f"a {kind} of peft; merge the adapter first, model.merge_and_unload()"
    return ""


def _not_float(model: nn.Module) -> str:
    if hasattr(model, "dfqvit_record") or quantized_layers(model):
        return "quantized by dfqvit already; give the float model that it was made from"
    parameters = list(model.parameters())
    if not parameters:
        return f"a {type(model).__name__} without parameters; it must be a float timm model"
    if any(parameter.is_meta for parameter in parameters):
        return "on the meta device, where it has no weights; build it on a CPU or GPU and load them"
    odd = next((p for p in parameters if not p.is_floating_point() or p.is_quantized), None)
    foreign = next(
        (type(m) for m in model.modules() if type(m).__module__.startswith(("bitsandbytes.", "torchao.", "torch.ao."))),
        None,
    )
    if foreign is not None:
        library = foreign.__module__.split(".")[0]
        return f"quantized by another library already ({library}'s {foreign.__name__}); give the float model"
    if odd is not None:
        return f"no float model: it has parameters of {odd.dtype}; give the float model"
    return ""


def _twin_of(model: Any) -> str:
    """What loads the same weights in timm, by the name that a transformers model came under, or else by its sizes."""
    config = getattr(model, "config", None)
    source = str(getattr(config, "_name_or_path", "") or "")
    for pattern, twin in _TWINS:
        found = re.fullmatch(pattern, source)
        if found and timm.is_model(name := found.expand(twin)):
            return f"the weights of '{source}' are timm.create_model('{name}', pretrained=True)"
    kind = str(getattr(config, "model_type", "") or "vit")
    width, patch, size = (getattr(config, key, None) for key in ("hidden_size", "patch_size", "image_size"))
    prefix = "deit" if kind == "deit" else "vit"
    name = f"{prefix}_{_WIDTHS.get(width or 0, 'base')}_patch{patch}_{size}"
    if timm.is_model(name):
        return f"one of the same structure is timm.create_model('{name}', pretrained=True)"
    return "timm.create_model(NAME, pretrained=True), where timm.list_pretrained() lists the names"


def _twin_of_torchvision(model: Any) -> str:
    found = {"tiny": 96, "base": 128}
    if type(model).__name__ == "SwinTransformer":
        width = next((p.shape[0] for p in model.parameters()), 96)
        return f"swin_{next((k for k, v in found.items() if v == width), 'tiny')}_patch4_window7_224"
    width, patch = getattr(model, "hidden_dim", 768), getattr(model, "patch_size", 16)
    name = f"vit_{_WIDTHS.get(width, 'base')}_patch{patch}_{getattr(model, 'image_size', 224)}"
    return name if timm.is_model(name) else "vit_base_patch16_224"
