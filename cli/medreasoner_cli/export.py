"""`medreasoner-cli export`: reasoner, segmenter, bundle, tensorrt and verify."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
Arch = Literal["auto", "sam", "medsam", "sam-med2d", "litemedsam", "sam2", "medsam2"]
CheckpointArgument = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint.")]
AdapterOption = Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter (peft) on the reasoner, to merge.")]


def _folder(text: str) -> Path:
    """A folder to write; a script's empty variable must not become the current one."""
    if not text or "\0" in text:
        raise typer.BadParameter("it is no name of a folder")
    return Path(text)


OutOption = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write.", parser=_folder, metavar="DIRECTORY")
]
WeightsOption = Annotated[Weights, typer.Option(help="Element type of the weights; source keeps the checkpoint's.")]
SettingsOption = Annotated[
    Path | None, typer.Option(help="JSON file whose entries replace those of the checkpoint's medreasoner.json.")
]

FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Start anew, and drop what a stopped build has left beside the output.")
]


@app.command()
def reasoner(
    checkpoint: CheckpointArgument,
    output: OutOption,
    weights: WeightsOption = "source",
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "int4"],
        typer.Option(help="fp16 is for GPUs; int8 rounds matrices to 8 bits (CPUs), int4 those of the decoder to 4."),
    ] = "fp32",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Prompts to choose int4's levels by: objects with image, query and answer."
        ),
    ] = None,
    adapter: AdapterOption = None,
    settings: SettingsOption = None,
    fresh: FreshOption = False,
) -> None:
    """Export a Qwen2.5-VL checkpoint: vision and decoder graphs, embedding, tokenizer.

    \b
    medreasoner-cli export reasoner MedReasoner-7B/ -o build/reasoner --precision int4
    medreasoner-cli export reasoner MedReasoner-7B/ -o build/reasoner --precision int4 --calibrate prompts.jsonl
    """  # noqa: D301
    package = load("medreasoner_export", extra="export")
    options = package.ReasonerOptions(
        weights=weights,
        precision=precision,
        adapter=adapter,
        calibration=() if calibrate is None else package.read_prompts(calibrate),
        settings=_read_json(settings),
        fresh=fresh,
    )
    with _bar() as progress:
        export = package.export_reasoner(checkpoint, output, options=options, progress=progress, announce=_note)
    print(export.folder)


@app.command()
def segmenter(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a Hugging Face checkpoint, or a .pth or .pt file.")
    ],
    output: OutOption,
    arch: Annotated[
        Arch, typer.Option(help="auto reads it from the weights; MedSAM's look like SAM's, MedSAM2's like SAM 2's.")
    ] = "auto",
    weights: WeightsOption = "source",
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "int4"],
        typer.Option(help="Of the image encoder; fp16 is for GPUs, int8 for CPUs."),
    ] = "fp32",
    settings: SettingsOption = None,
    fresh: FreshOption = False,
) -> None:
    """Export a SAM (also from optimum's ONNX), MedSAM, SAM-Med2D, LiteMedSAM, SAM 2 or MedSAM2: encoder and decoder.

    \b
    medreasoner-cli export segmenter sam_vit_b_01ec64.pth -o build/segmenter
    medreasoner-cli export segmenter medsam_vit_b.pth --arch medsam -o build/segmenter
    medreasoner-cli export segmenter MedSAM2_latest.pt --arch medsam2 -o build/segmenter
    """  # noqa: D301
    package = load("medreasoner_export", extra="export")
    options = package.SegmenterOptions(
        arch=arch, weights=weights, precision=precision, settings=_read_json(settings), fresh=fresh
    )
    with _bar() as progress:
        export = package.export_segmenter(checkpoint, output, options=options, progress=progress, announce=_note)
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
    card: Annotated[Path | None, typer.Option(help="JSON file with 'training', 'quality' and 'confidence'.")] = None,
    cpu_reasoner: Annotated[
        Path | None, typer.Option(help="Other export of the same reasoner, whose graphs are for the CPU.")
    ] = None,
    cpu_segmenter: Annotated[
        Path | None, typer.Option(help="Other export of the same segmenter, whose graphs are for the CPU.")
    ] = None,
    cpu_graphs: Annotated[
        str, typer.Option(help="Which of their graphs to take, as far as they differ.")
    ] = "vision,decoder,encoder,mask_decoder",
    integer_steps: Annotated[
        bool,
        typer.Option("--integer-steps", help="Let a small decoder multiply integers on a CPU: faster, and rounded."),
    ] = False,
    bfloat16: Annotated[
        bool,
        typer.Option("--bfloat16", help="Images and masks in bfloat16 on CPUs with AVX512_BF16 or AMX: faster."),
    ] = False,
    integer_images: Annotated[
        bool,
        typer.Option(
            "--integer-images", help="Images in eight bits on CPUs with VNNI and no AMX: faster, but rounded."
        ),
    ] = False,
    force: Annotated[bool, typer.Option(help="Replace the folder if it exists.")] = False,
) -> None:
    """Join two exports into one folder with a manifest.

    \b
    medreasoner-cli export bundle build/reasoner build/segmenter -o medreasoner-7b --name medreasoner-7b
    medreasoner-cli export bundle half/reasoner half/segmenter -o both --name both --cpu-segmenter int8/segmenter
    """  # noqa: D301
    package = load("medreasoner_export", extra="export")
    terms = package.Licence(weights=licence, notice=notice, file=licence_file)
    text = {"name": name, "version": version, "description": description, **_read_json(card)}
    seconds = {
        "cpu_reasoner": cpu_reasoner,
        "cpu_segmenter": cpu_segmenter,
        "cpu_graphs": tuple(each.strip() for each in cpu_graphs.split(",")),
        "integer_steps": integer_steps,
        "bfloat16": bfloat16,
        "integer_images": integer_images,
    }
    print(package.build_bundle(reasoner, segmenter, output, licence=terms, force=force, **seconds, **text))


@app.command()
def tensorrt(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder or name of the bundle.")],
    arch: Annotated[
        str | None, typer.Option(help="GPU architectures, such as sm_86,sm_89; tensorrt builds for this machine's.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder to write; NAME-engines if left out.", parser=_folder, metavar="DIRECTORY"
        ),
    ] = None,
    precision: Annotated[
        Literal["fp16", "fp32", "int8"],
        typer.Option(help="int8 is for the segmenter's image encoder, and all else fp16."),
    ] = "fp16",
    calibrate: Annotated[list[Path] | None, typer.Option(help="Image to scale int8 by; repeat for more.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    max_images: Annotated[int, typer.Option(min=1, help="Images read at once.")] = 4,
    max_chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prompt read at once.")] = 512,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="The reasoner's only size of image, for a smaller engine."),
    ] = None,
    builder: Annotated[
        Literal["tensorrt-rtx", "tensorrt"] | None,
        typer.Option(
            help="tensorrt-rtx needs no GPU, tensorrt builds for the GPU of this machine. Default: installed."
        ),
    ] = None,
    workspace: Annotated[int, typer.Option(min=1, help="Most MiB that a layer may take, with tensorrt.")] = 2048,
    keep_graphs: Annotated[
        bool, typer.Option(help="Leave the ONNX graphs of the engines for another builder.")
    ] = False,
    fresh: FreshOption = False,
) -> None:
    """Build a bundle's engines: TensorRT-RTX's ahead of time and without a GPU, or TensorRT's for this machine's GPU.

    \b
    medreasoner-cli export tensorrt nano --arch sm_86,sm_89 -o nano-engines
    medreasoner-cli export tensorrt nano --builder tensorrt -o nano-engines
    """  # noqa: D301
    from medreasoner_cli.folders import bundle_path

    if bool(calibrate) != (precision == "int8"):
        raise typer.BadParameter("--calibrate IMAGE and --precision int8 go together")
    package = load("medreasoner_export", extra="export")
    limits = package.EngineLimits(
        max_batch=max_batch, max_images=max_images, max_chunk=max_chunk, image_size=_size(image_size)
    )
    options = package.EngineOptions(
        architectures=() if arch is None else tuple(each.strip() for each in arch.split(",")),
        precision=precision,
        limits=limits,
        calibration=tuple(calibrate or ()),
        keep_graphs=keep_graphs,
        fresh=fresh,
        builder=package.find_builder(builder),
        workspace=workspace * 2**20,
    )
    if arch is None and options.builder == "tensorrt-rtx":
        raise typer.BadParameter("--arch: tensorrt-rtx builds for the GPUs that are named, such as sm_86,sm_89")
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
    adapter: AdapterOption = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Picture for the whole answers; may be repeated. Default: two drawn ones.")
    ] = None,
    query: Annotated[list[str] | None, typer.Option(help="Question about each --image, in their order.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for the report: .json, or a table in Markdown.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare a bundle with the PyTorch models that it was made from: graph by graph, then whole answers.

    \b
    medreasoner-cli export verify medreasoner-7b --reasoner MedReasoner-7B/ --segmenter medsam-vit-base/
    """  # noqa: D301
    package = load("medreasoner_export", extra="export")
    if len(image or []) != len(query or []):
        raise typer.BadParameter(f"{len(image or [])} --image and {len(query or [])} --query: give one for each")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{output}: it is a folder, or the folder {output.parent} does not exist")
    report = package.verify_bundle(
        bundle, reasoner, segmenter, adapter=adapter, questions=_questions(image or [], query or []), progress=_done
    )
    texts = {True: json.dumps(report.to_json(), indent=1) + "\n", False: report.to_markdown()}
    print(texts[as_json], end="")
    if output is not None:
        output.write_text(texts[output.suffix == ".json"], encoding="utf-8")
    raise typer.Exit(0 if report.passed else 4)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on the error stream, with an estimate of the time that is left, for tensors that are read one by one."""
    if not sys.stderr.isatty():
        yield lambda _done, _total, _name: None
        return
    with typer.progressbar(length=1, label="weights", file=sys.stderr, show_eta=True) as bar:

        def show(done: int, total: int, _name: str) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield show


def _done(stage: str) -> None:
    print(f"compared: {stage}", file=sys.stderr)


def _questions(images: list[str], queries: list[str]) -> list[object]:
    from medreasoner.image import read_image
    from medreasoner_cli.inputs import find_inputs

    package = load("medreasoner_export", extra="export")
    return [
        package.Question(image=read_image(find_inputs([image])[0].source), query=query)
        for image, query in zip(images, queries, strict=True)
    ]


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
