"""Checkpoints that do not fit one file or the memory: weights beside the graph, and four bits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from medreasoner import Grounder
from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner_export import ReasonerOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.parity_reasoner import reasoner_stages

QUERY = "Where is the heart in this image?"
IMAGE = np.random.default_rng(0).integers(0, 255, (60, 80), np.uint8)


@pytest.fixture(scope="module")
def segmenter(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("segmenter")
    export_segmenter(toy / "segmenter", out)
    return out


def _bundle(toy: Path, segmenter: Path, out: Path, options: ReasonerOptions) -> Path:
    export_reasoner(toy / "reasoner", out / "reasoner", options=options)
    return build_bundle(out / "reasoner", segmenter, out / "bundle", name="large")


def _answer(folder: Path, cache: Path) -> tuple[Any, ...]:
    with Grounder.load(folder, verify="full", cache_dir=cache) as grounder:
        result = grounder.ground(IMAGE, QUERY)
    return result.found, result.box, result.points, result.answer


def test_weights_beside_the_graph_give_the_same_answer(toy: Path, segmenter: Path, tmp_path: Path) -> None:
    folder = _bundle(toy, segmenter, tmp_path, ReasonerOptions(external_data=True))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for name in ("reasoner/vision.onnx", "reasoner/decoder.onnx"):
        assert files[f"{name}.data"]["size_bytes"] > 10_000
        model = onnx.load(folder / name, load_external_data=False)
        outside = [each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL]
        assert outside
        for each in outside:
            entries = {entry.key: entry.value for entry in each.external_data}
            assert entries["location"] == f"{Path(name).name}.data"
            assert int(entries["offset"]) % 4096 == 0
    assert _answer(folder, tmp_path) == _answer(toy / "bundle", tmp_path)
    stages = list(reasoner_stages(load_bundle(folder), toy / "reasoner", tolerance=1e-4, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []


def test_a_changed_byte_beside_the_graph_is_noticed(toy: Path, segmenter: Path, tmp_path: Path) -> None:
    folder = _bundle(toy, segmenter, tmp_path, ReasonerOptions(external_data=True))
    data = folder / "reasoner" / "decoder.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data"):
        load_bundle(folder)


def test_a_new_export_leaves_no_weights_of_the_old_one(toy: Path, tmp_path: Path) -> None:
    export_reasoner(toy / "reasoner", tmp_path, options=ReasonerOptions(external_data=True))
    assert (tmp_path / "decoder.onnx.data").is_file()
    export_reasoner(toy / "reasoner", tmp_path)
    beside = sorted(path.name for path in tmp_path.glob("*.data"))
    assert beside == ["decoder.onnx.data", "vision.onnx.data"]  # for what runs without the graphs
    export_reasoner(toy / "reasoner", tmp_path, options=ReasonerOptions(precision="int8"))
    assert not list(tmp_path.glob("*.data"))


def test_large_checkpoints_put_their_weights_outside(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import medreasoner_export.graph as module

    monkeypatch.setattr(module, "LARGEST_INSIDE", 1000)
    export_reasoner(toy / "reasoner", tmp_path)
    assert (tmp_path / "vision.onnx.data").is_file()
    export_segmenter(toy / "segmenter", tmp_path / "segmenter")
    assert (tmp_path / "segmenter" / "encoder.onnx.data").is_file()
    folder = build_bundle(tmp_path, tmp_path / "segmenter", tmp_path / "bundle", name="large")
    assert _answer(folder, tmp_path / "cache") == _answer(toy / "bundle", tmp_path / "cache")


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_short_weights_lie_beside_the_graph_too(toy: Path, segmenter: Path, tmp_path: Path, weights: Any) -> None:
    answers = []
    for external in (False, True):
        out = tmp_path / str(external)
        folder = _bundle(toy, segmenter, out, ReasonerOptions(weights=weights, external_data=external))
        answers.append(_answer(folder, tmp_path / "cache"))
    assert answers[0] == answers[1]


def test_an_export_that_fails_leaves_nothing(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import medreasoner_export.reasoner_parts as module

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_graph", full_disk)
    with pytest.raises(BundleError, match=r"new: it cannot be written \(No space left on device\)"):
        export_reasoner(toy / "reasoner", tmp_path / "new", options=ReasonerOptions(external_data=True))
    assert not (tmp_path / "new").exists()


def test_an_export_that_fails_over_an_earlier_one_is_not_taken_for_it(
    toy: Path, segmenter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "out")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    import medreasoner_export.reasoner as module

    monkeypatch.setattr(module, "describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_reasoner(toy / "reasoner", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == before - {"export.json"}
    with pytest.raises(BundleError, match=r"export\.json is missing"):
        build_bundle(tmp_path / "out", segmenter, tmp_path / "bundle", name="x")


def test_an_output_that_is_a_file_is_refused(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match="file: it cannot be written"):
        export_reasoner(toy / "reasoner", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("external", [False, True])
def test_a_four_bit_decoder_is_verified_and_answers(toy: Path, segmenter: Path, tmp_path: Path, external: bool) -> None:
    options = ReasonerOptions(precision="int4", external_data=external)
    folder = _bundle(toy, segmenter, tmp_path, options)
    spec = load_bundle(folder).spec
    assert spec.precision == "int4"
    graph = onnx.load(folder / "reasoner" / "decoder.onnx", load_external_data=False)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("MatMulNBits") == 5 * spec.reasoner.n_layers  # qkv, o, gate, up, down
    assert "MatMul" not in kinds
    stages = list(reasoner_stages(load_bundle(folder), toy / "reasoner", tolerance=1e-4, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []
    assert max(stage.relative for stage in stages) > 1e-4  # the rounding of activations is there
    found, box, points, text = _answer(folder, tmp_path)
    assert text.startswith("<answer>")
    assert (box is not None) == (points is not None) == found


def test_verifying_four_bits_notices_a_wrong_scale(toy: Path, segmenter: Path, tmp_path: Path) -> None:
    folder = _bundle(toy, segmenter, tmp_path, ReasonerOptions(precision="int4"))
    bundle = load_bundle(folder)
    path = folder / "reasoner" / "decoder.onnx"
    graph = onnx.load(path)
    scales = next(each for each in graph.graph.initializer if each.name.endswith("down_proj.weight.scales"))
    changed = onnx.numpy_helper.to_array(scales) * np.float32(1.5)
    scales.CopyFrom(onnx.numpy_helper.from_array(changed, scales.name))
    onnx.save(graph, path)
    stages = list(reasoner_stages(dataclasses.replace(bundle), toy / "reasoner", tolerance=1e-4, seed=0))
    assert not all(stage.passed for stage in stages)


def test_small_weights_stay_in_the_graph(toy: Path, tmp_path: Path) -> None:
    export_reasoner(toy / "reasoner", tmp_path, options=ReasonerOptions(external_data=True))
    model = onnx.load(tmp_path / "decoder.onnx", load_external_data=False)
    inside = [each for each in model.graph.initializer if each.data_location != onnx.TensorProto.EXTERNAL]
    assert inside
    assert max(each.ByteSize() for each in inside) < 2000
    ort.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
