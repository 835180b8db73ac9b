"""Several gloo processes: the same samples, the same file, the same accuracy as one; and a lost process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dfqvit import demo

from ..conftest import threads

QUICK = ["--samples", "4", "--batch-size", "1", "--rounding", "nearest", "--seed", "3"]


def command(processes, *arguments):
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        start += ["--nproc-per-node", str(processes), "-m"]
    return [*start, "dfqvit", *map(str, arguments)]


def run_group(processes, *arguments):
    """As `run`, in that many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(processes, *arguments), capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes have: the sums of several threads differ in their last bits."""
    with threads(1):
        yield


def test_the_file_does_not_depend_on_the_number_of_processes(run, tmp_path):
    for processes in (1, 2, 4):
        out = tmp_path / str(processes)
        arguments = ("quantize", "demo", *QUICK, "--iters", 4, "--acm", "sequential", "--out", out, "--json")
        status, stdout, err = run(*arguments) if processes == 1 else run_group(processes, *arguments)
        assert status == 0, err
        assert json.loads(stdout)["out"] == str(out / "model.safetensors")  # one object: only the first prints
    files = [(tmp_path / str(processes) / "model.safetensors").read_bytes() for processes in (1, 2, 4)]
    assert files[0] == files[1] == files[2]

    with np.load(demo.TEST_IMAGES) as file:
        np.savez(tmp_path / "test.npz", images=file["images"][:101], labels=file["labels"][:101])
    model, data = tmp_path / "1" / "model.safetensors", tmp_path / "test.npz"
    arguments = ("evaluate", model, "--data", data, "--against", "demo", "--json")
    one, two = (json.loads(found[1]) for found in (run(*arguments), run_group(2, *arguments)))
    assert one["images"] == two["images"] == 101
    for key in ("top1", "top5", "agreement", "against_top1"):
        assert one[key] == two[key]
    assert one["logit_error"] == pytest.approx(two["logit_error"], rel=1e-5)


def test_a_lost_process_ends_the_run_in_a_line_and_it_can_be_resumed(run, tmp_path):
    arguments = ("quantize", "demo", *QUICK, "--iters", "120")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    group = subprocess.Popen(
        command(2, *arguments, "--out", tmp_path / "a"), stderr=subprocess.PIPE, text=True, env=environment
    )
    seen = ""
    while "crop=" not in seen:
        seen += group.stderr.read(1)
    children = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                values = dict(pair.split(b"=", 1) for pair in file.read().split(b"\0") if b"=" in pair)
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == group.pid:
            children[values.get(b"RANK")] = int(entry)
    os.kill(children[b"1"], signal.SIGKILL)
    rest = group.communicate()[1]
    assert group.returncode != 0
    assert "dfqvit: a process of this run was lost; the same command with --resume" in rest
    deadline = time.monotonic() + 10
    while not (tmp_path / "a" / "synthesis.snapshot.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert os.listdir(tmp_path / "a") == ["synthesis.snapshot.safetensors"]
    for folder, extra in (("a", ["--resume"]), ("b", [])):
        assert run(*arguments, "--out", tmp_path / folder, *extra)[0] == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two


def test_more_processes_than_parts_are_refused(tmp_path):
    status, _, err = run_group(2, "quantize", "demo", "--samples", "4", "--iters", "2", "--out", tmp_path)
    assert status != 0
    lines = [line for line in err.splitlines() if line.startswith("dfqvit:")]
    assert len(lines) == 1
    assert "batch_size was 32" in lines[0]
    assert "at most 2" in lines[0]
