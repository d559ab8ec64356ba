"""`medreasoner-cli ground`."""

from typing import Annotated, Literal

import typer

from medreasoner_cli.start import without_collecting

__all__ = ["BundleOption", "Device", "DeviceOption", "JsonOption", "app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
Form = Literal["overlay", "mask", "rle", "json", "nifti", "seg"]

_IMAGES = "Files, folders, patterns in quotes, sample:NAME, or - for the standard input."
_OUTPUT = (
    "File to write, by its ending: .png .jpg overlay, mask.png mask, .json, .rle.json, .nii, .nii.gz, .dcm DICOM SEG. "
    "For several images a folder, or a name with {stem} or {index} in it. May be repeated."
)
BundleOption = typer.Option("--bundle", "-b", envvar="MEDREASONER_BUNDLE", help="Name or folder of the model.")
DeviceOption = typer.Option("--device", help="Where to compute; auto takes the fastest that works.")
JsonOption = typer.Option("--json", help="Print JSON.")


@app.command()
def ground(
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE...", help=_IMAGES)] = None,
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="The question, in quotes, behind the images.")
    ] = None,
    bundle: Annotated[str, BundleOption] = "nano",
    device: Annotated[Device, DeviceOption] = "auto",
    output: Annotated[list[str] | None, typer.Option("--output", "-o", help=_OUTPUT)] = None,
    form: Annotated[Form | None, typer.Option("--format", help="Form of the outputs, whatever their ending.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    think: Annotated[bool, typer.Option("--think/--no-think", help="Whether to reason in words first.")] = False,
    samples: Annotated[
        int, typer.Option(min=1, max=64, help="Draw so many answers: the mask they agree on, and how sure that is.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up on an image after this.")] = None,
    frame: Annotated[int | None, typer.Option(min=0, help="Frame, page or slice, from 0.")] = None,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Largest image, height times width, that is decoded.")
    ] = 100_000_000,
    unconstrained: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Answer a question about images with a box, two points and a mask.

    \b
    medreasoner-cli ground chest.dcm "Which organs fill with air?" -o chest.png
    medreasoner-cli ground ct.nii.gz "Where is bile made?" --frame 40 -o m.nii.gz
    medreasoner-cli ground chest.dcm "Which organs fill with air?" --samples 8
    medreasoner-cli ground study/ "Where is the lesion?" -o out/ --format mask
    medreasoner-cli ground 'in/*.dcm' "Where is it?" -o 'out/{stem}.seg.dcm' --json

    Exit codes: 0 found, 1 the answer is that it is absent, 2 wrong usage or a file that cannot be written, 3 unreadable
    input, 4 trouble with model or engine; of several images the gravest. 130 interrupted.
    """  # noqa: D301
    with without_collecting():
        from medreasoner_cli.answers import Printer, show_warnings
        from medreasoner_cli.batch import Question, answer_all
        from medreasoner_cli.inputs import find_inputs
        from medreasoner_cli.targets import plan_targets

    if not images or query is None:
        raise typer.BadParameter("give one image or more, and then the question in quotes")
    if timeout is not None and not timeout > 0:
        raise typer.BadParameter("--timeout takes a positive number of seconds")
    if form is not None and not output:
        raise typer.BadParameter("--format says how an output is written: name one with --output")
    show_warnings()
    inputs = find_inputs(images)
    asked = Question(
        query=query,
        bundle=bundle,
        device=device,
        think=think,
        samples=samples,
        seed=seed,
        timeout_s=timeout,
        frame=frame,
        max_pixels=max_pixels,
        unconstrained=unconstrained,
    )
    plan = plan_targets(output or [], inputs, form)
    raise typer.Exit(answer_all(asked, inputs, plan, Printer(len(inputs), as_json=as_json)))
