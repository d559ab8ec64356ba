"""The program `medreasoner-cli`: picks the command, and turns every failure into one line and an exit code."""

import gc
import importlib
import io
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medreasoner_cli.failures import USAGE, exit_code, is_debugging, one_line

__all__ = ["main", "run"]

_COMMANDS = ("ground", "samples", "models", "doctor", "bench", "export", "train", "eval")
_INTERRUPTED = 130  # as shells have it: 128 and the number of the signal


class _LazyGroup(TyperGroup):
    """A group whose commands are imported when they are asked for: each start pays for one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = dict.fromkeys(_COMMANDS)  # type: ignore[assignment]  # names, to list and to suggest

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, None if there is none."""
        if cmd_name not in _COMMANDS:
            return None
        return typer.main.get_command(importlib.import_module(f"medreasoner_cli.{cmd_name}").app)


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    rich_markup_mode=None,  # rich costs more than all the rest of the start
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"medreasoner {version('medreasoner')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Answer a question about a medical image with a mask, on this machine.

    \b
    medreasoner-cli samples
    medreasoner-cli ground sample:chest "Which paired organs fill with air?" -o chest.png

    For research and engineering, not for diagnosis.
    """  # noqa: D301  # the sign is typer's, and it must be the character


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; `arguments` default to those of the process."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        code = typer.main.get_command(app).main(given, prog_name="medreasoner-cli", standalone_mode=False)
        if sys.stdout is not None:  # it is None where the caller has closed it
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except Exception as err:
        if is_debugging():
            raise
        return _report(err)


def _report(error: Exception) -> int:
    if hasattr(error, "format_message"):  # an error of the command line itself; the class is private to typer
        text = error.format_message()
        if "\n" in text:  # the help, where a command was left out
            print(text, file=sys.stderr)
        else:
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "medreasoner-cli"
            print(f"error: {text.rstrip('.')} (see {path} --help)", file=sys.stderr)
        return USAGE
    print(f"error: {one_line(error)}", file=sys.stderr)
    return exit_code(error)


def main() -> None:
    """Run the program in a process of its own."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader of a pipe has gone
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    code = run()
    gc.freeze()  # the interpreter would look for cycles among all that was imported, which takes a tenth of a second
    sys.exit(code)
