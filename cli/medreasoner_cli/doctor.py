"""`medreasoner-cli doctor`."""

from typing import Annotated

import typer

from medreasoner_cli.failures import MODEL
from medreasoner_cli.ground import BundleOption, JsonOption

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def doctor(bundle: Annotated[str, BundleOption] = "nano", as_json: Annotated[bool, JsonOption] = False) -> None:
    """Check what this machine can do, and say what is missing. Exit code 4 if it cannot answer questions.

    \b
    medreasoner-cli doctor
    medreasoner-cli doctor --json > report.json
    """  # noqa: D301
    from medreasoner_cli.checks import examine

    findings = examine(bundle)
    if as_json:
        import dataclasses
        import json

        print(json.dumps([dataclasses.asdict(finding) for finding in findings], ensure_ascii=False, indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:<8}{finding.name:<14}{finding.detail}")
            if finding.advice:
                print(f"{'':<22}-> {finding.advice}")
    raise typer.Exit(MODEL if any(finding.state == "FAULT" for finding in findings) else 0)
