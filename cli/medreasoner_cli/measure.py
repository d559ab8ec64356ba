"""Times of repeated questions."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medreasoner import Grounder, Grounding

__all__ = ["as_json", "facts", "in_order", "measure", "precision_words", "save", "table"]

_WARM_UP = 2
# In which stages are shown, as far as they occur; others come behind them, and the whole last.
_ORDER = (
    "read", "preprocess", "vision", "prefill", "think", "answer", "segment_encode", "segment_decode", "postprocess",
)  # fmt: skip
_PERCENTILES = (25, 50, 75, 95)
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "pillow", "pydicom", "tokenizers")


def measure(
    image: str,
    query: str,
    *,
    bundle: str,
    device: str,
    runs: int,
    threads: int | None,
    think: bool,
    anyway: bool = False,
) -> dict[str, Any]:
    """Percentiles in milliseconds of each stage, of a first question and of a further one about an open image.

    Raises
    ------
    MedReasonerError
        As `Grounder.load` and `Grounder.ground`; and if other processes load the cores, unless `anyway`.
    """
    from medreasoner import Grounder
    from medreasoner_cli.busy import LIMIT, CoreWatch, busy_sentence, check_quiet
    from medreasoner_cli.folders import bundle_path

    noticed = check_quiet(anyway=anyway)
    notes = [noticed] if noticed else []
    start = time.perf_counter()
    chosen: Any = device
    with Grounder.load(bundle_path(bundle), device=chosen, n_threads=threads, cache_bytes=0) as grounder:
        load = (time.perf_counter() - start) * 1000
        model = facts(grounder)
        watch = CoreWatch()
        first, sample = _repeat(lambda: grounder.ground(image, query, think=think), runs)
        with grounder.open(image) as study:
            further, _ = _repeat(lambda: study.ground(query, think=think), runs)
        others = watch.share_of_others()
    if others is not None and others > LIMIT:
        notes.append(f"BUSY: {busy_sentence(others)} during the runs")
    return {
        **_machine(threads),
        "bundle": {"name": sample.model_name, "version": sample.model_version, "digest": sample.model_digest},
        "device": device,
        **model,
        "image": [sample.image.height, sample.image.width],
        "runs": runs,
        "tokens": dict(sample.tokens),
        "warnings": list(sample.warnings),
        "notes": notes,
        "others_load": None if others is None else round(others, 3),
        "peak_memory_mib": _peak_memory_mib(),
        "load_ms": round(load, 1),
        "first": first,
        "further": further,
    }


def _machine(threads: int | None) -> dict[str, Any]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from medreasoner import __version__
    from medreasoner.ops import simd_level
    from medreasoner.providers import usable_cores

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "medreasoner": __version__,
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads or usable_cores(),
        "usable_cores": usable_cores(),
        "simd": simd_level(),
    }


def facts(grounder: "Grounder") -> dict[str, Any]:
    """What a report says of the bundle in use."""
    spec = grounder.bundle.spec
    return {
        "precision": spec.precision,
        "kernels": dict(grounder.kernels),  # in the place of graphs, and what they multiply
        "cpu_graphs": sorted(set(spec.cpu_graphs().values()) & set(grounder.providers)),  # of a precision of their own
        "providers": dict(grounder.providers),
    }


def precision_words(report: Mapping[str, Any]) -> str:
    """The precision that `facts` state, and which graphs have one of their own.

    >>> precision_words({"precision": "fp16", "cpu_graphs": ["a.onnx"], "kernels": {"b.onnx": "int8"}})
    'fp16, but for a.onnx, b.onnx (int8)'
    """
    others = ", ".join(
        [*report["cpu_graphs"], *(f"{graph} ({numbers})" for graph, numbers in report["kernels"].items())]
    )
    return f"{report['precision']}, but for {others}" if others else str(report["precision"])


def _peak_memory_mib() -> float | None:
    """Of this process, mapped files included; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
    return None if peak is None else round(int(peak) / 1024, 1)


def _repeat(ask: "Callable[[], Grounding]", runs: int) -> "tuple[dict[str, dict[str, float]], Grounding]":
    import numpy as np

    results, walls = [], []
    for _ in range(runs + _WARM_UP):
        start = time.perf_counter()
        results.append(ask())
        walls.append((time.perf_counter() - start) * 1000)
    kept = results[_WARM_UP:]
    found = dict.fromkeys(stage for result in kept for stage in result.timings_ms)
    stages = {stage: [result.timings_ms.get(stage, 0.0) for result in kept] for stage in in_order(found)}
    stages.pop("total", None)
    stages["wall"] = walls[_WARM_UP:]
    report = {}
    for stage, values in stages.items():
        middles = np.percentile(values, _PERCENTILES)
        report[stage] = {f"p{p}": round(float(value), 3) for p, value in zip(_PERCENTILES, middles, strict=True)}
    return report, results[-1]


def in_order(stages: Iterable[str]) -> list[str]:
    """Stages as they follow each other, those not known behind the others.

    >>> in_order(["wall", "answer", "dreaming", "read"])
    ['read', 'answer', 'dreaming', 'wall']
    """
    places = {stage: place for place, stage in enumerate(_ORDER)} | {"wall": len(_ORDER) + 1}
    return sorted(stages, key=lambda stage: places.get(stage, len(_ORDER)))


def table(report: Mapping[str, Any]) -> str:
    """Report as text."""
    model, first, further = report["bundle"], report["first"], report["further"]
    runs_on = ", ".join(dict.fromkeys(report["providers"].values()))
    peak = report["peak_memory_mib"]
    lines = [
        f"{model['name']} {model['version']} on {runs_on}, {report['threads']} threads, {report['simd']}; "
        f"image {report['image'][1]} x {report['image'][0]}; {report['runs']} runs; load {report['load_ms']:.0f} ms; "
        f"{precision_words(report)}{'' if peak is None else f'; peak memory {peak:.0f} MiB'}",
        *(f"note: {note}" for note in (*report["notes"], *report["warnings"])),
        f"{'ms':<16}{'first p50':>12}{'p95':>10}{'further p50':>14}{'p95':>10}",
    ]
    for stage in in_order(dict.fromkeys([*first, *further])):
        line = f"{stage:<16}" + _columns(first, stage, 12) + _columns(further, stage, 14)
        lines.append(line.rstrip())
    return "\n".join(lines)


def _columns(part: Mapping[str, Mapping[str, float]], stage: str, width: int) -> str:
    if stage not in part:
        return " " * (width + 10)
    return f"{part[stage]['p50']:>{width}.2f}{part[stage]['p95']:>10.2f}"


def as_json(report: Mapping[str, Any]) -> str:
    """Report as JSON."""
    import json

    return json.dumps(report, ensure_ascii=False, indent=2)


def save(report: Mapping[str, Any], *, json_file: Path | None, picture: Path | None) -> None:
    """Write the files that are asked for.

    Raises
    ------
    OutputError
        If one cannot be written.
    """
    from medreasoner import OutputError

    path = json_file
    try:
        if json_file is not None:
            json_file.write_text(as_json(report) + "\n", encoding="utf-8")
        path = picture
        if picture is not None:
            from medreasoner_cli.stages import draw_stages

            draw_stages(report).save(picture)
    except (OSError, ValueError) as err:  # ValueError: an ending that Pillow does not know
        reason = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
        raise OutputError(f"{path}: cannot be written ({reason})") from err
