"""The manifest is read strictly, and every refusal names the key."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medreasoner.errors import BundleError
from medreasoner.manifest import parse_manifest, read_record
from medreasoner.spec import BundleSpec, ConfidenceSpec, PadResize, SmartResize, StretchResize


def at(data: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *path, last = key.split("/")
    for name in path:
        data = data[name]
    return data, last


def test_a_manifest_becomes_records(spec: BundleSpec) -> None:
    assert spec.reasoner.graphs.decoder == "reasoner/decoder.onnx"
    assert spec.reasoner.mrope_section == (2, 2, 2)
    assert spec.reasoner.vision.resize == StretchResize(width=84, height=84)
    assert spec.segmenter.resize == PadResize(size=64)
    assert spec.reasoner.answer.absent is not None
    assert spec.used_files() == (
        "reasoner/vision.onnx",
        "reasoner/decoder.onnx",
        "reasoner/embedding.bin",
        "reasoner/tokenizer.json",
        "segmenter/encoder.onnx",
        "segmenter/decoder.onnx",
    )


def test_graphs_for_the_cpu_are_optional_each(manifest: dict[str, Any]) -> None:
    assert parse_manifest(json.dumps(manifest)).cpu_graphs() == {}
    manifest["reasoner"]["cpu_graphs"] = {"vision": "reasoner/cpu/vision.onnx"}
    with pytest.raises(
        BundleError, match=r"files: expected every file that is used, got \['reasoner/cpu/vision.onnx'\]"
    ):
        parse_manifest(json.dumps(manifest))
    manifest["files"]["reasoner/cpu/vision.onnx"] = {"sha256": "0" * 64, "size_bytes": 0}
    spec = parse_manifest(json.dumps(manifest))
    assert spec.cpu_graphs() == {"reasoner/vision.onnx": "reasoner/cpu/vision.onnx"}
    assert "reasoner/cpu/vision.onnx" in spec.used_files()
    for graphs, words in (
        ({"encoder": "x"}, "encoder: unknown key"),
        ({"vision": 3}, "vision: expected text"),
        ([], ""),
    ):
        manifest["reasoner"]["cpu_graphs"] = graphs
        with pytest.raises(BundleError, match=rf"reasoner\.cpu_graphs.*{words}"):
            parse_manifest(json.dumps(manifest))


def leaves(data: Any, path: str = "") -> list[str]:
    if not isinstance(data, dict) or path in ("producers", "source", "training", "quality"):
        return [path]
    inner = [leaf for key, value in data.items() for leaf in leaves(value, f"{path}/{key}" if path else key)]
    return inner + ([path] if path else [])


def test_every_missing_key_is_named(manifest: dict[str, Any]) -> None:
    for key in leaves(manifest):
        if key.startswith("files/") and key.count("/") < 3 and not key.endswith(("sha256", "size_bytes")):
            continue
        broken = copy.deepcopy(manifest)
        where, last = at(broken, key) if not key.startswith("files/") else _file(broken, key)
        del where[last]
        with pytest.raises(BundleError, match=last):
            parse_manifest(json.dumps(broken))


def _file(data: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    _, rest = key.split("/", 1)
    name, last = rest.rsplit("/", 1)
    return data["files"][name], last


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("schema_version", 2, "schema_version: expected 1, got 2"),
        ("name", 7, "name: expected text"),
        ("opset", "20", "opset: expected an integer"),
        ("opset", True, "opset: expected an integer"),
        ("opset", -1, "opset: expected an integer of at least 0"),
        ("reasoner", [], "reasoner: expected an object"),
        ("reasoner/architecture", "llama", "reasoner.architecture: expected one of qwen2_5_vl"),
        ("reasoner/rope_theta", float("nan"), "reasoner.rope_theta: expected a finite number"),
        ("reasoner/rope_theta", 10**400, "reasoner.rope_theta: expected a finite number"),
        ("reasoner/coordinates", "relative_" + "9" * 5000, "reasoner.coordinates: expected absolute or relative_N"),
        ("reasoner/mrope_section", [8, 12], "reasoner.mrope_section: expected an array of 3"),
        ("reasoner/mrope_section", [1, 2, 2], "reasoner.mrope_section: expected half of head_dim"),
        ("reasoner/n_kv_heads", 3, "reasoner.n_kv_heads: expected a divisor of 2"),
        ("reasoner/n_layers", 0, "reasoner.n_layers: expected a positive number"),
        ("reasoner/coordinates", "percent", "reasoner.coordinates: expected absolute or relative_N"),
        ("reasoner/absent_threshold", 1.5, "reasoner.absent_threshold: expected a probability or null"),
        ("reasoner/embedding/shape", [1, 24], "reasoner.embedding.shape: expected"),
        ("reasoner/embedding/dtype", "int8", "reasoner.embedding.dtype: expected one of"),
        ("reasoner/vision/window_size", 20, "reasoner.vision.window_size: expected at least 28"),
        ("reasoner/vision/image_std", [1, 0, 1], "reasoner.vision.image_std: expected positive"),
        ("reasoner/vision/image_mean", [1, "0", 1], r"reasoner.vision.image_mean\[1\]: expected a finite number"),
        ("reasoner/vision/full_attention_layers", 3, "reasoner.vision.full_attention_layers: expected an array"),
        ("reasoner/vision/resize/rule", "crop", "reasoner.vision.resize.rule: expected one of"),
        ("reasoner/vision/resize/width", 85, "reasoner.vision.resize: expected multiples of 28"),
        ("reasoner/prompt/template", "{query}{image}", "reasoner.prompt.template: expected"),
        ("reasoner/prompt/template", "{image}{query}{query}", "reasoner.prompt.template: expected"),
        ("reasoner/answer/present", "[{x1}]", "reasoner.answer.present: expected the fields"),
        ("reasoner/answer/end", "", "reasoner.answer.end: expected text"),
        ("segmenter/resize", {"rule": "smart", "min_pixels": 1, "max_pixels": 9, "factor": 1}, "segmenter.resize.rule"),
        ("segmenter/n_masks", 0, "segmenter.n_masks: expected a positive number"),
        ("licence/file", "LICENSE.weights", "files: expected every file that is used"),
        ("files/reasoner~vision.onnx", {"sha256": "A" * 64, "size_bytes": 1}, "sha256: expected 64 lower-case"),
        ("surprise", 1, "surprise: unknown key"),
        ("reasoner/vision/surprise", 1, "reasoner.vision.surprise: unknown key"),
    ],
)
def test_a_wrong_value_is_named(manifest: dict[str, Any], key: str, value: Any, named: str) -> None:
    where, last = at(manifest, key)
    where[last.replace("~", "/")] = value
    with pytest.raises(BundleError, match=named):
        parse_manifest(json.dumps(manifest))


def test_resize_rules_are_told_apart(manifest: dict[str, Any]) -> None:
    manifest["reasoner"]["vision"]["resize"] = {"rule": "smart", "min_pixels": 3136, "max_pixels": 10**6, "factor": 28}
    manifest["segmenter"]["resize"] = {"rule": "stretch", "size": 1024}
    spec = parse_manifest(json.dumps(manifest))
    assert spec.reasoner.vision.resize == SmartResize(min_pixels=3136, max_pixels=10**6, factor=28)
    assert spec.segmenter.resize == StretchResize(width=1024, height=1024)


@given(st.one_of(st.text(), st.binary()))
def test_text_that_is_no_manifest_is_a_bundle_error(text: str | bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema_version": 1e999}', "null", "[]", '{"schema_version": 1}'])
def test_hostile_json_is_a_bundle_error(text: str) -> None:
    with pytest.raises(BundleError):
        parse_manifest(text)


@pytest.mark.parametrize(
    "confidence",
    [
        {"temperature": 0.0, "knots": [[0.5, 0.5]]},
        {"temperature": 0.7, "knots": []},
        {"temperature": 0.7, "knots": [[0.5, 0.5], [0.5, 0.6]]},
        {"temperature": 0.7, "knots": [[0.5, 0.6], [0.7, 0.5]]},
        {"temperature": 0.7, "knots": [[0.5, 1.1]]},
        {"temperature": 0.7, "knots": [[0.5]]},
    ],
)
def test_a_confidence_that_is_no_rising_line_is_refused(confidence: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"^confidence"):
        read_record(ConfidenceSpec, confidence, "confidence")


def test_a_confidence_is_read() -> None:
    found = read_record(ConfidenceSpec, {"temperature": 0.7, "knots": [[0.2, 0.1], [0.9, 0.8]]}, "confidence")
    assert found == ConfidenceSpec(temperature=0.7, knots=((0.2, 0.1), (0.9, 0.8)))
