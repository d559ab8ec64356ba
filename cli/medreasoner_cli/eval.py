"""`medreasoner-cli eval`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medreasoner_cli.extras import load
from medreasoner_cli.ground import Device, DeviceOption, JsonOption

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Option(help="Folder of the data set.")],
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Name or folder of the model.")] = "nano",
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", help="Folder for rows.jsonl, figures.json and report.md.")
    ] = None,
    device: Annotated[Device, DeviceOption] = "auto",
    part: Annotated[Literal["heldout", "train"], typer.Option(help="Phrasings to ask with.")] = "heldout",
    think: Annotated[bool, typer.Option("--think/--no-think", help="Whether to reason in words first.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Take each n-th image only.")] = 1,
    controls: Annotated[bool, typer.Option(help="Also blank and swap images, and ask other questions.")] = True,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Measure a bundle on the validation groups of a data set, beside the prior, with intervals over groups.

    \b
    medreasoner-cli eval nano --data grounding/ --every 10 -o report/
    """  # noqa: D301
    import json

    from medreasoner import Grounder
    from medreasoner_cli.folders import bundle_path

    measure = load("medreasoner_train.evaluate", extra="train")
    report = load("medreasoner_train.report", extra="train")
    options = measure.EvalOptions(data=data, part=part, think=think, every=every, controls=controls)
    with Grounder.load(bundle_path(bundle), device=device) as grounder:
        rows, sets = measure.evaluate_bundle(grounder, options, progress=_bar)
    figures = report.as_dict(rows, sets)
    if output is not None:
        report.save(output, rows, figures)
    print(json.dumps(figures, indent=1) if as_json else report.markdown(figures))


def _bar(items: Sequence[Any]) -> Iterator[Any]:
    """The items, with a bar on the error stream that shows how many are done."""
    with typer.progressbar(items, file=sys.stderr) as bar:
        yield from bar
