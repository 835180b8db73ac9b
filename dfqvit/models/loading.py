"""From a MODEL name and a checkpoint to a float timm model, and the record that rebuilds it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import timm.data
import torch
from torch import nn

from ..errors import DfqvitError, UsageError
from . import demo

FAMILIES = ("vit", "deit", "swin", "dfqvit_demo")


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its input: pixels in [0, 1], resized, centre-cropped, then `(pixel - mean) / std`."""

    input_size: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise UsageError(f"{name} had {len(values)} values; the model takes images of {channels} channels")
        if min(self.std) <= 0:
            raise UsageError(f"std was {self.std}; every value must be greater than 0")
        if self.interpolation not in ("nearest", "bilinear", "bicubic"):
            raise UsageError(f"interpolation was '{self.interpolation}'; it may be 'nearest', 'bilinear' or 'bicubic'")

    @classmethod
    def of(cls, model: Any) -> Preprocessing:
        """The model's own, as timm's pretrained configuration gives it, for the model's actual input size."""
        config = timm.data.resolve_data_config({}, pretrained_cfg=getattr(model, "pretrained_cfg", {}), model=model)
        channels = int(model.in_chans)
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if len(mean) != channels:  # timm's figures are for RGB: a model of other channels gets their average
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        return cls(
            input_size=(channels, *_image_size(model)),
            mean=mean,
            std=std,
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    def channel_bounds(self, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised values of pixel 0 and pixel 1, each [C, 1, 1]."""
        mean = torch.tensor(self.mean, device=device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=device).view(-1, 1, 1)
        return (0 - mean) / std, (1 - mean) / std

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(pixel - mean) / std` in float32 on the pixels' device; pixels [..., C, H, W], uint8 or float in [0, 1].

        The same bits on every device: torch on GPUs divides by a plain number as a product with its reciprocal, so all
        divisors are tensors.
        """
        device = pixels.device
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / torch.tensor(255.0, device=device)
        mean = torch.tensor(self.mean, device=device).view(-1, 1, 1)
        return (pixels - mean) / torch.tensor(self.std, device=device).view(-1, 1, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`, also after a trip through JSON."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)


@dataclass(frozen=True)
class ModelSpec:
    """What `timm.create_model` needs to build a model's structure again."""

    architecture: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self, device: torch.device | str | None = None) -> nn.Module:
        """The structure with fresh weights, in eval mode. `device="meta"` allocates nothing."""
        kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in self.kwargs.items()}
        with torch.device(device or "cpu"):
            return timm.create_model(self.architecture, pretrained=False, **kwargs).eval()

    @classmethod
    def of(cls, model: nn.Module, kwargs: Mapping[str, Any] | None = None) -> ModelSpec:
        """The spec of a timm model in memory, checked by building it (on the meta device) and comparing structures.

        Args:
            model: any supported timm model.
            kwargs: what was given to `timm.create_model` beyond the name, where the structure does not tell.

        Raises:
            UsageError: the name is not known, or the structure built from it differs.
        """
        known = getattr(model, "dfqvit_spec", None)
        if isinstance(known, ModelSpec) and kwargs is None:
            return known
        architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
        if not architecture or not timm.is_model(architecture):
            raise UsageError("model has no timm architecture name in its pretrained_cfg; build it by timm.create_model")
        if kwargs is None:
            kwargs = {
                "num_classes": model.num_classes,
                "in_chans": model.in_chans,
                "img_size": list(_image_size(model)),
            }
        spec = cls(architecture, dict(kwargs))
        difference = _structural_difference(model, spec.build("meta"))
        if difference:
            raise UsageError(
                f"model differs from timm's '{architecture}' with {spec.kwargs} ({difference}); "
                "give model_kwargs={...}, the keyword arguments that it was created with"
            )
        return spec


def load_model(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    pretrained: bool = True,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The float model `name` in eval mode, its weights checked.

    Args:
        name: a timm name of the ViT, DeiT or Swin families, or "demo" / "demo-swin".
        checkpoint: a .safetensors or .pth file of a state_dict; without it, timm's pretrained weights (or the demo's own).
        num_classes: classes of the head; default the architecture's.
        in_chans: channels of the images; default the architecture's.
        img_size: side of the square input, pixels; default the architecture's.
        pretrained: False leaves the weights random where there is no checkpoint (and the model is no demo).
        device: where the model goes.

    Raises:
        UsageError: unknown or unsupported name, a checkpoint that does not fit.
        DfqvitError: an unreadable checkpoint, NaN or Inf in weights, pretrained weights that cannot be had.
    """
    architecture = demo.ALIASES.get(name, name)
    if not timm.is_model(architecture) or not architecture.startswith(FAMILIES):
        raise UsageError(f"MODEL was '{name}'; {_suggestions(architecture)}")
    options = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    kwargs = {key: value for key, value in options.items() if value is not None}
    if checkpoint is None:
        checkpoint = demo.WEIGHTS.get(architecture)
    try:
        model = timm.create_model(architecture, pretrained=pretrained and checkpoint is None, **kwargs)
    except Exception as error:  # timm raises many kinds here: network, hub, unknown arguments
        what = "timm's pretrained weights could not be had" if checkpoint is None else "timm could not build it"
        raise DfqvitError(f"MODEL '{name}': {what} ({_first_line(error)}); give --checkpoint FILE") from error
    if checkpoint is not None:
        _load_weights(model, Path(checkpoint), name)
    check_finite(model)
    model.dfqvit_spec = ModelSpec(architecture, kwargs)
    return model.eval().to(device)


def check_finite(model: nn.Module) -> None:
    """DfqvitError that names the first tensor of the model that holds NaN or Inf."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DfqvitError(f"weights: '{key}' holds NaN or Inf")


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state_dict in a .safetensors file, or in a .pth file read without unpickling code (weights_only)."""
    if not path.is_file():
        raise UsageError(f"checkpoint was '{path}'; there is no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip and runtime errors
        raise DfqvitError(f"checkpoint '{path}' could not be read: {_first_line(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise DfqvitError(f"checkpoint '{path}' holds no state_dict of tensors")
    return loaded


def _load_weights(model: nn.Module, path: Path, name: str) -> None:
    found, wanted = read_checkpoint(path), model.state_dict()
    head = next((key for key in ("head.weight", "head.fc.weight") if key in wanted and key in found), None)
    if head and found[head].shape[1:] == wanted[head].shape[1:] and found[head].shape[0] != wanted[head].shape[0]:
        raise UsageError(
            f"num-classes: the checkpoint '{path}' has {found[head].shape[0]} classes and the model {wanted[head].shape[0]}; "
            f"give --num-classes {found[head].shape[0]}"
        )
    problems = []
    for title, keys in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if keys:
            problems.append(f"{len(keys)} {title} ({_some(sorted(keys))})")
    shapes = [key for key in sorted(wanted.keys() & found.keys()) if wanted[key].shape != found[key].shape]
    if shapes:
        sizes = [f"{key} {tuple(found[key].shape)} for {tuple(wanted[key].shape)}" for key in shapes]
        problems.append(f"{len(shapes)} of another shape ({_some(sizes)})")
    if problems:
        raise UsageError(f"checkpoint '{path}' is not of MODEL '{name}': keys {'; '.join(problems)}")
    model.load_state_dict(found)


def _image_size(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.img_size
    return int(height), int(width)


def _structural_difference(model: nn.Module, other: nn.Module) -> str:
    """What first differs between two models: parameters' shapes, module classes, or a module's plain settings; or ""."""
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in other.state_dict().items()}
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            return f"'{key}' is {ours.get(key)} here and {theirs.get(key)} there"
    modules = dict(other.named_modules())
    for name, module in model.named_modules():
        twin = modules.get(name)
        if type(module) is not type(twin):
            return f"'{name}' is a {type(module).__name__} here and a {type(twin).__name__} there"
        for key, value in vars(twin).items():
            plain = isinstance(value, (bool, int, float, str)) and not key.startswith("_")
            if plain and key not in ("training", "fused_attn") and getattr(module, key, None) != value:
                return f"'{name}.{key}' is {getattr(module, key, None)!r} here and {value!r} there"
    return ""


def _suggestions(name: str) -> str:
    known = [model for model in timm.list_models() if model.startswith(FAMILIES)]
    near = difflib.get_close_matches(name, [*known, *demo.ALIASES], n=4, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else "for instance deit_tiny_patch16_224 or demo"
    return f"it may be a timm name of the ViT, DeiT or Swin families; {hint}"


def _some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
