"""Spans and metrics of answers, for OpenTelemetry.

Nothing is sent unless `instrument` was called, and never a query, an answer, pixels or a name.
"""

from collections.abc import Callable
from typing import Any

from medreasoner._extras import require
from medreasoner.result import Grounding

__all__ = ["instrument", "tell", "uninstrument"]

_observers: list[Callable[[Grounding], None]] = []


def tell(result: Grounding) -> None:
    """Show a result to whoever asked for it."""
    for observe in _observers:
        observe(result)


def instrument(*, tracer_provider: Any = None, meter_provider: Any = None) -> None:
    """From now on record every answer of this process.

    A span ``medreasoner.ground`` with a child for each stage, laid one behind the other and ending now; the histogram
    ``medreasoner.stage.duration`` (milliseconds, by stage), and the counters ``medreasoner.tokens`` (by kind) and
    ``medreasoner.answers`` (found or not, from the cache or not).

    Parameters
    ----------
    tracer_provider, meter_provider
        Of OpenTelemetry's SDK; None: those that are set for the process.

    Raises
    ------
    MissingExtraError
        If ``opentelemetry-api`` is not installed.
    """
    trace: Any = require("opentelemetry.trace", extra="otel", feature="Telemetry")
    metrics: Any = require("opentelemetry.metrics", extra="otel", feature="Telemetry")
    tracer = trace.get_tracer("medreasoner", tracer_provider=tracer_provider)
    meter = metrics.get_meter("medreasoner", meter_provider=meter_provider)
    durations = meter.create_histogram("medreasoner.stage.duration", unit="ms", description="Time of a stage")
    tokens = meter.create_counter("medreasoner.tokens", description="Tokens by kind")
    answers = meter.create_counter("medreasoner.answers", description="Answers")

    def observe(result: Grounding) -> None:
        about = {"medreasoner.model": result.model_name, "medreasoner.version": result.model_version}
        is_cached = result.tokens.get("cached", 0) > 0
        answers.add(1, {**about, "found": result.found, "cached": is_cached})
        for kind, count in result.tokens.items():
            tokens.add(count, {**about, "kind": kind})
        for stage, spent in result.timings_ms.items():
            durations.record(spent, {**about, "stage": stage})
        _record_spans(tracer, result, {**about, "medreasoner.found": result.found, "medreasoner.cached": is_cached})

    _observers.append(observe)


def uninstrument() -> None:
    """Record nothing any more."""
    _observers.clear()


def _record_spans(tracer: Any, result: Grounding, about: dict[str, Any]) -> None:
    import time

    trace: Any = require("opentelemetry.trace", extra="otel", feature="Telemetry")
    end = time.time_ns()
    start = end - int(result.timings_ms["total"] * 1e6)
    root = tracer.start_span("medreasoner.ground", start_time=start, attributes=about)
    parent, at = trace.set_span_in_context(root), start
    for stage, spent in result.timings_ms.items():
        if stage == "total":
            continue
        child = tracer.start_span(f"medreasoner.{stage}", context=parent, start_time=at)
        at += int(spent * 1e6)
        child.end(end_time=at)
    root.end(end_time=end)
