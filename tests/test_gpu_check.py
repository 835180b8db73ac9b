"""scripts/gpu_check.py: its steps exist and its time is bounded. What the steps do needs a GPU."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from .fresh import python

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Parsing(Exception):
    """Of an argument parser, in the place of which it is raised."""


@functools.cache
def options_of(path: str) -> set[str]:
    """What a benchmark's parser knows."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Parsing(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(path).parent)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsing) as raised:
            runpy.run_path(path, run_name="__main__")
    return set(raised.value.args[0]._option_string_actions)


def test_every_benchmark_is_there_and_takes_its_options(script, tmp_path):
    known = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {
        "runner",
        "accuracy",
        "accuracy_tables",
        "dense",
        "dense_tables",
        "models",
        "round_second_order",
    }
    assert {row[1] for row in script.KEY + script.REST} == known
    commands = {name: command for name, command, _ in script.steps(tmp_path)}
    for name, benchmark, *_ in script.KEY + script.REST:
        command = commands[name]
        assert Path(command[1]).stem == benchmark
        options = {word for word in command if word.startswith("--")}
        assert options <= options_of(command[1]), name


def test_what_matters_most_comes_first(script, tmp_path):
    names = [name for name, _, _ in script.steps(tmp_path)]
    assert names[:6] == ["build", "info", "deit_base", "synthesis", "patch_similarity_entropy", "tests"]
    assert len(set(names)) == len(names)  # each has its own log
    least = {name: limit for name, _, limit in script.steps(tmp_path)}
    assert sum(least[name] for name in names[:5]) < script.TOTAL


def test_the_gpu_tests_are_those_that_need_one(script, tmp_path):
    """As collected here; with a GPU those of which a parameter is "cuda" come in addition."""
    command = next(command for name, command, _ in script.steps(tmp_path) if name == "tests")
    done = subprocess.run([*command, "-q", "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {file: int(count) for file, count in re.findall(r"^(tests/\S+\.py): (\d+)$", done.stdout, re.MULTILINE)}
    assert counts.keys() >= {
        "tests/runtime/test_cuda_graph.py",
        "tests/synthesis/test_synthesis.py",
        "tests/kernels/test_quant_attention_triton.py",
        "tests/kernels/test_patch_similarity_entropy.py",
        "tests/kernels/test_quant_linear_cuda.py",
    }, done.stdout + done.stderr
    assert not counts.keys() & {"tests/synthesis/test_capture.py", "tests/kernels/test_capability.py"}
    assert sum(counts.values()) < 400


def test_the_contenders_are_known(script):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from contenders import CONTENDERS
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    assert all(not CONTENDERS[name].why_not("cuda") for name in script.CONTENDERS)
    assert CONTENDERS["dfqvit-w8a8-graph"].why_not("cpu") == "not on cpu"


def test_the_whole_is_bounded(script, tmp_path, monkeypatch, capsys):
    """By a clock that only the steps move."""
    now, given = [0.0], []

    def run(command, log, seconds, variables):
        given.append((log.name, seconds))
        log.touch()
        now[0] += min(command, seconds)
        return 0 if command <= seconds else 124

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(script, "steps", lambda out: [("a", 20, 60), ("b", 70, 60), ("c", 70, 60), ("d", 0, 60)])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--seconds", "100"])
    assert script.main() == 1
    assert given == [("a.log", 60), ("b.log", 60), ("c.log", 20)]
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["status"], row["seconds"]) for row in rows] == [(0, 20), (124, 60), (124, 20), (124, 0)]


def test_a_step_ends_when_its_time_is_over(script, tmp_path):
    def sleep(seconds):
        return [sys.executable, "-c", f"import time; time.sleep({seconds}); print('awake')"]

    assert script.run(sleep(0), tmp_path / "a.log", 600, {**os.environ}) == 0
    assert (tmp_path / "a.log").read_text() == "awake\n"
    assert script.run(sleep(600), tmp_path / "b.log", 0.1, {**os.environ}) == 124
    assert "awake" not in (tmp_path / "b.log").read_text()


@pytest.mark.parametrize("background", [False, True])
def test_a_step_out_of_time_says_what_had_failed_and_where_it_was(script, tmp_path, monkeypatch, background):
    """Interrupted before it is ended, also where a shell's background job was told to ignore that."""
    (tmp_path / "test_slow.py").write_text(
        "import time\n"
        "def test_wrong():\n    assert 1 + 1 == 3\n"
        "def test_endless():\n    print('started', flush=True)\n    time.sleep(600)\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ready = tmp_path / "ready"
    (tmp_path / "conftest.py").write_text(
        f"import pathlib\ndef pytest_runtest_call(item):\n"
        f"    if 'endless' in item.name: pathlib.Path({str(ready)!r}).touch()\n"
    )

    class Impatient(subprocess.Popen):  # out of time once the second test runs, however slow the machine
        def wait(self, timeout=None):
            if timeout == 600:
                while not ready.exists() and self.poll() is None:
                    time.sleep(0.1)
                raise subprocess.TimeoutExpired(command, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(script.subprocess, "Popen", Impatient)
    monkeypatch.setattr(script, "GRACE", 120)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    try:
        assert script.run(command, log, 600, {**script.os.environ}) == 124
    finally:
        signal.signal(signal.SIGINT, before)
    text = log.read_text()
    assert "assert (1 + 1) == 3" in text
    assert "KeyboardInterrupt" in text
    assert "test_slow.py" in text


def test_a_failure_is_printed_at_once(tmp_path):
    """The process ends without a word after it: no summary can have said it."""
    (tmp_path / "test_hard.py").write_text(
        "import os\nfrom tests.conftest import pytest_runtest_logreport\n"
        "def test_wrong():\n    assert 1 + 1 == 3\n"
        "def test_end():\n    os._exit(9)\n"
    )
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_runtest_logreport\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DFQVIT_TEST_AT_ONCE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 9
    assert "assert (1 + 1) == 3" in done.stderr


def test_inference_begins_nothing_after_its_time(tmp_path):
    done = python(ROOT / "benchmarks" / "inference.py", "--models", "demo", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert "demo: not begun, 0 s are over" in done.stderr
