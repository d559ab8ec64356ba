"""Four bits calibrated on prompts: the statistics, the bundle, what it says of itself, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

from medreasoner import Grounder, ops
from medreasoner.bundle import Bundle, load_bundle
from medreasoner.errors import BundleError, ImageReadError, MedReasonerError, QueryError
from medreasoner_cli.main import app
from medreasoner_export import (
    CalibrationPrompt,
    ReasonerOptions,
    SegmenterOptions,
    build_bundle,
    export_reasoner,
    export_segmenter,
    read_prompts,
)
from medreasoner_export.checkpoint import Checkpoint
from medreasoner_export.layerwise import LayerwiseRounding
from medreasoner_export.parity_reasoner import reasoner_stages
from medreasoner_export.parity_segmenter import segmenter_stages
from medreasoner_export.prompts import PromptReader
from medreasoner_export.qwen_config import QwenConfig
from medreasoner_export.streamed import prompt_inputs
from medreasoner_export.toy import make_toy_reasoner

ANSWER = '<answer>{"bbox": [10, 20, 110, 220], "points_1": [50, 60], "points_2": [70, 80]}</answer>'

LINE = json.dumps({"image": "a.png", "query": "q", "answer": "a"})


def _drawn(count: int) -> list[CalibrationPrompt]:
    rng = np.random.default_rng(0)
    return [
        CalibrationPrompt(
            image=rng.integers(0, 255, (60 + 9 * n, 90), np.uint8), query=f"Where is the heart {n}?", answer=ANSWER
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def prompts() -> Sequence[CalibrationPrompt]:
    return _drawn(4)


@pytest.fixture(scope="module")
def calibrated(toy: Path, prompts: Sequence[CalibrationPrompt], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("calibrated")
    options = ReasonerOptions(precision="int4", calibration=prompts)
    seen: list[tuple[int, int, str]] = []
    said: list[str] = []
    export_reasoner(
        toy / "reasoner", folder / "r", options=options,
        progress=lambda *each: seen.append(each), announce=said.append,
    )  # fmt: skip
    assert [each[0] for each in seen] == sorted(each[0] for each in seen)
    assert seen[-1][0] == seen[-1][1]
    assert "calibrating on 4 prompts of " in said[-1]
    assert not [path for path in (folder / "r").iterdir() if path.is_dir()]  # no layer is left
    export_segmenter(toy / "segmenter", folder / "s")
    return load_bundle(build_bundle(folder / "r", folder / "s", folder / "b", name="calibrated"), verify="full")


def test_the_manifest_says_on_how_many_prompts(calibrated: Bundle, bundle: Bundle) -> None:
    said = calibrated.spec.source["reasoner_calibration"]
    assert said["prompts"] == 4
    assert said["tokens"] > 4 * 81
    assert "reasoner_calibration" not in bundle.spec.source


def test_it_loads_answers_and_is_verified(calibrated: Bundle, toy: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120), dtype=np.uint8)
    with Grounder.load(calibrated.root, device="cpu") as grounder:
        assert grounder.ground(pixels, "Where is it?").answer.startswith("<answer>")
    # Graph by graph: two answers of random weights may differ, as those of any four bits.
    stages = list(reasoner_stages(calibrated, toy / "reasoner", tolerance=1e-4, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []
    (stage,) = [stage for stage in stages if stage.name.startswith("calibrated matrices")]
    assert 0.03 < stage.error < 0.2


def test_verify_sees_matrices_that_are_not_the_checkpoints(calibrated: Bundle, tmp_path: Path) -> None:
    other = make_toy_reasoner(tmp_path / "other", seed=1)
    stages = list(reasoner_stages(calibrated, other, tolerance=1e-4, seed=0))
    assert not next(stage for stage in stages if stage.name.startswith("calibrated matrices")).passed


def test_the_same_prompts_give_the_same_file(
    calibrated: Bundle, toy: Path, prompts: Sequence[CalibrationPrompt], tmp_path: Path
) -> None:
    options = ReasonerOptions(precision="int4", calibration=prompts)
    export_reasoner(toy / "reasoner", tmp_path, options=options)
    name = calibrated.spec.reasoner.graphs.decoder
    assert (tmp_path / "decoder.onnx").read_bytes() == calibrated.path(name).read_bytes()


def _layers(toy: Path, folder: Path, prompts: Sequence[CalibrationPrompt]) -> tuple[LayerwiseRounding, Any]:
    bundle = load_bundle(toy / "bundle")
    spec = bundle.spec.reasoner
    checkpoint = Checkpoint(toy / "reasoner")
    states = PromptReader(spec, bundle.path).states(prompts)
    config = QwenConfig.from_json(checkpoint.config)
    return LayerwiseRounding(checkpoint, config, "float32", spec=spec, states=states, scratch=folder), states


def test_the_statistics_are_those_of_transformers(
    toy: Path, bundle: Bundle, qwen: Any, prompts: Sequence[CalibrationPrompt], tmp_path: Path
) -> None:
    rounding, _ = _layers(toy, tmp_path, prompts)
    seen: dict[str, list[np.ndarray]] = {}
    first = qwen.model.language_model.layers[0]
    parts = {
        "qkv": first.self_attn.q_proj, "self_attn.o_proj": first.self_attn.o_proj,
        "mlp.gate": first.mlp.gate_proj, "mlp.up": first.mlp.up_proj, "mlp.down_proj": first.mlp.down_proj,
    }  # fmt: skip
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0][0].numpy())
        )
        for name, module in parts.items()
    ]
    reader = PromptReader(bundle.spec.reasoner, bundle.path)
    for prompt in prompts:
        ids, pixels, placement, grid = reader._read(prompt)
        vision = bundle.spec.reasoner.vision
        patches = ops.preprocess_patches(
            pixels, placement.grid_height, placement.grid_width,
            content=(placement.content_height, placement.content_width), mean=vision.image_mean,
            std=vision.image_std, patch=vision.patch_size, merge=vision.merge_size,
        )  # fmt: skip
        with torch.inference_mode():
            qwen(**prompt_inputs(qwen, ids, reader._prompt.image_token, patches, grid))
    for hook in hooks:
        hook.remove()
    rounding._enter(0)
    for name in parts:
        rows = np.concatenate(seen[name]).astype(np.float64)
        ((_, found),) = rounding._moments[f"layers.0.{name}.weight"].parts()
        expected = rows.T @ rows / len(rows)
        expected += np.eye(len(expected)) * np.trace(expected) / len(expected) / 100
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), name


def test_hidden_states_come_nearer_to_those_of_float32(
    calibrated: Bundle, bundle: Bundle, toy: Path, tmp_path: Path
) -> None:
    """On prompts that were not calibrated with, read by the whole decoders."""
    export_reasoner(toy / "reasoner", tmp_path, options=ReasonerOptions(precision="int4"))
    states = PromptReader(bundle.spec.reasoner, bundle.path).states(_drawn(8)[4:])
    paths = {
        "exact": bundle.path(bundle.spec.reasoner.graphs.decoder),
        "nearest": tmp_path / "decoder.onnx",
        "calibrated": calibrated.path(calibrated.spec.reasoner.graphs.decoder),
    }
    hidden = {}
    for name, path in paths.items():
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        spec = bundle.spec.reasoner
        empty = np.zeros((1, spec.n_kv_heads, spec.max_length, spec.head_dim), np.float32)
        caches = {each.name: empty for each in session.get_inputs() if each.name.startswith("past_")}
        runs = [session.run(["hidden_states"], state.inputs(spec) | caches)[0][0] for state in states]
        hidden[name] = np.concatenate(runs)
    errors = {name: np.linalg.norm(hidden[name] - hidden["exact"]) for name in ("nearest", "calibrated")}
    assert errors["calibrated"] < 0.8 * errors["nearest"]


def test_weights_beside_the_graph_and_bfloat16_do_not_matter(
    toy: Path, prompts: Sequence[CalibrationPrompt], tmp_path: Path
) -> None:
    options = {"precision": "int4", "calibration": prompts}
    export_reasoner(toy / "reasoner", tmp_path / "in", options=ReasonerOptions(**options))  # type: ignore[arg-type]
    outside = ReasonerOptions(external_data=True, **options)  # type: ignore[arg-type]
    export_reasoner(toy / "reasoner", tmp_path / "out", options=outside)
    loaded = [onnx.load(str(tmp_path / name / "decoder.onnx")) for name in ("in", "out")]
    arrays = [{each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer} for model in loaded]
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(array, arrays[1][name])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"image": "missing.png"}, ImageReadError, "prompt 2 to calibrate with: .*missing.png"),
        ({"query": "  "}, QueryError, "prompt 2 to calibrate with: query: empty"),
        ({"query": "word " * 400}, QueryError, "prompt 2 to calibrate with: query: .* at most 96"),
        ({"answer": "word " * 600}, BundleError, "prompt 2 to calibrate with: .* 512 have room"),
    ],
    ids=["unreadable", "empty query", "long query", "long answer"],
)
def test_a_prompt_that_does_not_fit_is_refused_and_nothing_is_left(
    toy: Path, tmp_path: Path, change: dict[str, Any], error: type[MedReasonerError], words: str
) -> None:
    good = _drawn(1)[0]
    fields = {"image": good.image, "query": good.query, "answer": good.answer}
    bad = CalibrationPrompt(**(fields | change))
    with pytest.raises(error, match=words):
        export_reasoner(
            toy / "reasoner", tmp_path / "r", options=ReasonerOptions(precision="int4", calibration=[good, bad])
        )
    assert not (tmp_path / "r").exists()


def test_other_precisions_have_nothing_to_calibrate(toy: Path, tmp_path: Path) -> None:
    options = ReasonerOptions(precision="int8", calibration=_drawn(1))
    with pytest.raises(BundleError, match="are for precision int4, not int8"):
        export_reasoner(toy / "reasoner", tmp_path / "r", options=options)
    assert not (tmp_path / "r").exists()


def test_a_file_of_prompts_is_read_with_paths_beside_it(tmp_path: Path) -> None:
    lines = [
        {"image": "a/b.png", "query": "Where?", "answer": ANSWER},
        {"image": "/c.png", "query": "What?", "answer": "", "id": 7},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    first, second = read_prompts(path)
    assert (first.image, first.query, first.answer) == (tmp_path / "a" / "b.png", "Where?", ANSWER)
    assert (second.image, second.answer) == (Path("/c.png"), "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it holds no prompts"),
        (f"{LINE}\n" + LINE.replace("query", "other"), ":2: expected a JSON object with the texts image, query and"),
        (LINE.replace("answer", "anwser"), ":1: expected a JSON object"),
        (LINE.replace('"q"', "3"), ":1: expected a JSON object"),
        ("[" * 100_000, ":1: expected a JSON object"),
        ("\xff", "cannot be read"),
    ],
    ids=["empty", "no query", "no answer", "number", "deep", "not UTF-8"],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=words):
        read_prompts(path)


def test_the_command_takes_the_file(toy: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (70, 80), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"image": "a.png", "query": "Where is it?", "answer": ANSWER}))
    command = ["export", "reasoner", str(toy / "reasoner"), "-o", str(tmp_path / "r"), "--precision", "int4"]
    result = CliRunner().invoke(app, [*command, "--calibrate", str(path)])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "r" / "export.json").read_text())["calibration"]["prompts"] == 1
    result = CliRunner().invoke(app, [*command, "--calibrate", str(tmp_path / "none.jsonl")])
    assert isinstance(result.exception, BundleError)
    assert "none.jsonl: prompts to calibrate with cannot be read" in str(result.exception)


def test_an_image_encoder_in_four_bits_is_near_and_becomes_its_matrices_elsewhere(
    toy: Path, tmp_path: Path, dialect_of: Any
) -> None:
    export_reasoner(toy / "reasoner", tmp_path / "r")
    export_segmenter(toy / "segmenter", tmp_path / "s", options=SegmenterOptions(precision="int4"))
    made = load_bundle(build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "b", name="four"))
    stages = list(segmenter_stages(made, toy / "segmenter", tolerance=1e-4, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []
    assert stages[0].relative > 1e-3  # it is in four bits
    path = made.path(made.spec.segmenter.graphs.encoder)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    assert {each.i for node in nodes for each in node.attribute if each.name == "bits"} == {4}
    pixels = np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype=np.float32)
    own = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    found, expected = (each.run(None, {"pixel_values": pixels})[0] for each in (dialect_of(made, "encoder"), own))
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()  # activations in eight bits on one side
