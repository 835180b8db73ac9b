"""The .npz checkpoints of the original JAX models: compared with the model, then read by timm, and nothing in them left over."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from ..errors import DfqvitError, UsageError, first_line
from .checkpoint import no_checkpoint, some

_SUFFIXES = (".npz", ".npy")
_PREFIXES = ("opt/target/", "params/", "params/img/", "")  # before the names of arrays, in timm's order
_EMBEDDING = "embedding/kernel"  # [height, width, channels, features]
_ROOT = "conv_root/kernel"  # the first convolution of a hybrid
_POSITIONS = ("pos_embedding", "Transformer/posembed_input/pos_embedding")  # big_vision's, then the older
_STACKED = "Transformer/encoderblock/LayerNorm_0/scale"  # big_vision's blocks in one array
_BLOCK = "Transformer/encoderblock_"
_READING = threading.RLock()


def is_arrays(path: Path) -> bool:
    """Whether the file is one of numpy's, by its suffix or by what is in it."""
    if path.suffix.lower() in _SUFFIXES:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def array_shapes(model: nn.Module, path: Path, name: str) -> dict[str, torch.Size]:
    """Shapes of the patch projection and the position embedding in the file, by timm's names and order of axes.

    Raises:
        UsageError: there is no such file, timm has no reader for the model, or its blocks or heads are not the model's.
        DfqvitError: the file is unreadable.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint was '{path}'; there is no such file")
    if not callable(getattr(model, "load_pretrained", None)):
        raise UsageError(f"checkpoint was '{path}'; MODEL '{name}' has no reader of {path.suffix} files in timm")
    with _opened(path, name) as arrays:
        prefix = _prefix(arrays.files)
        if hasattr(model, "blocks") and f"{prefix}{_EMBEDDING}" not in arrays.files:
            raise UsageError(f"checkpoint '{path}' has no '{_EMBEDDING}', as the original JAX weights have")
        _check_blocks(model, arrays, prefix, path)
        found = {}
        for key in (_ROOT, _EMBEDDING):
            if f"{prefix}{key}" in arrays.files and arrays[f"{prefix}{key}"].ndim == 4:
                height, width, channels, features = arrays[f"{prefix}{key}"].shape
                title = "patch_embed.proj.weight" if key == _EMBEDDING else "conv_root.weight"
                found[title] = torch.Size((features, channels, height, width))
        for key in _POSITIONS:
            if f"{prefix}{key}" in arrays.files:
                found["pos_embed"] = torch.Size(arrays[f"{prefix}{key}"].shape)
                break
        return found


def read_arrays(model: Any, path: Path, name: str) -> None:
    """Loads the file by the model's own reader; what that leaves out of the model is found by the NaNs put there before.

    Raises:
        UsageError: a part of the model is not in the file, or an array of the file has no place in the model.
        DfqvitError: the file is unreadable.
    """
    read: dict[str, Any] = {}
    with torch.no_grad(), _opened(path, name) as arrays:
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
        kind = type(arrays)
        get = kind.__getitem__

        def recorded(self: Any, key: str) -> Any:
            read[key] = found = get(self, key)
            return found

        try:
            with _READING, mock.patch.object(kind, "__getitem__", recorded):
                model.load_pretrained(str(path))
        except Exception as error:  # numpy's, zipfile's, and what missing arrays raise in timm
            raise DfqvitError(
                f"checkpoint '{path}' could not be read as MODEL '{name}': {first_line(error)}"
            ) from error
        odd = next((key for key, array in read.items() if np.asarray(array).dtype.kind != "f"), None)
        if odd is not None:
            raise UsageError(f"checkpoint '{path}' holds {read[odd].dtype} under '{odd}', which is float")
        left = [key for key, value in model.named_parameters() if bool(torch.isnan(value).any())]
        if left:
            hint = "; give the --num-classes of the file" if all(key.startswith("head") for key in left) else ""
            raise UsageError(f"checkpoint '{path}' is not of MODEL '{name}': it left out {some(left)}{hint}")
        _check_unread(arrays, read, path, name)


def _check_unread(arrays: Any, read: Any, path: Path, name: str) -> None:
    prefix = _prefix(arrays.files)
    unread = [key for key in arrays.files if key.startswith(prefix) and key not in read and arrays[key].ndim]
    if not unread:
        return
    if all(key.startswith(f"{prefix}head/") for key in unread):
        raise UsageError(
            f"num-classes: the checkpoint '{path}' has a classifier and the model none; give --num-classes "
            f"{arrays[unread[0]].shape[-1]}"
        )
    raise UsageError(
        f"checkpoint '{path}' is not of MODEL '{name}': the model has no place for {len(unread)} of its arrays ({some(unread)})"
    )


def _opened(path: Path, name: str) -> Any:
    other = no_checkpoint(path)
    if other:
        raise DfqvitError(f"checkpoint '{path}' is {other}")
    try:
        arrays = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy's and zipfile's
        said = first_line(error)
        if "pickle" in said:  # numpy's advice is to run what the file says
            said = "it is no archive of numpy's arrays"
        raise DfqvitError(f"checkpoint '{path}' could not be read as MODEL '{name}': {said}") from error
    if isinstance(arrays, np.ndarray):
        raise DfqvitError(
            f"checkpoint '{path}' could not be read as MODEL '{name}': it holds one array without a name, and the original JAX "
            "weights are an .npz of many"
        )
    return arrays


def _prefix(names: Sequence[str]) -> str:
    return next((prefix for prefix in _PREFIXES if f"{prefix}{_EMBEDDING}" in names), "")


def _check_blocks(model: Any, arrays: Any, prefix: str, path: Path) -> None:
    """UsageError unless the file has as many blocks as the model, and each as many heads: timm's reader looks at neither."""
    blocks = list(model.blocks.children()) if isinstance(getattr(model, "blocks", None), nn.Module) else []
    if not blocks:
        return
    start = f"{prefix}{_BLOCK}"
    stacked = f"{prefix}{_STACKED}" in arrays.files
    numbers = {key.removeprefix(start).split("/")[0] for key in arrays.files if key.startswith(start)}
    depth = arrays[f"{prefix}{_STACKED}"].shape[0] if stacked else len(numbers)
    if depth and depth != len(blocks):
        raise UsageError(
            f"checkpoint '{path}' has {depth} blocks and the model {len(blocks)}: it is of another MODEL or depth"
        )
    pool = getattr(getattr(model, "attn_pool", None), "num_heads", None)
    for key in arrays.files:
        if not key.startswith(prefix) or not key.endswith("/query/kernel") or arrays[key].ndim < 3:
            continue
        ours = pool if key.startswith(f"{prefix}MAPHead") else getattr(blocks[0].attn, "num_heads", None)
        theirs = arrays[key].shape[-2]
        if ours is not None and ours != theirs:
            raise UsageError(
                f"checkpoint '{path}' has attention of {theirs} heads under '{key}' and the model {ours}: it is of another MODEL "
                "or num_heads"
            )
