"""What `dfqvit info` prints: versions, devices, CPU, backends. Collecting it never fails."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from ..kernels import backends, extension
from ..version import __version__

_PACKAGES = ("torch", "torchvision", "timm", "triton", "safetensors", "numpy")


def collect() -> dict[str, Any]:
    """A JSON-ready record of this installation and machine."""
    module, reason = extension.load()
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                }
            )
    return {
        "dfqvit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "model": extension.cpu_name(),
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "detected_isa": module.detected_isa() if module else None,
            "active_isa": module.active_isa() if module else None,
        },
        "gpus": gpus,
        "compiled": module.build_info() if module else {"missing": reason},
        "backends": backends(),
    }


def describe(record: dict[str, Any]) -> str:
    """The record of `collect` as text."""
    cpu, compiled = record["cpu"], record["compiled"]
    lines = [
        f"dfqvit {record['dfqvit']}, Python {record['python']}, {record['platform']}",
        "packages: " + ", ".join(f"{name} {version}" for name, version in record["packages"].items()),
        f"CPU: {cpu['model']}, {cpu['threads']} threads, torch uses {cpu['torch_capability']}, "
        f"dfqvit uses {cpu['active_isa'] or 'no compiled path'}",
    ]
    lines += [f"GPU: {g['name']}, sm_{g['capability'].replace('.', '')}, {g['memory_gib']} GiB" for g in record["gpus"]]
    if not record["gpus"]:
        lines.append("GPU: none that torch sees")
    if "missing" in compiled:
        lines.append(f"compiled module: {compiled['missing']}")
    else:
        cuda = f"CUDA for {compiled['cuda_archs']}" if compiled["cuda"] else "no CUDA"
        lines.append(f"compiled module: torch {compiled['torch']}, {cuda}, compiler {compiled['compiler']}")
    lines.append("backends:")
    for operator, states in record["backends"].items():
        lines += [f"  {operator:26s} {backend:10s} {state}" for backend, state in states.items()]
    return "\n".join(lines)


def describe_tuning(table: dict[str, Any]) -> str:
    """The record of `kernels.tuning.table` as text."""
    state = "" if table["enabled"] else " (not used: DFQVIT_TUNING=0)"
    lines = [f"measured choices of backends{state}: {table['file']}"]
    for key, entry in table["choices"].items():
        times = ", ".join(f"{backend} {time:g} us" for backend, time in entry["microseconds"].items())
        lines.append(f"  {key}: {entry['backend']} ({times})")
    return "\n".join(lines if table["choices"] else [*lines, "  none yet"])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
