"""Lays the operators out as a kernel repository of the Hugging Face Hub: what its package `kernels` loads, without dfqvit.

    python scripts/hub_kernels.py --out DIR [--build]      DIR, empty before: build.toml, csrc/ and torch-ext/, which the Hub's
                                                           kernel-builder takes, README.md, LICENSE; --build adds
                                                           build/<variant>/, for the CPU and the torch of this machine

All files are those of this checkout, or written from its lists. A build is named after what is in it, and registers its operators
under that name: it can be loaded beside an installed dfqvit and beside other builds.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
VERSION = runpy.run_path(str(ROOT / "dfqvit" / "version.py"))["__version__"]
NAME = "dfqvit-kernels"  # of the repository; its package has an underscore
PACKAGE = NAME.replace("-", "_")
BINDING = "torch-ext/torch_binding.cpp"
GENERAL = {"name": NAME, "version": int(VERSION.split(".")[0]), "license": "Apache-2.0"}
CARD = f"""---
library_name: kernels
license: apache-2.0
tags:
- kernel
- quantization
- vision-transformer
---

# {NAME}

The operators of dfqvit {VERSION}, for quantized vision transformers: integer linear layers, attention and whole blocks, weights
packed to 2 to 8 bits, and the entropy of patch similarities.

```python
from pathlib import Path

import torch
from kernels import get_local_kernel

# or, from the Hub: kernels.get_kernel("OWNER/{NAME}", version={GENERAL["version"]}, backend="cpu", trust_remote_code=True)
ops = get_local_kernel(Path("THIS_FOLDER"), backend="cpu")
x, weight = torch.randn(8, 64), torch.randn(32, 64)
y = ops.quant_linear(x, weight, x_scale=0.03, x_zero=128.0, w_scale=0.3, a_bits=8, w_bits=4)
```

The docstring of each function says what it takes and computes; `ops.__all__` lists them. Python 3.10 or newer.
"""


def build_toml() -> dict[str, dict[str, Any]]:
    """The tables of build.toml: what kernel-builder compiles for a CPU, and for a GPU with the CPU's beside it."""
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "include").rglob("*.*"))
    flags = [*SETUP["CXX_FLAGS"], "-DDFQVIT_NAMESPACE=TORCH_EXTENSION_NAME"]
    common = {"depends": ["torch"], "include": ["csrc/include"]}
    cuda = {
        "cuda-capabilities": [arch.removesuffix("+PTX") for arch in SETUP["DEFAULT_ARCHS"].split(";")],
        "cuda-flags": SETUP["NVCC_FLAGS"],
    }
    cpu_sources, cuda_sources = SETUP["CPU_SOURCES"], SETUP["CUDA_SOURCES"]
    return {
        "general": {**GENERAL, "edition": 5, "backends": ["cpu", "cuda"]},
        "torch": {"src": [BINDING]},
        f"kernel.{PACKAGE}_cpu": {
            "backend": "cpu",
            **common,
            "cxx-flags": [*flags, "-DDFQVIT_CUDA=0"],
            "src": [*headers, *cpu_sources],
        },
        f"kernel.{PACKAGE}_cuda": {
            "backend": "cuda",
            **common,
            **cuda,
            "cxx-flags": [*flags, "-DDFQVIT_CUDA=1"],
            "src": [*headers, *cpu_sources, *cuda_sources],
        },
    }


def lay_out(out: Path) -> dict[str, dict[str, Any]]:
    """Writes the sources into `out`; the tables of its build.toml."""
    tables = build_toml()
    shutil.copytree(ROOT / "kernels", out / "torch-ext" / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "csrc" / "torch_binding.cpp", out / BINDING)
    for name in tables[f"kernel.{PACKAGE}_cuda"]["src"]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, out / name)
    text = (
        f"[{table}]\n" + "".join(f"{key} = {json.dumps(value, indent=4)}\n" for key, value in values.items())
        for table, values in tables.items()
    )
    (out / "build.toml").write_text("\n".join(text))
    (out / "README.md").write_text(CARD)
    shutil.copy2(ROOT / "LICENSE", out / "LICENSE")
    return tables


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in base 64, as metadata.json has them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files}
    return {name: base64.b64encode(value).decode() for name, value in hashes.items()}


def variant() -> str:
    """The folder's name, by which `kernels` finds what fits its machine, for example torch211-cxx11-cpu-x86_64-linux."""
    import torch

    system, machine = platform.system().lower(), platform.machine().replace("arm64", "aarch64")
    abi = f"cxx{'11' if torch.compiled_with_cxx11_abi() else '98'}-" if system == "linux" else ""
    return f"torch{''.join(torch.__version__.split('.')[:2])}-{abi}cpu-{machine}-{system}"


def build(out: Path, kernel: dict[str, Any]) -> Path:
    """Compiles what `lay_out` wrote, with the table `kernel` of its build.toml; the folder of the variant."""
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    name = f"_{PACKAGE}_cpu_{hashlib.sha256(json.dumps(digests(out)).encode()).hexdigest()[:7]}"
    folder = out / "build" / variant()
    shutil.copytree(out / "torch-ext" / PACKAGE, folder)
    # else static variables of templates would be those of another build that was loaded before
    apart = ["-fno-gnu-unique"] if sys.platform.startswith("linux") else []
    library = CppExtension(
        name,
        [str(out / source) for source in (BINDING, *kernel["src"]) if source.endswith(".cpp")],
        include_dirs=[str(out / path) for path in kernel["include"]],
        extra_compile_args=["-std=c++17", *kernel["cxx-flags"], *apart],
        py_limited_api=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        command = BuildExtension(Distribution({"ext_modules": [library]}))
        command.build_lib, command.build_temp = str(folder), temporary
        command.ensure_finalized()
        command.run()
    (folder / "_ops.py").write_text(f"import torch\n\nfrom . import {name}\n\nops = torch.ops.{name}\n")
    metadata = {
        "id": name,
        **GENERAL,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": digests(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the repository, empty or not there yet")
    parser.add_argument("--build", action="store_true", help="compile it for this machine's CPU too; takes minutes")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"--out was {arguments.out}, which is not empty")
    tables = lay_out(out)
    print(build(out, tables[f"kernel.{PACKAGE}_cpu"]) if arguments.build else out)


if __name__ == "__main__":
    main()
