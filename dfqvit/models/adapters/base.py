"""The interface of an adapter, and what all families share."""

from __future__ import annotations

import abc
import contextlib
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from ...errors import UsageError, first_line
from ...quantization.attention import AttentionOperands
from ...quantization.layers import QuantLinear, QuantPatchProjection, correct_output, quantize_output, quantized_layers
from ...quantization.recipe import Recipe
from ..preprocessing import image_shape
from ..spec import classifier
from .calls import Probe, at_one_place
from .products import quantize_products
from .scalings import SCALED, scalings

_FIRST = "patch_embed.proj"
_FUSING = ("fuse", "reparameterize", "switch_to_deploy")  # methods of timm that write weights anew
_WRITTEN = ("timm", "torch", "builtins", __name__.split(".")[0])  # packages whose classes compute what an adapter knows


@dataclass
class Features:
    """Attention outputs averaged over heads, as hooks collect them in one forward pass: [B * windows, N, D] each."""

    windows: list[int] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)

    def stacked(self) -> Iterator[tuple[torch.Tensor, int]]:
        """([L, B * windows, N, D], windows) for each run of layers of one shape, so that one launch serves all its layers."""
        start = 0
        for end in range(1, len(self.tensors) + 1):
            same = end < len(self.tensors) and (
                self.tensors[end].shape == self.tensors[start].shape and self.windows[end] == self.windows[start]
            )
            if not same:
                yield torch.stack(self.tensors[start:end]), self.windows[start]
                start = end


LayerNames = Mapping[type, tuple[str, ...]]  # class of the parent -> its linear layers


class Adapter(abc.ABC):
    """One model seen through its family's structure.

    `compat="psaq"` makes features as PSAQ-ViT's own code does where that differs (Swin).
    """

    patchable: ClassVar[LayerNames]  # where `dfqvit.patch` takes linear layers over, beside MLPs
    element_acm_only: ClassVar[bool] = False  # whether blocks' outputs may be other than [B, ..., channels]
    whole_blocks: ClassVar[bool] = True  # whether a block's output depends on its one input alone
    placements: ClassVar[tuple[str, ...]] = ("gemm", "psaq")  # of quantizers; see `Recipe`
    mixins: ClassVar[tuple[type, ...]] = ()  # of the quantized model's class, beside `QuantizedModel`
    heeds_compat: bool = False  # whether `compat` makes other features

    def __init__(self, model: nn.Module, compat: str = "") -> None:
        self.model: Any = model
        self.compat = compat

    @classmethod
    @abc.abstractmethod
    def supports(cls, model: nn.Module) -> bool:
        """Whether `model` is of this family."""

    @abc.abstractmethod
    def blocks(self) -> list[Any]:
        """The transformer blocks, first to last."""

    @abc.abstractmethod
    def add_psaq_sites(self, bits: int, quantizer: str) -> None:
        """Quantizes the activations that PSAQ-ViT quantizes beside the inputs of linear layers; see `placement="psaq"`."""

    def add_gemm_sites(self, bits: int, quantizer: str) -> None:
        """Quantizes the operands of the matrix products that are no layers: attention's, as far as it is known."""
        quantize_products(self.model, bits, quantizer)

    @abc.abstractmethod
    def quantize_constants(self, bits: int) -> None:
        """Rounds the parameters that PSAQ-ViT treats as activations (embeddings, bias tables) to their grids, in place."""

    @abc.abstractmethod
    def feature_of(self, attention: Any, output: torch.Tensor) -> tuple[torch.Tensor, int]:
        """(features [B * windows, N, D], windows) from an attention layer's `softmax(QK^T)V` of shape [B', N', heads * D]."""

    def heads(self) -> tuple[Any, ...]:
        """The classifier's layers."""
        found = classifier(self.model)
        return tuple(found) if isinstance(found, (tuple, list, nn.ModuleList)) else (found,)

    def is_known(self) -> bool:
        """Whether the model computes what its family's code says: no class of it is of the user's own."""
        kinds = {kind for module in self.model.modules() for kind in type(module).__mro__}
        return all(kind.__module__.split(".")[0] in _WRITTEN for kind in kinds)

    def candidates(self) -> dict[str, nn.Module]:
        """The layers that could be quantized, by name: every linear layer, and the patch projection where it is one.

        One that stands at two places, or whose weight does, is none.
        """
        found = at_one_place(self.model, lambda module: type(module) is nn.Linear or is_patch_convolution(module))
        first = {name: found.pop(name) for name in (_FIRST,) if name in found}
        return {name: layer for name, layer in found.items() if type(layer) is nn.Linear} | first

    def layers(self) -> dict[str, nn.Module]:
        """The candidates that the model calls with what depends on the image, and of which it reads nothing itself.

        Found by a pass over one image.
        """
        probes = {name: Probe(layer) for name, layer in self.candidates().items()}
        with self._replaced(probes):
            self._pass()
            self._pass(graph=False)
        found = {name: probe.layer for name, probe in probes.items() if probe.depends and not probe.read}
        if not found:
            raise UsageError(f"model was a {type(self.model).__name__}, which calls no layer that could be quantized")
        return found

    @contextlib.contextmanager
    def _replaced(self, probes: dict[str, Probe]) -> Iterator[None]:
        """The probes in place of their layers, during the `with` block."""
        try:
            for name, probe in probes.items():
                self._replace(name, probe)
            yield
        finally:
            for name, probe in probes.items():
                self._replace(name, probe._modules["layer"])  # type: ignore[arg-type]

    def _pass(self, *, graph: bool = True) -> None:
        """One image through the model, so that what depends on it requires a gradient, and nothing else does.

        Without the graph, some modules of torch (`nn.TransformerEncoderLayer`) read the weights of their layers and call none.
        """
        parameter = next(self.model.parameters())
        image = torch.zeros(1, *image_shape(self.model), device=parameter.device, dtype=parameter.dtype)
        trained = [each for each in self.model.parameters() if each.requires_grad]
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(graph):
                self.model.requires_grad_(False)
                given = image.clone().requires_grad_() * 1
                version = given._version
                self.model(given)
        except Exception as error:  # whatever the model raises
            raise UsageError(
                f"model was a {type(self.model).__name__}, which one image {list(image.shape)} cannot be run through "
                f"({first_line(error)})"
            ) from error
        finally:
            for each in trained:
                each.requires_grad_(True)
        if given._version != version:
            raise UsageError(
                f"model was a {type(self.model).__name__}, which writes into the images that it is given, and would see what it "
                "wrote at its next call; let it make new ones (x = x - mean, not x -= mean)"
            )

    def prepare(self) -> None:  # noqa: B027 (most families change nothing)
        """What a family changes in the float model before its layers are looked for; the output stays."""

    def convert(self, recipe: Recipe, names: Collection[str] | None = None) -> None:
        """Replaces the model's `layers` by quantized ones, in place, and adds the placement's sites.

        The convolution over the image and the classifier are the recipe's edges.

        Args:
            recipe: bits and rules.
            names: the layers to replace, as `load` knows them from the file; default `layers()`.

        Raises:
            UsageError: `layer_bits` names a layer that stays float, or the model does not fit.
        """
        self.prepare()
        layers = self.layers() if names is None else {name: self.model.get_submodule(name) for name in names}
        heads = self.heads()
        assert recipe.levels is not None
        for name, module in layers.items():
            edge = any(module is head for head in heads) or _takes_images(name, module)
            bits = recipe.bits_of(name, edge), recipe.input_bits(edge)
            kind = QuantPatchProjection if isinstance(module, nn.Conv2d) else QuantLinear
            self._replace(name, kind.from_float(module, *bits, recipe.quantizer, recipe.levels))
        replaced = quantized_layers(self.model)
        for name in recipe.layer_bits or {}:
            if name not in replaced:
                raise UsageError(f"layer_bits named '{name}'; the model has no such linear layer")
        sites = self.add_psaq_sites if recipe.placement == "psaq" else self.add_gemm_sites
        sites(recipe.a_bits, recipe.quantizer)
        for module in self.model.modules():
            if isinstance(module, AttentionOperands):
                module.steps = (1 << recipe.softmax_bits) - 1
        if recipe.scaling == "channels":
            self.model.dfqvit_scalings = places = scalings(self.model).among(replaced.keys())  # see `runtime.own`
            scaled = [self.model.get_submodule(name) for name in {*places.results(), *places.inputs()}]
            mark = uuid.uuid4().hex
            for module in (self.model, *scaled):
                vars(module)[SCALED] = mark
        for module in self.model.modules():
            fusing = [name for name in _FUSING if hasattr(type(module), name)] if module is not self.model else []
            if fusing and quantized_layers(module):
                vars(module).update(dict.fromkeys(fusing, _refuse_fusing))

    def set_acm(self, index: int, acm: torch.Tensor | None) -> None:
        """Corrects the output of block `index` by `acm` [tokens, channels], or takes the correction away.

        Where only the residual sum lies between the block's last linear layer and its output, the correction rides in
        that layer's epilogue; otherwise (a norm, LayerScale or quantizers in between) it is added to the block's output.
        """
        block: Any = self.blocks()[index]
        last = self.last_linear(block)
        if isinstance(last, QuantLinear) and not hasattr(block, "output_quantizer"):
            last.acm = acm
        else:
            correct_output(block, acm)

    @abc.abstractmethod
    def last_linear(self, block: Any) -> nn.Module | None:
        """The layer whose result, added to the residual, is the block's output; None where a block is not known to have one."""

    def get_acm(self, index: int) -> torch.Tensor | None:
        """The correction of block `index`, if any."""
        block: Any = self.blocks()[index]
        acm = getattr(self.last_linear(block), "acm", None)
        return acm if acm is not None else getattr(block, "acm", None)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Features]:
        """Collects the features of every attention layer during the `with` block; timm's forward stays as it is."""
        features = Features()
        with contextlib.ExitStack() as hooks:
            for block in self.blocks():
                attention: Any = block.attn
                # timm applies `norm` (often Identity) to softmax(QK^T)V before any gate and before the projection
                tap = getattr(attention, "norm", attention.proj)

                def collect(_: nn.Module, inputs: tuple[torch.Tensor, ...], attention: Any = attention) -> None:
                    tensor, windows = self.feature_of(attention, inputs[0])
                    features.tensors.append(tensor)
                    features.windows.append(windows)

                hooks.enter_context(tap.register_forward_pre_hook(collect))
            yield features

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        module.train(self.model.training)
        setattr(self.model.get_submodule(parent), child, module)


def is_patch_convolution(module: Any) -> bool:
    """Whether the module is an `nn.Conv2d` that multiplies each patch of its input once: a 1x1 convolution is one."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride
        and module.groups == 1
        and module.padding in ((0, 0), 0, "valid")
        and module.dilation == (1, 1)
    )


def _takes_images(name: str, module: nn.Module) -> bool:
    return f".{name}".endswith(".patch_embed.proj") or (isinstance(module, nn.Conv2d) and module.in_channels <= 3)


def last_of_mlp(mlp: nn.Module) -> nn.Module | None:
    """The layer whose result is that of one of timm's MLPs, in eval; None for others. The runtime's name theirs `family`."""
    known = getattr(type(mlp), "family", type(mlp)) in (Mlp, GluMlp, SwiGLU)
    return mlp.fc2 if known else None  # type: ignore[return-value]


def heads_mean(output: torch.Tensor, heads: int, skip: int = 0) -> torch.Tensor:
    """[B, N, heads * D] to [B, N - skip, D], the mean over heads without the first `skip` tokens."""
    return _HeadsMean.apply(output, heads, skip)


def _refuse_fusing(*_: Any, **__: Any) -> None:
    """Stands for `_FUSING` in modules that hold quantized layers."""
    raise UsageError(
        "a quantized model cannot be fused (timm's reparameterize_model, fuse), since its weights are packed; it computes the same "
        "as it is"
    )


class _HeadsMean(torch.autograd.Function):
    """Autograd's own backward writes the gradient four times (expand, divide, two slices); this one writes it once."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, heads: int, skip: int) -> torch.Tensor:
        ctx.shape, ctx.heads, ctx.skip = output.shape, heads, skip
        return output[:, skip:].unflatten(-1, (heads, -1)).mean(dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        result = grad.new_empty(ctx.shape)
        result[:, : ctx.skip] = 0
        kept = result[:, ctx.skip :].unflatten(-1, (ctx.heads, -1))
        kept.copy_((grad / ctx.heads).unsqueeze(-2).expand_as(kept))
        return result, None, None


def expect_psaq(index: int, block: Any, kind: type, attention: type) -> None:
    """UsageError unless a block and its attention are of exactly these classes of timm, as "psaq" knows them."""
    found = type(block), type(block.attn)
    if found != (kind, attention):
        names = " with ".join(each.__name__ for each in found)
        raise UsageError(f"placement was 'psaq'; block {index} is a {names}, which only 'gemm' supports")


def add_block_sites(block: Any, bits: int, quantizer: str) -> None:
    """The psaq sites that every family's block has: outputs of qkv, proj and fc2, and the block's own output."""
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc2):
        quantize_output(layer, "output_quantizer", bits, quantizer)
    quantize_output(block, "output_quantizer", bits, quantizer)
