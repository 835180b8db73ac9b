"""scripts/hub_kernels.py: the kernel repository for the Hugging Face Hub is whole, and its build runs where dfqvit is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_package import ALONE

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
ROOT = Path(__file__).parent.parent
CHECKS = """
def check(ops):
    import torch
    torch.manual_seed(0)
    x, weight, acm = torch.randn(2, 5, 64), torch.randn(32, 64), torch.randn(5, 32)
    linear = {"x_scale": 0.03, "x_zero": 128.0, "w_scale": torch.full((32,), 0.3), "a_bits": 8, "w_bits": 4}
    packed = ops.pack_weight(weight, linear["w_scale"], 4)
    requantized = {"acm": acm, "out_scale": 0.1, "out_zero": 100.0, **linear}
    qkv = torch.randint(0, 256, (2, 9, 96), dtype=torch.uint8)
    scales = {"in_scale": torch.tensor([0.02, 0.03, 0.04]), "in_zero": torch.tensor([120.0, 128.0, 130.0]), "scale": 0.25}
    features = torch.randn(2, 3, 16, 8, requires_grad=True)
    def entropy():
        result = ops.patch_similarity_entropy(features)
        return torch.stack([result.mean(), *torch.autograd.grad(result.sum(), features)[0].flatten()[:9]])
    calls = {
        "quant_linear": lambda: ops.quant_linear(x, packed, **linear),
        "quant_linear to integers": lambda: ops.quant_linear(x, packed, **requantized).float(),
        "quant_attention": lambda: ops.quant_attention(qkv, 2, **scales),
        "patch_similarity_entropy": entropy,
    }
    for name, call in calls.items():
        automatic = call()
        with ops.use_backend("cpu"):
            compiled = call()
        with ops.use_backend("reference"):
            expected = call()
        assert torch.equal(automatic, compiled), name
        atol = 0.02 if name == "quant_attention" else 1e-5  # there a rounded probability may be one step apart
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=atol, msg=lambda text: f"{name}: {text}")
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("dfqvit_hub_kernels", ROOT / "scripts" / "hub_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    script.lay_out(folder)
    return folder


@pytest.fixture(scope="module")
def variant(script, tmp_path_factory):
    """The folder of a build. With -O1 it takes half as long."""
    if os.environ.get("DFQVIT_TEST_HUB_BUILD") != "1":
        pytest.skip("compiling all CPU operators once more takes minutes: set DFQVIT_TEST_HUB_BUILD=1")
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(script.SETUP, "CXX_FLAGS", ["-O1", *script.SETUP["CXX_FLAGS"][1:]])
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # of ninja
        return script.build(folder, script.lay_out(folder)["kernel.dfqvit_kernels_cpu"])


def python(code, folder, **environment):
    """Runs `code` after CHECKS in a new process, which finds torch and `environment`, and dfqvit only if that has it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    command = [sys.executable, "-W", "error::UserWarning", "-c", f"{ALONE}\n{CHECKS}\n{code}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_build_toml_names_every_source_and_they_are_there(script, repository):
    tables = tomllib.loads((repository / "build.toml").read_text())
    cpu, cuda = (tables["kernel"][f"dfqvit_kernels_{backend}"] for backend in ("cpu", "cuda"))
    assert (cpu["backend"], cuda["backend"]) == ("cpu", "cuda")
    assert set(script.SETUP["CPU_SOURCES"]) <= set(cpu["src"])
    assert {*cpu["src"], *script.SETUP["CUDA_SOURCES"]} == set(cuda["src"])
    for name in [*tables["torch"]["src"], *cuda["src"]]:
        assert (repository / name).is_file(), name
    for name in cuda["src"]:  # kernel-builder sees what is named, no more
        for header in re.findall(r'^#include "(dfqvit/.*)"', (repository / name).read_text(), re.MULTILINE):
            assert f"csrc/include/{header}" in cpu["src"], f"{name} includes {header}"
    assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", tables["general"]["name"])
    assert (repository / "torch-ext" / tables["general"]["name"].replace("-", "_") / "__init__.py").is_file()


def test_the_python_of_the_repository_imports_itself_and_torch_only(repository):
    for path in (repository / "torch-ext").rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) ([a-z_]\w*)", path.read_text(), re.MULTILINE):
            assert module in {*sys.stdlib_module_names, "torch", "triton"}, f"{path.name} imports {module}"


def test_card_and_licence(repository):
    header = (repository / "README.md").read_text().split("---\n")[1].splitlines()
    assert {"library_name: kernels", "license: apache-2.0", "- kernel"} <= set(header)
    assert (repository / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_a_folder_in_use_is_left_alone(script, tmp_path, monkeypatch):
    (tmp_path / "note").touch()
    monkeypatch.setattr(sys, "argv", ["hub_kernels.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="which is not empty"):
        script.main()


def test_the_hub_s_own_reader_takes_build_toml(repository):
    place = hub_package()
    code = f"from kernels._rust import Build; print(*Build.open({str(repository)!r}).general.backends)"
    assert python(code, repository, PYTHONPATH=place) == "cpu cuda"


@pytest.mark.slow
def test_a_build_computes_where_dfqvit_is_not(variant):
    code = f"""
import importlib, importlib.util
assert importlib.util.find_spec("dfqvit") is None
check(importlib.import_module({variant.name!r}))
"""
    python(code, variant, PYTHONPATH=str(variant.parent))


@pytest.mark.slow
@pytest.mark.parametrize("order", [("dfqvit.kernels", "build"), ("build", "dfqvit.kernels")])
def test_a_build_and_an_installed_dfqvit_do_not_meet(variant, order):
    code = f"""
import importlib, torch
both = {{name: importlib.import_module({{"build": {variant.name!r}}}.get(name, name)) for name in {order}}}
for ops in both.values():
    check(ops)
build, own = both["build"], both["dfqvit.kernels"]
x = torch.randn(3, 8)
for one, other in ((build, own), (own, build)):
    with one.use_backend("cuda"):
        other.fake_quantize(x, 0.1, quant_min=-8, quant_max=7)
        try:
            one.fake_quantize(x, 0.1, quant_min=-8, quant_max=7)
        except one.BackendError:
            continue
        raise AssertionError("a backend that cannot serve was asked for")
"""
    python(code, variant, PYTHONPATH=os.pathsep.join([str(variant.parent), str(ROOT)]))


@pytest.mark.slow
def test_the_package_of_hugging_face_loads_a_build(variant):
    place = hub_package()
    repository = variant.parent.parent
    code = f"""
from pathlib import Path
import kernels
from kernels._rust import Digest, DigestAlgorithm, Metadata
check(kernels.get_local_kernel(Path({str(repository)!r}), backend="cpu"))
folder = Path({str(variant)!r})
metadata = Metadata.read_from_file(folder / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
print(metadata.id)
"""
    assert python(code, repository, PYTHONPATH=place) == json.loads((variant / "metadata.json").read_text())["id"]


def hub_package():
    """Where the package `kernels` of Hugging Face is installed."""
    try:
        return str(importlib.metadata.distribution("kernels").locate_file(""))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package kernels of Hugging Face is not installed")
