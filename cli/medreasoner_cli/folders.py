"""Bundles by name: those that ship with the package and those in the folder that MEDREASONER_BUNDLES names."""

import os
from pathlib import Path

__all__ = ["bundle_path", "list_bundles"]

_VARIABLE = "MEDREASONER_BUNDLES"


def list_bundles() -> dict[str, Path]:
    """Folders with a manifest, by name."""
    import medreasoner.bundle

    shipped = Path(medreasoner.bundle.__file__).parent / "bundles"
    found: dict[str, Path] = {}
    for folder in (shipped, Path(os.environ.get(_VARIABLE, "")) if os.environ.get(_VARIABLE) else None):
        if folder is not None and folder.is_dir():
            for path in sorted(folder.iterdir()):
                if (path / "manifest.json").is_file():
                    found.setdefault(path.name, path)
    return found


def bundle_path(name_or_path: str) -> str:
    """Path of a bundle that is named, or else the argument as it is, for the loader to judge."""
    if Path(name_or_path).is_dir():
        return name_or_path
    return str(list_bundles().get(name_or_path, name_or_path))
