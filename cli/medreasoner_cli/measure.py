"""Times of repeated questions."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medreasoner import Grounding

__all__ = ["measure", "table"]

_WARM_UP = 2


def measure(
    image: str, query: str, *, bundle: str, device: str, runs: int, threads: int | None, think: bool
) -> dict[str, Any]:
    """Percentiles in milliseconds of each stage, of a first question and of a further one about an open image.

    Raises
    ------
    MedReasonerError
        As `Grounder.load` and `Grounder.ground`.
    """
    from medreasoner import Grounder, __version__
    from medreasoner.ops import simd_level
    from medreasoner.providers import usable_cores
    from medreasoner_cli.folders import bundle_path

    start = time.perf_counter()
    chosen: Any = device
    with Grounder.load(bundle_path(bundle), device=chosen, n_threads=threads, cache_bytes=0) as grounder:
        load = (time.perf_counter() - start) * 1000
        providers = dict(grounder.providers)
        first, sample = _repeat(lambda: grounder.ground(image, query, think=think), runs)
        with grounder.open(image) as study:
            further, _ = _repeat(lambda: study.ground(query, think=think), runs)
    return {
        "medreasoner": __version__,
        "bundle": {"name": sample.model_name, "version": sample.model_version, "digest": sample.model_digest},
        "device": device,
        "providers": providers,
        "threads": threads or usable_cores(),
        "simd": simd_level(),
        "image": [sample.image.height, sample.image.width],
        "runs": runs,
        "tokens": dict(sample.tokens),
        "warnings": list(sample.warnings),
        "load_ms": round(load, 1),
        "first": first,
        "further": further,
    }


def _repeat(ask: "Callable[[], Grounding]", runs: int) -> "tuple[dict[str, dict[str, float]], Grounding]":
    import numpy as np

    results, walls = [], []
    for _ in range(runs + _WARM_UP):
        start = time.perf_counter()
        results.append(ask())
        walls.append((time.perf_counter() - start) * 1000)
    stages = {stage: [result.timings_ms[stage] for result in results[_WARM_UP:]] for stage in results[-1].timings_ms}
    stages.pop("total", None)
    stages["wall"] = walls[_WARM_UP:]
    report = {}
    for stage, values in stages.items():
        middle, high = np.percentile(values, [50, 95])
        report[stage] = {"p50": round(float(middle), 3), "p95": round(float(high), 3)}
    return report, results[-1]


def table(report: Mapping[str, Any]) -> str:
    """Report as text."""
    model, first, further = report["bundle"], report["first"], report["further"]
    runs_on = ", ".join(dict.fromkeys(report["providers"].values()))
    lines = [
        f"{model['name']} {model['version']} on {runs_on}, {report['threads']} threads, {report['simd']}; "
        f"image {report['image'][1]} x {report['image'][0]}; {report['runs']} runs; load {report['load_ms']:.0f} ms",
        *(f"note: {warning}" for warning in report["warnings"]),
        f"{'ms':<16}{'first p50':>12}{'p95':>10}{'further p50':>14}{'p95':>10}",
    ]
    for stage in first:
        line = f"{stage:<16}{first[stage]['p50']:>12.2f}{first[stage]['p95']:>10.2f}"
        if stage in further:
            line += f"{further[stage]['p50']:>14.2f}{further[stage]['p95']:>10.2f}"
        lines.append(line)
    return "\n".join(lines)
