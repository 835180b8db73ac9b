"""Marks tests that run Triton, which `test_interpreted.py` runs where there is no GPU, and compiles kernels for GPUs."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which takes seconds for what takes others milliseconds
NO_TRITON = "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"


def _hasten(interpreter: Any) -> None:
    """Triton's interpreter looks up what it has looked up before no more: a third of its time.

    For each call of a function within a kernel it goes through all of triton.language, to put its own in the place of what
    compiles, and leaves it there; and for each operation it writes the table of NumPy's types anew.
    """
    put, of_numpy = interpreter._patch_lang, interpreter._get_np_dtype
    done, types = set(), {}

    def put_once(function: Any) -> Any:
        if function not in done:
            done.add(function)
            put(function)
        return interpreter._LangPatchScope()  # which takes nothing back

    def kept(kind: Any) -> Any:
        element = kind.scalar  # a block's is that of its elements
        if element.name not in types:
            types[element.name] = of_numpy(element)
        return types[element.name]

    interpreter._patch_lang, interpreter._get_np_dtype = put_once, kept


if INTERPRETED:
    _hasten(importlib.import_module("triton.runtime.interpreter"))


def live_triton(test: Any) -> Any:
    """Marks a test that runs Triton: in the interpreter, or on a GPU."""
    if INTERPRETED:
        return test
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_TRITON)(test))


def few_on_gpu(cases: Iterable[Any], every: int) -> list[Any]:
    """The cases; outside the interpreter each `every`-th, since a GPU's Triton compiles for seconds for nearly each."""
    found = list(cases)
    return found if INTERPRETED else found[::every]


def compiles_for_gpus(test: Any) -> Any:
    """Marks a test that compiles kernels for GPUs of each `capability`, which need not be there."""
    for mark in (
        pytest.mark.parametrize("capability", [80, 90]),
        pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
        pytest.mark.slow,
    ):
        test = mark(test)
    return test


def kernels_of(operator: str) -> Any:
    """The module of an operator's Triton kernels; skips where Triton is not installed."""
    pytest.importorskip("triton")
    return importlib.import_module(f"dfqvit.kernels.{operator}.triton")


def compile_for(kernel: Any, capability: int, kinds: dict[str, str], constants: dict[str, Any], **options: Any) -> Any:
    """The kernel compiled for a GPU of `capability`, which need not be there: its `asm` and `metadata`.

    Arguments that are neither among `kinds` nor `constants` are pointers to float32.
    Pointers are aligned to 16 bytes, as torch's are; a kind "i32:16" is a multiple of 16.
    """
    triton = pytest.importorskip("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in used else kinds.get(name, "*fp32") for name in kernel.arg_names}
    multiples = [place for place, kind in enumerate(signature.values()) if kind.startswith("*") or kind.endswith(":16")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in multiples}
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=aligned)
    return triton.compile(source, target=target, options=options)


def resources(made: Any, capability: int) -> tuple[int, int]:
    """(registers of a thread, bytes spilled) of what `compile_for` gave, by the ptxas that comes with Triton."""
    triton = importlib.import_module("triton")
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(made.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (re.search(rf"(\d+) {what}", said) for what in ("registers", "bytes spill stores"))
    assert registers is not None, said
    assert spilled is not None, said
    return int(registers[1]), int(spilled[1])


def shared_memory(kernel: Any, capability: int, *what: Any, **options: Any) -> int:
    """Bytes of shared memory that `compile_for` gives."""
    return compile_for(kernel, capability, *what, **options).metadata.shared
