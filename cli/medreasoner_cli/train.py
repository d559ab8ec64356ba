"""`medreasoner-cli train`: dense, sft and segmenter."""

from pathlib import Path
from typing import Annotated

import typer

from medreasoner_cli.extras import load

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Train the models of a bundle: dense, then sft; segmenter apart. Each run goes on from its last checkpoint.",
)

DataOption = Annotated[Path, typer.Option(help="Folder of the data set: index.jsonl, images, masks.")]
OutOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints and the log.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")]
SeedOption = Annotated[int, typer.Option(help="Seed of all random choices.")]
StartOption = Annotated[Path | None, typer.Option(help="Checkpoint of the stage before.")]
CacheOption = Annotated[Path | None, typer.Option(help="Folder for decoded images.")]


@app.command()
def dense(
    data: DataOption,
    output: OutOption,
    steps: StepsOption,
    start: StartOption = None,
    cache: CacheOption = None,
    seed: SeedOption = 0,
) -> None:
    """Teach the vision tower where things are: the first stage."""
    stage = load("medreasoner_train.pretrain", extra="train")
    loop = stage.LoopOptions(steps=steps, out=output, seed=seed)
    stage.run(stage.DenseOptions(data=data, loop=loop, start=start, cache=cache))


@app.command()
def sft(
    data: DataOption,
    output: OutOption,
    steps: StepsOption,
    start: StartOption = None,
    cache: CacheOption = None,
    seed: SeedOption = 0,
) -> None:
    """Teach the reasoner to answer questions: the second stage."""
    stage = load("medreasoner_train.sft", extra="train")
    loop = stage.LoopOptions(steps=steps, out=output, seed=seed)
    stage.run(stage.SftRun(data=data, loop=loop, start=start, cache=cache))


@app.command()
def segmenter(
    data: DataOption, output: OutOption, steps: StepsOption, cache: CacheOption = None, seed: SeedOption = 0
) -> None:
    """Teach the segmenter to draw what a box and two points mean."""
    stage = load("medreasoner_train.segmenter", extra="train")
    loop = stage.LoopOptions(steps=steps, out=output, seed=seed)
    stage.run(stage.SegmenterOptions(data=data, loop=loop, cache=cache))
