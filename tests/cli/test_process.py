"""The program in its surroundings: signals that end it, streams that are closed, full or gone, arguments that are empty."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from dfqvit import cli
from dfqvit.cli.process import ENDING, empty_argument

STUB = """
import os, signal, sys, time, types, click
import dfqvit.cli as cli
def callback():
{body}
sys.modules['dfqvit.cli.info'] = types.SimpleNamespace(command=click.Command('info', callback=callback))
cli.main(['info'])
"""


def program(body, **options):
    """The program with a command of one's own: without torch, so that it starts at once."""
    code = STUB.format(body="\n".join(f"    {line}" for line in body))
    return subprocess.run([sys.executable, "-c", code], text=True, check=False, **options)


def ended(body):
    """(status, stdout, stderr) of `program` with the usual signals."""
    found = program(body, capture_output=True, preexec_fn=usual)
    return found.returncode, found.stdout, found.stderr.strip()


def half_written(folder):
    return [f"path = {str(folder / 'half')!r}", "open(path, 'w').write('half')"]


def usual():
    """The signals of a process that is started, whatever the tests' own surroundings ignore."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_that_end_it_let_it_clean_up(name, status, tmp_path):
    """Found here: SIGTERM and SIGHUP left half of a file, and the steps of a synthesis since its last snapshot were lost."""
    body = [
        *half_written(tmp_path),
        "try:",
        f"    os.kill(os.getpid(), signal.{name})",
        "    time.sleep(60)",
        "finally:",
        "    os.unlink(path)",
    ]
    assert ended(body) == (status, "", "dfqvit: interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ("SIGINT", "SIGINT", 130),
        ("SIGINT", "SIGTERM", 130),
        ("SIGTERM", "SIGTERM", 143),
        ("SIGTERM", "SIGHUP", 143),
        ("SIGHUP", "SIGINT", 129),
    ],
)
def test_a_second_signal_changes_nothing(first, second, status, tmp_path):
    """Found here: it ended the cleaning up after the first, or the line that is said of it, which became a traceback.

    It comes wherever it may: while what was begun is cleaned up after, while the line is said, and as Python ends.
    """
    body = [
        "import atexit",
        f"again = lambda *_: signal.raise_signal(signal.{second})",
        "atexit.register(again)",
        "say = cli._fail",
        "cli._fail = lambda *told: (again(), say(*told), again())[1]",
        *half_written(tmp_path),
        "try:",
        "    try:",
        f"        signal.raise_signal(signal.{first})",
        "    except KeyboardInterrupt as error:",
        "        again()",
        "        raise cli.Interrupted('interrupted; go on') from error",
        "finally:",
        "    again()",
        "    os.unlink(path)",
    ]
    assert ended(body) == (status, "", "dfqvit: interrupted; go on")
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_changes_nothing_of_what_python_frees():
    """Found here: where objects end with a frame, as torch's readers of images do, nothing tells that an error is on its way."""
    body = [
        "class Held:",
        "    def __del__(self):",
        "        signal.raise_signal(signal.SIGTERM)",
        "        click.echo('freed')",
        "held = Held()",
        "signal.raise_signal(signal.SIGINT)",
    ]
    found = program(body, capture_output=True, preexec_fn=usual)
    assert (found.returncode, found.stderr.strip()) == (130, "dfqvit: interrupted")


def test_the_handlers_of_who_calls_the_program_stay(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.program, "main", interrupt)
    before = {number: signal.signal(number, interrupt) for number in ENDING}
    try:
        assert cli.run(["info"]) == 130
        assert [signal.getsignal(number) for number in ENDING] == [interrupt] * len(ENDING)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_fifth_signal_ends_what_hangs():
    body = [
        "try:",
        "    signal.raise_signal(signal.SIGINT)",
        "finally:",
        "    for _ in range(4):",
        "        signal.raise_signal(signal.SIGTERM)",
        "    click.echo('hangs')",
        "    signal.raise_signal(signal.SIGTERM)",
        "    time.sleep(600)",
    ]
    found = program(body, capture_output=True, preexec_fn=usual)
    assert (found.returncode, found.stdout, found.stderr) == (143, "hangs\n", "dfqvit: interrupted\n")


def test_the_end_of_processes_that_read_images_changes_nothing():
    """Found here: they had the signal too, and torch raised an error for each of them while the command was cleaned up after."""
    body = [
        "def ended(*_):",
        "    raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Terminated.')",
        "signal.signal(signal.SIGCHLD, ended)",
        "try:",
        "    signal.raise_signal(signal.SIGTERM)",
        "finally:",
        "    signal.raise_signal(signal.SIGCHLD)",
        "    click.echo('cleaned')",
    ]
    assert ended(body) == (143, "cleaned\n", "dfqvit: interrupted")


def test_a_signal_after_a_signal_that_a_library_swallowed_ends_it():
    """As callbacks of compiled code do: it is not taken for one that is being cleaned up after."""
    body = [
        "try:",
        "    signal.raise_signal(signal.SIGINT)",
        "except BaseException:",
        "    pass",
        "signal.raise_signal(signal.SIGTERM)",
        "print('went on')",
    ]
    found = program(body, capture_output=True, preexec_fn=usual)
    assert (found.returncode, found.stdout, found.stderr.strip()) == (143, "", "dfqvit: interrupted")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_as_python_ends_leaves_the_status_as_it_is(name):
    """Found here: a traceback, of the modules that clean up as Python ends."""
    body = ["import atexit", f"atexit.register(lambda: signal.raise_signal(signal.{name}))", "click.echo('done')"]
    found = program(body, capture_output=True, preexec_fn=usual)
    assert (found.returncode, found.stdout, found.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_before_or_after_the_command_is_the_same_line(name):
    """Found here: a traceback."""
    body = [f"signal.raise_signal(signal.{name})"]
    code = STUB.format(body=f"    {body[0]}").replace(
        "cli.main(", "cli.run = lambda _: (cli.take_signals(), callback()); cli.main("
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=usual)
    status = 128 + getattr(signal, name)
    assert (found.returncode, found.stdout, found.stderr) == (status, "", "dfqvit: interrupted\n")


def test_a_signal_that_is_ignored_stays_so():
    """As nohup asks."""
    body = ["os.kill(os.getpid(), signal.SIGHUP)", "print('went on')"]
    found = program(body, capture_output=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (found.returncode, found.stdout) == (0, "went on\n")


def test_torchruns_processes_end_at_once():
    """It waits for them, and they for each other in code that comes to no handler."""
    body = ["print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"]
    code = STUB.format(body=f"    {body[0]}").replace("cli.main(", "cli.run = lambda _: callback(); cli.main(")
    environment = {**os.environ, "RANK": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    )
    assert found.stdout == "True\n"


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_torchrun_serves_what_shares_its_work(command, monkeypatch, capsys):
    """`sweep` waited for good, its own processes for the others of torchrun; two of `card` wrote one folder."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status = cli._run([command, "--help"])
    said = capsys.readouterr().err
    assert status == (0 if command in ("quantize", "synthesize", "evaluate", "info") else 2)
    assert (f"torchrun started 2 processes of '{command}'" in said) == (status == 2)


def closing(*numbers):
    def close():
        for number in numbers:
            with contextlib.suppress(OSError):
                os.close(number)

    return close


@pytest.mark.parametrize("closed", [(2,), (0, 2), (0,), (0, 1, 2)])
def test_closed_streams_lead_nowhere(closed, tmp_path):
    """Found here: without a stderr the progress bar failed, and the first file that was opened took its messages."""
    out = tmp_path / "out"
    body = [
        "import tqdm",
        "for _ in tqdm.tqdm(range(3)): pass",
        f"file = open({str(out)!r}, 'w')",
        "file.write(str(file.fileno() > 2))",
        "file.close()",
        "print('done')",
    ]
    found = program(body, stdout=subprocess.PIPE, preexec_fn=closing(*closed))
    assert found.returncode == 0
    assert found.stdout == ("" if 1 in closed else "done\n")
    assert out.read_text() == "True"


def test_a_warning_beside_a_bar_has_a_line_of_its_own():
    """Found here: `dfqvit evaluate` doubts the labels while its bar stands, and the sentence stood behind the bar's figures."""
    body = [
        "import tqdm, warnings",
        "bar = tqdm.tqdm(total=3)",
        "bar.update(2)",
        "warnings.warn('so it is')",
        "bar.close()",
    ]
    status, _, err = ended(body)
    assert status == 0
    assert "dfqvit: warning: so it is" in err.splitlines()
    assert "2/3" in err


def test_a_stderr_that_fails_ends_no_work():
    """A log on a full disk, or the terminal that a command was started in and that was closed."""
    with open("/dev/full", "w") as full:
        body = ["import tqdm", "for _ in tqdm.tqdm(range(3)): pass", "click.echo('x', err=True)", "print('done')"]
        found = program(body, stdout=subprocess.PIPE, stderr=full)
    assert (found.returncode, found.stdout) == (0, "done\n")


def test_a_stdout_that_fails_is_status_1():
    """A full disk is said; a reader that has gone, as `head` does, wants to hear no more."""
    with open("/dev/full", "w") as full:
        found = program(["click.echo('done')"], stdout=full, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr) == (1, "dfqvit: No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        found = program(["click.echo('done')"], stdout=gone, stderr=subprocess.PIPE)
    assert (found.returncode, found.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "q.safetensors", "--data", ""], "the argument after '--data' was empty"),
        (["evaluate", "", "--data", "t.npz"], "the argument after 'evaluate' was empty"),
        (["evaluate", "q.safetensors", "--data", "t.npz", "--against="], "'--against' was empty"),
        (["quantize", "demo", "--out", ""], "the argument after '--out' was empty"),
    ],
)
def test_an_empty_argument_is_no_folder_and_no_default(arguments, message, capsys):
    """Found here: --data "" was the folder one is in, and --against "" the architecture of the file."""
    assert cli.run(arguments) == 2
    assert f"{message}; it must be left out or have a value" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["quantize", "demo", "--model-kwargs", "key="], ["info"], ["--help"], ["-"]])
def test_what_is_not_empty_passes(arguments):
    assert empty_argument(arguments) == ""
