"""`medreasoner-cli models`: list, info and verify."""

from typing import Annotated

import typer

from medreasoner_cli.ground import JsonOption

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Look at model bundles: those that ship with the package, and those in the folder MEDREASONER_BUNDLES.",
)

Name = Annotated[str, typer.Argument(metavar="[BUNDLE]", envvar="MEDREASONER_BUNDLE", help="Name or folder.")]


@app.command("list")
def list_models(as_json: Annotated[bool, JsonOption] = False) -> None:
    """List the bundles that --bundle knows by name."""
    from medreasoner_cli.folders import list_bundles

    found = list_bundles()
    if as_json:
        import json

        print(json.dumps({name: str(path) for name, path in found.items()}, ensure_ascii=False))
        return
    for name, path in found.items():
        print(f"{name}  {path}")
    if not found:
        print("no bundle: this build ships none, and MEDREASONER_BUNDLES names no folder that holds one")


@app.command()
def info(name: Name = "nano", as_json: Annotated[bool, JsonOption] = False) -> None:
    """Show what a bundle is: sizes, licence, training data, measured quality. Nothing is loaded."""
    from medreasoner_cli.summary import read_manifest, summary_lines

    manifest = read_manifest(name)
    if as_json:
        import json

        print(json.dumps(manifest, ensure_ascii=False, indent=2))
        return
    for line in summary_lines(manifest):
        print(line)


@app.command()
def verify(name: Name = "nano") -> None:
    """Hash every file of a bundle and compare with its manifest. Exit code 4 if anything differs."""
    from medreasoner.bundle import load_bundle
    from medreasoner_cli.folders import bundle_path

    bundle = load_bundle(bundle_path(name), verify="full")
    print(f"{bundle.spec.name} {bundle.spec.version}: {len(bundle.spec.files)} files as the manifest says")
    print(f"  digest  {bundle.digest}")
