"""Random command lines: whatever the options are, one line for an error, no exception, and no result is replaced.

All is real up to where the long work of a command begins; there a test's own error stands in for the work.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dfqvit import cli, demo
from dfqvit.cli.runs import read_config
from dfqvit.errors import DfqvitError, UsageError

WORK = {  # command -> where its long work begins, in its module
    "quantize": ["_calibration"],
    "synthesize": ["run_synthesis"],
    "evaluate": ["evaluate"],
    "diagnose": ["diagnose", "gradient_norms"],
    "export": ["export_onnx"],
    "benchmark": ["race", "quantize"],
    "ablate": ["run_study"],
    "sweep": ["run_all"],
    "card": ["write_card", "push"],
}
RESULTS = (
    "model.safetensors",
    "samples.safetensors",
    "report.html",
    "gradients.csv",
    "ablations.csv",
    "model.onnx",
    "README.md",
)
REACHED = "the work was reached"
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)  # what argv can hold
GOOD = {"model": "demo", "model_or_file": "given.safetensors", "file": "given.safetensors", "data": "test.npz"}
GOOD |= {"config": "sweep.yaml"}
PLACES = ["given.safetensors", "test.npz", "folder", "empty", "absent", "folder/absent", ""]
NUMBERS = st.lists(st.sampled_from(["0", "1", "-1", "3", "0.5", "1e400", "nan", "x", ""]), min_size=1, max_size=4)


def values(parameter: click.Parameter) -> st.SearchStrategy[str]:
    """Values for a parameter, some of them good."""
    if parameter.name in ("model", "model_or_file", "against", "gradients"):
        return st.sampled_from(["demo", "demo", "demo-swin", "resnet18", *PLACES]) | WORDS
    if parameter.name == "device":
        return st.sampled_from(["cpu", "cpu", "cuda", "cuda:9", "meta", "cpu:3"]) | WORDS
    if isinstance(parameter.type, click.Choice):
        return st.sampled_from(list(parameter.type.choices)) | WORDS
    if isinstance(parameter.type, click.types.IntParamType):
        return st.integers(-2, 40).map(str) | WORDS
    if isinstance(parameter.type, click.types.FloatParamType):
        return st.floats().map(repr) | st.floats(0, 1).map(repr) | WORDS
    return st.sampled_from(PLACES) | NUMBERS.map(",".join) | WORDS


@st.composite
def lines(draw, name):
    command = importlib.import_module(f"dfqvit.cli.{name}").command
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option) and p.name not in ("force", "out")]
    tame = draw(st.booleans())  # what must be given is good, so that what may be given is looked at

    def needed(parameter):
        return GOOD[parameter.name] if tame else draw(values(parameter))

    line = [needed(p) for p in arguments if p.required or tame or draw(st.booleans())]
    for option in options:
        line += [option.opts[0], needed(option)] if option.required else []
    for option in draw(st.lists(st.sampled_from(options), max_size=2 if tame else 4)):  # many contradict each other
        line += [option.opts[0]] if option.is_flag else [option.opts[0], draw(values(option))]
    return [*line, *place(command, name, not tame)]


def place(command, name, unasked):
    """Where a command writes, also where it need not be said if `unasked`."""
    out = next((p for p in command.params if p.name == "out"), None)
    if out is None or not (unasked or out.required):
        return []
    return [out.opts[0], "out/model.onnx" if name == "export" else "out"]


def plain(command, name):
    """A line of what must be given alone, all of it good."""
    arguments = [GOOD[p.name] for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option) and p.required and p.name != "out"]
    return [*arguments, *(word for p in options for word in (p.opts[0], GOOD[p.name])), *place(command, name, False)]


@pytest.fixture(scope="module")
def given_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    with np.load(demo.TEST_IMAGES) as file:
        np.savez(folder / "test.npz", images=file["images"][:4], labels=file["labels"][:4])
    assert cli.run(["quantize", "demo", "--calib", "noise", "--samples", "2", "--out", str(folder)]) == 0
    (folder / "model.safetensors").rename(folder / "given.safetensors")
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    (folder / "sweep.yaml").write_text("models: [demo]")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WORK)
def test_random_options(name, given_files, monkeypatch, capsys):
    module = importlib.import_module(f"dfqvit.cli.{name}")
    reached = []

    def work(*_, **__):
        reached.append(True)
        raise DfqvitError(REACHED)

    for place in WORK[name]:
        monkeypatch.setattr(module, place, work)
    monkeypatch.chdir(given_files)
    out = Path("out")

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(lines(name), st.booleans())
    @example(plain(module.command, name), False)  # of those drawn here 7 of 60 are good enough, and by chance none
    def check(line, existing):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for file in RESULTS if existing else ():
            (out / file).write_text("kept")
        before = contents(Path())
        capsys.readouterr()
        status = cli.run([name, *line])
        stdout, err = capsys.readouterr()
        said = [text for text in err.splitlines() if text.startswith("dfqvit: ") and "warning" not in text]
        if stdout.startswith("Usage: "):  # one of the words was --help
            return
        assert status in (1, 2), (status, stdout)  # 0 needs the work
        assert len(said) == 1, err
        assert "Traceback" not in err
        assert not said[0].startswith("dfqvit: unexpected "), err  # nobody foresaw it
        after = contents(Path())
        assert {path: after.get(path) for path in before} == before

    check()
    assert reached, "the plain line did not reach the work"


OPTIONS = st.sampled_from(["w-bits", "iters", "acm-shrink", "out", "data", "workers", "model", "frog"])
SCALARS = st.sampled_from(["demo", "4", "e2h"]) | st.integers(-2, 9) | st.floats() | st.booleans() | st.none() | WORDS
ENTRIES = st.dictionaries(OPTIONS | WORDS, SCALARS | st.lists(SCALARS, max_size=3), max_size=3)
MODELS = st.just(["demo"]) | st.lists(st.just("demo") | ENTRIES | SCALARS, max_size=3) | SCALARS


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.fixed_dictionaries(
        {"models": MODELS}, optional={"quantize": ENTRIES | SCALARS, "evaluate": ENTRIES | SCALARS, "models ": SCALARS}
    )
    | st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3))
)
def test_random_sweeps_are_runs_or_one_sentence(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_text(yaml.safe_dump(config))
    with contextlib.suppress(UsageError):  # any other exception fails the test
        runs = read_config(path)
        assert runs
        assert all(isinstance(run.model, str) for run in runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--acm-blocks 99", "acm_blocks was [99]; the model has blocks 0 to 3"),
        ("--acm-top 5", "acm_top was 5; the model has 4 blocks"),
        ("--acm checked --samples 1", "acm was 'checked' with 1 images"),
        ("--size-budget 0.001", "size_budget was 0.001 MB"),
        ("--w-bits 9", "w_bits was 9"),
        ("--reconstruct 1 --placement psaq", "it is for gemm"),
    ],
)
def test_quantize_refuses_before_the_synthesis(options, message, tmp_path, monkeypatch, capsys):
    """The first three were found here: they came after it, and the images were lost."""
    monkeypatch.setattr("dfqvit.cli.quantize._calibration", lambda *_: pytest.fail("the synthesis began"))
    assert cli.run(["quantize", "demo", "--out", str(tmp_path / "out"), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_classes_that_are_no_text(given_files, capsys):
    """Found here: a traceback."""
    file, folder = str(given_files / "given.safetensors"), str(given_files / "folder")
    assert cli.run(["evaluate", file, "--data", folder, "--classes", file]) == 2
    assert f"classes was '{file}'; it must be a text file in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["quantize", "synthesize", "export", "diagnose"])
def test_refuses_before_the_work(name, given_files, tmp_path, monkeypatch, capsys):
    """With every result there already, each command that writes stops before it does anything."""
    module = importlib.import_module(f"dfqvit.cli.{name}")
    for place in WORK[name]:
        monkeypatch.setattr(module, place, lambda *_, **__: pytest.fail("the work began"))
    for file in RESULTS:
        (tmp_path / file).write_text("kept")
    line = {
        "export": [str(given_files / "given.safetensors"), "--onnx", str(tmp_path / "model.onnx")],
        "diagnose": ["--gradients", "demo", "--out", str(tmp_path)],
    }.get(name, ["demo", "--out", str(tmp_path)])
    assert cli.run([name, *line]) == 2
    assert "exists already; give --force to replace it" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == sorted(RESULTS)
    assert all((tmp_path / file).read_text() == "kept" for file in RESULTS)
