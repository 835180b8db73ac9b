"""Devices, dtypes, fresh random seeds, small models, and the place of the real data."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import io
import os
import pickle
import platform
import random
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dfqvit import cli, demo
from dfqvit.kernels import extension
from dfqvit.models import load_model
from dfqvit.synthesis import procedural

os.environ.setdefault("DFQVIT_CPUS", "8")  # tests that ask for more threads than there are CPUs get them
# What /proc/cpuinfo says the processor has is taken for true: inductor would compile a program for each kind of vectors, and
# import torch in a process of its own to run it, 16 s of a processor.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
torch._inductor.config.cpp.vec_isa_ok = True
# Of each compilation's guards torch would measure the time, after a flush of the processor's cache, for its log.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
# torch.compile makes many objects, which a collector that looks often looks through again and again
gc.set_threshold(50_000, 20, 50)
DATA = Path(os.environ.get("DFQVIT_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The CPU paths of this architecture, each with what those before it have, and how an error lists them.
ARM = platform.machine().lower() in ("aarch64", "arm64")
PATHS = ["portable", "neon", "dotprod", "i8mm"] if ARM else ["portable", "avx2", "avx512", "amx"]
FUSING = PATHS[1:]  # those that fuse multiply-adds
PATHS_SAID = "'{}', '{}', '{}' or '{}'".format(*PATHS)
# What quant_linear's activations are, in the dtype of y: QuickGELU as a fraction, not as its backends write it.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y / (1 + torch.exp(-1.702 * y)),
    "silu": lambda y: y / (1 + torch.exp(-y)),
}
# What makes a model of each family small, as `timm.create_model` takes it.
SMALL: dict[str, dict[str, Any]] = {
    "vit": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7},
    "distilled": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7},
    "swin": {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "num_classes": 7,
    },
}
# Files, and tests by file::name, the files that take longest first.
SLOW = tuple((Path(__file__).parent / "slow.txt").read_text().split())
SLOW_FILES = tuple(dict.fromkeys(name.partition("::")[0] for name in SLOW))
# Of the tests in drawn.txt one set of parameters in SHARE is run: which, SEED says. `make test` sets both; by default all run.
DRAWN = tuple((Path(__file__).parent / "drawn.txt").read_text().split())
SHARE = int(os.environ.get("DFQVIT_TEST_SHARE", 1))
SEED = os.environ.get("DFQVIT_TEST_SEED", "0")
QUICK = ["--samples", "2", "--iters", "2"]  # of a synthesis on the command line


def pytest_report_header() -> str:
    drawn = f"one set of parameters in {SHARE}, drawn by seed {SEED}" if SHARE > 1 else "all sets of parameters"
    return f"of the tests in tests/drawn.txt: {drawn}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests that `-m gpu` selects: those of which one parameter is a GPU or a backend that runs on one; and the slow.

    Slow files come first: each runs in one process, and a long one that starts last leaves the other cores idle.
    """
    files = [item.nodeid.partition("::")[0] for item in items]
    place = {file: SLOW_FILES.index(file) if file in SLOW_FILES else len(SLOW_FILES) for file in set(files)}
    items[:] = [item for _, item in sorted(zip(files, items, strict=True), key=lambda pair: place[pair[0]])]
    on_gpu = {"cuda"} if os.environ.get("TRITON_INTERPRET") == "1" else {"cuda", "triton"}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("device") in on_gpu or params.get("backend") in on_gpu:
            item.add_marker(pytest.mark.gpu)
        name = item.nodeid.partition("[")[0]
        if (name in SLOW or name.partition("::")[0] in SLOW) and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.slow)
    if SHARE > 1:
        left_out = not_drawn(items)
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def not_drawn(items: list[pytest.Item]) -> set[pytest.Item]:
    """What this run leaves out. Triton's interpreter, which takes seconds where others take milliseconds, draws of everything."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        drawn = interpreted or name in DRAWN or name.partition("::")[0] in DRAWN
        if drawn and not item.get_closest_marker("gpu"):
            families.setdefault(name, []).append(item)
    left_out: set[pytest.Item] = set()
    for name, family in families.items():
        kept = random.Random(f"{SEED} {name}").sample(family, -(-len(family) // SHARE))
        left_out |= set(family) - set(kept)
    return left_out


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With DFQVIT_TEST_AT_ONCE=1 a failure is printed as it happens: a run that is ended by force has no summary."""
    if report.failed and os.environ.get("DFQVIT_TEST_AT_ONCE") == "1":
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.fixture(scope="session", autouse=True)
def few_crops() -> Iterator[None]:
    """Second-order rounding sees 32 crops of the calibration images in all, not 192, and 6 procedural images beside synthetic ones,
    not 48: the same path in less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dfqvit.calibration.observation.VIEWS", 32)
        patch.setattr("dfqvit.calibration.images.COMPANIONS", 6)
        yield


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> Iterator[None]:
    """A procedural image of one seed and size is drawn once: 48 of them stand beside the synthetic ones of every quantization."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(procedural, "_draw", functools.lru_cache(maxsize=2000)(procedural._draw))
        yield


@pytest.fixture(autouse=True)
def modes_are_as_before() -> Iterator[None]:
    """A test that leaves one of torch's modes on fails itself, instead of whichever comes after it in its process."""
    yield
    left = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()]
    left.append(torch.is_autocast_enabled("cpu"))
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_autocast_enabled("cpu", False)
    assert left == [True, False, torch.float32, False], "gradients, inference mode, dtype or autocast were left changed"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for every run, printed so that a failure can be repeated with DFQVIT_TEST_SEED."""
    value = int(os.environ.get("DFQVIT_TEST_SEED", secrets.randbelow(2**31)))
    print(f"DFQVIT_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine."""
    return request.param


@pytest.fixture(params=PATHS)
def isa(request: pytest.FixtureRequest) -> Any:
    """Every CPU path that this processor can run, one after the other."""
    with on_path(request.param):
        yield request.param


@contextmanager
def on_path(name: str) -> Iterator[None]:
    """A CPU path within the block; the test is skipped where this processor has none such."""
    module, reason = extension.load()
    if module is None:
        pytest.skip(reason)
    before = module.active_isa()
    try:
        module.set_isa(name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        module.set_isa(before)


def each_path(paths: Sequence[str] = PATHS) -> Iterator[str]:
    """Those of the CPU paths that this processor has, each in use while it is the loop's."""
    module, reason = extension.load()
    if module is None:
        pytest.skip(reason)
    for path in paths:
        with suppress(pytest.skip.Exception), on_path(path):
            yield path


@pytest.fixture
def data() -> Path:
    """The folder of real weights and images."""
    if not (DATA / "deit_tiny_patch16_224.in1k.safetensors").exists():
        pytest.skip(f"no real data at '{DATA}' (set DFQVIT_DATA)")
    return DATA


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.run([str(each) for each in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def said(err: str) -> list[str]:
    """The program's own lines on stderr, without progress bars."""
    return [line for line in err.replace("\r", "\n").split("\n") if line.startswith("dfqvit:")]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's own, within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Of each kind of block of the embedded models one, and a Swin's merging of patches: where it is not accuracy that is looked at.
SHALLOW: dict[str, dict[str, Any]] = {
    "demo": {"depth": 1},
    "demo-deit3": {"depth": 1},
    "demo-swin": {"depths": (2, 1)},
    "demo-convnext": {"depths": (1, 1, 1, 1)},
}


def shallow_demo(name: str) -> nn.Module:
    """The first blocks of an embedded model, with its weights."""
    state = load_model(name).state_dict()
    model: nn.Module = timm.create_model(demo.ALIASES[name], **SHALLOW[name]).eval()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model


class _ByValue(pickle.Pickler):
    """Equal tensors give equal bytes: torch's own pickles say where in memory each lies."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            return NotImplemented
        content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        how = type(value), value.dtype, value.shape, value.stride(), value.requires_grad, vars(value)
        return tuple, ((*how, content),)


def made_once(make: Callable[..., Any], most: int = 100) -> Callable[..., Any]:
    """`make`, for which equal arguments and an equal state of torch's random numbers make the same: then a copy of it.

    For what tests only begin with, such as a quantized model; on every CPU path anew. The latest `most` are kept.
    """
    kept: dict[bytes, tuple[Any, torch.Tensor]] = {}

    @functools.wraps(make)
    def call(*args: Any, **kwargs: Any) -> Any:
        module, _ = extension.load()
        path = None if module is None else module.active_isa()
        file = io.BytesIO()
        try:
            _ByValue(file).dump((args, kwargs, path, torch.get_rng_state()))
        except (AttributeError, pickle.PicklingError, TypeError):  # a class within a test
            return make(*args, **kwargs)
        key = hashlib.sha256(file.getbuffer()).digest()
        if key not in kept:
            kept[key] = make(*args, **kwargs), torch.get_rng_state()
            if len(kept) > most:
                del kept[next(iter(kept))]
        made, state = kept[key]
        torch.set_rng_state(state)
        return copy.deepcopy(made)

    return call


def arguments_of(operator: Any, call: Callable[[], Any]) -> tuple[Any, ...]:
    """What `call` calls an operator with, by position."""
    captured = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is operator:
                captured.append(args)
            return func(*args, **(kwargs or {}))

    with Spy():
        call()
    return captured[0]


def mirrored(scale: torch.Tensor) -> torch.Tensor:
    """The scales with a random sign each: a weight's grid may reach one step further on either side of 0."""
    return torch.where(torch.rand_like(scale) < 0.5, -scale, scale)


def small_vit(**kwargs: Any) -> nn.Module:
    """A ViT of 3 blocks on 32 x 32 images, with random weights large enough to matter."""
    return _lively(timm.create_model("vit_tiny_patch16_224", **{**SMALL["vit"], **kwargs}))


def small_clip(**kwargs: Any) -> nn.Module:
    """The image tower of OpenAI's CLIP at that size: QuickGELU, and a norm before the blocks."""
    return _lively(timm.create_model("vit_base_patch32_clip_quickgelu_224", **{**SMALL["vit"], **kwargs}))


def small_distilled(**kwargs: Any) -> nn.Module:
    """A distilled DeiT of the same size."""
    return _lively(timm.create_model("deit_tiny_distilled_patch16_224", **{**SMALL["distilled"], **kwargs}))


def small_swin(**kwargs: Any) -> nn.Module:
    """A Swin of 2 + 2 blocks on 32 x 32 images, with shifted windows of 4."""
    return _lively(timm.create_model("swin_tiny_patch4_window7_224", **{**SMALL["swin"], **kwargs}))


MODELS = {"vit": small_vit, "distilled": small_distilled, "swin": small_swin}


def _lively(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / max(parameter.shape[-1], 1) ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, seed: int) -> nn.Module:
    """One small model of each family."""
    return MODELS[request.param]()
