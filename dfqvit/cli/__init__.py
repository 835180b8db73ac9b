"""The command line. `main` turns every error into one line on stderr: exit status 2 for wrong use, 1 for failure, 130 for Ctrl-C.

SIGTERM and SIGHUP end a command as Ctrl-C does, with 143 and 129: half-written files go, and a synthesis keeps its snapshot.

An error that nobody foresaw is one line too; its traceback goes to a file that the line names.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import tempfile
import traceback
import warnings

import click

from ..errors import DfqvitError, Interrupted, UsageError
from ..version import __version__
from .process import (
    empty_argument,
    end_at_once,
    interrupted,
    leave_at_once,
    mend_streams,
    status_of,
    take_signals,
    watch_imports,
)

COMMANDS = {
    "ablate": "what each piece of the method does: a resumable grid of settings, tables and charts",
    "benchmark": "speed and energy of a quantized model beside the float one",
    "card": "a folder for the Hugging Face Hub: a saved model and its card",
    "demo": "quantize the embedded model and print accuracies for float, real, noise and data-free calibration",
    "diagnose": "the known failures in a saved model, with what to do; gradients of easy to hard",
    "evaluate": "top-1, top-5 and agreement with the float model, on a folder or an .npz",
    "export": "a saved model as ONNX, for ONNX Runtime or OpenVINO",
    "info": "versions, devices and backends; with FILE, check a saved model completely and describe it",
    "quantize": "from a float model to a saved low-bit model, with no data",
    "sweep": "quantize and evaluate every combination of models and settings in a YAML file",
    "synthesize": "optimise images from noise against a float model",
}
SHARED = ("quantize", "synthesize", "evaluate", "info")  # may run as several processes of torchrun
SPINS = "1000"  # about 10 microseconds


class _Commands(click.Group):
    """Loads a command's module, and with it torch and timm, only when the command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = __import__(f"{__name__}.{name}", fromlist=["command"])
        take_signals()
        return module.command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if wrong := empty_argument(args):
            raise click.UsageError(wrong)
        if name not in COMMANDS and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it may be {', '.join(COMMANDS)}"
            raise click.UsageError(f"No such command '{name}'; {hint}")
        if name not in SHARED and "RANK" in os.environ:
            from ..distributed import world

            if world() > 1:
                raise click.UsageError(
                    f"torchrun started {world()} processes of '{name}', each of which would do all of its work; start it without "
                    f"torchrun, which serves {', '.join(SHARED[:3])}"
                )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dfqvit")
def program() -> None:
    """Data-free quantization of timm vision transformers.

    MODEL is a timm name of a transformer or a ConvNeXt, or `demo`, `demo-swin`, `demo-deit3`, `demo-convnext`, the embedded models.
    """


def main(arguments: list[str] | None = None) -> None:
    """Runs the program and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] != ["benchmark"]:  # which times torch too, as it is by default
        let_threads_sleep()
    mend_streams()
    watch_imports()
    try:
        status = run(arguments)
        leave_at_once(status)
    except KeyboardInterrupt as error:  # as `run` returned
        end_at_once(status_of(error) - 128)
    sys.exit(status)


def let_threads_sleep() -> None:
    """Bounds how long torch's threads (libgomp's) spin while they wait, unless the user has; before torch is imported.

    By default they spin for milliseconds, on processors that others want (docs/kernels/threads.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def run(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status."""
    warnings.showwarning = _one_line_warning
    if "RANK" in os.environ:  # torchrun
        return _run_one_of_several(arguments)
    return _run(arguments)


def _run_one_of_several(arguments: list[str] | None) -> int:
    """As one of torchrun's processes: only the first prints. It says of a failure elsewhere that a process was lost."""
    from .. import distributed

    try:
        distributed.start()
        with contextlib.ExitStack() as stack:
            if distributed.rank() != 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            status = _run(arguments)
        if status == 0:
            distributed.wait_for_all()
            distributed.stop()
    except DfqvitError as error:
        status = _fail(str(error), 1)
    except Exception as error:  # torch's, where RANK and the like are set by hand or a port is taken
        status = _fail_unforeseen(error, arguments)
    return status


def _run(arguments: list[str] | None) -> int:
    try:
        program.main(arguments, prog_name="dfqvit", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except (click.ClickException, UsageError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return _fail(message, 2)
    except Interrupted as error:
        return _ended(str(error), error)
    except DfqvitError as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, click.Abort) as error:
        return _ended(interrupted(sys.argv[1:] if arguments is None else arguments), error)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout has gone; nothing is left to say
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}" + (f": '{error.filename}'" if error.filename else ""), 1)
    except Exception as error:  # all that is left: nobody foresaw it
        text = str(error)
        if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
            return _fail("out of memory; fewer --samples or a smaller --batch-size need less", 1)
        if _is_of_backends(error):
            return _fail(text, 2)
        return _fail_unforeseen(error, arguments)
    return 0


def _ended(message: str, error: BaseException) -> int:
    """Says so, and what the interruption holds is freed where no signal comes any more."""
    leave_at_once(_fail(message, status_of(error)))
    return status_of(error)


def _is_of_backends(error: Exception) -> bool:
    """Whether DFQVIT_BACKEND or DFQVIT_CPU_ISA is the cause: it names what there is not, or what cannot serve.

    By name, since dfqvit.kernels does not import in the first case.
    """
    named = any(name in str(error) for name in ("DFQVIT_BACKEND", "DFQVIT_CPU_ISA"))
    return type(error).__name__ == "BackendError" or (isinstance(error, (ValueError, RuntimeError)) and named)


def _fail_unforeseen(error: Exception, arguments: list[str] | None) -> int:
    """One line, and a file with the rest."""
    what = f"unexpected {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dfqvit-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(f"dfqvit {__version__}, Python {sys.version}\narguments: {arguments or sys.argv[1:]}\n\n")
            file.write("".join(traceback.format_exception(error)))
    except OSError:  # nowhere to write
        return _fail(f"{what}; its traceback could not be written to a file", 1)
    return _fail(f"{what}; please report it with '{file.name}', where its traceback is", 1)


def _fail(message: str, status: int) -> int:
    click.echo(f"dfqvit: {' '.join(message.split())}", err=True)
    return status


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"dfqvit: warning: {message}", file=sys.stderr)  # on a line of its own: a bar may stand there
