"""One rule for all operators: which backend runs a call.

An `Operator` is one torch operator `dfqvit::<name>` whose schema stands here in Python, once. Its kernel walks the
operator's backends in the order cuda, triton, cpu, reference and runs the first that `supports` the arguments. A backend
asked for by name (`set_backend`, `use_backend`, `DFQVIT_BACKEND`) runs or raises `BackendError` with the reason.
Compiled backends implement the same schema under `dfqvit_cpu::<name>` and `dfqvit_cuda::<name>` (TORCH_LIBRARY_IMPL). The
shared library knows these schemas too, for processes without Python's dfqvit (csrc/library.cpp). In a build for the Hugging Face
Hub another name stands for `dfqvit` here: `extension.NAMESPACE`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import capability, extension, tuning
from .extension import Verdict

NAMES = ("cuda", "triton", "cpu", "reference")

_LIBRARY = torch.library.Library(extension.NAMESPACE, "FRAGMENT")
_COMPILED = {name: torch.library.Library(f"{extension.NAMESPACE}_{name}", "FRAGMENT") for name in ("cpu", "cuda")}
_OPS = {name: getattr(torch.ops, library.ns) for name, library in _COMPILED.items()}
_OPERATORS: dict[str, Operator] = {}
_asked: dict[str | None, str] = {}  # operator name, or None for all of them -> backend name
_warned: set[tuple[str, str, str]] = set()


class BackendError(ValueError):
    """A backend was asked for by name and cannot serve; the message says why."""


class BackendFallbackWarning(UserWarning):
    """The automatic choice passed over a backend that this device would normally use; shown once for each reason."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an operator. `run` and `supports` take the operator's own arguments.

    `supports_traced`, where there is one, asks of them what `supports` does, in words that torch.compile can follow: device
    and build apart.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., Verdict]
    supports_traced: Callable[..., Verdict] | None = None


class Operator:
    """A torch operator with several backends; calling it calls `torch.ops.dfqvit.<name>`.

    With `tune`, which gives a key for a call's shape, the automatic choice takes the fastest for that key; see `tuning`.
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable[..., Any],
        backends: Sequence[Backend],
        tune: Callable[..., str] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        if tune is not None and "!" in schema:
            raise ValueError(
                f"tune was given for {self.name}, which writes to its arguments; it cannot be run for a try"
            )
        self.tune = tune
        self.backends = {backend.name: backend for backend in sorted(backends, key=lambda b: NAMES.index(b.name))}
        _define(_LIBRARY, schema)
        with warnings.catch_warnings():  # torch says so when this takes the place of the shared library's own choice
            warnings.simplefilter("ignore", UserWarning)
            _LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd", allow_override=True)
            autograd = self._once if self.name.endswith("_backward") else self._refuse_gradient
            _LIBRARY.impl(self.name, autograd, "Autograd", with_keyset=True, allow_override=True)
        fake = _on_one_device(self.name, fake)
        torch.library.register_fake(f"{_LIBRARY.ns}::{self.name}", fake, lib=_LIBRARY)
        for name in _COMPILED.keys() & self.backends.keys():
            library = _COMPILED[name]
            _define(library, schema)
            torch.library.register_fake(f"{library.ns}::{self.name}", fake, lib=library)
            _let_batch(library, self.name)
        _let_batch(_LIBRARY, self.name)
        self._torch_op = getattr(getattr(torch.ops, _LIBRARY.ns), self.name)
        _OPERATORS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self._while_compiling(*args) if torch.compiler.is_compiling() else self._torch_op(*args)

    def _while_compiling(self, *args: Any) -> Any:
        """Chooses the compiled backend of a CPU now, not in every call; an exported program may yet move to another device.

        Choosing by Python costs a call some 30 microseconds. torch.compile looks again when `set_backend` is called.
        """
        cpu = self.backends.get("cpu")
        if (
            not _asked
            and cpu is not None
            and cpu.supports_traced is not None
            and self.tune is None
            and _compiles_for_cpu()
        ):
            tensors = _tensors(args)
            on_cpu = all(each.device.type == "cpu" for each in tensors)
            # dfqvit_cpu::<name> would cut a gradient unseen; dfqvit::<name> refuses it
            wanted = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
            if on_cpu and not wanted and cpu.supports_traced(*args)[0]:
                return getattr(_OPS["cpu"], self.name)(*args)
        return self._torch_op(*args)

    @property
    def asked(self) -> str | None:
        """The backend that was asked for by name, if any."""
        return _asked.get(self.name) or _asked.get(None)

    def fused_on(self, device: str) -> bool:
        """Whether a backend other than the reference can run on `device`, "cpu" or "cuda"."""
        names = ("cpu",) if device == "cpu" else ("cuda", "triton")
        return any(name in self.backends and _available(name)[0] for name in names)

    def run(self, *args: Any) -> Any:
        """Computes on the backend that serves, in the dtypes that the operator's arithmetic names, whatever autocast says.

        What a call comes to below torch's dispatcher; one operator calls it of another inside its own backend.
        """
        if not torch._C._is_any_autocast_enabled():
            return self.resolve(*args).run(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return self.resolve(*args).run(*args)

    def _refuse_gradient(self, keys: Any, *args: Any) -> Any:
        """What autograd does with the operator itself, as an exported program calls it: it would cut the gradient unseen.

        A public function that has a gradient calls the operator where autograd records nothing.
        """
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise ValueError(
                f"a gradient is wanted of the operator {self.name}, which has none: use torch.no_grad(), or for gradients the "
                "model itself, not what was exported or traced from it"
            )
        _refuse_tangents(self.name, args)
        return self._torch_op.default.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def _once(self, keys: Any, *args: Any) -> Any:
        """What autograd does with a gradient's operator: under `create_graph` its results refuse to be differentiated again."""
        _refuse_tangents(self.name, args)
        run, keys = self._torch_op.default.redispatch, keys & torch._C._after_autograd_keyset
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return run(keys, *args)
        # torch.func comes here once for each of its levels, from the last one on; the levels below are to see the operator too.
        above = torch._C._are_functorch_transforms_active()
        with contextlib.nullcontext() if above else torch._C._AutoDispatchBelowAutograd():
            found = run(keys, *args)
        wanting = [arg.view_as(arg) for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
        for each in wanting:
            each.register_hook(self._refuse_second)
        # 0, and made of what must not be wanted
        nothing = torch.stack([each.flatten()[:0].sum() for each in wanting]).sum()
        if isinstance(found, list):
            return [each + nothing.to(each.dtype) for each in found]
        return found + nothing.to(found.dtype)

    def _refuse_second(self, _: torch.Tensor) -> None:
        name = self.name.removesuffix("_backward")
        raise ValueError(f"a second derivative is wanted of {name}, which has only a first one")

    def resolve(self, *args: Any) -> Backend:
        """The backend that a call with these arguments runs on."""
        asked = self.asked
        if asked is not None:
            return self._resolve_by_name(asked, *args)
        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
        serving = [backend for backend in self.backends.values() if _serves(backend.name, first)]
        for place, backend in enumerate(serving):
            able, reason = backend.supports(*args)
            if able:
                return backend if self.tune is None else self._fastest(serving[place:], *args)
            self._warn_once(backend.name, reason)
        raise BackendError(f"no backend of {self.name} supports these arguments on device '{first.device.type}'")

    def _fastest(self, able: Sequence[Backend], *args: Any) -> Backend:
        """Of `able`, whose first supports the arguments; the reference is a fallback, never a candidate."""
        rest = (backend for backend in able[1:] if backend.name != "reference" and backend.supports(*args)[0])
        candidates = {backend.name: backend.run for backend in (able[0], *rest)}
        if self.tune is None or len(candidates) == 1:
            return able[0]
        return self.backends[tuning.fastest(self.name, self.tune(*args), candidates, args)]

    def _resolve_by_name(self, name: str, *args: Any) -> Backend:
        backend = self.backends.get(name)
        if backend is None:
            raise BackendError(
                f"backend was '{name}', which {self.name} does not have; it may be {_listed(self.backends)}"
            )
        able, reason = backend.supports(*args)
        if not able:
            raise BackendError(f"backend was '{name}', which cannot run this {self.name}: {reason}")
        return backend

    def _warn_once(self, backend: str, reason: str) -> None:
        key = (self.name, backend, reason)
        if key not in _warned:
            _warned.add(key)
            warnings.warn(
                f"{self.name}: backend '{backend}' passed over: {reason}", BackendFallbackWarning, stacklevel=4
            )


def _tensors(args: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among arguments, and in their lists."""
    flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return [each for each in flat if isinstance(each, torch.Tensor)]


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """ValueError for a tensor of forward-mode differentiation: no operator has derivatives of that kind."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(each).tangent is not None for each in _tensors(args)):
        raise ValueError(
            f"a forward-mode derivative is wanted of {name}, which has none: use reverse mode, or detach()"
        )


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake of an operator. torch calls it too where one of real tensors is on meta, and would take the result for values."""

    def checked(*args: Any) -> Any:
        devices = {each.device.type for each in _tensors(args)}
        if "meta" in devices and len(devices) > 1:
            others = ", ".join(sorted(devices - {"meta"}))
            raise ValueError(
                f"{name} was given tensors on meta, which hold no values, beside others on {others}; load the values first"
            )
        return fake(*args)

    return checked


def _define(library: torch.library.Library, schema: str) -> None:
    """Defines an operator unless the shared library, loaded first, has."""
    if not hasattr(getattr(torch.ops, library.ns), schema.split("(", 1)[0]):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def places_of(name: str) -> list[Any]:
    """The operator of a name in every namespace that has it: `torch.ops.dfqvit.<name>`, and those of its compiled backends."""
    spaces = (getattr(torch.ops, _LIBRARY.ns), *_OPS.values())
    return [getattr(space, name) for space in spaces if hasattr(space, name)]


def _let_batch(library: torch.library.Library, name: str) -> None:
    """Lets torch.func.vmap call an operator: once for each of its batch, so that each is computed as without vmap."""
    operator = getattr(getattr(torch.ops, library.ns), name).default

    def one_by_one(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        found = [operator(*_selected(args, dims, index)) for index in range(info.batch_size)]
        if isinstance(found[0], torch.Tensor):
            return torch.stack(found), 0
        joined = [torch.stack(each) for each in zip(*found, strict=True)]
        return type(found[0])(joined), type(found[0])([0] * len(joined))

    torch.library.register_vmap(f"{library.ns}::{name}", one_by_one, lib=library)
    if "Tensor[]" in str(operator._schema):  # of others torch's old vmap makes calls itself
        library.impl(name, functools.partial(_refuse_old_vmap, name), "Batched")


def _refuse_old_vmap(name: str, *_: Any) -> Any:
    raise ValueError(
        f"{name} was called for a batch of gradients at once (is_grads_batched=True, vectorize=True); use torch.func.jacrev or "
        "torch.func.vmap, or one gradient after the other"
    )


def _selected(args: Sequence[Any], dims: Sequence[Any], index: int) -> list[Any]:
    """Arguments, of which those with a dimension are a batch's: the one at `index` of it."""
    return [
        _selected(arg, dim, index) if isinstance(dim, (list, tuple)) else arg if dim is None else arg.select(dim, index)
        for arg, dim in zip(args, dims, strict=True)
    ]


def compiled(name: str, device: str, supports: Callable[..., Verdict]) -> Backend:
    """The backend that runs `dfqvit_<device>::<name>`, once dfqvit._C is loaded and `supports` agrees."""
    present = extension.supports_cuda if device == "cuda" else extension.supports_cpu

    def supported(*args: Any) -> Verdict:
        able, reason = on_device(device)(*args)
        if able:
            able, reason = present()
        if able and device == "cuda":
            able, reason = capability.compiled_for(*args)
        return supports(*args) if able else (False, reason)

    found: list[Callable[..., Any]] = []  # torch's own look-up of an operator by name costs microseconds

    def run(*args: Any) -> Any:
        if not found:
            found.append(getattr(_OPS[device], name).default)
        return found[0](*args)

    return Backend(device, run, supported, supports if device == "cpu" else None)


def checking(backend: Backend, check: Callable[..., None]) -> Backend:
    """`backend`, with its arguments given to `check` before it runs. The cpu backends check values as they read them."""

    def run(*args: Any) -> Any:
        check(*args)
        return backend.run(*args)

    return dataclasses.replace(backend, run=run)


def _compiles_for_cpu() -> bool:
    """Whether a trace may name the compiled backend: it is built, and nothing is exported."""
    return extension.supports_cpu()[0] and not torch.compiler.is_exporting()


# Called while torch traces, not traced: within, torch takes its own `is_exporting` for True. This is all that
# torch.compiler.assume_constant_result does, but that imports the whole of torch.compile, which takes longer than torch.
_compiles_for_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_triton(name: str, package: str, supports: Callable[..., Verdict]) -> Backend:
    """The backend that runs `<package>.triton.<name>`, imported at its first use; CPU tensors run in Triton's interpreter."""

    def supported(*args: Any) -> Verdict:
        able, reason = triton_available()
        if not able:
            return False, reason
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        able, reason = on_device("cpu" if interpreted and not args[0].is_cuda else "cuda")(*args)
        if able:
            able, reason = capability.triton_for(*args)
        return supports(*args) if able else (False, reason)

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(".triton", package), name)(*args)

    return Backend("triton", run, supported)


def on_device(device: str) -> Callable[..., Verdict]:
    """A `supports` that asks for tensors on `device`."""

    def supports(*args: Any) -> Verdict:
        found = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        return (True, "") if found == device else (False, f"the tensors are on '{found}', not on '{device}'")

    return supports


def anything(*_: Any) -> Verdict:
    """A `supports` that never declines: the reference's."""
    return True, ""


def not_float64(*args: Any) -> Verdict:
    """A `supports` that leaves float64, the oracle's dtype, to the reference: that of the first argument."""
    return (True, "") if args[0].dtype != torch.float64 else (False, "float64 runs on the reference")


def set_backend(name: str | None, operator: str | None = None) -> None:
    """Runs every later call on the backend `name`; `None` returns to the automatic choice.

    Args:
        name: "cuda", "triton", "cpu", "reference" or None.
        operator: only this operator (and its backward); by default all of them.

    Raises:
        ValueError: for an unknown backend or operator name.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend was '{name}'; it may be {_listed(NAMES)}, or None for the automatic choice")
    if operator is not None and operator not in _OPERATORS:
        raise ValueError(f"operator was '{operator}'; it may be {_listed(_public_operators())}")
    keys: list[str | None] = [None] if operator is None else [operator, f"{operator}_backward"]
    for key in keys:
        if name is None:
            _asked.pop(key, None)
        else:
            _asked[key] = name


@contextlib.contextmanager
def use_backend(name: str | None, operator: str | None = None) -> Iterator[None]:
    """`set_backend` for the length of a `with` block; what was asked for before holds again after it.

    Args:
        name: "cuda", "triton", "cpu", "reference", or None for the automatic choice.
        operator: only this operator (and its backward); by default all of them.

    Raises:
        ValueError: for an unknown backend or operator name.
    """
    before = dict(_asked)
    try:
        set_backend(name, operator)
        yield
    finally:
        _asked.clear()
        _asked.update(before)


def asked_table() -> dict[str | None, str]:
    """The table behind `set_backend` itself, empty while every choice is automatic: for callers that watch it."""
    return _asked


def choices() -> frozenset[tuple[str | None, str]]:
    """What was asked for by name, as (operator or None, backend): for callers that remember a choice while this is the same."""
    return frozenset(_asked.items())


def backends() -> dict[str, dict[str, str]]:
    """Which backends can run on this machine.

    Returns:
        For each operator, {backend: "live", or the reason why it is not}.
    """
    table: dict[str, dict[str, str]] = {}
    for name in _public_operators():
        table[name] = {}
        for backend in _OPERATORS[name].backends.values():
            able, reason = _available(backend.name)
            table[name][backend.name] = "live" if able else reason
    return table


def _available(backend: str) -> Verdict:
    if backend == "cuda":
        able, reason = extension.supports_cuda()
        return capability.of_machine("cuda") if able else (False, reason)
    if backend == "cpu":
        return extension.supports_cpu()
    if backend == "triton":
        able, reason = triton_available()
        return capability.of_machine("triton") if able else (False, reason)
    return True, ""


def triton_available() -> Verdict:
    """Whether Triton can run: installed, and with a GPU or in its interpreter."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return False, f"triton does not import: {error}"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return True, ""
    return False, "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"


def _serves(backend: str, tensor: torch.Tensor) -> bool:
    """Whether the automatic choice looks at this backend at all; float64 is the oracle's dtype, so the reference's."""
    if backend == "reference":
        return True
    return tensor.dtype != torch.float64 and (backend == "cpu") == (tensor.device.type == "cpu")


def _public_operators() -> list[str]:
    return [name for name in _OPERATORS if not name.endswith("_backward")]


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _read_environment() -> None:
    """DFQVIT_BACKEND: one backend for all ("cpu"), or a list for some ("quant_linear=reference,fake_quantize=cpu")."""
    for part in filter(None, os.environ.get("DFQVIT_BACKEND", "").split(",")):
        operator, _, name = part.strip().rpartition("=")
        if name not in NAMES:
            raise ValueError(f"DFQVIT_BACKEND names the backend '{name}'; it may be {_listed(NAMES)}")
        _asked[operator or None] = name
        if operator:
            _asked[f"{operator}_backward"] = name


_read_environment()
