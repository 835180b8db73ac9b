"""The CPU operators compiled for a processor that this one is not, and run by an emulator in the place of the backend "cpu".

`tests/kernels/without_torch` is one program of all operators, which stands in for torch too: it answers requests on its standard
input. It is the operators' own code, from the check of their arguments to their loops. For ARM see test_arm.py, for AVX-512 and
AMX test_avx512.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dfqvit.kernels import dispatch

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).with_name("without_torch")
HEADERS = (
    "ATen/core/Tensor.h",
    "ATen/ops/clone.h",
    "ATen/ops/empty.h",
    "ATen/ops/empty_like.h",
    "ATen/ops/zeros.h",
    "ATen/ops/matmul.h",
    "ATen/Dispatch.h",
    "ATen/Parallel.h",
    "c10/core/impl/LocalDispatchKeySet.h",
    "torch/library.h",
)
# In the order of ScalarType in without_torch/tensor.h.
TYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float64,
]
# What setup.py gives the compiler, but for the level.
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-fopenmp-simd"]


def compile_operators(folder: Path, compiler: str, *flags: str) -> str:
    """The program of all operators.

    Compiled and run through once, -Og takes least: -O1 compiles twice as long, -O0 runs twice as long.
    """
    for header in HEADERS:
        path = folder / "include" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "tensor.h"\n')
    program = str(folder / "operators")
    includes = [f"-I{folder / 'include'}", f"-I{SOURCES}", f"-I{ROOT / 'csrc' / 'include'}"]
    source = str(SOURCES / "operators.cpp")
    subprocess.run([compiler, *FLAGS, "-Og", *flags, *includes, "-pthread", "-o", program, source], check=True)
    return program


class Operators:
    """The running program; a call is that of torch's operator of the name."""

    def __init__(self, *command: str, **environment: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)

    def close(self) -> None:
        self.process.communicate()

    def call(self, name: str, *arguments: tuple[str, Any]) -> list[torch.Tensor]:
        """Runs `name` with arguments of these types of a schema; the exceptions are the operator's own."""
        into, out = self.process.stdin, self.process.stdout
        assert into is not None
        assert out is not None
        with contextlib.suppress(BrokenPipeError):
            into.write(_text(name) + b"".join(_encoded(kind, value) for kind, value in arguments))
            into.flush()
        kind = out.read(1)
        if kind == b"R":
            return [_tensor(out) for _ in range(_number(out))]
        if kind == b"E":
            error, _, message = out.read(_number(out)).decode().partition(": ")
            raise {"ValueError": ValueError, "TypeError": TypeError}.get(error, RuntimeError)(message or error)
        raise RuntimeError(f"the emulated {name} ended with status {self.process.wait()}")

    def detected_isa(self) -> str:
        return bytes(self.call("detected_isa")[0].tolist()).decode()

    def set_isa(self, name: str) -> None:
        self.call("set_isa", ("str", name))

    def run(self, name: str, *values: Any) -> Any:
        """The operator dfqvit::<name>, its optional arguments at the end left out or not."""
        schema = getattr(torch.ops.dfqvit, name).default._schema
        values += tuple(argument.default_value for argument in schema.arguments[len(values) :])
        pairs = zip(schema.arguments, values, strict=True)
        found = self.call(name, *((str(argument.type), value) for argument, value in pairs))
        return found[0] if len(found) == 1 else tuple(found)

    @contextlib.contextmanager
    def as_cpu(self) -> Iterator[None]:
        """Within, every operator's backend "cpu" is this program."""
        before = {each: each.backends["cpu"] for each in dispatch._OPERATORS.values() if "cpu" in each.backends}
        try:
            for operator, backend in before.items():
                run = lambda *args, name=operator.name: self.run(name, *args)  # noqa: E731
                operator.backends["cpu"] = dispatch.Backend("cpu", run, backend.supports)
            yield
        finally:
            for operator, backend in before.items():
                operator.backends["cpu"] = backend


def _text(value: str) -> bytes:
    return struct.pack("<q", len(value.encode())) + value.encode()


def _encoded(kind: str, value: Any) -> bytes:
    if kind.startswith("Optional["):
        return struct.pack("<q", value is not None) + (b"" if value is None else _encoded(kind[9:-1], value))
    if kind.startswith("List["):
        return struct.pack("<q", len(value)) + b"".join(_encoded(kind[5:-1], each) for each in value)
    if kind == "Tensor":
        whole = value.detach().contiguous()
        head = struct.pack(f"<{2 + whole.dim()}q", TYPES.index(whole.dtype), whole.dim(), *whole.shape)
        return head + ctypes.string_at(whole.data_ptr(), whole.nbytes) if whole.numel() else head
    if kind == "str":
        return _text(value)
    return struct.pack("<d" if kind == "float" else "<q", value)


def _number(stream: Any) -> int:
    return struct.unpack("<q", stream.read(8))[0]


def _tensor(stream: Any) -> torch.Tensor:
    dtype = TYPES[_number(stream)]
    shape = [_number(stream) for _ in range(_number(stream))]
    result = torch.empty(shape, dtype=dtype)
    if result.numel():
        data = stream.read(result.nbytes)
        ctypes.memmove(result.data_ptr(), data, len(data))
    return result
