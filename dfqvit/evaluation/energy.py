"""Energy counters: RAPL for the CPU's packages, NVML for a GPU. Both count joules since some moment; differences are used."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


class Unavailable(Exception):
    """A counter cannot be read; the message says why."""


@dataclass
class Cost:
    """What some work took; joules by counter, empty where none can be read."""

    seconds: float
    joules: dict[str, float]

    @property
    def total(self) -> float | None:
        """Joules of all counters together."""
        return sum(self.joules.values()) if self.joules else None

    def __add__(self, other: Cost) -> Cost:
        keys = self.joules.keys() | other.joules.keys()
        return Cost(
            self.seconds + other.seconds, {key: self.joules.get(key, 0) + other.joules.get(key, 0) for key in keys}
        )

    def times(self, factor: float) -> Cost:
        """The cost of `factor` times the work."""
        return Cost(self.seconds * factor, {key: value * factor for key, value in self.joules.items()})


class Rapl:
    """All CPU packages of the machine, by Linux's powercap files (Intel and AMD); whatever else runs on them is counted too."""

    name = "cpu"

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        packages = [zone for zone in zones if zone.name.count(":") == 1 and _text(zone / "name").startswith("package")]
        if not packages:
            raise Unavailable(f"RAPL: no packages under {root}, as in most virtual machines")
        self.counters = [_Counter(zone) for zone in packages]

    def joules(self) -> float:
        """Since this object was made."""
        return sum(counter.joules() for counter in self.counters)


class _Counter:
    """One package's counter, which starts again at 0 after `max_energy_range_uj`."""

    def __init__(self, zone: Path) -> None:
        self.file = zone / "energy_uj"
        try:
            self.last = int(self.file.read_text())
            self.range = int((zone / "max_energy_range_uj").read_text())
        except PermissionError as error:
            raise Unavailable(f"RAPL: {self.file} may be read by root only") from error
        except (OSError, ValueError) as error:
            raise Unavailable(f"RAPL: {self.file} cannot be read ({error})") from error
        self.total = 0

    def joules(self) -> float:
        now = int(self.file.read_text())
        self.total += now - self.last if now >= self.last else now - self.last + self.range
        self.last = now
        return self.total / 1e6


class Nvml:
    """One GPU's whole board, by NVIDIA's management library (the package nvidia-ml-py); Volta and later."""

    name = "gpu"

    def __init__(self, device: torch.device) -> None:
        try:
            nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise Unavailable("NVML: the package nvidia-ml-py is not installed") from error
        try:
            nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # CUDA_VISIBLE_DEVICES renumbers, so no index
            self.handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.read = nvml.nvmlDeviceGetTotalEnergyConsumption
            self.read(self.handle)
        except Exception as error:  # pynvml's errors share no public base over its versions
            raise Unavailable(f"NVML: {error}") from error

    def joules(self) -> float:
        """Since the driver was loaded."""
        return self.read(self.handle) / 1e3


class Energy:
    """The counters that can be read for work on `device`; `note` says in a line why others cannot, or is ""."""

    def __init__(self, device: torch.device | str = "cpu", root: Path = POWERCAP) -> None:
        self.device = torch.device(device)
        self.counters: list[Rapl | Nvml] = []
        reasons = []
        wanted: list[Callable[[], Rapl | Nvml]] = [lambda: Rapl(root)]
        if self.device.type == "cuda":
            wanted.append(lambda: Nvml(self.device))
        for make in wanted:
            try:
                self.counters.append(make())
            except Unavailable as error:
                reasons.append(str(error))
        self.note = f"energy not counted: {'; '.join(reasons)}" if reasons else ""

    @contextlib.contextmanager
    def account(self) -> Iterator[Cost]:
        """The cost of the `with` block's work, filled in at its end; the machine's idle power is part of it."""
        cost = Cost(0.0, {})
        self._finish()
        before = {counter.name: counter.joules() for counter in self.counters}
        begin = time.perf_counter()
        yield cost
        self._finish()
        cost.seconds = time.perf_counter() - begin
        cost.joules = {counter.name: counter.joules() - before[counter.name] for counter in self.counters}

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
