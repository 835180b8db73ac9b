"""Writing tensors to a file, so that a full disk is an `OSError` that names the file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

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
