"""The wheel without compiled code: everything that users need is in it, and the method runs on the reference backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]  # of the developer's tree
import dfqvit, torch
from dfqvit import kernels
from dfqvit.models import load_model
assert dfqvit.__file__.startswith({place!r}), dfqvit.__file__
assert kernels.extension.load()[0] is None
model = load_model("demo")
qmodel = dfqvit.quantize(model, 4, samples=2, iters=2)
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
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(place), str(wheel))
    environment["PYTHONPATH"] = str(place)
    assert run(sys.executable, "-c", PROGRAM.format(place=str(place))).strip() == "whole"
    assert "quantize" in run(sys.executable, "-m", "dfqvit", "--help")
