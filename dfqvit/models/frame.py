"""The frame in which the float reference works: in eval mode and float32, whatever the caller's is; and all put back after."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

from .adapters import is_network
from .copying import copied
from .foreign import expect_float_model
from .spec import class_count

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


# The work puts hooks and flags on the caller's model and modes on the process: one thread after the other.
_one_at_a_time = threading.RLock()


def _free_in_child() -> None:
    """A child that was forked while another thread was at work never hears of its end."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_in_child)


def on_float_reference(
    work: Callable[Concatenate[nn.Module, Arguments], Result],
) -> Callable[Concatenate[nn.Module, Arguments], Result]:
    """Lets `work(model, ...)` see its model as the float reference: see `float_reference` and `undisturbed`.

    A second thread waits until the first is done. UsageError when the model is none.
    """

    @functools.wraps(work)
    def framed(model: nn.Module, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        expect_float_model(model)
        with _one_at_a_time, undisturbed(), float_reference(model) as reference:
            return work(reference, *args, **kwargs)

    return framed


@contextlib.contextmanager
def float_reference(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, with the number of classes that its head has; both put back for every module after the block.

    So is what rebuilds a network, which is the block's own affair.

    A copy where its tensors are not float32 (half, bfloat16 and double are brought to it) or were made in inference mode,
    which autograd cannot use.
    """
    tensors = [*model.parameters(), *model.buffers()]
    other = any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors)
    if other or any(tensor.is_inference() for tensor in tensors):
        model = _plain_copy(model)
    with evaluating(model):
        told, classes = getattr(model, "num_classes", None), class_count(model)
        if told is not None and classes is not None:
            model.num_classes = classes  # type: ignore[assignment]
        spec = model.__dict__.pop("dfqvit_spec", None) if is_network(model) else None
        try:
            yield model
        finally:
            if is_network(model):
                model.__dict__.pop("dfqvit_spec", None)
            if spec is not None:
                model.dfqvit_spec = spec
            if told is not None:
                model.num_classes = told


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module's own flag is put back after the block."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Plain torch within the block, with gradients, whatever modes the caller is in; global generators are as before after it.

    The modes are inference mode, no_grad, autocast, a default dtype or a default device.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_generators_kept())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Of torch, numpy and Python; of GPUs where torch has begun to use them."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if cuda else []
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])
        if cuda:
            torch.cuda.set_rng_state_all(gpus)


def _plain_copy(model: nn.Module) -> nn.Module:
    """A float32 copy; each tensor copied by itself, so that those of inference mode become ordinary ones."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        clone = tensor.detach().clone()
        clone = clone.float() if clone.is_floating_point() else clone
        memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
    return copied(model, memo)
