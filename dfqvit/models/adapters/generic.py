"""Any other timm model whose products lie in linear layers, 1x1 and patch convolutions: structure found, not known by name."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.beit import Attention as BeitAttention
from timm.models.convit import GPSA
from timm.models.eva import EvaAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import nn

from ...errors import UsageError
from ...quantization.layers import QuantLinear, quantized_layers
from ..preprocessing import config_of
from .base import Adapter, Features, heads_mean, is_patch_convolution
from .calls import at_one_place

_LEAST_PATCHES = 4  # a set of fewer vectors says nothing of an image's structure
_MOST_PATCHES = 1024  # of a stage's output; a larger one is averaged down to it
_SMALL = 16  # inputs and outputs of a layer: rounding so few costs more than their products save
_PROJECTIONS = ("proj", "out_proj", "attn_out_proj")  # attention's last layer: its input is softmax(QK^T)V
_SEPARATE = (EvaAttention, BeitAttention, WindowAttentionV2)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)


class GenericAdapter(Adapter):
    """A timm model of a family that dfqvit has no adapter for.

    Quantized are the layers of exact class `nn.Linear` and the `nn.Conv2d` whose patches do not overlap (1x1 among them), as
    far as the model calls them: one whose weight the model reads itself stays float, found by a pass over one image. So does a
    linear layer or 1x1 convolution of at most 16 inputs and outputs, which mixes heads or the channels of a stem: it would be
    slower in integers. The products of the attentions that `attentions` knows are quantized too; all else stays float.
    """

    patchable: ClassVar = {}
    element_acm_only: ClassVar = True
    whole_blocks: ClassVar = False
    placements: ClassVar = ("gemm",)

    def __init__(self, model: nn.Module, compat: str = "") -> None:
        super().__init__(model, compat)
        self.entry = model  # which the images go through: a network that holds this model, or the model

    @classmethod
    def supports(cls, model: nn.Module) -> bool:
        """Whether timm made `model`, it takes images alone, and a layer beside the classifier can be quantized."""
        if config_of(model) is None or required(model.forward) != 1:
            return False
        if quantized_layers(model):
            return True  # converted already
        adapter = cls(model)
        heads = adapter.heads()
        return any(not any(layer is head for head in heads) for layer in adapter.candidates().values())

    def is_known(self) -> bool:
        """No: its structure is found."""
        return False

    def candidates(self) -> dict[str, nn.Module]:
        """The linear layers, and the convolutions whose patches do not overlap, that are large enough; each at one place."""
        return at_one_place(
            self.model, lambda m: (type(m) is nn.Linear or is_patch_convolution(m)) and not _is_small(m)
        )

    def prepare(self) -> None:
        """Gives `qkv` the biases that some of timm's attentions keep for Q and V alone, so that they call it as it is.

        A ConViT makes its tables anew: it reads weights for that, in its first call alone, and that must be the pass of `layers`.
        """
        for module in self.model.modules():
            if type(module) is GPSA:
                module.rel_indices = module.rel_indices.new_zeros(1, 1, 1, 3)
            if type(module) in _SEPARATE and module.qkv is not None and module.q_bias is not None:
                bias = torch.cat((module.q_bias, torch.zeros_like(module.q_bias), module.v_bias))
                module.qkv.bias = nn.Parameter(bias.detach(), requires_grad=module.q_bias.requires_grad)
                module.q_bias = module.k_bias = module.v_bias = None

    def blocks(self) -> list[Any]:
        """The children of every list named `blocks` that take one tensor and give one; none where there are no such lists."""
        found: list[Any] = []
        chosen: list[str] = []
        for name, module in self.model.named_modules():
            inside = any(name.startswith(f"{prefix}.") for prefix in chosen)
            if (
                name.rpartition(".")[2] == "blocks"
                and isinstance(module, (nn.Sequential, nn.ModuleList))
                and not inside
            ):
                blocks = list(module)
                if all(_is_block(block) for block in blocks):
                    found += blocks
                    chosen.append(name)
        return found

    def last_linear(self, block: Any) -> nn.Module | None:
        """None: corrections are added to a block's output."""
        return None

    def add_psaq_sites(self, bits: int, quantizer: str) -> None:
        """UsageError: it is made for plain ViT, DeiT and Swin."""
        raise UsageError(
            f"placement was 'psaq' and the model a {type(self.model).__name__}; it may be 'gemm' for this model"
        )

    def quantize_constants(self, bits: int) -> None:
        """None."""

    def feature_of(self, attention: Any, output: torch.Tensor) -> tuple[torch.Tensor, int]:
        """As the base's, of one image or window each."""
        heads = attention.num_heads if output.shape[-1] % attention.num_heads == 0 else 1
        return heads_mean(output, heads), 1

    @contextlib.contextmanager
    def capture(self) -> Iterator[Features]:
        """Collects, during the `with` block, what each attention's last layer takes; without attentions, the stages' outputs.

        The features are there once the block has ended.
        """
        features, attended, staged = Features(), Features(), Features()
        batch: list[int] = []

        def attend(attention: nn.Module, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0]
            if values.dim() == 4:  # [B, H, W, C]
                values = values.flatten(1, 2)
            if values.dim() != 3 or len(values) % batch[-1]:
                return
            windows = len(values) // batch[-1]
            prefix = int(getattr(self.model, "num_prefix_tokens", 0) or 0) if windows == 1 else 0
            values = values[:, prefix:]
            if values.shape[1] >= _LEAST_PATCHES:
                attended.tensors.append(self.feature_of(attention, values.contiguous())[0])
                attended.windows.append(windows)

        def stage(_: nn.Module, __: Any, output: Any) -> None:
            patches = self._patches(output)
            if patches is not None:
                staged.tensors.append(patches)
                staged.windows.append(1)

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.entry.register_forward_pre_hook(lambda _, inputs: batch.append(len(inputs[0]))))
            for attention, projection in self._attentions():
                hooks.enter_context(projection.register_forward_pre_hook(functools.partial(attend, attention)))
            for part in self._stages():
                hooks.enter_context(part.register_forward_hook(stage))
            yield features
        chosen = attended if attended.tensors else staged
        features.tensors, features.windows = chosen.tensors, chosen.windows

    def _attentions(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for module in self.model.modules():
            if not isinstance(getattr(module, "num_heads", None), int) or "Pool" in type(module).__name__:
                continue
            for name in _PROJECTIONS:
                layer = module._modules.get(name)
                if isinstance(layer, (nn.Linear, QuantLinear)):
                    yield module, layer
                    break

    def _stages(self) -> list[nn.Module]:
        for name in ("stages", "layers"):
            stages = self.model._modules.get(name)
            if isinstance(stages, (nn.Sequential, nn.ModuleList)):
                return list(stages)
        return self.blocks() or self._stages_of_other_names()

    def _stages_of_other_names(self) -> list[nn.Module]:
        """Children named `stage1`, `stage2`, ...; or what a list holds whose name ends in `stages` or `blocks`."""
        children = dict(self.model.named_children())
        lists = [
            child
            for name, child in children.items()
            if name.endswith(("stages", "blocks")) and isinstance(child, (nn.Sequential, nn.ModuleList))
        ]
        numbered = [child for name, child in children.items() if name.startswith("stage") and name[5:].isdecimal()]
        return numbered or [part for each in lists for part in each]

    def _patches(self, output: Any) -> torch.Tensor | None:
        """[B, N, C] of a stage's output, which is [B, N, C] or, as the model's `output_fmt` says, [B, C, H, W] or [B, H, W, C]."""
        if isinstance(output, tuple) and output:  # the features, and what else the next stage takes
            output = output[0]
        if not isinstance(output, torch.Tensor) or output.dim() not in (3, 4):
            return None
        if output.dim() == 4:
            planes = output.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else output
            step = 1
            while (planes.shape[2] // step) * (planes.shape[3] // step) > _MOST_PATCHES:
                step += 1
            output = F.avg_pool2d(planes, step).flatten(2).mT.contiguous()
        return output if output.shape[1] >= _LEAST_PATCHES else None


def _is_small(layer: Any) -> bool:
    """Whether it mixes so few values of each token that integers would not pay."""
    single = isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
    return single and max(layer.weight.shape) <= _SMALL


def required(function: Any) -> int:
    """How many arguments must be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(each.kind in kinds and each.default is inspect.Parameter.empty for each in parameters)


def _is_block(block: nn.Module) -> bool:
    if isinstance(block, _CONTAINERS) or required(block.forward) != 1:
        return False
    given = inspect.signature(block.forward).return_annotation
    return given in (inspect.Signature.empty, torch.Tensor, "torch.Tensor", "Tensor")
