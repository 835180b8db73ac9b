"""Progress: every stage of a quantization is told from its beginning to its end, in Python and on the command line."""

from __future__ import annotations

import contextlib
import math
import threading

import pytest
import torch

import dfqvit
from dfqvit import cli
from dfqvit.models import Preprocessing, load_model
from dfqvit.progress import Bars, Progress, Stage, showing, tracked


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


def stages(told):
    """{stage: (steps as they were told, totals)} in order."""
    found = {}
    for each in told:
        steps, totals = found.setdefault(each.stage, ([], set()))
        steps.append(each.step)
        totals.add(each.total)
    return found


def test_every_stage_of_a_quantization_is_told_and_ends(model):
    told: list[Progress] = []
    dfqvit.quantize(model, samples=4, iters=3, acm="sequential", acm_blocks=[0, 3], progress=False, report=told.append)
    found = stages(told)
    assert list(found) == [
        "synthesis",
        "weigh errors",
        "scale channels",
        "calibrate",
        "round weights",
        "correct blocks",
    ]
    for name, (steps, totals) in found.items():
        (total,) = totals
        first = 1 if name == "synthesis" else 0
        assert steps == list(range(first, total + 1)), name
    assert found["synthesis"][1] == {3}
    layers = sum(
        hasattr(module, "weight_packed") for module in dfqvit.quantize(model, calib="noise", progress=False).modules()
    )
    assert found["round weights"][1] == {layers}
    assert found["correct blocks"][1] == {2}
    for each in told:
        assert math.isnan(each.entropy) == (each.stage != "synthesis")


@pytest.mark.parametrize(
    ("options", "stage", "total"),
    [({"reconstruct": 1}, "reconstruct blocks", 4), ({"size_budget": 0.3}, "choose bits", 18)],
)
def test_optional_stages(model, options, stage, total):
    told: list[Progress] = []
    dfqvit.quantize(model, calib="noise", samples=4, rounding="nearest", progress=False, report=told.append, **options)
    steps, totals = stages(told)[stage]
    assert (steps, totals) == (list(range(total + 1)), {total})


def test_bars_are_the_default_in_python_and_can_be_left_out(model, capsys):
    x = Preprocessing.of(model).normalise(torch.rand(4, 1, 28, 28))
    shown = dfqvit.quantize(model, calib=x)
    err = capsys.readouterr().err
    for stage in ("scale channels", "calibrate", "round weights"):
        assert f"{stage}: 100%" in err
    silent = dfqvit.quantize(model, calib=x, progress=False)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(shown(x), silent(x))


def test_the_command_line_shows_the_stages_and_prints_one_object(tmp_path, capsys):
    arguments = ["quantize", "demo", "--samples", "2", "--iters", "2", "--out", str(tmp_path), "--json"]
    assert cli.run(arguments) == 0
    captured = capsys.readouterr()
    for stage in ("synthesis", "scale channels", "calibrate", "round weights", "report"):
        assert f"{stage}: 100%" in captured.err
    assert captured.out.count("\n") == 1


def test_work_that_fails_leaves_nobody_listening():
    told: list[Progress] = []
    with contextlib.suppress(ZeroDivisionError), showing(False, told.append):
        Stage("a", 2).step()
        raise ZeroDivisionError
    Stage("b", 2).step()
    assert [(each.stage, each.step) for each in told] == [("a", 0), ("a", 1)]


def test_an_outer_listener_hears_what_is_inside_and_other_threads_do_not_interfere():
    outer: list[Progress] = []
    inner: list[Progress] = []
    with showing(False, outer.append), showing(True, inner.append):  # no bars: somebody listens already
        thread = threading.Thread(target=lambda: Stage("elsewhere", 1).step())
        thread.start()
        thread.join()
        assert list(tracked(["x", "y"], "letters")) == ["x", "y"]
    assert outer == inner
    assert [each.step for each in outer] == [0, 1, 2]
    assert {each.stage for each in outer} == {"letters"}


def test_a_stage_without_steps_is_not_shown(capsys):
    with showing():
        assert list(tracked([], "nothing")) == []
    assert capsys.readouterr().err == ""


def test_bars_follow_steps_that_are_told_late(capsys):
    """As on a GPU, where every tenth step is."""
    bars = Bars()
    for step in (10, 20, 25):
        bars(Progress(step, 1.0, 2.0, 3.0, 0.5, "synthesis", 25))
    err = capsys.readouterr().err
    assert "25/25" in err
    assert "entropy=1.000" in err
    assert bars.bar is None


def test_a_bar_of_a_resumed_run_counts_only_the_steps_it_saw():
    bars = Bars()
    bars(Progress(201, 1.0, 2.0, 3.0, 0.5, "synthesis", 250))
    bars(Progress(202, 1.0, 2.0, 3.0, 0.5, "synthesis", 250))
    assert (bars.bar.n, bars.bar.initial) == (202, 201)  # its time left goes by the difference
    bars.close()


def test_a_snapshot_that_is_there_or_not_is_said(tmp_path, capsys):
    arguments = ["synthesize", "demo", "--samples", "2", "--iters", "2", "--out", str(tmp_path)]
    assert cli.run([*arguments, "--resume"]) == 0
    assert f"warning: --resume found no snapshot in '{tmp_path}'" in capsys.readouterr().err
    (tmp_path / "synthesis.snapshot.safetensors").write_bytes(b"of an interrupted run")
    assert cli.run([*arguments, "--force"]) == 0
    assert f"warning: '{tmp_path}' holds the snapshot of an interrupted synthesis" in capsys.readouterr().err
    assert not (tmp_path / "synthesis.snapshot.safetensors").exists()  # it would be of no use any more
    assert cli.run([*arguments, "--force"]) == 0
    assert "warning" not in capsys.readouterr().err
