"""Bundles with graphs for the CPU beside those for GPUs: built, loaded, refused and verified."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from medreasoner import Grounder
from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner.manifest import manifest_sha256
from medreasoner_export import (
    EngineLimits,
    ReasonerOptions,
    SegmenterOptions,
    build_bundle,
    export_reasoner,
    export_segmenter,
    verify_bundle,
)
from medreasoner_export.checkpoint import sha256_of
from medreasoner_export.toy import make_toy_reasoner
from medreasoner_export.trt_plan import engine_plans

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
MAIN = {"reasoner/vision.onnx", "reasoner/decoder.onnx", "segmenter/encoder.onnx", "segmenter/decoder.onnx"}
SECOND = {"reasoner/cpu/vision.onnx", "segmenter/cpu/encoder.onnx"}
ON_CPU = {"reasoner/cpu/vision.onnx", "reasoner/decoder.onnx", "segmenter/cpu/encoder.onnx", "segmenter/decoder.onnx"}
PIXELS = np.random.default_rng(0).integers(0, 256, (90, 120), dtype=np.uint8)


@pytest.fixture(scope="module")
def exports(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``r-fp16``, ``s-fp16`` and the same in int8."""
    folder = tmp_path_factory.mktemp("exports")
    for precision in ("fp16", "int8"):
        reasoner, segmenter = ReasonerOptions(precision=precision), SegmenterOptions(precision=precision)
        export_reasoner(toy / "reasoner", folder / f"r-{precision}", options=reasoner)
        export_segmenter(toy / "segmenter", folder / f"s-{precision}", options=segmenter)
    return folder


@pytest.fixture
def build(exports: Path, tmp_path: Path) -> Callable[..., Path]:
    """A bundle in float16 with vision tower and image encoder in int8 for the CPU."""

    def make(**options: Any) -> Path:
        chosen = {
            "cpu_reasoner": exports / "r-int8",
            "cpu_segmenter": exports / "s-int8",
            "cpu_graphs": ("vision", "encoder"),
            **options,
        }
        return build_bundle(exports / "r-fp16", exports / "s-fp16", tmp_path / "both", name="both", **chosen)

    return make


def test_the_files_are_beside_the_main_ones_and_listed(build: Callable[..., Path], exports: Path) -> None:
    bundle = load_bundle(build(), verify="full")
    spec = bundle.spec
    assert set(spec.cpu_graphs().values()) == SECOND
    assert {name for name in spec.files if name.endswith(".onnx")} == MAIN | SECOND
    assert spec.files["reasoner/cpu/vision.onnx"].sha256 == sha256_of(exports / "r-int8/vision.onnx")
    assert spec.precision == "fp16"
    assert {plan.source for plan in engine_plans(bundle, EngineLimits())} == MAIN  # engines are for GPUs


def test_all_that_differs_is_taken_if_nothing_is_said(build: Callable[..., Path]) -> None:
    from medreasoner_export.package import CPU_GRAPHS

    spec = load_bundle(build(cpu_graphs=tuple(CPU_GRAPHS))).spec
    assert set(spec.cpu_graphs().values()) == SECOND | {"reasoner/cpu/decoder.onnx"}  # mask decoders are the same


def test_the_cpu_answers_with_its_graphs(build: Callable[..., Path], exports: Path, tmp_path: Path) -> None:
    alone = build_bundle(exports / "r-int8", exports / "s-int8", tmp_path / "alone", name="alone")
    with Grounder.load(build(), device="cpu") as both, Grounder.load(alone, device="cpu") as eight:
        assert both.providers == dict.fromkeys(ON_CPU, CPU)
        seen = [each._engine.segmenter.encode(each.open(PIXELS).image).features for each in (both, eight)]
        assert both.ground(PIXELS, "Where is it?").warnings == eight.ground(PIXELS, "Where is it?").warnings
    np.testing.assert_array_equal(seen[0]["image_embedding"], seen[1]["image_embedding"])


@pytest.mark.parametrize(("starts", "graphs"), [(True, MAIN), (False, ON_CPU)])
def test_a_gpu_takes_the_main_graphs_and_a_fall_back_those_of_the_cpu(
    build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, starts: bool, graphs: set[str]
) -> None:
    real = ort.InferenceSession

    def start(path: str, options: object, *, providers: list[tuple[str, object]], **more: object) -> object:
        if providers[0][0] == CUDA and not starts:
            raise RuntimeError("no such library")
        session = real(path, options, providers=[CPU], **more)
        if providers[0][0] == CUDA:
            session.get_providers = lambda: [CUDA, CPU]
        return session

    folder = build()
    monkeypatch.setattr(ort, "InferenceSession", start)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    with Grounder.load(folder, device="auto") as grounder:
        assert set(grounder.providers) == graphs
        assert set(grounder.providers.values()) == {CUDA if starts else CPU}
        assert bool(grounder._engine.warnings) is not starts
    with Grounder.load(folder, device="cpu") as grounder:
        assert set(grounder.providers) == ON_CPU


def test_weights_beside_a_graph_come_along(build: Callable[..., Path], toy: Path, tmp_path: Path) -> None:
    options = ReasonerOptions(precision="int8", external_data=True)
    export_reasoner(toy / "reasoner", tmp_path / "outside", options=options)
    folder = build(cpu_reasoner=tmp_path / "outside")
    assert "reasoner/cpu/vision.onnx.data" in load_bundle(folder, verify="full").spec.files
    with Grounder.load(folder, device="cpu") as grounder:
        assert set(grounder.providers) == ON_CPU
        grounder.ground(PIXELS, "Where is it?")


def test_an_export_of_another_checkpoint_is_refused(build: Callable[..., Path], tmp_path: Path) -> None:
    other = make_toy_reasoner(tmp_path / "other", seed=1)
    export_reasoner(other, tmp_path / "r-other", options=ReasonerOptions(precision="int8"))
    with pytest.raises(BundleError, match="r-other: it was exported from another checkpoint"):
        build(cpu_reasoner=tmp_path / "r-other")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("settings", "key"), [({"image_mean": [0.1, 0.1, 0.1]}, "image_mean"), ({"box_mask": True}, "box_mask")]
)
def test_an_export_with_other_settings_is_refused(
    build: Callable[..., Path], toy: Path, tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    options = SegmenterOptions(precision="int8", settings=settings)
    export_segmenter(toy / "segmenter", tmp_path / "s-other", options=options)
    with pytest.raises(BundleError, match=f"s-other: its {key} is another"):
        build(cpu_segmenter=tmp_path / "s-other")


def test_what_makes_no_difference_is_refused(build: Callable[..., Path], exports: Path) -> None:
    with pytest.raises(BundleError, match="s-fp16: none of its graphs that were asked for differs"):
        build(cpu_segmenter=exports / "s-fp16")
    with pytest.raises(BundleError, match=r"graphs for the CPU: expected some of vision, .* got 'eyes'"):
        build(cpu_graphs=("eyes",))


def test_a_cut_export_for_the_cpu_is_refused(build: Callable[..., Path], exports: Path, tmp_path: Path) -> None:
    cut: Path = copytree(exports / "s-int8", tmp_path / "cut")
    graph = cut / "encoder.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"cut/encoder\.onnx"):
        build(cpu_segmenter=cut)
    assert not (tmp_path / "both").exists()


def test_a_damaged_graph_for_the_cpu_is_refused_by_its_hash(build: Callable[..., Path]) -> None:
    folder = build()
    path = folder / "segmenter/cpu/encoder.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"segmenter/cpu/encoder\.onnx: its SHA-256 is not the manifest's"):
        Grounder.load(folder, device="cpu")


def test_verify_covers_both_sets_of_graphs(build: Callable[..., Path], toy: Path) -> None:
    folder = build()
    report = verify_bundle(folder, toy / "reasoner", toy / "segmenter")
    assert report.passed, report.to_markdown()
    second = [stage for stage in report.stages if stage.name.startswith("for the CPU: ")]
    assert 2 * len(second) == len(report.stages)
    # One weight of the second vision tower in another place, with a manifest that knows of it.
    name = "reasoner/cpu/vision.onnx"
    model = onnx.load(folder / name)
    (levels,) = (each for each in model.graph.initializer if each.name == "blocks.0.mlp.up.weight.levels")
    levels.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(levels), 1, axis=1), levels.name))
    onnx.save(model, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": sha256_of(folder / name), "size_bytes": (folder / name).stat().st_size}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_sha256(manifest)}))
    stages = verify_bundle(folder, toy / "reasoner", toy / "segmenter").stages
    failed = [stage.name for stage in stages if not stage.passed]
    assert any("vision embeddings" in each for each in failed)
    assert all(each.startswith("for the CPU: ") for each in failed)
