"""Writing tensors to a file, so that a full disk is an `OSError` that names the file; and what tells whether they are the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..kernels.files import atomic


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, atomically.

    Raises:
        OSError: the file cannot be written; names `path`, and one that was there is as it was.
    """
    with atomic(path) as temporary:
        try:
            safetensors.torch.save_file(dict(tensors), temporary, dict(metadata))
        except safetensors.SafetensorError as error:  # "... (os error 28)", which no handler of OSError sees
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise OSError(str(error)) from error
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def checksum(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, in hexadecimal, of a file's tensors and of its JSON without `sha256`; or of whatever else is told in these."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key].detach().cpu()
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
