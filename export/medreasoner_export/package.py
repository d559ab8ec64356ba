"""An exported reasoner and an exported segmenter as one bundle: a folder that the runtime loads."""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
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
from medreasoner_export.parts import check_parts, check_room, telling
from medreasoner_export.trt_plan import GraphName

__all__ = ["CPU_GRAPHS", "Licence", "build_bundle"]

MANIFEST = "manifest.json"
CPU_GRAPHS: Mapping[GraphName, tuple[str, str]] = {
    "vision": ("reasoner", "vision"),
    "decoder": ("reasoner", "decoder"),
    "encoder": ("segmenter", "encoder"),
    "mask_decoder": ("segmenter", "decoder"),
}
"""Graphs that a bundle may have a second time, for the CPU: of each the section of a manifest, and its key there."""

CPU = "cpu"  # the folder of those graphs, in that of their part
# What a second export may have otherwise than the first: the graphs, and matrices that are not taken from it.
_FREE = ("graphs", "step", "tower", "drawing", "embedding", "lm_head")
_KERNELS = ("step", "tower", "drawing")  # keys of what runs without a graph
STEP_BLOCK = 64  # numbers that share a scale
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
    confidence: Mapping[str, Any] | None = None,
    cpu_reasoner: str | Path | None = None,
    cpu_segmenter: str | Path | None = None,
    cpu_graphs: Collection[GraphName] = tuple(CPU_GRAPHS),
    integer_steps: bool = False,
    bfloat16: bool = False,
    integer_images: bool = False,
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
    confidence
        What agreement of drawn answers is worth, as a manifest has it (`medreasoner.spec.ConfidenceSpec`).
    cpu_reasoner, cpu_segmenter
        Other exports of the same checkpoints, whose graphs are used where a session runs on the CPU.
    cpu_graphs
        Which of those graphs to take, as far as they differ.
    integer_steps
        Round a small decoder's matrices to eight bits when they are loaded on a CPU, and multiply integers.
    bfloat16
        Round the matrices of vision tower, image encoder and mask decoder to bfloat16 when they are loaded on a CPU
        that multiplies such numbers (AVX512_BF16, AMX), where their kernels take them.
    integer_images
        Let the kernels of vision tower and image encoder multiply eight bits on CPUs that have AVX-512 with VNNI and no
        AMX, which does bfloat16 as fast.
    force
        Replace `out_dir` if it exists.

    Raises
    ------
    BundleError
        If `out_dir` exists without `force`, an export is incomplete, one for the CPU is of another checkpoint or other
        settings or has nothing to take, or the manifest would not load.
    """
    out = Path(out_dir)
    if out.exists() and not force:
        raise BundleError(f"{out} exists; remove it, or force the replacement")
    sources = (reasoner_dir, segmenter_dir, cpu_reasoner, cpu_segmenter)
    check_room(out, [Path(each) for each in sources if each is not None])
    with telling(out), _appearing(out) as folder:
        parts = {
            part: _copy_export(Path(source), folder / part)
            for part, source in (("reasoner", reasoner_dir), ("segmenter", segmenter_dir))
        }
        seconds = {
            part: _copy_cpu_graphs(Path(source), folder / part, parts[part], _keys(part, cpu_graphs))
            for part, source in (("reasoner", cpu_reasoner), ("segmenter", cpu_segmenter))
            if source is not None
        }
        if integer_steps:
            _multiply_integers(Path(reasoner_dir), parts["reasoner"]["section"])
        if bfloat16:
            _multiply_tiles(parts)
        if integer_images:
            _multiply_bytes(parts)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "version": version,
            "description": description,
            **{part: _prefixed(parts[part]["section"], part, seconds.get(part, {})) for part in parts},
            "precision": parts["reasoner"].get("precision", "fp32"),
            "opset": OPSET,
            "producers": {package: importlib.metadata.version(package) for package in PRODUCERS},
            "source": _source(parts),
            "licence": _copy_licence(licence or Licence(), folder),
            "training": dict(training or {}),
            "quality": dict(quality or {}),
            **({"confidence": dict(confidence)} if confidence is not None else {}),
            "files": _hashes(folder),
        }
        try:
            _write_manifest(manifest, folder / MANIFEST)
        except BundleError as err:  # such as a key that an export of another release lacks
            raise BundleError(f"{reasoner_dir}, {segmenter_dir}: {err}; export them again with this release") from err
    return out


def _copy_licence(licence: Licence, folder: Path) -> dict[str, str | None]:
    """The terms as a manifest has them; their file goes into the folder."""
    name = None
    if licence.file is not None:
        if not Path(licence.file).is_file():
            raise BundleError(f"{licence.file}: no such file with the licence")
        name = "LICENSE.weights"
        shutil.copyfile(licence.file, folder / name)
    return {"weights": licence.weights, "notice": licence.notice, "file": name}


def _source(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of which weights both exports are, and by what images they were calibrated."""
    source = {f"{part}_{key}": each[key] for part, each in parts.items() for key in ("sha256", "storage")}
    return source | {
        f"{part}_calibration": each["calibration"] for part, each in parts.items() if "calibration" in each
    }


def _write_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """With its own digest; one that would not load is refused."""
    text = json.dumps({**manifest, "sha256": manifest_sha256(manifest)}, indent=1, ensure_ascii=False) + "\n"
    parse_manifest(text)
    path.write_text(text, encoding="utf-8")


def _read_export(source: Path) -> tuple[dict[str, Any], list[str]]:
    """An export's description and the names of its files, once both are proved."""
    path = source / DESCRIPTION
    description = read_json(path)
    try:
        names = sorted({*_paths(description["section"]), *description.get("data", [])})
        _ = description["sha256"], description["storage"]  # must be there
    except (KeyError, TypeError, AttributeError) as err:
        raise BundleError(f"{path} is malformed ({err!r}); export it again") from err
    for name in names:
        if Path(name).name != name or not (source / name).is_file():
            raise BundleError(f"{source}: {name} is not a file there; export it again")
    try:
        check_parts(source, description, names)
    except (KeyError, TypeError, AttributeError) as err:
        raise BundleError(f"{path} is malformed ({err!r}); export it again") from err
    return description, names


def _copy_export(source: Path, target: Path) -> dict[str, Any]:
    """Copy the files that an export's description names; return the description."""
    description, names = _read_export(source)
    target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / name)
    return description


def _multiply_integers(source: Path, section: dict[str, Any]) -> None:
    """Say so in a reasoner's section."""
    step = section.get("step")
    width = section["head_dim"] * section["n_heads"]
    sizes = (section["hidden_dim"], width, width + 2 * section["head_dim"] * section["n_kv_heads"])
    if step is None or step["matrices"] == "int4" or any(size % STEP_BLOCK for size in (*sizes, step["mlp_dim"])):
        raise BundleError(
            f"{source}: steps in integers are for decoders of up to 64 MiB in fp32 or fp16, "
            f"whose sizes are multiples of {STEP_BLOCK}"
        )
    step["products"] = "int8"


def _multiply_tiles(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Say so of whatever of both sections has a kernel."""
    found = [parts[part]["section"].get(key) for part in ("reasoner", "segmenter") for key in ("tower", "drawing")]
    if not any(found):
        raise BundleError(
            "bfloat16 is for vision towers of Qwen2.5-VL and image encoders of SAM in fp32 or fp16, and mask decoders "
            "of SAM, whose sizes are multiples of 32 and 128: neither of the two exports has one"
        )
    for section in found:
        if section is not None:
            section["products"] = "bfloat16"


def _multiply_bytes(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Say so of both towers, where their rows divide into blocks."""
    reasoner, segmenter = (parts[part]["section"] for part in ("reasoner", "segmenter"))
    sizes = []  # of each tower those that are rounded in blocks
    if tower := reasoner.get("tower"):
        sizes.append((tower, (tower["n_heads"] * reasoner["vision"]["head_dim"], reasoner["hidden_dim"])))
    if tower := segmenter.get("tower"):
        sizes.append((tower, (tower["hidden_dim"], tower["mlp_dim"])))
    found = [tower for tower, own in sizes if not any(size % STEP_BLOCK for size in own)]
    if not found:
        raise BundleError(
            "images in eight bits are for vision towers of Qwen2.5-VL and image encoders of SAM in fp32 or fp16, whose "
            f"sizes are multiples of {STEP_BLOCK}: neither of the two exports has one"
        )
    for section in found:
        section["products"] = "int8"


def _keys(part: str, names: Collection[GraphName]) -> list[str]:
    """Keys in the section `part` of the graphs with these names."""
    if unknown := sorted(set(names) - set(CPU_GRAPHS)):
        raise BundleError(f"graphs for the CPU: expected some of {', '.join(CPU_GRAPHS)}, got {unknown[0]!r:.80}")
    return [key for section, key in (CPU_GRAPHS[name] for name in names) if section == part]


def _copy_cpu_graphs(source: Path, folder: Path, main: Mapping[str, Any], keys: list[str]) -> dict[str, str]:
    """Copy those of an export's graphs that differ from the ones in `folder` into a folder in that.

    Their names stay, since a graph names the file with its weights. Returns the paths in `folder`, by key.
    """
    description, names = _read_export(source)
    section = description["section"]
    same = {key: section.get(key) == main["section"][key] for key in main["section"] if key not in _FREE}
    if missing := [key for key in keys if key not in section["graphs"]]:
        raise BundleError(f"{source / DESCRIPTION} is malformed: it names no graph {missing[0]}; export it again")
    graphs = {key: section["graphs"][key] for key in keys}
    if description["sha256"] != main["sha256"]:
        raise BundleError(
            f"{source}: it was exported from another checkpoint than the graphs beside which it shall stand"
        )
    same["box_mask"] = description.get("box_mask") == main.get("box_mask")
    if differing := [key for key, is_same in same.items() if not is_same]:
        raise BundleError(
            f"{source}: its {differing[0]} is another than that of the graphs beside which it shall stand"
        )
    taken = {}
    for key, name in graphs.items():
        files = [each for each in (name, f"{name}.data") if each in names]
        if any(not (folder / each).is_file() or sha256_of(source / each) != sha256_of(folder / each) for each in files):
            (folder / CPU).mkdir(exist_ok=True)
            for each in files:
                shutil.copyfile(source / each, folder / CPU / each)
            taken[key] = f"{CPU}/{name}"
    if not taken:
        raise BundleError(
            f"{source}: none of its graphs that were asked for differs from those beside which it shall stand"
        )
    return taken


def _paths(section: Mapping[str, Any]) -> Iterator[str]:
    yield from section["graphs"].values()
    for matrix in ("embedding", "lm_head"):
        if matrix in section:
            yield section[matrix]["file"]
    if "tokenizer" in section:
        yield section["tokenizer"]
    for key in _KERNELS:
        if section.get(key):
            yield section[key]["file"]


def _prefixed(section: Mapping[str, Any], folder: str, cpu_graphs: Mapping[str, str]) -> dict[str, Any]:
    """The section with its paths relative to the bundle, and with the graphs for the CPU if there are any."""
    result = dict(section)
    result["graphs"] = {key: f"{folder}/{name}" for key, name in section["graphs"].items()}
    if cpu_graphs:
        result["cpu_graphs"] = {key: f"{folder}/{name}" for key, name in cpu_graphs.items()}
    for matrix in ("embedding", "lm_head"):
        if matrix in section:
            result[matrix] = {**section[matrix], "file": f"{folder}/{section[matrix]['file']}"}
    if "tokenizer" in section:
        result["tokenizer"] = f"{folder}/{section['tokenizer']}"
    for key in _KERNELS:
        if section.get(key):
            result[key] = {**section[key], "file": f"{folder}/{section[key]['file']}"}
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
