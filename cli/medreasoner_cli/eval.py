"""`medreasoner-cli eval`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medreasoner_cli.extras import load
from medreasoner_cli.ground import BundleOption, Device, DeviceOption

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Option(help="Folder of the data set.")],
    bundle: Annotated[str, BundleOption] = "nano",
    device: Annotated[Device, DeviceOption] = "auto",
    part: Annotated[Literal["heldout", "train"], typer.Option(help="Phrasings to ask with.")] = "heldout",
    think: Annotated[bool, typer.Option("--think/--no-think", help="Whether to reason in words first.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Take each n-th image only.")] = 1,
    controls: Annotated[bool, typer.Option(help="Also blank and swap images, and ask other questions.")] = True,
) -> None:
    """Measure a bundle on the validation groups of a data set; prints one JSON object a question.

    \b
    medreasoner-cli eval --data grounding/ --every 10 > rows.jsonl
    """  # noqa: D301
    import dataclasses
    import json

    from medreasoner import Grounder
    from medreasoner_cli.folders import bundle_path

    measure = load("medreasoner_train.evaluate", extra="train")
    options = measure.EvalOptions(data=data, part=part, think=think, every=every, controls=controls)
    with Grounder.load(bundle_path(bundle), device=device) as grounder:
        rows, _ = measure.evaluate_bundle(grounder, options)
    for row in rows:
        print(json.dumps(dataclasses.asdict(row)))
