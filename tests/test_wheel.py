"""The wheel without compiled code: everything that users need is in it, and the method runs on the reference backend. And the
names and the build farm of those with compiled code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from .fresh import python

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # of the developer's tree
import dfqvit, torch
from dfqvit import kernels
from dfqvit.calibration import observation
from dfqvit.models import load_model
observation.VIEWS = 32  # as in the other tests
assert dfqvit.__file__.startswith({place!r}), dfqvit.__file__
assert kernels.extension.load()[0] is None
model = load_model("demo")
qmodel = dfqvit.quantize(model, 4, samples=2, iters=2, companions=2)
path = dfqvit.save(qmodel, {place!r} + "/model.safetensors")
x = torch.randn(2, 1, 28, 28)
assert torch.equal(dfqvit.load(path)(x), qmodel(x))
print("whole")
"""


def test_wheel_without_a_compiler(tmp_path):
    source = tmp_path / "source"  # a copy, so that the build leaves nothing behind and sees no compiled module
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=ignored)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHONPATH")}
    environment |= {"DFQVIT_BUILD": "0", "PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(
        *pip,
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    )
    (wheel,) = tmp_path.glob("dfqvit-*.whl")
    place = tmp_path / "installed"
    run(*pip, "install", "-q", "--no-compile", "--no-deps", "--no-index", "--target", str(place), str(wheel))
    environment["PYTHONPATH"] = str(place)
    done = python("-c", PROGRAM.format(place=str(place)), cwd=tmp_path, env=environment)
    assert done.stdout.strip() == "whole", done.stderr
    assert "quantize" in run(sys.executable, "-m", "dfqvit", "--help")


def test_the_build_farm_is_configured_for_every_architecture():
    """Checked once against cibuildwheel's own schema; here what would make wheels that nobody can use."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    farm = project["tool"]["cibuildwheel"]
    pythons = [int(each.removeprefix("cp3").removesuffix("-*")) for each in farm["build"]]
    least = int(project["project"]["requires-python"].removeprefix(">=3."))
    assert pythons == list(range(least, least + len(pythons)))
    assert farm["build-frontend"]["args"] == ["--no-build-isolation"]  # or it would meet another torch than the pinned
    for package in ("-c constraints.txt", "torch", "setuptools", "wheel", "pybind11", "ninja"):
        assert package in farm["before-build"]
    assert farm["linux"]["archs"] == ["auto64"]
    for key in ("manylinux-x86_64-image", "manylinux-aarch64-image"):
        assert farm["linux"][key] == "manylinux_2_28"  # what torch's own wheels ask for
    assert farm["linux"]["repair-wheel-command"].split()[1] == "scripts/wheel.py"
    assert "--exclude libtorch" in farm["macos"]["repair-wheel-command"]
    for system in (farm["linux"], farm["macos"]):  # a table of a system takes the place of the common one
        assert system.get("environment", farm["environment"])["DFQVIT_CUDA"] == "0"


def test_the_workflow_runs_the_farm():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    compiled, plain = workflow["jobs"]["compiled"], workflow["jobs"]["plain"]
    assert compiled["strategy"]["matrix"]["os"] == ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-14"]
    assert compiled["runs-on"] == "${{ matrix.os }}"
    assert any(step.get("uses", "").startswith("pypa/cibuildwheel@v") for step in compiled["steps"])
    assert {"DFQVIT_BUILD": "0"} in [step.get("env") for step in plain["steps"]]
    assert set(workflow[True]) == {"workflow_dispatch", "push"}  # YAML takes the word `on` for a truth value


def named(folder, wheel):
    command = [sys.executable, str(ROOT / "scripts" / "wheel.py"), str(wheel), str(folder / "dist")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_wheel_without_compiled_files_keeps_its_name(tmp_path):
    wheel = tmp_path / "dfqvit-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("dfqvit/__init__.py", "")
    done = named(tmp_path, wheel)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'dist' / wheel.name}: 0.0 MB\n"


def test_a_wheel_that_cannot_be_named_is_an_error(tmp_path):
    wheel = tmp_path / "dfqvit-0.1.0-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"")
    done = named(tmp_path, wheel)
    assert done.returncode == 1
    assert re.search("auditwheel (was not found|gave dfqvit-0.1.0-cp311-cp311-linux_x86_64.whl no)", done.stderr)
    assert not list((tmp_path / "dist").glob("*.whl"))
