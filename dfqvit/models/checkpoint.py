"""Checkpoints read as timm reads them: which weights of several, without wrappers' prefixes, without running code."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import nn

from ..errors import DfqvitError, UsageError, first_line

# What timm takes from a training script's checkpoint, in its order: the averaged weights first.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Last names of what checkpoints hold beside weights: buffers that timm's models compute, or count, and the token of pretraining.
COMPUTED = {
    "attention_bias_idxs",
    "attn_mask",
    "bias_mask",
    "mask_token",
    "num_batches_tracked",
    "rel_coords_log",
    "rel_indices",
    "rel_pos_indices",
    "relative_coordinates_log",
    "relative_coords_table",
    "relative_position_index",
}
# Types that no quantizer gives: what is wrong with tensors of these is said where the model's names are known.
_UNQUANTIZED = (*FLOATS, torch.int64, torch.bool, torch.complex64, torch.complex128)
_WITHIN = ("module", "state_dict", "model")  # where a container may hold its weights one level down
_AVERAGED = re.compile(r"(^|_)(ema|swa|avg|averaged?)(_|$)", re.IGNORECASE)  # names that timm does not look under
_START = 64  # bytes that tell what a file is
_ZIP = b"PK\x03\x04"  # of torch.save


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state_dict in a file of safetensors, or in one of torch.save read without unpickling code, without wrappers' prefixes.

    Which of the two it is, its first bytes say, not its suffix.

    Of several, timm's choice: averaged (EMA) weights before raw ones, with a warning that says so. One says, too, where averaged
    ones were left.

    Raises:
        UsageError: there is no such file, or it holds a model that is quantized already.
        DfqvitError: the file is unreadable, needs code to be unpickled, or holds no state_dict that timm would take.
    """
    if path.is_dir():
        raise UsageError(f"checkpoint was '{path}', which is a folder; give the file with the weights in it")
    if not path.is_file():
        raise UsageError(f"checkpoint was '{path}'; there is no such file")
    loaded = _read(path)
    if not isinstance(loaded, Mapping):
        raise DfqvitError(f"checkpoint '{path}' holds no state_dict of tensors, but a {type(loaded).__name__}")
    found = [key for key in CONTAINERS if isinstance(loaded.get(key), Mapping) and loaded[key]]
    weights = _within(loaded[found[0]]) if found else loaded
    for key in weights:
        if not isinstance(key, str):
            raise DfqvitError(
                f"checkpoint '{path}' has the key {key!r} of type {type(key).__name__}; every key of a state_dict must be a text"
            )
    if len(found) > 1 and found[0].endswith("ema"):
        warnings.warn(
            f"checkpoint '{path}' holds {' and '.join(map(repr, reversed(found)))}; '{found[0]}', the averaged weights, "
            "was loaded, as timm does",
            stacklevel=2,
        )
    if found:
        _tell_others(path, loaded, found[0], f"'{found[0]}', which was loaded, as timm does")
        container = loaded[found[0]]
        if (inner := _inner(container)) is not None:
            _tell_others(path, container, inner, f"the '{inner}' of '{found[0]}', which was loaded")
    state = _without_prefixes(path, weights)
    state.pop("n_averaged", None)  # torch's AveragedModel counts there
    tensors = dict(tensors_of(state))
    if not tensors:
        raise no_state_dict(path, loaded)
    if any(key.endswith("weight_packed") for key in tensors):
        raise UsageError(
            f"checkpoint '{path}' holds packed weights of a quantized model; dfqvit.load reads such a file, and "
            "--checkpoint takes float weights"
        )
    for key, value in tensors.items():
        if value.is_meta or value.layout is not torch.strided:
            what = "a meta tensor, which has no values," if value.is_meta else "a sparse tensor"
            raise DfqvitError(
                f"checkpoint '{path}' holds {what} under '{key}'; it must be dense: save the values themselves"
            )
        if value.dtype not in _UNQUANTIZED and value.dim() and not is_computed(key):
            raise UsageError(
                f"checkpoint '{path}' holds {str(value.dtype).removeprefix('torch.')} under '{key}': its weights are quantized "
                "already and mean nothing without their scales; give the float checkpoint"
            )
    return state


def _without_prefixes(path: Path, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights by the names that timm gives them; UsageError where two of different values then have one name."""
    state: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, value in weights.items():
        (name,) = clean_state_dict({key: value})
        if name in state and not _same(state[name], value):
            raise UsageError(
                f"checkpoint '{path}' holds two sets of weights, '{names[name]}' and '{key}' among them, which are one to timm; "
                "save the wanted one alone"
            )
        state[name], names[name] = value, key
    return state


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return one is other


def _tell_others(path: Path, loaded: Mapping[str, Any], chosen: str, said: str) -> None:
    """Warns of weights left beside the chosen ones, as `said`: averaged ones by their name, or others of the same names."""
    if chosen.endswith("ema"):
        return
    averaged = [key for key, value in loaded.items() if key != chosen and _is_averaged(key, value)]
    if averaged:
        warnings.warn(
            f"checkpoint '{path}' holds '{averaged[0]}', by its name averaged weights, beside {said}; "
            f"where the averaged ones are wanted, save '{averaged[0]}' alone",
            stacklevel=3,
        )
    weights = clean_state_dict(_within(loaded[chosen]))
    for key, value in loaded.items():
        if (
            key == chosen
            or key in averaged
            or not isinstance(value, Mapping)
            or not all(isinstance(k, str) for k in value)
        ):
            continue
        other = clean_state_dict(_within(value))
        if other.keys() == weights.keys() and not all(_same(other[name], weights[name]) for name in weights):
            warnings.warn(
                f"checkpoint '{path}' holds '{key}', with weights of the same names and other values, beside {said}; "
                f"where the others are wanted, save '{key}' alone",
                stacklevel=3,
            )
            return


def is_computed(key: str) -> bool:
    """Whether a checkpoint's tensor of that name is none of the weights: the model computes it, or does not need it."""
    return key.rpartition(".")[2] in COMPUTED


def _within(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """What holds the weights: the container, or an entry of it, such as the `module` of an average beside its `decay`."""
    inner = _inner(container)
    return container if inner is None else container[inner]


def _inner(container: Mapping[str, Any]) -> str | None:
    """The entry of a container that holds the weights; None where it holds them itself."""
    if any(isinstance(value, torch.Tensor) and value.dim() for value in container.values()):
        return None
    return next((key for key in _WITHIN if isinstance(container.get(key), Mapping)), None)


def _is_averaged(key: Any, value: Any) -> bool:
    """Whether an entry holds averaged weights under a name that timm does not know."""
    return key not in CONTAINERS and _AVERAGED.search(str(key)) is not None and _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(each) for each in value)
    return isinstance(value, torch.Tensor) and value.dim() > 0


def no_state_dict(path: Path, entries: Mapping[Any, Any]) -> DfqvitError:
    """The error for a checkpoint whose weights are not where timm looks."""
    held = some([repr(str(key)) for key in entries])
    what = f"its entries are {held}: save the one with the weights alone" if held else "it is an empty dict"
    return DfqvitError(
        f"checkpoint '{path}' holds no state_dict of tensors where timm looks for one ({', '.join(CONTAINERS)}); {what}"
    )


def _read(path: Path) -> Any:
    other = no_checkpoint(path)
    if other:
        raise DfqvitError(f"checkpoint '{path}' is {other}")
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # `args` of timm's and DeiT's training scripts
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip and runtime errors
        more = _unsafe(path)
        if more:
            raise DfqvitError(
                f"checkpoint '{path}' could not be read: beside tensors it holds Python objects ({some(more)}), which "
                "are not unpickled because that runs code; where you trust it, torch.load(..., weights_only=False) and "
                "save the model's state_dict() alone"
            ) from error
        said = first_line(error)
        if "TorchScript" in said:
            said = "it is a TorchScript archive; save the state_dict() of the module that it was made from"
        elif "weights_only" in said:  # torch's advice is to run what the file says
            said = "it is neither a .safetensors file nor a pickle of tensors"
        raise DfqvitError(f"checkpoint '{path}' could not be read: {said}") from error


def _is_safetensors(path: Path) -> bool:
    """By its first bytes, the length of a JSON header and its brace; by its suffix where it is too short to tell."""
    with path.open("rb") as file:
        start = file.read(_START)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= length <= path.stat().st_size - 8:
        return True
    return path.suffix.lower() == ".safetensors" and not start.startswith(_ZIP)


def no_checkpoint(path: Path) -> str:
    """What a file of text is that stands in a checkpoint's place, and what to do; "" where it is none."""
    with path.open("rb") as file:
        start = file.read(_START)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "empty; fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights; fetch them with 'git lfs pull'"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not the weights; fetch the file itself, by its download link"
    if text.startswith((b"{", b"[")):
        if b'"weight_map"' in path.read_bytes():
            return "the index of weights that lie in several files; join those in one file, with safetensors.torch.save_file"
        return "a JSON file, which holds no weights; give the .safetensors or .pth file"
    return ""


def _unsafe(path: Path) -> list[str]:
    """The classes and functions that a .pth file would have to import; empty where it is no such file."""
    if _is_safetensors(path):
        return []
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            return sorted(found, key=lambda name: (".models." not in name, name))  # a pickled model's class first
    except Exception:  # not a zip of torch's, damaged, or a TorchScript archive: the first error says it
        return []


def load_state(network: nn.Module, path: Path, name: str) -> None:
    """Loads a state_dict in a .safetensors file into a network, whose own names are in it; `name` is what makes the network.

    Raises:
        UsageError: integers or bytes under the names of float weights.
        DfqvitError: the file is unreadable, or of another network.
    """
    wanted = network.state_dict()
    try:
        state = safetensors.torch.load_file(path)
        network.load_state_dict(state)
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise DfqvitError(f"checkpoint '{path}' does not fit what '{name}' makes: {first_line(error)}") from error
    for key, value in state.items():
        if wanted[key].is_floating_point() and value.dtype not in FLOATS:
            raise UsageError(f"checkpoint '{path}' holds {value.dtype} under '{key}', which is float")


def tensors_of(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a state_dict, also those one level down: some families' filters look there."""
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            yield str(key), value
        elif isinstance(value, Mapping):
            yield from ((str(k), v) for k, v in value.items() if isinstance(v, torch.Tensor))


def some(items: list[str], most: int = 3) -> str:
    """The first of a list, for a message."""
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")
