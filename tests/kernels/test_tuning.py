"""The measured choice of a backend: operators made up here, whose speed and failures are known."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from dfqvit import cli
from dfqvit.kernels import dispatch, extension, tuning, use_backend
from dfqvit.kernels.dispatch import Backend, Operator, anything
from dfqvit.kernels.tuning import TuningWarning

_numbers = itertools.count()
_now = [0.0]  # of a clock that only the backends made up here move: a busy machine ranks them otherwise


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, a process that remembers nothing, and no restriction of backends to devices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DFQVIT_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_entries", None)
    monkeypatch.setattr(tuning, "_warned", set())
    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: _now[0]))
    monkeypatch.setattr(dispatch, "_serves", lambda backend, tensor: True)
    monkeypatch.setattr(dispatch, "_OPERATORS", dict(dispatch._OPERATORS))
    monkeypatch.setattr(dispatch, "_asked", {})
    return tmp_path / "dfqvit" / "tuning.json"


class Fake:
    """An operator that returns 2 x; each backend takes `seconds` and counts its calls. Negative seconds: it fails."""

    def __init__(self, tune=lambda x: f"rows {tuning.bucket(len(x))}", supports=anything, **seconds):
        self.calls = dict.fromkeys(seconds, 0)
        backends = [Backend(name, self.backend(name, value), supports) for name, value in seconds.items()]
        self.operator = Operator(
            f"fake_{next(_numbers)}(Tensor x) -> Tensor", fake=torch.empty_like, backends=backends, tune=tune
        )

    def backend(self, name, seconds):
        def run(x):
            self.calls[name] += 1
            if seconds < 0:
                raise RuntimeError(f"{name} is broken")
            _now[0] += seconds
            return 2 * x

        return run

    def chosen(self, x=None):
        """The backend of one more call, or None if more than one ran: it measured."""
        before = dict(self.calls)
        x = torch.ones(3) if x is None else x
        assert torch.equal(self.operator(x), 2 * x)
        ran = [name for name in self.calls if self.calls[name] > before[name]]
        return ran[0] if len(ran) == 1 else None


def fresh_process(monkeypatch):
    monkeypatch.setattr(tuning, "_entries", None)


def test_the_fastest_is_measured_once_and_remembered(cache, monkeypatch):
    fake = Fake(cuda=0.004, triton=0.001, cpu=0.002, reference=0)
    assert fake.chosen() is None
    assert fake.calls["reference"] == 0  # a fallback, never a candidate
    assert [fake.chosen() for _ in range(3)] == ["triton"] * 3
    fresh_process(monkeypatch)
    assert fake.chosen() == "triton"
    (key, entry), *more = json.loads(cache.read_text())["choices"].items()
    assert not more
    assert key.startswith(f"{fake.operator.name} | rows 4 | {extension.cpu_name()}")
    assert entry["backend"] == "triton"
    assert entry["microseconds"] == pytest.approx({"cuda": 4000, "triton": 1000, "cpu": 2000})


def test_each_bucket_of_shapes_has_its_own_choice():
    fake = Fake(cuda=0, cpu=0)
    assert fake.chosen(torch.ones(5)) is None
    assert fake.chosen(torch.ones(8)) is not None
    assert fake.chosen(torch.ones(9)) is None
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [1, 1, 2, 4, 4, 8, 1024, 2048]


def test_threads_are_part_of_the_key(monkeypatch):
    fake = Fake(cuda=0, cpu=0)
    assert fake.chosen() is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert fake.chosen() is None


def test_a_small_advantage_leaves_the_order_alone(monkeypatch):
    times = {"cuda": 1.02, "triton": 1.0}
    monkeypatch.setattr(tuning, "_seconds", lambda run, args, number: times[run(*args)])
    runs = {name: lambda x, name=name: name for name in times}
    assert tuning.fastest("a", "k", runs, (torch.ones(1),)) == "cuda"
    times["cuda"] = 1.04
    assert tuning.fastest("b", "k", runs, (torch.ones(1),)) == "triton"


@pytest.mark.parametrize("backends", [{"cpu": 0.001, "reference": 0}, {"reference": 0}])
def test_without_a_second_candidate_nothing_is_measured(cache, backends):
    fake = Fake(**backends)
    assert fake.chosen() == next(iter(backends))
    assert sum(fake.calls.values()) == 1
    assert not cache.exists()


def test_only_operators_that_opted_in_are_measured(cache):
    fake = Fake(tune=None, cuda=0.002, cpu=0)
    assert fake.chosen() == "cuda"
    assert not cache.exists()


def test_other_candidates_than_those_measured(cache, monkeypatch):
    """What was measured without a backend says nothing about it."""
    fake = Fake(cuda=0.002, triton=0.001, cpu=0)
    monkeypatch.delitem(fake.operator.backends, "cpu")
    assert fake.chosen() is None
    assert fake.chosen() == "triton"
    monkeypatch.setitem(fake.operator.backends, "cpu", Backend("cpu", fake.backend("cpu", 0), anything))
    assert fake.chosen() is None
    assert fake.chosen() == "cpu"


def test_a_backend_asked_for_by_name_wins(cache):
    fake = Fake(cuda=0.002, cpu=0)
    with use_backend("cuda"):
        assert fake.chosen() == "cuda"
    assert not cache.exists()


def test_dfqvit_tuning_0_turns_it_off(cache, monkeypatch):
    fake = Fake(cuda=0.002, cpu=0)
    assert fake.chosen() is None
    assert fake.chosen() == "cpu"
    monkeypatch.setenv("DFQVIT_TUNING", "0")
    assert fake.chosen() == "cuda"
    cache.unlink()
    monkeypatch.setenv("DFQVIT_TUNING", "1")
    assert fake.chosen() == "cpu"


# ---- where measuring would do harm


def test_not_where_autograd_would_record_it(cache):
    fake = Fake(cuda=0.002, cpu=0)
    x = torch.ones(3, requires_grad=True)
    assert fake.operator.resolve(x).name == "cuda"
    assert not cache.exists()
    with torch.no_grad():
        assert fake.operator.resolve(x).name == "cpu"
    assert fake.operator.resolve(x).name == "cpu"  # what is known already may be used


def test_not_during_compilation_nor_on_tensors_that_only_pretend(cache, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = Fake(cuda=0.002, cpu=0)
    with FakeTensorMode():
        assert fake.operator.resolve(torch.ones(3)).name == "cuda"
    assert fake.operator.resolve(torch.ones(3, device="meta")).name == "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert fake.operator.resolve(torch.ones(3)).name == "cuda"
    assert sum(fake.calls.values()) == 0
    assert not cache.exists()


def test_a_compiled_function_measures_when_it_runs_not_when_it_is_traced():
    fake = Fake(cuda=0.002, cpu=0)
    compiled = torch.compile(lambda x: fake.operator(x) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    assert fake.chosen() == "cpu"


@pytest.mark.gpu
def test_not_while_a_cuda_graph_is_captured(cache):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    x, runs = torch.ones(3, device="cuda"), {"cuda": torch.neg, "triton": torch.abs}
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert tuning.fastest("a", "k", runs, (x,)) == "cuda"
    assert not cache.exists()
    chosen = tuning.fastest("a", "k", runs, (x,))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert tuning.fastest("a", "k", runs, (x,)) == chosen
    assert torch.cuda.get_device_name() in cache.read_text()


def test_operators_that_write_to_their_arguments_cannot_opt_in():
    with pytest.raises(ValueError, match="tune was given for writes, which writes to its arguments"):
        Operator("writes(Tensor(a!) x) -> ()", fake=lambda x: None, backends=[], tune=str)


# ---- failures


def test_a_backend_that_fails_is_passed_over_with_a_warning_and_tried_again_later(cache, monkeypatch):
    fake = Fake(cuda=-1, triton=0.001, cpu=0)
    with pytest.warns(TuningWarning, match="backend 'cuda' failed while it was measured, .*: cuda is broken"):
        fake.operator(torch.ones(3))
    assert fake.chosen() == "cpu"
    assert not cache.exists()
    fresh_process(monkeypatch)
    assert fake.chosen() is None


def test_bad_arguments_raise_the_operators_own_error(cache):
    fake = Fake(cuda=-1, cpu=-1)
    with pytest.raises(RuntimeError, match="cuda is broken"):
        fake.operator(torch.ones(3))
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 1, "choices": []}',
        '{"format": 1, "choices": {"k": {"backend": "cpu", "microseconds": {}}}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_ignored_with_one_warning_and_written_anew(cache, monkeypatch, damage):
    cache.parent.mkdir()
    cache.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    fake = Fake(cuda=0.002, cpu=0)
    with pytest.warns(TuningWarning, match=r"tuning\.json' is ignored and will be written anew") as caught:
        assert fake.chosen() is None
    assert len(caught) == 1
    fresh_process(monkeypatch)
    assert fake.chosen() == "cpu"


def test_a_file_of_another_format_is_replaced_silently(cache):
    cache.parent.mkdir()
    cache.write_text('{"format": 0, "choices": "of long ago"}')
    fake = Fake(cuda=0.002, cpu=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fake.chosen() is None
    assert json.loads(cache.read_text())["format"] == 1


def test_a_folder_that_cannot_be_written(cache):
    cache.parent.write_text("a file where the folder should be")
    fake = Fake(cuda=0.002, cpu=0)
    with warnings.catch_warnings(record=True) as caught:
        assert fake.chosen() is None
    assert [str(w.message).partition("tuning.json' ")[2].partition(":")[0] for w in caught] == [
        "is ignored and will be written anew",
        "could not be written",
    ]
    assert fake.chosen() == "cpu"  # in this process it is remembered all the same


def _write_many(name):
    for number in range(40):
        tuning._remember(f"{name} {number}", {"backend": "cpu", "microseconds": {"cpu": 1.0}})


def test_processes_that_write_at_once_never_leave_half_a_file(cache):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        result = pool.map_async(_write_many, ["a", "b", "c"])
        while not result.ready():
            if cache.exists():
                assert json.loads(cache.read_text())["format"] == 1
        result.get()
    found = json.loads(cache.read_text())["choices"]
    assert sum(f"{name} 39" in found for name in "abc") >= 1
    assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]


def test_the_cache_folder(monkeypatch, tmp_path):
    assert tuning.cache_file() == tmp_path / "dfqvit" / "tuning.json"
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(sys, "platform", "linux")
    assert str(tuning.cache_file()) == "/home/someone/.cache/dfqvit/tuning.json"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert str(tuning.cache_file()) == "/home/someone/Library/Caches/dfqvit/tuning.json"


# ---- dfqvit info --tuning


def test_info_prints_the_choices(capsys, monkeypatch, cache):
    assert cli.run(["info", "--tuning"]) == 0
    assert capsys.readouterr().out == f"measured choices of backends: {cache}\n  none yet\n"
    fake = Fake(cuda=0.002, cpu=0)
    fake.chosen()
    assert cli.run(["info", "--tuning"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"  {fake.operator.name} | rows 4 | ")
    assert ": cpu (cpu" in line or ": cpu (cuda" in line
    monkeypatch.setenv("DFQVIT_TUNING", "0")
    assert cli.run(["info", "--tuning", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["file"] == str(cache)
    assert record["enabled"] is False
    assert [entry["backend"] for entry in record["choices"].values()] == ["cpu"]
    assert cli.run(["info", "--tuning", "model.safetensors"]) == 2
    assert "--tuning was given with a FILE" in capsys.readouterr().err


def test_importing_the_operators_reads_no_cache_file(tmp_path):
    code = "import dfqvit.kernels.tuning as t; print(t._entries)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "None\n"
