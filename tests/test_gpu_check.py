"""scripts/gpu_check.py: its steps exist and its time is bounded. What the steps do needs a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_is_there_and_takes_its_options(script, tmp_path):
    known = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"runner", "accuracy"}
    assert set(script.BENCHMARKS) == known
    for name, command, _ in script.steps(tmp_path):
        options = {word for word in command if word.startswith("--")}
        if name in known:
            text = Path(command[1]).read_text()
            assert all(f'"{option}"' in text for option in options), name
        if name == "tests":
            assert {"test_cuda_graph.py", "test_quant_attention_triton.py"} <= {Path(word).name for word in command}


def test_the_contenders_are_known(script):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from contenders import CONTENDERS
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    assert all(not CONTENDERS[name].why_not("cuda") for name in script.CONTENDERS)
    assert CONTENDERS["dfqvit-w8a8-graph"].why_not("cpu") == "not on cpu"


def test_the_whole_is_bounded(script, tmp_path, monkeypatch, capsys):
    def sleep(seconds):
        return [sys.executable, "-c", f"import time; time.sleep({seconds}); print('awake')"]

    monkeypatch.setattr(script, "TOTAL", 3)
    monkeypatch.setattr(script, "steps", lambda out: [("a", sleep(0), 60), ("b", sleep(60), 60), ("c", sleep(0), 60)])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    started = time.perf_counter()
    assert script.main() == 1
    assert time.perf_counter() - started < 20
    assert [row["status"] for row in json.loads((tmp_path / "summary.json").read_text())] == [0, 124, 124]
    assert "awake" in (tmp_path / "a.log").read_text()
    assert not (tmp_path / "c.log").exists()


def test_inference_begins_nothing_after_its_time(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "inference.py"), "--models", "demo", "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo: not begun, 0 s are over" in done.stderr
