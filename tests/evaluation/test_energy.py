"""Energy counters on made-up powercap trees and a made-up NVML; costs of runs; `dfqvit benchmark`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import types

import pytest
import torch
from torch import nn

from dfqvit.evaluation.energy import Cost, Energy, Nvml, Rapl, Unavailable
from dfqvit.evaluation.neighbours import neighbours
from dfqvit.evaluation.speed import calibration_cost, fine_tuning_cost, race
from dfqvit.models import load_model

from ..conftest import small_vit


def zone(root, name, kind, energy, top=1000):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", kind), ("energy_uj", energy), ("max_energy_range_uj", top)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def test_rapl_adds_up_packages_only(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000, 10**9)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 0, 10**9)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    psys = zone(tmp_path, "intel-rapl:2", "psys", 0)
    rapl = Rapl(tmp_path)
    for file, value in ((first, 7_000_000), (second, 500_000), (core, 900), (psys, 900)):
        file.write_text(str(value))
    assert rapl.joules() == pytest.approx(2.5)


def test_rapl_counter_starts_again(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 900, 1000)
    rapl = Rapl(tmp_path)
    file.write_text("100")
    assert rapl.joules() == pytest.approx(200e-6)
    file.write_text("150")
    assert rapl.joules() == pytest.approx(250e-6)


def test_why_energy_is_not_counted(tmp_path):
    assert "no packages under" in Energy(root=tmp_path / "none").note
    zone(tmp_path, "intel-rapl:0", "package-0", "word")
    energy = Energy(root=tmp_path)
    assert energy.note.startswith("energy not counted: RAPL: ")
    assert "cannot be read" in energy.note
    assert "\n" not in energy.note
    with energy.account() as cost:
        time.sleep(0.02)
    assert cost.seconds >= 0.02
    assert cost.total is None


def test_unreadable_counter_says_root_only(tmp_path, monkeypatch):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("dfqvit.evaluation.energy._text", lambda path: "package-0")
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(Unavailable, match=r"energy_uj may be read by root only"):
        Rapl(tmp_path)


def test_account_gives_the_difference(tmp_path):
    file = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000, 10**9)
    energy = Energy(root=tmp_path)
    file.write_text("2000000")  # before the block: not its own
    with energy.account() as cost:
        file.write_text("5000000")
    assert energy.note == ""
    assert cost.joules == {"cpu": pytest.approx(3.0)}
    assert cost.total == pytest.approx(3.0)


def test_nvml_counts_the_right_board(monkeypatch):
    millijoules = iter([0, 4000, 9500])
    asked = []
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="12-34"))
    nvml = Nvml(torch.device("cuda", 1))
    assert asked == ["GPU-12-34"]
    assert (nvml.joules(), nvml.joules()) == (4.0, 9.5)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Unavailable, match="nvidia-ml-py is not installed"):
        Nvml(torch.device("cuda"))


def test_costs_add_and_scale():
    total = Cost(1.0, {"cpu": 2.0}) + Cost(2.0, {"cpu": 3.0, "gpu": 1.0}).times(2)
    assert total == Cost(5.0, {"cpu": 8.0, "gpu": 2.0})
    assert total.total == 10.0


def test_race_ranks_and_counts(tmp_path, monkeypatch):
    """By a clock that only the models move: a busy machine ranks them otherwise."""
    file, now = zone(tmp_path, "intel-rapl:0", "package-0", 0, 10**12), [0.0]
    monkeypatch.setattr("dfqvit.evaluation.speed.time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    class Timed(nn.Module):
        def __init__(self, seconds, microjoules):
            super().__init__()
            self.seconds, self.microjoules = seconds, microjoules

        def forward(self, x):
            now[0] += self.seconds
            file.write_text(str(int(file.read_text()) + self.microjoules))
            return x

    models = {"slow": Timed(0.02, 0), "fast": Timed(0.005, 6_000_000)}
    slow, fast = race(models, [3], (1, 2, 2), Energy(root=tmp_path), rounds=3, seconds=0.04)
    assert (slow.model, fast.model, slow.batch) == ("slow", "fast", 3)
    assert [slow.p50_ms, slow.p90_ms, slow.p99_ms] == pytest.approx([20, 20, 20])
    assert slow.images_per_second == pytest.approx(150)
    assert slow.times_first == 1.0
    assert fast.times_first == pytest.approx(4)
    assert fast.times_first_range == pytest.approx((4, 4))
    assert slow.joules_per_image == 0.0
    assert fast.joules_per_image == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["demo", "demo-swin"])
def test_calibration_and_fine_tuning_leave_the_model_alone(name, tmp_path, monkeypatch):
    model = load_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    energy = Energy(root=tmp_path / "none")
    costs = calibration_cost(model, energy, w_bits=4, samples=2, iters=50, measured=2)
    assert set(costs) == {"synthesis", "calibration"}
    assert costs["calibration"].seconds > 0
    images = torch.randn(2, 1, 28, 28)
    now, step = [0.0], torch.optim.AdamW.step
    monkeypatch.setattr("dfqvit.evaluation.energy.time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def timed(self, *args):
        now[0] += 0.25
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", timed)
    short, long = (fine_tuning_cost(model, images, energy, w_bits=4, steps=n, measured=2).seconds for n in (2, 200))
    assert (short, long) == (0.5, 50)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([9, 3, 7], 3 + 99 * 1), ([9, 8, 7], 8 + 99 * 7 / 5), ([9, 7, 7], 7 + 99 * 7 / 5)],
)
def test_a_disturbance_makes_no_step_of_less_than_nothing(monkeypatch, tmp_path, seconds, expected):
    """Found here: where the run of one step was held up for longer than four more steps take, 100 steps took -17 seconds."""
    now, runs = [0.0], iter(seconds)
    monkeypatch.setattr("dfqvit.evaluation.energy.time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def made(*_, **__):
        now[0] += next(runs)

    monkeypatch.setattr("dfqvit.evaluation.speed.synthesize", made)
    monkeypatch.setattr("dfqvit.evaluation.speed.quantize", lambda *_, **__: None)
    energy = Energy(root=tmp_path / "none")
    found = calibration_cost(load_model("demo"), energy, w_bits=4, samples=2, iters=100, measured=4)["synthesis"]
    assert found.seconds == pytest.approx(expected)


def test_fine_tuning_moves_every_weight(seed, monkeypatch):
    """What is timed is real work: the optimizer sees a gradient for every parameter, through the rounded weights."""
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args):
        seen.append([p.grad is not None and bool(p.grad.any()) for group in self.param_groups for p in group["params"]])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    model = small_vit()
    fine_tuning_cost(model, torch.randn(4, 3, 32, 32), Energy(), w_bits=4, steps=1, measured=1)
    assert len(seen) == 2
    assert sum(seen[1]) >= 0.9 * len(seen[1])


def test_benchmark_of_a_model_and_of_its_file(run, tmp_path):
    short = ["--rounds", 1, "--json"]
    status, out, _ = run("benchmark", "demo", "--w-bits", 4, "--batch", "1,3", *short)
    record = json.loads(out)
    assert status == 0
    assert [(s["model"], s["batch"]) for s in record["speeds"]] == [
        ("float32", 1),
        ("W4/A8", 1),
        ("float32", 3),
        ("W4/A8", 3),
    ]
    assert run("quantize", "demo", "--calib", "noise", "--w-bits", 8, "--out", tmp_path / "q")[0] == 0
    options = ["--energy", "--samples", 2, "--iters", 3]
    status, out, err = run("benchmark", tmp_path / "q" / "model.safetensors", "--batch", 2, *options, *short)
    record = json.loads(out)
    assert status == 0, err
    assert record["speeds"][1]["model"] == "W8/A8"
    assert set(record["costs"]) == {"synthesis", "calibration", "fine-tuning"}
    assert "energy_note" in record


def test_benchmark_says_why_there_is_no_energy(run, monkeypatch, tmp_path):
    monkeypatch.setattr("dfqvit.cli.benchmark.Energy", lambda device: Energy(device, tmp_path / "none"))
    options = ["--energy", "--samples", 2, "--iters", 2, "--rounds", 1, "--batch", 1]
    status, out, _ = run("benchmark", "demo-swin", *options)
    assert status == 0
    assert out.count("energy not counted: RAPL: no packages under") == 1
    assert "joules" not in out


def test_benchmark_beside_busy_processes(run, monkeypatch):
    """They run while the models do, and no longer: also when the command is cut off."""
    started = []

    @contextlib.contextmanager
    def watched(count):
        with neighbours(count) as processes:
            started.extend(processes)
            yield processes

    monkeypatch.setattr("dfqvit.cli.benchmark.neighbours", watched)
    options = ["--rounds", 1, "--batch", 1, "--neighbours", 2]
    status, out, _ = run("benchmark", "demo", *options, "--json")
    assert status == 0
    assert json.loads(out)["neighbours"] == 2
    assert "Beside 2 other busy processes." in run("benchmark", "demo", *options)[1]
    assert len(started) == 4

    def cut(*_, **__):
        assert [process.poll() for process in started[4:]] == [None] * 2
        raise KeyboardInterrupt

    monkeypatch.setattr("dfqvit.cli.benchmark.race", cut)
    assert run("benchmark", "demo", *options)[0] != 0
    assert len(started) == 6
    assert None not in [process.returncode for process in started]


@pytest.mark.parametrize("batch", ["0", "1,x", ""])
def test_benchmark_refuses_bad_batches(run, batch):
    status, _, err = run("benchmark", "demo", "--batch", batch)
    assert status == 2
    assert ("--batch was" if batch else "the argument after '--batch' was empty") in err
