"""A network of the user's own around one or more timm models: a detector, a segmenter, anything with a neck and heads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...quantization.attention import AttentionOperands
from ...quantization.layers import QuantLinear, quantize_output
from ...quantization.model import QuantizedNetwork
from ...quantization.quantizers import ActivationQuantizer
from ...quantization.recipe import Recipe
from ..preprocessing import FEATURES, config_of
from ..spec import dotted
from .base import Adapter, Features
from .calls import Probe
from .generic import GenericAdapter
from .swin import SwinAdapter
from .vit import VitAdapter

_OURS = __name__.split(".")[0]


def is_network(model: nn.Module) -> bool:
    """Whether `model` is no timm model itself but holds at least one that is supported."""
    is_timms = config_of(model) is not None
    return (not is_timms or type(model).__module__ == FEATURES) and bool(backbones(model))


@torch.no_grad()
def rescaled_by(network: nn.Module, images: torch.Tensor) -> str:
    """The backbone that sees the images [B, C, H, W] with another mean and deviation than the network; "" where none does."""
    seen: dict[str, torch.Tensor] = {}

    def look(name: str, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], torch.Tensor) and given[0].shape == images.shape:
            seen.setdefault(name, given[0].float())

    with contextlib.ExitStack() as hooks:
        for name, adapter in backbones(network).items():
            for module in adapter.model.modules():
                hook = module.register_forward_pre_hook(lambda _, given, name=name: look(name, given))
                hooks.enter_context(hook)
        network(images)
    for name, found in seen.items():
        x, y = (each.transpose(0, 1).flatten(1).double() for each in (images, found))
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        slope = (x * y).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True)
        straight = bool(((y - slope * x).square().sum(1) < 1e-6 * y.square().sum(1)).all())
        if straight and not torch.allclose(found, images.float(), atol=1e-3):
            return name
    return ""


def backbones(network: nn.Module) -> dict[str, Adapter]:
    """{name: adapter} of the supported timm models inside `network`, outermost ones, each once however often it is held."""
    found: dict[str, Adapter] = {}
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        if name:
            for kind in (VitAdapter, SwinAdapter):
                if kind.supports(module):
                    found[name] = kind(module)
                    return
        before = len(found)
        for child, inner in module.named_children():
            visit(dotted(name, child), inner)
        wrapper = type(module).__module__ == FEATURES
        timms = name and config_of(module) is not None
        if timms and not (wrapper and len(found) > before) and GenericAdapter.supports(module):
            for inner_name in list(found)[before:]:
                del found[inner_name]
            found[name] = GenericAdapter(module)

    visit("", network)
    return found


@dataclass(frozen=True)
class Survey:
    """What one image's way through a network shows.

    Attributes:
        layers: names of the layers that can be quantized.
        heads: those outside the backbones whose result no further layer takes.
        idle: names of the modules that are never called.
    """

    layers: tuple[str, ...]
    heads: tuple[str, ...]
    idle: tuple[str, ...]


class NetworkAdapter(GenericAdapter):
    """Composed of the adapters of the timm models inside.

    In the backbones all is quantized that their adapters quantize, outside them the layers of exact class `nn.Linear` and the
    `nn.Conv2d` whose patches do not overlap (1x1 among them). What no image passes through stays float.
    """

    mixins: ClassVar = (QuantizedNetwork,)

    def __init__(self, model: nn.Module, compat: str = "") -> None:
        super().__init__(model, compat)
        self.backbones = backbones(model)
        self.heeds_compat = any(adapter.heeds_compat for adapter in self.backbones.values())
        for adapter in self.backbones.values():
            adapter.compat = compat
            if isinstance(adapter, GenericAdapter):
                adapter.entry = model

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Whether `model` holds supported timm models and is none."""
        return is_network(model)

    @functools.cached_property
    def survey(self) -> Survey:
        """Of the model's record where it was loaded, else by a pass over one image."""
        known = getattr(self.model, "dfqvit_survey", None)
        return Survey(**known) if known is not None else self._surveyed()

    def _surveyed(self) -> Survey:
        probes = {name: Probe(layer) for name, layer in self.candidates().items()}
        names = {module: name for name, module in self.model.named_modules()}
        called: set[nn.Module] = set()
        with self._replaced(probes):
            with contextlib.ExitStack() as hooks:
                for module in names:
                    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                        hooks.enter_context(module.register_forward_hook(lambda module, *_: called.add(module)))
                self._pass()
            self._pass(graph=False)  # without hooks, with which torch's modules call their layers
        usable = {name: probe for name, probe in probes.items() if probe.depends and not probe.read}
        outside = [name for name in usable if not any(name.startswith(f"{prefix}.") for prefix in self.backbones)]
        inner = _followed(usable)
        idle = (name for module, name in names.items() if module not in called)
        return Survey(tuple(usable), tuple(name for name in outside if name not in inner), tuple(idle))

    def heads(self) -> tuple[Any, ...]:
        """The layers outside the backbones whose result no further layer takes."""
        return tuple(self.model.get_submodule(name) for name in self.survey.heads)

    def layers(self) -> dict[str, nn.Module]:
        """Those that an image passes through, in the backbones and outside."""
        return {name: self.model.get_submodule(name) for name in self.survey.layers}

    def convert(self, recipe: Recipe, names: Collection[str] | None = None) -> None:
        """As the base's; what the survey found is kept on the model as `dfqvit_survey`."""
        self.prepare()
        survey = self.survey
        self.model.dfqvit_survey = asdict(survey)
        super().convert(recipe, names)
        for name in survey.idle:
            self._clear(self.model.get_submodule(name))

    @staticmethod
    def _clear(module: Any) -> None:
        """Takes away the quantizers of a module that no image passes through: they would see nothing."""
        for child, site in list(module._modules.items()):
            if isinstance(site, (ActivationQuantizer, AttentionOperands)):
                del module._modules[child]
                module._forward_hooks.clear()
                module.__class__ = next(kind for kind in type(module).__mro__ if kind.__module__.split(".")[0] != _OURS)

    def prepare(self) -> None:
        """As the backbones' adapters do."""
        for adapter in self.backbones.values():
            adapter.prepare()

    def blocks(self) -> list[Any]:
        """Of all backbones, one after the other, without those that no image passes through."""
        idle = {self.model.get_submodule(name) for name in self.survey.idle}
        return [block for adapter in self.backbones.values() for block in adapter.blocks() if block not in idle]

    def last_linear(self, block: Any) -> nn.Module | None:
        """As the adapter of the block's backbone says."""
        for adapter in self.backbones.values():
            if any(block is each for each in adapter.blocks()):
                return adapter.last_linear(block)
        return None

    def add_psaq_sites(self, bits: int, quantizer: str) -> None:
        """Those of the backbones, and the outputs of the layers outside."""
        for adapter in self.backbones.values():
            adapter.add_psaq_sites(bits, quantizer)
        for name, module in list(self.model.named_modules()):
            inside = any(name.startswith(f"{prefix}.") for prefix in self.backbones)
            if isinstance(module, QuantLinear) and not inside:
                quantize_output(module, "output_quantizer", bits, quantizer)

    def quantize_constants(self, bits: int) -> None:
        """Those of the backbones."""
        for adapter in self.backbones.values():
            adapter.quantize_constants(bits)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Features]:
        """Collects the features of all backbones; they are there once the block has ended."""
        features = Features()
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(adapter.capture()) for adapter in self.backbones.values()]
            yield features
        features.tensors += [tensor for each in found for tensor in each.tensors]
        features.windows += [windows for each in found for windows in each.windows]


def _followed(probes: dict[str, Probe]) -> set[str]:
    """The layers whose result reaches another layer's input, found along torch's graph of the pass."""
    made = {node: name for name, probe in probes.items() for node in probe.made}
    found: set[str] = set()
    seen: set[Any] = set()
    waiting = [node for probe in probes.values() for node in probe.taken]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            found.add(made[node])
            continue
        waiting += [following for following, _ in node.next_functions]
    return found


def flattened(outputs: Any) -> list[torch.Tensor]:
    """The tensors in what a network gives: a tensor, or lists, tuples and mappings of such, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    elif not isinstance(outputs, (list, tuple)):
        return []
    return [tensor for each in outputs for tensor in flattened(each)]
