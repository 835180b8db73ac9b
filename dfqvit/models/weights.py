"""A checkpoint's tensors mapped to a model as timm maps them: names, sizes, channels; and refused where they do not fit."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import re
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.models import _builder, adapt_input_conv
from torch import nn

from ..errors import UsageError, first_line
from .arrays import array_shapes, is_arrays, read_arrays
from .checkpoint import FLOATS, is_computed, no_state_dict, read_checkpoint, some, tensors_of
from .preprocessing import config_of, image_shape

Filter = Callable[..., dict[str, Any]]

_POSITIONS = re.compile(r"pos_embed|positional_embedding|embed_positions")  # in the layouts that timm converts
_BUILDING = threading.RLock()


def build(architecture: str, kwargs: Mapping[str, Any]) -> tuple[nn.Module, Filter | None]:
    """(the model with random weights, timm's filter that maps a checkpoint of its family to it).

    timm's entrypoints name the filter only to the function that loads pretrained weights, so that function is stood in
    for while the model is built. An entrypoint that does not use timm's builder gets the filter of its class's module.
    """
    filters: list[Filter | None] = []

    def stand_in(*_: Any, filter_fn: Filter | None = None, **__: Any) -> None:
        filters.append(filter_fn)

    with _BUILDING, mock.patch.object(_builder, "load_pretrained", stand_in):
        model = timm.create_model(architecture, pretrained=True, **kwargs)
    if filters:
        return model, filters[0]
    return model, getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


def load_weights(
    model: nn.Module, path: Path, name: str, filter_fn: Filter | None, asked: Mapping[str, Any] | None = None
) -> None:
    """Loads the checkpoint at `path` into `model`, as timm maps it, and refuses what does not fit wholly.

    Args:
        model: the structure.
        path: .safetensors, .pth and the like, or the .npz of the original JAX models.
        name: MODEL, for messages.
        filter_fn: timm's for the family, see `build`.
        asked: the keywords that the model was asked for with; where they have no `img_size`, a resize is warned of.
    """
    asked = asked or {}
    if is_arrays(path):
        shapes = array_shapes(model, path, name)
        _check_patches(model, shapes, path, asked)
        for first in [key for key in ("conv_root.weight", "patch_embed.proj.weight") if key in shapes][:1]:
            _expect_channels(shapes[first][1], image_shape(model)[0], first, path, asked)
        read_arrays(model, path, name)
        if "img_size" not in asked and hasattr(model, "pos_embed"):
            _tell_resizes(model, shapes, model.state_dict(), path)
        return
    wanted, given = model.state_dict(), read_checkpoint(path)
    before, found = {key: value.shape for key, value in tensors_of(given)}, dict(given)
    if filter_fn is not None:
        try:
            found = _mapped(filter_fn, found, model)
            left = _left_out(filter_fn, model, given, found)
        except Exception as error:  # a filter meets keys and shapes that it was not written for
            if not all(isinstance(value, torch.Tensor) for value in found.values()):
                raise no_state_dict(path, found) from error
            hint = _library(given) or _prefixed(wanted, given)
            raise UsageError(
                f"checkpoint '{path}' is not of MODEL '{name}': timm's conversion failed ({first_line(error)}){hint}"
            ) from error
        if left:
            raise UsageError(
                f"checkpoint '{path}' is not of MODEL '{name}': the model has no place for {some(left)}, which timm's "
                "conversion leaves out, and without which the weights beside them give other results"
            )
    if not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise no_state_dict(path, found)
    before = _by_timms_names(before, found) | before
    for key in found.keys() - wanted.keys():
        if is_computed(key):
            del found[key]  # buffers that older versions saved, and that the model computes itself
    _adapt_channels(model, found, path, asked)
    _check(wanted, found, path, name)
    _check_patches(model, before, path, asked)
    if "img_size" not in asked:
        _tell_resizes(model, before, found, path)
    model.load_state_dict(found)


def _mapped(filter_fn: Filter, state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What timm's conversion makes of a checkpoint: some do not take the model, some print what is no result of ours."""
    given = (state, model) if len(inspect.signature(filter_fn).parameters) > 1 else (state,)
    with contextlib.redirect_stdout(io.StringIO()):
        return dict(filter_fn(*given))


def _left_out(filter_fn: Filter, model: nn.Module, given: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Weights of the file that timm's conversion leaves out, though not the classifier after them or the rest of their layer."""
    layers = {key.rpartition(".")[0] for key in given.keys() & found.keys()} - {""}
    heads = _heads(found)
    halves = [
        key
        for key, value in given.items()
        if isinstance(value, torch.Tensor) and key not in found and not is_computed(key)
        if key.rpartition(".")[0] in layers or (heads and "pre_logits" in key.split("."))
        if value.is_floating_point() and bool(value.any())
    ]
    if not halves:
        return []
    # What is left out changes nothing; clones, since some of the conversions write into what they get.
    changed = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    changed |= {key: changed[key] + 1 for key in halves}
    again = _mapped(filter_fn, changed, model)
    return halves if all(torch.equal(value, again[key]) for key, value in found.items()) else []


def _by_timms_names(before: Mapping[str, torch.Size], found: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Shapes of the patch projection and the positions in a file of another layout, which has them under other names."""
    named: dict[str, torch.Size] = {}
    weight, positions = found.get("patch_embed.proj.weight"), found.get("pos_embed")
    if weight is not None and weight.dim() == 4:
        alike = [shape for shape in before.values() if len(shape) == 4 and shape[0] == weight.shape[0]]
        fitting = [shape for shape in alike if shape[2:] == weight.shape[2:]]
        named |= {"patch_embed.proj.weight": shape for shape in (fitting or alike)[:1]}  # noqa: B035
    if positions is not None and positions.dim() == 3:
        width, side = positions.shape[-1], _grid(positions.shape)
        tables = [shape for name, shape in before.items() if _POSITIONS.search(name) and shape[-1:] == (width,)]
        same = [shape for shape in tables if _grid(shape) == side]
        named |= {"pos_embed": shape for shape in (same or tables)[:1]}  # noqa: B035
    return named


def _check_patches(model: nn.Module, shapes: Mapping[str, torch.Size], path: Path, asked: Mapping[str, Any]) -> None:
    """A patch projection of another size is another model, though timm would resize it; FlexiViT's is meant to be resized."""
    embedding = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)  # the second is NaFlexViT's
    projection = getattr(embedding, "proj", None)
    size = projection.kernel_size if isinstance(projection, nn.Conv2d) else getattr(embedding, "patch_size", None)
    size = (size, size) if isinstance(size, int) else size
    shape = shapes.get("patch_embed.proj.weight")
    flexible = "flexi" in str((config_of(model) or {}).get("architecture", "")) or "patch_size" in asked
    if size is None or shape is None or len(shape) != 4 or flexible:
        return
    if tuple(shape[2:]) != tuple(size):
        raise UsageError(
            f"checkpoint '{path}' has patches of {shape[2]} x {shape[3]} pixels and the model "
            f"{size[0]} x {size[1]}: it is of another MODEL"
        )


def _adapt_channels(model: nn.Module, found: dict[str, torch.Tensor], path: Path, asked: Mapping[str, Any]) -> None:
    """The first convolution of an RGB checkpoint for other channels, by timm's rule."""
    names = (config_of(model) or {}).get("first_conv") or "patch_embed.proj"
    for name in (names,) if isinstance(names, str) else names:
        key = f"{name}.weight"
        weight = found.get(key)
        module = dict(model.named_modules()).get(name)
        if weight is None or weight.dim() != 4 or not isinstance(module, nn.Conv2d) or module.groups != 1:
            continue
        have, want = weight.shape[1], module.in_channels
        if have == want:
            continue
        _expect_channels(have, want, key, path, asked)
        found[key] = adapt_input_conv(want, weight)


def _expect_channels(have: int, want: int, key: str, path: Path, asked: Mapping[str, Any]) -> None:
    """A word on a first convolution that timm adapts; UsageError where it cannot."""
    if have == want:
        return
    if have != 3:
        raise UsageError(
            f"in-chans: the checkpoint '{path}' takes images of {have} channels and the model {want}; give --in-chans {have}"
        )
    if "in_chans" not in asked:
        warnings.warn(
            f"checkpoint '{path}' takes images of {have} channels and the model {want}: '{key}' was adapted, as timm does; "
            f"--in-chans {have} keeps it",
            stacklevel=5,
        )


def _check(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], path: Path, name: str) -> None:
    head = next((key for key in ("head.weight", "head.fc.weight") if key in wanted), None)
    if head and head in found:
        have, want = found[head].shape, wanted[head].shape
        if have[1:] == want[1:] and have[0] != want[0]:
            raise UsageError(
                f"num-classes: the checkpoint '{path}' has {have[0]} classes and the model {want[0]}; "
                f"give --num-classes {have[0]}"
            )
    if (
        head
        and not any(key.startswith("head") for key in found)
        and not (wanted.keys() - found.keys() - _heads(wanted))
    ):
        raise UsageError(
            f"num-classes: the checkpoint '{path}' has no classifier ('{head}'); give --num-classes 0 for the model without one"
        )
    if head is None and _heads(found) and not (wanted.keys() ^ (found.keys() - _heads(found))):
        classes = next((len(found[key]) for key in ("head.weight", "head.fc.weight") if key in found), None)
        raise UsageError(
            f"num-classes: the checkpoint '{path}' has a classifier and the model none; give --num-classes {classes}"
        )
    problems = []
    for title, keys in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if keys:
            problems.append(f"{len(keys)} {title} ({some(sorted(keys))})")
    shapes = [key for key in sorted(wanted.keys() & found.keys()) if wanted[key].shape != found[key].shape]
    if shapes:
        sizes = [f"{key} {tuple(found[key].shape)} for {tuple(wanted[key].shape)}" for key in shapes]
        problems.append(f"{len(shapes)} of another shape ({some(sizes)})")
    if problems:
        hint = _library(found) or _prefixed(wanted, found)
        raise UsageError(f"checkpoint '{path}' is not of MODEL '{name}': keys {'; '.join(problems)}{hint}")
    for key, value in found.items():
        if wanted[key].is_floating_point() and value.dtype not in FLOATS:
            raise UsageError(f"checkpoint '{path}' holds {value.dtype} under '{key}', which is float")


def _library(keys: Mapping[str, Any]) -> str:
    """Where names come from that timm cannot map; for a message."""
    if any(".embeddings." in f".{key}" or ".encoder.layer." in f".{key}" for key in keys):
        return (
            "; its names are those of Hugging Face transformers: give the model that loads it there to "
            "dfqvit.from_transformers, or take timm's weights of the same model"
        )
    if "conv_proj.weight" in keys or any(key.startswith("encoder.layers.encoder_layer_") for key in keys):
        return "; its names are those of torchvision, whose models timm does not have"
    return ""


def _heads(keys: Mapping[str, Any]) -> set[str]:
    return {key for key in keys if key.startswith("head")}


def _prefixed(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """That a wrapper's prefix stands before the model's own names, for a message; "" where that is not it."""
    ends = ("cls_token", "patch_embed.proj.weight", next(iter(wanted)))
    prefixes = sorted({key.removesuffix(end) for key in found for end in ends if key.endswith(end)} - {""})
    before = [prefix for prefix in prefixes if any(key.removeprefix(prefix) in wanted for key in found)]
    if len(before) == 1 and all(key.startswith(before[0]) for key in found):
        return f"; all of its keys begin with '{before[0]}': save it without"
    named = " and ".join(map(repr, before))
    return f"; names of the model stand behind {named} there: save the wanted ones alone, without it" if before else ""


def _tell_resizes(
    model: nn.Module, before: Mapping[str, torch.Size], found: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Warns of positions, or of tables of them, that timm's conversion made of another size."""
    for key in sorted(before.keys() & found.keys()):
        old, new = before[key], found[key].shape
        if old.numel() == new.numel() or key.endswith("weight"):
            continue
        if key == "pos_embed" and _grid(old) == _grid(new):  # those of class and register tokens went to the tokens
            continue
        hint, rows = "", old.numel() // old[-1]
        size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        if key == "pos_embed" and rows > 4 and size is not None:
            prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
            hint = f"; --img-size {round((rows - prefix) ** 0.5) * int(size[0])} keeps it"
        warnings.warn(
            f"checkpoint '{path}' was trained with another input size: '{key}' {tuple(old)} was resized to "
            f"{tuple(new)}, as timm does{hint}",
            stacklevel=4,
        )
        return


def _grid(positions: torch.Size) -> int:
    """Side of the square of patches that positions [..., N, C] are of, with a few of other tokens among them."""
    return math.isqrt(positions.numel() // positions[-1])
