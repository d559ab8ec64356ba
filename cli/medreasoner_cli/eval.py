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
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Name or folder of the model.")] = "nano",
    data: Annotated[
        Path | None,
        typer.Argument(metavar="DATA", help="Folder with index.jsonl or a CSV, or U-MRG parquet."),
    ] = None,
    data_option: Annotated[Path | None, typer.Option("--data", help="The same, by another spelling.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--out", "-o", help="Folder for rows.jsonl, figures.json, report.md and report.html."),
    ] = None,
    device: Annotated[Device, DeviceOption] = "auto",
    part: Annotated[
        Literal["heldout", "train", "named"],
        typer.Option(help="Phrasings to ask with; named: in sentences that say what they ask for."),
    ] = "heldout",
    groups: Annotated[
        Literal["validation", "all"], typer.Option(help="Ask about the validation groups, or about all of a new set.")
    ] = "validation",
    think: Annotated[bool, typer.Option("--think/--no-think", help="Whether to reason in words first.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Take each n-th image only.")] = 1,
    controls: Annotated[bool, typer.Option(help="Also blank and swap images, and ask other questions.")] = True,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Of the surface distance, pixels of an image of 840 x 840.")
    ] = 8.0,
    bad_rows: Annotated[
        Literal["refuse", "skip"], typer.Option(help="What becomes of rows that cannot be measured.")
    ] = "refuse",
    seed: Annotated[int, typer.Option(min=0, help="Of the phrasings: another one asks other questions.")] = 1,
    examples: Annotated[int, typer.Option(min=0, max=50, help="Pictures in each section of report.html.")] = 4,
    as_json: Annotated[bool, JsonOption] = False,
) -> None:
    """Measure a bundle on the validation groups of a data set, beside the prior, with intervals over groups.

    \b
    medreasoner-cli eval nano grounding/ --every 10 -o report/

    The files of -o show images and questions: they are as confidential as the data.
    """  # noqa: D301
    import json

    from medreasoner import Grounder
    from medreasoner_cli.folders import bundle_path

    folder = _one(data, data_option)
    measure = load("medreasoner_train.evaluate", extra="train")
    report = load("medreasoner_train.report", extra="train")
    options = measure.EvalOptions(
        data=folder,
        part=part,
        groups=groups,
        think=think,
        every=every,
        controls=controls,
        tolerance=tolerance,
        bad_rows=bad_rows,
        seed=seed,
    )
    with Grounder.load(bundle_path(bundle), device=device) as grounder:
        evaluation = measure.evaluate_bundle(grounder, options, progress=_bar)
    figures = report.figures_of(evaluation, options)
    if output is not None:
        page = load("medreasoner_train.page", extra="train").html(figures, evaluation, count=examples)
        report.save(output, evaluation.rows, figures, page)
    print(json.dumps(figures, indent=1) if as_json else report.markdown(figures))


def _one(data: Path | None, option: Path | None) -> Path:
    """The data set, however it was named."""
    if (data is None) == (option is None):
        raise typer.BadParameter("give the data set once: medreasoner-cli eval BUNDLE DATA")
    return data or option or Path()


def _bar(items: Sequence[Any]) -> Iterator[Any]:
    """The items, with a bar on the error stream that shows how many are done."""
    with typer.progressbar(items, file=sys.stderr) as bar:
        yield from bar
