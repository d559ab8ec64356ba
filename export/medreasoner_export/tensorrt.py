"""A bundle's graphs as TensorRT-RTX engines, built ahead of time on a machine without a GPU."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import onnx

from medreasoner.bundle import Bundle, load_bundle
from medreasoner.engines import ENGINES, ENGINES_VERSION, EngineRecord, TensorRecord
from medreasoner.errors import BundleError
from medreasoner.manifest import read_record
from medreasoner_export.calibrate import input_ranges, segmenter_images
from medreasoner_export.checkpoint import sha256_of
from medreasoner_export.folder import Build, build_key, building
from medreasoner_export.graph import LARGEST_INSIDE, save_graph, weights_file
from medreasoner_export.needs import free_disk
from medreasoner_export.stored import StoredWeights
from medreasoner_export.trt_build import build_engine, builder_version, check_architectures
from medreasoner_export.trt_dialect import trt_graph
from medreasoner_export.trt_plan import EngineLimits, EnginePlan, GraphName, TensorSpec, engine_plans

__all__ = ["EngineExport", "EngineOptions", "EnginePrecision", "export_engines"]

# What an engine holds beside the weights; measured on nano, where it is most of it.
KERNEL_BYTES = 12_000_000

GRAPH_NAMES: tuple[str, ...] = get_args(GraphName)

EnginePrecision: TypeAlias = Literal["fp32", "fp16", "int8"]
"""Arithmetic of products; everything between them is float32."""

Progress: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Which engines are built.

    Attributes
    ----------
    architectures
        Such as ``("sm_86", "sm_89")``.
    precision
        ``"int8"`` computes the segmenter's image encoder in eight bits, scaled by `calibration`, and all else in
        float16.
    limits
        Largest sizes of batch, images and length.
    graphs
        Which of the bundle's.
    calibration
        Image files, for int8.
    keep_graphs
        Leave the graphs that the engines were built from beside them, for another builder.
    fresh
        Do not use the engines that a stopped build has left beside the output.
    """

    architectures: tuple[str, ...]
    precision: EnginePrecision = "fp16"
    limits: EngineLimits = field(default_factory=EngineLimits)
    graphs: tuple[GraphName, ...] = ("mask_decoder", "encoder", "vision", "decoder")
    calibration: Sequence[str | Path] = ()
    keep_graphs: bool = False
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineExport:
    """Exported engines: their folder, and what its ``engines.json`` says of each."""

    folder: Path
    engines: tuple[EngineRecord, ...]


def export_engines(
    bundle_dir: str | Path, out_dir: str | Path, *, options: EngineOptions, progress: Progress | None = None
) -> EngineExport:
    """Write one engine for each graph and architecture, and ``engines.json``; all of them or nothing.

    Parameters
    ----------
    bundle_dir
        A bundle's folder, or ``"nano"``.
    out_dir
        Folder to write into, made if absent; not the bundle's own, which holds only what its manifest lists.
    options
        Architectures, precision and sizes.
    progress
        Is told in a line what is needed, and each engine as it is built.

    Raises
    ------
    BundleError
        If the bundle is malformed, the builder cannot target an architecture or build a graph, or the disk is too
        small; the message names it.
    MissingExtraError
        If TensorRT-RTX is not installed.
    """
    say = progress or (lambda _: None)
    version = builder_version()
    check_architectures(options.architectures)
    if options.precision == "int8" and not options.calibration:
        raise BundleError("precision int8 needs images to calibrate with; give some, or build with fp16")
    if options.calibration and options.precision != "int8":
        raise BundleError(f"images to calibrate with are for precision int8, not {options.precision}")
    bundle = load_bundle(bundle_dir)
    out = Path(out_dir)
    if out.resolve().is_relative_to(bundle.root.resolve()):
        raise BundleError(f"{out}: engines go into another folder than the bundle, whose files its manifest lists")
    cache: Literal["float32", "float16"] = "float32" if options.precision == "fp32" else "float16"
    plans = [plan for plan in engine_plans(bundle, options.limits, cache) if plan.name in options.graphs]
    # Read before anything is written: one that cannot be read costs no engine.
    feeds = list(segmenter_images(bundle, options.calibration)) if options.precision == "int8" else []
    stale = ("*.engine", *(f"{plan}.onnx*" for plan in GRAPH_NAMES))
    # Each engine is a stage: those of other architectures and graphs may be asked for the next time.
    about = replace(options, architectures=(), graphs=(), keep_graphs=False, fresh=False)
    key = build_key(repr((version, bundle.digest, about)), map(Path, options.calibration))
    with building(out, key=key, description=ENGINES, stale=stale, fresh=options.fresh, announce=say) as build:
        _need_disk(bundle, plans, build, options, say)
        entries: list[dict[str, Any]] = []
        for plan in plans:
            entries += _write_engines(build, bundle, plan, options, feeds, say)
        content = {
            "schema_version": ENGINES_VERSION,
            "bundle": {"name": bundle.spec.name, "version": bundle.spec.version, "sha256": bundle.digest},
            "builder": version,
            "engines": entries,
        }
        build.write_description(json.dumps(content, indent=1) + "\n")
    return EngineExport(folder=out, engines=tuple(read_record(EngineRecord, each, "") for each in entries))


def _write_engines(
    build: Build, bundle: Bundle, plan: EnginePlan, options: EngineOptions, feeds: Sequence[Mapping[str, Any]],
    say: Progress,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Build a graph's engines, or take those that a stopped build has left; entries of ``engines.json``."""
    names = [f"{plan.name}.{architecture}" for architecture in options.architectures]
    if not options.keep_graphs and all(name in build.found for name in names):
        made: dict[str, Any] = {}  # nothing needs the graph any more
    else:
        made = build.stage(
            f"{plan.name}.graph", lambda folder: _write_graph(bundle, plan, options, feeds, folder),
            kept=options.keep_graphs,
        )  # fmt: skip
    for architecture, name in zip(options.architectures, names, strict=True):

        def engine(folder: Path, architecture: str = architecture) -> dict[str, Any]:
            graph = build.folder(f"{plan.name}.graph") / f"{plan.name}.onnx"
            record = _write_engine(bundle, plan, graph, architecture, made, say)
            (graph.parent / record.file).replace(folder / record.file)
            return asdict(record)

        yield build.stage(name, engine)
    if not options.keep_graphs:
        build.drop(f"{plan.name}.graph")


def _write_graph(
    bundle: Bundle, plan: EnginePlan, options: EngineOptions, feeds: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """Write the graph in the ``trt`` dialect; return the precision that it has, and its hash."""
    source, path = bundle.path(plan.source), folder / f"{plan.name}.onnx"
    eighths = options.precision == "int8" and plan.name == "encoder"
    half = options.precision != "fp32"
    ranges = input_ranges(source, feeds) if eighths else None
    metadata = {"source_graph_sha256": bundle.spec.files[plan.source].sha256}
    large = _n_bytes(source, options.precision) > LARGEST_INSIDE
    with weights_file(path, wanted=large) as outside:
        model = trt_graph(source, plan, half=half, ranges=ranges, metadata=metadata, outside=outside)
    save_graph(model, path)
    return {"precision": "int8" if eighths else "fp16" if half else "fp32", "sha256": sha256_of(path)}


def _write_engine(
    bundle: Bundle, plan: EnginePlan, graph: Path, architecture: str, made: Mapping[str, Any], say: Progress
) -> EngineRecord:
    """Build one engine beside its graph, of which `made` tells precision and hash, and describe it."""
    started = time.monotonic()
    path = graph.with_name(f"{plan.name}.{architecture}.{made['precision']}.engine")
    fixed = build_engine(graph, plan, architecture, path)
    size = path.stat().st_size
    note = "" if fixed else "; addresses are random on this system, so that another build may differ in some bytes"
    say(f"{path.name}: {size / 1e6:.1f} MB in {time.monotonic() - started:.1f} s{note}")
    return EngineRecord(
        file=path.name,
        sha256=sha256_of(path),
        size_bytes=size,
        architecture=architecture,
        precision=made["precision"],
        graph=plan.name,
        source=plan.source,
        source_sha256=bundle.spec.files[plan.source].sha256,
        graph_sha256=made["sha256"],
        inputs=_records(plan.inputs),
        outputs=_records(plan.outputs),
        profiles=tuple(
            {name: (span.least, span.usual, span.most) for name, span in each.items()} for each in plan.profiles
        ),
    )


def _records(tensors: Sequence[TensorSpec]) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(name=each.name, dtype=each.dtype, shape=tuple(str(size) for size in each.shape))
        for each in tensors
    )


def _n_bytes(source: Path, precision: EnginePrecision) -> int:
    """Weights of a graph in the element type of its engine."""
    model = onnx.load(str(source), load_external_data=False)
    return StoredWeights(model, source).n_values * (4 if precision == "fp32" else 2)


def _need_disk(
    bundle: Bundle, plans: Sequence[EnginePlan], build: Build, options: EngineOptions, say: Progress
) -> None:
    """Tell how much disk the engines and the graphs on the way take, and refuse what is not there."""
    copies = len(options.architectures)
    weights = sum(_n_bytes(bundle.path(plan.source), options.precision) for plan in plans)
    needed = max(0, weights * (copies + 1) + len(plans) * copies * KERNEL_BYTES - build.found_bytes)
    free = free_disk(build.out)
    if needed > free:
        raise BundleError(f"{build.out}: about {needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
    say(f"{len(plans) * copies} engines, about {needed / 1e6:.0f} MB of disk")
