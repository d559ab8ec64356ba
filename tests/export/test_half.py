"""Graphs that compute in float16: near float32, float32 at their ends, and caches that a GPU's attention takes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from medreasoner import Grounder
from medreasoner.bundle import Bundle, load_bundle
from medreasoner.errors import BundleError
from medreasoner_export import (
    ReasonerOptions,
    SegmenterOptions,
    build_bundle,
    export_reasoner,
    export_segmenter,
    verify_bundle,
)
from medreasoner_export.graph import FLOAT, GraphBuilder


@pytest.fixture(scope="module")
def half(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("half")
    reasoner = export_reasoner(toy / "reasoner", folder / "reasoner", options=ReasonerOptions(precision="fp16"))
    segmenter = export_segmenter(toy / "segmenter", folder / "segmenter", options=SegmenterOptions(precision="fp16"))
    return load_bundle(build_bundle(reasoner.folder, segmenter.folder, folder / "bundle", name="half"))


def test_the_whole_bundle_is_near_the_checkpoints(half: Bundle, toy: Path) -> None:
    report = verify_bundle(half.root, toy / "reasoner", toy / "segmenter")
    assert report.passed, report.to_markdown()
    assert max(stage.relative for stage in report.stages) > 1e-5  # it did compute in float16


def test_it_computes_in_float16_and_passes_float32(half: Bundle) -> None:
    spec = half.spec
    for name in (spec.reasoner.graphs.vision, spec.reasoner.graphs.decoder, spec.segmenter.graphs.encoder):
        graph = onnx.shape_inference.infer_shapes(onnx.load(half.path(name))).graph
        reals = {weight.data_type for weight in graph.initializer} & {TensorProto.FLOAT, TensorProto.FLOAT16}
        assert reals == {TensorProto.FLOAT16}, name
        for value in (*graph.input, *graph.output):
            kind = value.type.tensor_type.elem_type
            assert (kind == TensorProto.FLOAT16) == value.name.startswith(("past_", "present_")), value.name


def test_a_question_is_answered_through_the_runtime(half: Bundle) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120), dtype=np.uint8)
    with Grounder.load(half.root, device="cpu") as grounder, grounder.open(pixels) as study:
        first, second = study.ground("Where is it?"), study.ground("Where is it?")  # the second from a saved prefix
    assert first.answer == second.answer
    np.testing.assert_array_equal(first.mask, second.mask)


def test_weights_beyond_float16_are_refused() -> None:
    g = GraphBuilder("g", precision="fp16")
    x = g.input("x", FLOAT, ("n", 4))
    with pytest.raises(
        BundleError, match=r"weight layer\.weight: 1e\+06 does not fit float16; export with --precision"
    ):
        g.linear(x, "layer", np.full((2, 4), 1e6, np.float32))


def test_an_output_that_is_used_on_the_way_stays_float32_outside() -> None:
    g = GraphBuilder("g", precision="fp16")
    x = g.input("x", FLOAT, ("n", 4))
    y = g.op("Mul", x, x, out="y")
    g.op("Add", y, g.constant("one", np.ones(4, np.float32)), out="z")
    for name in ("y", "z"):
        g.output(name, FLOAT, ("n", 4))
    session = ort.InferenceSession(g.model({}).SerializeToString(), providers=["CPUExecutionProvider"])
    y_found, z_found = session.run(["y", "z"], {"x": np.full((1, 4), 1.5, np.float32)})
    assert y_found.dtype == z_found.dtype == np.float32
    assert (y_found == 2.25).all()
    assert (z_found == 3.25).all()


def test_eight_bits_are_near_the_checkpoints_too(toy: Path, tmp_path: Path) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "r", options=ReasonerOptions(precision="int8"))
    export_segmenter(toy / "segmenter", tmp_path / "s", options=SegmenterOptions(precision="int8"))
    folder = build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "b", name="eight")
    report = verify_bundle(folder, toy / "reasoner", toy / "segmenter")
    assert report.passed, report.to_markdown()
    for name, operator in (
        ("reasoner/vision.onnx", "DynamicQuantizeMatMul"),
        ("reasoner/decoder.onnx", "MatMulNBits"),
        ("segmenter/encoder.onnx", "DynamicQuantizeMatMul"),
    ):
        assert operator in {node.op_type for node in onnx.load(folder / name).graph.node}, name
