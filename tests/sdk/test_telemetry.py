"""What OpenTelemetry is told of an answer."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.sdk.test_grounder import QUERIES, picture, with_threshold

import medreasoner as mr
from medreasoner import telemetry
from medreasoner.errors import MissingExtraError


@pytest.fixture
def told() -> Iterator[tuple[InMemorySpanExporter, InMemoryMetricReader]]:
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracer = TracerProvider()
    tracer.add_span_processor(SimpleSpanProcessor(spans))
    telemetry.instrument(tracer_provider=tracer, meter_provider=MeterProvider([reader]))
    yield spans, reader
    telemetry.uninstrument()


def test_stages_and_counts_are_told_and_nothing_about_the_patient(
    told: tuple[InMemorySpanExporter, InMemoryMetricReader], toy_bundle: Path, tmp_path: Path
) -> None:
    exporter, reader = told
    with mr.Grounder.load(with_threshold(toy_bundle, tmp_path / "bundle", 1.0), device="cpu") as grounder:
        first = grounder.ground(picture(), QUERIES[0])
        grounder.ground(picture(), QUERIES[0])
    spans = exporter.get_finished_spans()
    roots = [span for span in spans if span.parent is None]
    assert [root.name for root in roots] == ["medreasoner.ground"] * 2
    assert [root.attributes["medreasoner.cached"] for root in roots if root.attributes] == [False, True]
    own = {span.name for span in spans if span.parent and span.parent.span_id == roots[0].context.span_id}
    assert own == {f"medreasoner.{stage}" for stage in first.timings_ms if stage != "total"}
    total = (roots[0].end_time or 0) - (roots[0].start_time or 0)
    assert abs(total / 1e6 - first.timings_ms["total"]) < 0.01
    data = reader.get_metrics_data()
    assert data is not None
    metrics = {each.name: each for each in data.resource_metrics[0].scope_metrics[0].metrics}
    counted = {point.attributes["kind"]: point.value for point in metrics["medreasoner.tokens"].data.data_points}
    assert counted["image"] == 2 * 81
    assert counted["cached"] > 81
    assert sum(point.value for point in metrics["medreasoner.answers"].data.data_points) == 2
    stages = {point.attributes["stage"] for point in metrics["medreasoner.stage.duration"].data.data_points}
    assert {"vision", "answer", "segment_decode", "cache"} <= stages
    everything = str(spans) + str([dict(span.attributes or {}) for span in spans]) + data.to_json()
    assert QUERIES[0] not in everything
    assert first.answer not in everything


def test_nobody_is_told_without_being_asked(
    told: tuple[InMemorySpanExporter, InMemoryMetricReader], toy_bundle: Path
) -> None:
    telemetry.uninstrument()
    with mr.Grounder.load(toy_bundle, device="cpu") as grounder:
        grounder.ground(picture(), QUERIES[0])
    assert told[0].get_finished_spans() == ()


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(MissingExtraError, match=r"medreasoner\[otel\]"):
        telemetry.instrument()
