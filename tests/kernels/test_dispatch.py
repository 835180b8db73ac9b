"""The one rule that picks a backend: by name, automatic, fallback with a warning, from the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dfqvit import kernels
from dfqvit.kernels import BackendError, BackendFallbackWarning, dispatch, extension, fake_quantize
from dfqvit.kernels.fake_quantize import op

from ..conftest import PATHS, PATHS_SAID
from ..fresh import python

ARGUMENTS = (torch.zeros(2), torch.ones(1), torch.zeros(1), 0, 7, 0)


@pytest.fixture
def without_extension(monkeypatch):
    """As on a machine where nothing was compiled."""
    monkeypatch.setattr(extension, "load", lambda: (None, "the compiled module dfqvit._C is not built (test)"))
    monkeypatch.setattr(dispatch, "_warned", set())


def test_automatic_choice_falls_back_with_one_warning(without_extension):
    with pytest.warns(
        BackendFallbackWarning, match=r"fake_quantize: backend 'cpu' passed over: .* is not built"
    ) as caught:
        names = [op.forward.resolve(*ARGUMENTS).name for _ in range(3)]
    assert names == ["reference"] * 3
    assert len(caught) == 1


def test_a_backend_asked_for_by_name_raises_with_the_reason(without_extension):
    with (
        kernels.use_backend("cpu"),
        pytest.raises(BackendError, match=r"backend was 'cpu', which cannot run this fake_quantize: .* is not built"),
    ):
        fake_quantize(torch.zeros(2), 1.0, quant_min=0, quant_max=7)


def test_wrong_device_by_name():
    with (
        kernels.use_backend("cuda"),
        pytest.raises(BackendError, match="the tensors are on 'cpu', not on 'cuda'"),
    ):
        fake_quantize(torch.zeros(2), 1.0, quant_min=0, quant_max=7)


def test_a_backend_that_the_operator_does_not_have():
    with (
        kernels.use_backend("triton", "fake_quantize"),
        pytest.raises(
            BackendError, match=r"backend was 'triton', which fake_quantize does not have; it may be 'cuda', 'cpu'"
        ),
    ):
        fake_quantize(torch.zeros(2), 1.0, quant_min=0, quant_max=7)


def test_choice_for_one_operator_leaves_the_others(without_extension):
    with kernels.use_backend("reference", "fake_quantize"):
        assert op.forward.resolve(*ARGUMENTS).name == "reference"
        assert op.backward.resolve(torch.zeros(2), *ARGUMENTS).name == "reference"
        with pytest.raises(ValueError, match="operator was 'nope'; it may be 'fake_quantize'"):
            kernels.set_backend("cpu", "nope")
    with pytest.warns(BackendFallbackWarning):  # the choice ended with the block
        op.forward.resolve(*ARGUMENTS)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend was 'gpu'; it may be 'cuda', 'triton', 'cpu', 'reference', or None"):
        kernels.set_backend("gpu")


def test_table_of_backends_says_why_not(without_extension):
    table = kernels.backends()
    assert table["fake_quantize"]["reference"] == "live"
    assert "is not built" in table["fake_quantize"]["cpu"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "reference"),
        ("fake_quantize=reference,quant_linear=reference", "reference"),
        ("nope", "ValueError"),
    ],
)
def test_environment(value, expected):
    code = (
        "import torch; from dfqvit.kernels.fake_quantize import op;"
        "print(op.forward.resolve(torch.zeros(2), torch.ones(1), torch.zeros(1), 0, 7, 0).name)"
    )
    result = python("-c", code, env={**os.environ, "DFQVIT_BACKEND": value})
    assert expected in (result.stdout + result.stderr).strip().splitlines()[-1]


def test_an_operator_called_by_itself_refuses_gradients(seed):
    """autograd would cut them; the public function has them."""
    x = torch.randn(5, requires_grad=True)
    arguments = (x, torch.tensor([0.1]), torch.zeros(1), 0, 7, 0)
    with pytest.raises(
        ValueError, match="a gradient is wanted of the operator fake_quantize, which has none: use torch"
    ):
        torch.ops.dfqvit.fake_quantize(*arguments)
    with torch.no_grad():
        expected = torch.ops.dfqvit.fake_quantize(*arguments)
    assert torch.equal(torch.ops.dfqvit.fake_quantize(x.detach(), *arguments[1:]), expected)
    found = fake_quantize(x, 0.1, quant_min=0, quant_max=7)
    assert torch.equal(found, expected)
    assert found.requires_grad


def test_gradients_of_tensors_in_lists_are_refused_too(seed):
    ones, zeros, bias = torch.ones(8), torch.zeros(8), torch.randn(8, requires_grad=True)
    weights = [kernels.pack_weight(torch.randn(8, 8), ones, 8)] * 2
    arguments = (
        torch.randn(1, 3, 3, 8), torch.randn(8, 1, 3, 3), zeros, ones, zeros, 1e-5, weights, [zeros, bias], [ones] * 2, [8, 8],
        [ones[:1]] * 2, [zeros[:1]] * 2, [8, 8], None, "gelu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="a gradient is wanted of the operator quant_conv_block"):
        torch.ops.dfqvit.quant_conv_block(*arguments)
    with torch.no_grad():
        assert torch.ops.dfqvit.quant_conv_block(*arguments).isfinite().all()


def test_operators_import_neither_timm_nor_the_method():
    code = "import sys, dfqvit.kernels; print([m for m in sys.modules if m in ('timm', 'dfqvit.api', 'triton')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("system", "reason"), [("win32", "there is none for Windows"), ("linux", "install with a C")])
def test_a_module_that_was_not_built_is_explained(monkeypatch, system, reason):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extension.importlib, "import_module", missing)
    monkeypatch.setattr(extension.sys, "platform", system)
    module, said = extension.load.__wrapped__()
    assert module is None
    assert reason in said


def test_isa_can_be_asked_for_and_is_checked():
    module, reason = extension.load()
    if module is None:
        pytest.skip(reason)
    with pytest.raises(ValueError, match=f"isa was 'sse9'; it may be {PATHS_SAID}"):
        module.set_isa("sse9")
    assert module.active_isa() in PATHS
