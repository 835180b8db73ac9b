"""Processes of their own that begin where torch and timm are imported: forks of one that has done nothing else.

For tests whose subject is what a process does, and not its beginning: those imports take three seconds of a processor each time.
What tests how Python begins, signals or threads starts a process itself.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_PARENT = """
import json, os, runpy, sys
import timm, torch
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
call = json.loads(line)
for number, path in enumerate([os.devnull, call["stdout"], call["stderr"]]):
    os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND), number)
os.chdir(call["cwd"])
os.environ.clear()
os.environ.update(call["environment"])
kind, what = call["kind"], call["what"]
first = {"-c": "", "-m": os.getcwd()}.get(kind, os.path.dirname(what))
sys.path[:1] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
sys.argv = [what if kind == "script" else kind, *call["arguments"]]
names = {"__name__": "__main__"}
if kind == "-m":
    del call, line
    runpy.run_module(what, run_name="__main__", alter_sys=True)
elif kind == "script":
    runpy.run_path(what, run_name="__main__")
else:
    exec(compile(what, "<string>", "exec"), names)
"""


@functools.cache
def _parent() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(process.communicate)  # its standard input ends, and so does it
    return process


def python(
    *arguments: Any, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `python <arguments>` gives: "-c", code, ...; "-m", module, ...; or a script, ...; with the environment `env`."""
    words = [str(each) for each in arguments]
    kind, what, *rest = words if words[0] in ("-c", "-m") else ["script", *words]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in paths:
            path.touch()
        call = {"kind": kind, "what": what, "arguments": rest, "cwd": str(cwd or Path.cwd())}
        call |= {"environment": dict(env or os.environ), "stdout": str(paths[0]), "stderr": str(paths[1])}
        parent = _parent()
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(json.dumps(call) + "\n")
        parent.stdin.flush()
        status = int(parent.stdout.readline())
        return subprocess.CompletedProcess(words, status, *(path.read_text() for path in paths))
