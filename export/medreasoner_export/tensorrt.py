"""A bundle's graphs as engines: of TensorRT-RTX ahead of time, without a GPU, or of TensorRT for the GPU at hand."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from medreasoner.bundle import Bundle, load_bundle
from medreasoner.engines import ENGINES, ENGINES_VERSION, EngineRecord, TensorRecord
from medreasoner.errors import BundleError
from medreasoner.manifest import read_record
from medreasoner_export.calibrate import input_ranges, segmenter_images
from medreasoner_export.checkpoint import sha256_of
from medreasoner_export.folder import Build, build_key, building
from medreasoner_export.graph import LARGEST_INSIDE, save_graph, weights_file
from medreasoner_export.needs import free_disk
from medreasoner_export.stored import StoredWeights, load_graph
from medreasoner_export.trt_build import (
    WORKSPACE_BYTES,
    BuilderName,
    build_engine,
    builder_version,
    check_architectures,
    find_builder,
)
from medreasoner_export.trt_dialect import trt_graph
from medreasoner_export.trt_plan import EngineLimits, EnginePlan, GraphName, TensorSpec, engine_plans

__all__ = ["EngineExport", "EngineOptions", "EnginePrecision", "export_engines"]

# What an engine holds beside the weights; measured on nano, where it is most of it.
KERNEL_BYTES = 12_000_000

GRAPH_NAMES: tuple[str, ...] = get_args(GraphName)

EnginePrecision: TypeAlias = Literal["fp32", "fp16", "int8"]
"""Arithmetic of products; everything between them is float32."""

Progress: TypeAlias = Callable[[str], None]

# Why another build may give other bytes.
NOT_FIXED: Mapping[BuilderName, str] = {
    "tensorrt-rtx": "; addresses are random on this system, so that another build may differ in some bytes",
    "tensorrt": "; its kernels were chosen by timing them, so that another build may differ",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Which engines are built.

    Attributes
    ----------
    architectures
        Such as ``("sm_86", "sm_89")``; none for ``"tensorrt"``, which builds for the GPU of this machine.
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
    builder
        ``"tensorrt-rtx"`` or ``"tensorrt"``; None: the one that is installed, the first of them if both are.
    workspace
        Most bytes that a layer may take on the GPU; for ``"tensorrt"``.
    cache_dir
        Where ``"tensorrt"`` keeps its timings; None: ``~/.cache/medreasoner``.
    """

    architectures: tuple[str, ...] = ()
    precision: EnginePrecision = "fp16"
    limits: EngineLimits = field(default_factory=EngineLimits)
    graphs: tuple[GraphName, ...] = ("mask_decoder", "encoder", "vision", "decoder")
    calibration: Sequence[str | Path] = ()
    keep_graphs: bool = False
    fresh: bool = False
    builder: BuilderName | None = None
    workspace: int = WORKSPACE_BYTES
    cache_dir: Path | None = None


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
        If no builder is installed, or not the one that was asked for.
    ProviderError
        If TensorRT proper was asked for, and there is no GPU.
    """
    say = progress or (lambda _: None)
    builder = find_builder(options.builder)
    version = builder_version(builder)
    options = replace(options, builder=builder, architectures=check_architectures(options.architectures, builder))
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
    about = replace(options, architectures=(), graphs=(), keep_graphs=False, fresh=False, cache_dir=None)
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
            record = _write_engine(bundle, plan, graph, architecture, made, options, say)
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
    bundle: Bundle,
    plan: EnginePlan,
    graph: Path,
    architecture: str,
    made: Mapping[str, Any],
    options: EngineOptions,
    say: Progress,
) -> EngineRecord:
    """Build one engine beside its graph, of which `made` tells precision and hash, and describe it."""
    started = time.monotonic()
    path = graph.with_name(f"{plan.name}.{architecture}.{made['precision']}.engine")
    assert options.builder is not None
    timings = _timings(options.cache_dir, architecture) if options.builder == "tensorrt" else None
    fixed = build_engine(
        graph, plan, architecture, path, builder=options.builder, timings=timings, workspace=options.workspace
    )
    size = path.stat().st_size
    note = "" if fixed else NOT_FIXED[options.builder]
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


def _timings(cache_dir: Path | None, architecture: str) -> Path:
    """File in which TensorRT keeps what it timed on GPUs of an architecture, beside the engines that it caches."""
    folder = (cache_dir or Path.home() / ".cache" / "medreasoner") / "engines"
    with suppress(OSError):  # without it a build only takes longer
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{builder_version('tensorrt').replace(' ', '-')}.{architecture}.timings"


def _records(tensors: Sequence[TensorSpec]) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(name=each.name, dtype=each.dtype, shape=tuple(str(size) for size in each.shape))
        for each in tensors
    )


def _n_bytes(source: Path, precision: EnginePrecision) -> int:
    """Weights of a graph in the element type of its engine."""
    model = load_graph(source)
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
