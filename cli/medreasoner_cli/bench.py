"""`medreasoner-cli bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from medreasoner_cli.ground import BundleOption, Device, DeviceOption

__all__ = ["app"]

_STDOUT = "-"


class _OptionalFile(TyperCommand):
    """A command whose --json may stand without its file, which typer has no option for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Let --json that no name with .json follows mean the standard output."""
        filled = []
        for i, argument in enumerate(args):
            filled.append(argument)
            if argument == "--json" and not (i + 1 < len(args) and args[i + 1].endswith((".json", _STDOUT))):
                filled.append(_STDOUT)
        parsed: list[str] = super().parse_args(ctx, filled)
        return parsed


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(cls=_OptionalFile)
def bench(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="File or sample:NAME.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The question, in quotes.")],
    bundle: Annotated[str, BundleOption] = "nano",
    device: Annotated[Device, DeviceOption] = "auto",
    runs: Annotated[int, typer.Option("--runs", "-n", min=1, help="Measured runs, after two that are not.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a session; default: the usable cores.")] = None,
    think: Annotated[bool, typer.Option("--think/--no-think", help="Whether to reason in words first.")] = False,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="[FILE.json]", help="Write JSON; without a file print it, and no table."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a picture of the time by stage.")
    ] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Measure even while others load the cores.")] = False,
) -> None:
    """Measure how long a question takes on this machine, stage by stage, in milliseconds.

    "first" reads and encodes the image anew each time; "further" asks again about an image that is open.

    \b
    medreasoner-cli bench sample:chest "Which paired organs fill with air?" -n 50
    medreasoner-cli bench chest.dcm "Where is the heart?" --json times.json --picture times.png
    """  # noqa: D301
    from medreasoner_cli.answers import show_warnings
    from medreasoner_cli.measure import as_json, measure, save, table

    show_warnings()
    report = measure(image, query, bundle=bundle, device=device, runs=runs, threads=threads, think=think, anyway=anyway)
    print(as_json(report) if json_file == _STDOUT else table(report))
    save(report, json_file=None if json_file in (None, _STDOUT) else Path(str(json_file)), picture=picture)
