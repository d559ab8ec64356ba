"""`medreasoner-cli samples`."""

import typer

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def samples() -> None:
    """List the real DICOM images that can be tried at once, as sample:NAME.

    \b
    medreasoner-cli ground sample:chest "Which paired organs fill with air on every breath?"
    """  # noqa: D301
    from medreasoner.errors import MedReasonerError
    from medreasoner.samples import SAMPLES, sample_path

    for sample in SAMPLES.values():
        print(f"sample:{sample.name}\n  {sample.description}\n  {sample.query!r}")
    try:
        sample_path(next(iter(SAMPLES)))
    except MedReasonerError as err:
        print(f"\nnote: {err}")
