"""`medreasoner-cli bench`."""

from typing import Annotated

import typer

from medreasoner_cli.ground import BundleOption, Device, DeviceOption, JsonOption

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def bench(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="File or sample:NAME.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The question, in quotes.")],
    bundle: Annotated[str, BundleOption] = "nano",
    device: Annotated[Device, DeviceOption] = "auto",
    runs: Annotated[int, typer.Option("--runs", "-n", min=1, help="Measured runs, after two that are not.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a session; default: the usable cores.")] = None,
    think: Annotated[bool, typer.Option("--think/--no-think", help="Whether to reason in words first.")] = False,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Measure how long a question takes on this machine, stage by stage, in milliseconds.

    "first" reads and encodes the image anew each time; "further" asks again about an image that is open.

    \b
    medreasoner-cli bench sample:chest "Which paired organs fill with air?" -n 50
    """  # noqa: D301
    from medreasoner_cli.answers import show_warnings
    from medreasoner_cli.measure import measure, table

    show_warnings()
    report = measure(image, query, bundle=bundle, device=device, runs=runs, threads=threads, think=think)
    if as_json:
        import json

        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print(table(report))
