"""Files are the old one or the new one, whatever comes between: signals, once and twice, and full disks."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import random
import shutil
import signal
import sys

import pytest
import torch
from PIL import Image

from dfqvit import errors
from dfqvit.cli import process
from dfqvit.kernels import files
from dfqvit.models import Preprocessing, load_model
from dfqvit.storage.atomic import atomic
from dfqvit.studies.ablation import Gallery
from dfqvit.synthesis import SynthesisConfig


@pytest.fixture(params=["the usual handler", "the program's own"])
def ctrl_c(request):
    """Ctrl-C as at a terminal: a background shell's children ignore it."""
    own = request.param == "the program's own"
    before = signal.signal(signal.SIGINT, process._raise if own else signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def full_disk(size):
    """No file may become longer than `size` bytes: the system's error of a full disk but for its number."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    """Found here: one that came as the temporary file was made left that one behind."""
    path = tmp_path / "file.txt"

    def interrupted_at(line):
        """Whether the writing has that many lines; it is interrupted there."""
        seen = 0

        def trace(frame, event, _):
            nonlocal seen
            if frame.f_code.co_filename != files.__file__ and not frame.f_globals["__name__"].startswith("pathlib"):
                return None
            if event == "line":
                seen += 1
                if seen == line:
                    signal.raise_signal(signal.SIGINT)
            return trace

        monkeypatch.setattr(errors, "_raised", None)  # that of the line before may not be freed yet
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with atomic(path) as temporary, io.open(os.open(temporary, os.O_WRONLY), "w") as file:  # noqa: UP020
                file.write("new")
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    line, found = 1, set()
    path.write_text("old")
    while interrupted_at(line):
        assert os.listdir(tmp_path) == ["file.txt"], line
        found.add(path.read_text())
        path.write_text("old")
        line += 1
    assert line > 10
    assert found == {"old", "new"}


def test_a_second_signal_waits_until_the_first_is_cleaned_up_after(tmp_path, monkeypatch):
    """Found here: it came before the temporary file was removed, which stayed."""
    before = signal.signal(signal.SIGINT, process._raise)
    unlink = pathlib.Path.unlink

    def pressed_again(self, missing_ok=False):
        signal.raise_signal(signal.SIGINT)
        unlink(self, missing_ok)

    monkeypatch.setattr(errors, "_raised", None)
    monkeypatch.setattr(pathlib.Path, "unlink", pressed_again)

    def interrupted():
        with atomic(tmp_path / "file.txt") as temporary:
            temporary.write_text("half")
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert os.listdir(tmp_path) == []


def picture(path):
    Image.frombytes("L", (99, 99), random.randbytes(99 * 99)).save(path, format="PNG")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("x" * 5000),
        lambda path: path.write_bytes(bytes(50_000)),
        lambda path: shutil.copyfile(__file__, path),
        picture,
    ],
    ids=["text", "bytes", "copy", "picture"],
)
def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path, write, there):
    """Found here: of texts and pictures no file was named, of copies the one that was read."""
    path = tmp_path / "file.out"
    if there:
        path.write_text("old")
    with full_disk(1000), pytest.raises(OSError, match=r"file\.out'") as told, atomic(path) as temporary:
        write(temporary)
    assert str(path) in str(told.value)
    assert ".file.out." not in str(told.value)
    assert told.value.filename2 is None
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"] * there


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic(tmp_path / "file.txt") as temporary:
        shutil.copyfile(tmp_path / "elsewhere", temporary)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_names_the_images_of_a_study(tmp_path):
    """Found here: an unexpected SafetensorError."""
    model = load_model("demo")
    gallery = Gallery(model, Preprocessing.of(model), tmp_path, "w")
    config = SynthesisConfig(samples=2, iters=2, seed=5)
    with full_disk(1000), pytest.raises(OSError, match=r"2x2_seed5_\w+.safetensors'"):
        gallery.images(config)
    assert os.listdir(tmp_path) == []
    assert torch.isfinite(gallery.images(config)[0]).all()
