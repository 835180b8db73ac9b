"""Several gloo processes: the same samples, the same file, the same accuracy as one; and a lost process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest

from dfqvit import demo, distributed, errors
from dfqvit.cli.process import Ended
from dfqvit.errors import UsageError
from dfqvit.models import Preprocessing, load_model
from dfqvit.synthesis import Synthesis, SynthesisConfig

from ..conftest import said, threads

QUICK = ["--samples", "4", "--batch-size", "1", "--rounding", "nearest", "--seed", "3"]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# The program once for each of the commands, in one group, which can be joined once.
# Every process writes its exit statuses.
SEVERAL = """
import json, os, pathlib, sys
from dfqvit import cli, distributed
place, commands = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
stop, distributed.stop = distributed.stop, lambda: None
(place / os.environ["RANK"]).write_text(json.dumps([cli.run(command) for command in commands]))
stop()
"""

# The second process is killed before its sixth step.
LOSING = """
import os, signal, sys
from dfqvit import cli
from dfqvit.synthesis.step import Step
step = Step.__call__
def stepping(self):
    if os.environ["RANK"] == "1" and self.taken == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)
Step.__call__ = stepping
cli.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes have: the sums of several threads differ in their last bits."""
    with threads(1):
        yield


def test_three_processes_give_the_file_and_the_accuracy_of_one(run, tmp_path):
    """Of four parts one process makes two. And more processes than parts are refused, by the first alone."""
    with np.load(demo.TEST_IMAGES) as file:
        np.savez(tmp_path / "test.npz", images=file["images"][:101], labels=file["labels"][:101])
    quantize = ["quantize", "demo", *QUICK, "--iters", "4", "--acm", "sequential", "--json", "--out"]
    evaluate = ["evaluate", str(tmp_path / "1" / "model.safetensors"), "--data", str(tmp_path / "test.npz")]
    evaluate += ["--against", "demo", "--json"]
    refused = ["quantize", "demo", "--samples", "6", "--iters", "2", "--out", str(tmp_path / "refused")]
    status, stdout, err = run(*quantize, tmp_path / "1")
    assert status == 0, err
    assert json.loads(stdout)["out"] == str(tmp_path / "1" / "model.safetensors")
    one = json.loads(run(*evaluate)[1])

    (tmp_path / "several.py").write_text(SEVERAL)
    (tmp_path / "statuses").mkdir()
    commands = [refused, [*quantize, str(tmp_path / "3")], evaluate]
    group = [*LAUNCHER, "--nproc-per-node", "3", tmp_path / "several.py", tmp_path / "statuses", json.dumps(commands)]
    done = subprocess.run(group, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / "statuses" / str(rank)).read_text()) for rank in range(3)] == [[2, 0, 0]] * 3
    (line,) = said(done.stderr)
    assert "batch_size was 32" in line
    assert "at most 2" in line
    made, three = map(json.loads, done.stdout.splitlines())  # one object of each: only the first prints
    assert made["out"] == str(tmp_path / "3" / "model.safetensors")
    files = [(tmp_path / processes / "model.safetensors").read_bytes() for processes in ("1", "3")]
    assert files[0] == files[1]
    assert one["images"] == three["images"] == 101
    for key in ("top1", "top5", "agreement", "against_top1"):
        assert one[key] == three[key]
    assert one["logit_error"] == pytest.approx(three["logit_error"], rel=1e-5)


def test_a_lost_process_ends_the_run_in_a_line_and_it_can_be_resumed(run, tmp_path):
    arguments = ["quantize", "demo", *QUICK, "--iters", "40", "--out"]
    (tmp_path / "losing.py").write_text(LOSING)
    command = [*LAUNCHER, "--nproc-per-node", "2", tmp_path / "losing.py", *arguments, tmp_path / "a"]
    group = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert group.returncode != 0
    assert "dfqvit: a process of this run was lost; the same command with --resume" in group.stderr
    assert os.listdir(tmp_path / "a") == ["synthesis.snapshot.safetensors"]
    for folder, extra in (("a", ["--resume"]), ("b", [])):
        assert run(*arguments, tmp_path / folder, *extra)[0] == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two


def test_a_process_is_lost_once(monkeypatch):
    """torchrun's SIGTERM comes after gloo's error, while what that error ended is cleaned up."""

    def lost(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed, "_lost", False)
    with pytest.raises(distributed.LostProcess, match="a process of this run was lost"):
        distributed._call(lost)
    distributed._terminated(signal.SIGTERM, None)
    monkeypatch.setattr(distributed, "_lost", False)
    monkeypatch.setattr(errors, "_raised", None)
    with pytest.raises(distributed.LostProcess):
        distributed._terminated(signal.SIGTERM, None)
    distributed._terminated(signal.SIGTERM, None)


def test_torchruns_signal_after_ctrl_c_says_nothing_new(monkeypatch):
    monkeypatch.setattr(distributed, "_lost", False)
    raised = errors.interruption(Ended(signal.SIGINT))
    distributed._terminated(signal.SIGTERM, None)
    del raised
    with pytest.raises(distributed.LostProcess):
        distributed._terminated(signal.SIGTERM, None)


@pytest.fixture
def joined(monkeypatch):
    """`distributed.start` as one of two processes, without the other; with the signals that a shell's processes have."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "_lost", False)
    monkeypatch.setattr(errors, "_raised", None)
    monkeypatch.setattr(distributed, "_waiting", None)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda _: None)
    monkeypatch.setattr(distributed.dist, "new_group", lambda backend, timeout: (backend, timeout))
    yield distributed.start
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_torchrun_ends_a_process_by_is_cleaned_up_after(joined, name):
    """Found here: SIGHUP, of a terminal that was closed, ended the process without a snapshot."""
    joined()
    assert callable(signal.getsignal(getattr(signal, name)))
    with pytest.raises(distributed.LostProcess):
        signal.raise_signal(getattr(signal, name))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup's
    joined()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_others_wait_however_long_the_first_calibrates(joined, monkeypatch):
    """Found here: for half an hour, gloo's own patience. Then all was lost that the first had at work."""
    waited = []
    joined()
    monkeypatch.setattr(distributed.dist, "barrier", waited.append)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    distributed.wait_for_all()
    ((backend, patience),) = waited
    assert backend == "gloo"
    assert patience >= timedelta(days=1)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_batch_size_that_is_named_is_the_greatest_that_does(monkeypatch, world):
    model, preprocessing = load_model("demo"), Preprocessing.of(load_model("demo"))
    monkeypatch.setattr("dfqvit.distributed.world", lambda: world)

    def refused(samples, batch_size):
        try:
            Synthesis(model, SynthesisConfig(samples=samples, batch_size=batch_size, iters=1), preprocessing)
        except UsageError as error:
            return str(error)
        return ""

    for samples in range(1, 12):
        if samples < world:
            assert refused(samples, 1) == f"samples was {samples}; for {world} processes it must be at least {world}"
            continue
        named = int(refused(samples, 32).rsplit("at most ", 1)[1])
        assert not refused(samples, named)
        assert refused(samples, named + 1)
