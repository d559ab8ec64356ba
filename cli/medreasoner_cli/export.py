"""`medreasoner-cli export`: reasoner, segmenter, bundle, tensorrt and verify."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from medreasoner_cli.extras import load

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Turn checkpoints into a bundle (reasoner, segmenter, bundle, verify), and a bundle into engines (tensorrt).",
)

Weights = Literal["source", "float32", "float16", "bfloat16"]
Arch = Literal["auto", "sam", "medsam", "sam-med2d", "litemedsam"]
CheckpointArgument = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint.")]
OutOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
WeightsOption = Annotated[Weights, typer.Option(help="Element type of the weights; source keeps the checkpoint's.")]
SettingsOption = Annotated[
    Path | None, typer.Option(help="JSON file whose entries replace those of the checkpoint's medreasoner.json.")
]


@app.command()
def reasoner(
    checkpoint: CheckpointArgument,
    output: OutOption,
    weights: WeightsOption = "source",
    precision: Annotated[
        Literal["fp32", "int4"], typer.Option(help="int4 rounds the decoder's matrices to four bits.")
    ] = "fp32",
    settings: SettingsOption = None,
) -> None:
    """Export a Qwen2.5-VL checkpoint: vision and decoder graphs, embedding, tokenizer.

    \b
    medreasoner-cli export reasoner MedReasoner-7B/ -o build/reasoner --precision int4
    """  # noqa: D301
    package = load("medreasoner_export", extra="export")
    options = package.ReasonerOptions(weights=weights, precision=precision, settings=_read_json(settings))
    print(package.export_reasoner(checkpoint, output, options=options).folder)


@app.command()
def segmenter(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint, or a .pth file of SAM.")
    ],
    output: OutOption,
    arch: Annotated[Arch, typer.Option(help="auto reads it from the weights, but MedSAM's look like SAM's.")] = "auto",
    weights: WeightsOption = "source",
    settings: SettingsOption = None,
) -> None:
    """Export a SAM, MedSAM, SAM-Med2D or LiteMedSAM: image encoder and mask decoder.

    \b
    medreasoner-cli export segmenter sam_vit_b_01ec64.pth -o build/segmenter
    medreasoner-cli export segmenter medsam_vit_b.pth --arch medsam -o build/segmenter
    """  # noqa: D301
    package = load("medreasoner_export", extra="export")
    options = package.SegmenterOptions(arch=arch, weights=weights, settings=_read_json(settings))
    export = package.export_segmenter(checkpoint, output, options=options)
    print(f"note: {export.recognised}", file=sys.stderr)
    print(export.folder)


@app.command()
def bundle(
    reasoner: Annotated[Path, typer.Argument(metavar="REASONER", help="Folder that 'export reasoner' wrote.")],
    segmenter: Annotated[Path, typer.Argument(metavar="SEGMENTER", help="Folder that 'export segmenter' wrote.")],
    output: OutOption,
    name: Annotated[str, typer.Option(help="Name of the model.")],
    version: Annotated[str, typer.Option(help="Version of the model.")] = "0.1.0",
    description: Annotated[str, typer.Option(help="One line about it.")] = "",
    licence: Annotated[str, typer.Option(help="Terms of the weights, in short.")] = "unstated",
    notice: Annotated[str | None, typer.Option(help="Line to show at the first load.")] = None,
    licence_file: Annotated[Path | None, typer.Option(help="File with the terms.")] = None,
    card: Annotated[Path | None, typer.Option(help="JSON file with 'training' and 'quality', for people.")] = None,
    force: Annotated[bool, typer.Option(help="Replace the folder if it exists.")] = False,
) -> None:
    """Join two exports into one folder with a manifest.

    \b
    medreasoner-cli export bundle build/reasoner build/segmenter -o medreasoner-7b --name medreasoner-7b
    """  # noqa: D301
    package = load("medreasoner_export", extra="export")
    terms = package.Licence(weights=licence, notice=notice, file=licence_file)
    text = {"name": name, "version": version, "description": description, **_read_json(card)}
    print(package.build_bundle(reasoner, segmenter, output, licence=terms, force=force, **text))


@app.command()
def tensorrt(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder or name of the bundle.")],
    arch: Annotated[str, typer.Option(help="GPU architectures, such as sm_86,sm_89.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; NAME-engines if left out.")
    ] = None,
    precision: Annotated[
        Literal["fp16", "fp32", "int8"],
        typer.Option(help="int8 is for the segmenter's image encoder, and all else fp16."),
    ] = "fp16",
    calibrate: Annotated[list[Path] | None, typer.Option(help="Image to scale int8 by; repeat for more.")] = None,
    max_batch: Annotated[int, typer.Option(help="Questions answered at once.")] = 8,
    max_images: Annotated[int, typer.Option(help="Images read at once.")] = 4,
    max_chunk: Annotated[int, typer.Option(help="Tokens of a prompt read at once.")] = 512,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="The reasoner's only size of image, for a smaller engine."),
    ] = None,
    keep_graphs: Annotated[
        bool, typer.Option(help="Leave the ONNX graphs of the engines for another builder.")
    ] = False,
) -> None:
    """Build a bundle's TensorRT-RTX engines ahead of time, on a machine without a GPU.

    \b
    medreasoner-cli export tensorrt nano --arch sm_86,sm_89 -o nano-engines
    """  # noqa: D301
    from medreasoner_cli.folders import bundle_path

    package = load("medreasoner_export", extra="export")
    limits = package.EngineLimits(
        max_batch=max_batch, max_images=max_images, max_chunk=max_chunk, image_size=_size(image_size)
    )
    options = package.EngineOptions(
        architectures=tuple(each.strip() for each in arch.split(",")),
        precision=precision,
        limits=limits,
        calibration=tuple(calibrate or ()),
        keep_graphs=keep_graphs,
    )
    target = output or Path(f"{Path(bundle).resolve().name}-engines")
    export = package.export_engines(
        bundle_path(bundle), target, options=options, progress=lambda line: print(line, file=sys.stderr)
    )
    print(export.folder)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"--image-size: expected WIDTHxHEIGHT, got {text!r:.40}")
    return int(width), int(height)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.")],
    reasoner: Annotated[Path, typer.Option(help="Reasoner checkpoint that it was made from.")],
    segmenter: Annotated[Path, typer.Option(help="Segmenter checkpoint that it was made from.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare a bundle's graphs with the PyTorch models that they were made from, number by number.

    \b
    medreasoner-cli export verify medreasoner-7b --reasoner MedReasoner-7B/ --segmenter medsam-vit-base/
    """  # noqa: D301
    package = load("medreasoner_export", extra="export")
    report = package.verify_bundle(bundle, reasoner, segmenter)
    print(json.dumps(report.to_json(), indent=1) if as_json else report.to_markdown())
    raise typer.Exit(0 if report.passed else 4)


def _read_json(path: Path | None) -> dict[str, object]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as err:
        raise typer.BadParameter(f"{path}: it cannot be read as JSON ({err})") from err
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{path}: expected a JSON object")
    return value
