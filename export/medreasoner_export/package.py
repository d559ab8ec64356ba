"""An exported reasoner and an exported segmenter as one bundle: a folder that the runtime loads."""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medreasoner.errors import BundleError
from medreasoner.manifest import manifest_sha256, parse_manifest
from medreasoner.spec import SCHEMA_VERSION
from medreasoner_export.checkpoint import read_json, sha256_of
from medreasoner_export.folder import DESCRIPTION
from medreasoner_export.graph import OPSET

__all__ = ["Licence", "build_bundle"]

MANIFEST = "manifest.json"
PRODUCERS = ("medreasoner", "onnx", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """Terms of the weights: what they are, a line to show at the first load, and a file to put beside them."""

    weights: str = "unstated"
    notice: str | None = None
    file: Path | None = None


def build_bundle(
    reasoner_dir: str | Path,
    segmenter_dir: str | Path,
    out_dir: str | Path,
    *,
    name: str,
    version: str = "0.1.0",
    description: str = "",
    licence: Licence | None = None,
    training: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Join two exports into the folder `out_dir` with a manifest; return the folder.

    The folder appears whole or not at all: it is written beside its place and renamed.

    Parameters
    ----------
    reasoner_dir, segmenter_dir
        Folders that :func:`export_reasoner` and :func:`export_segmenter` wrote.
    out_dir
        The bundle's folder; its parents are made.
    name, version, description
        Of the bundle, for people.
    licence
        Terms of the weights.
    training, quality
        What the model was trained on and what it reaches: free, for people.
    force
        Replace `out_dir` if it exists.

    Raises
    ------
    BundleError
        If `out_dir` exists without `force`, an export is incomplete, or the manifest would not load.
    """
    out = Path(out_dir)
    if out.exists() and not force:
        raise BundleError(f"{out} exists; remove it, or force the replacement")
    licence = licence or Licence()
    with _appearing(out) as folder:
        parts = {
            part: _copy_export(Path(source), folder / part)
            for part, source in (("reasoner", reasoner_dir), ("segmenter", segmenter_dir))
        }
        terms = {"weights": licence.weights, "notice": licence.notice, "file": None}
        if licence.file is not None:
            if not Path(licence.file).is_file():
                raise BundleError(f"{licence.file}: no such file with the licence")
            terms["file"] = "LICENSE.weights"
            shutil.copyfile(licence.file, folder / "LICENSE.weights")
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "version": version,
            "description": description,
            "reasoner": _prefixed(parts["reasoner"]["section"], "reasoner"),
            "segmenter": _prefixed(parts["segmenter"]["section"], "segmenter"),
            "precision": parts["reasoner"].get("precision", "fp32"),
            "opset": OPSET,
            "producers": {package: importlib.metadata.version(package) for package in PRODUCERS},
            "source": {
                f"{part}_{key}": parts[part][key] for part in ("reasoner", "segmenter") for key in ("sha256", "storage")
            }
            | {f"{part}_calibration": each["calibration"] for part, each in parts.items() if "calibration" in each},
            "licence": terms,
            "training": dict(training or {}),
            "quality": dict(quality or {}),
            "files": _hashes(folder),
        }
        text = json.dumps({**manifest, "sha256": manifest_sha256(manifest)}, indent=1, ensure_ascii=False) + "\n"
        try:
            parse_manifest(text)
        except BundleError as err:  # such as a key that an export of another release lacks
            raise BundleError(f"{reasoner_dir}, {segmenter_dir}: {err}; export them again with this release") from err
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return out


def _copy_export(source: Path, target: Path) -> dict[str, Any]:
    """Copy the files that an export's description names; return the description."""
    description = read_json(source / DESCRIPTION)
    try:
        names = sorted({*_paths(description["section"]), *description.get("data", [])})
        _ = description["sha256"], description["storage"]  # must be there
    except (KeyError, TypeError, AttributeError) as err:
        raise BundleError(f"{source / DESCRIPTION} is malformed: {err!r}") from err
    target.mkdir()
    for name in names:
        if Path(name).name != name or not (source / name).is_file():
            raise BundleError(f"{source}: {name} is not a file there")
        shutil.copyfile(source / name, target / name)
    return description


def _paths(section: Mapping[str, Any]) -> Iterator[str]:
    yield from section["graphs"].values()
    for matrix in ("embedding", "lm_head"):
        if matrix in section:
            yield section[matrix]["file"]
    if "tokenizer" in section:
        yield section["tokenizer"]


def _prefixed(section: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The section with its paths relative to the bundle."""
    result = dict(section)
    result["graphs"] = {key: f"{folder}/{name}" for key, name in section["graphs"].items()}
    for matrix in ("embedding", "lm_head"):
        if matrix in section:
            result[matrix] = {**section[matrix], "file": f"{folder}/{section[matrix]['file']}"}
    if "tokenizer" in section:
        result["tokenizer"] = f"{folder}/{section['tokenizer']}"
    return result


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends, and is removed when it fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rename(Path(scratch) / "old")
        folder.rename(out)
