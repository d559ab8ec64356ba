"""Engines of TensorRT-RTX, built here without a GPU; what runs them is in test_trt_runtime."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
import pytest

from medreasoner.bundle import Bundle, load_bundle
from medreasoner.engines import read_engines
from medreasoner.errors import BundleError, MissingExtraError
from medreasoner_export import EngineLimits, EngineOptions, build_bundle, export_engines, export_segmenter, trt_build
from medreasoner_export import tensorrt as module
from medreasoner_export.graph import save_graph
from medreasoner_export.trt_build import build_engine
from medreasoner_export.trt_dialect import trt_graph
from medreasoner_export.trt_plan import engine_plans

HAS_BUILDER = importlib.util.find_spec("tensorrt_rtx") is not None
builds = pytest.mark.skipif(
    not HAS_BUILDER, reason="tensorrt-rtx is not installed: pip install 'medreasoner[tensorrt-rtx]'"
)
FOUR = ("sm_80", "sm_86", "sm_89", "sm_120")
GRAPHS = ("mask_decoder", "encoder", "vision", "decoder")


@pytest.fixture(scope="module")
def nano() -> Bundle:
    try:
        return load_bundle("nano")
    except BundleError as err:
        pytest.skip(str(err))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "image.png"
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    PIL.Image.fromarray(np.kron(coarse, np.ones((16, 16), np.uint8))).save(path)
    return path


def export(
    bundle: Bundle, out: Path, *architectures: str, lines: list[str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Entries of ``engines.json``; what was said goes into `lines`."""
    lines = [] if lines is None else lines
    export_engines(
        bundle.root, out, options=EngineOptions(architectures=architectures, **options), progress=lines.append
    )
    content = json.loads((out / "engines.json").read_text())
    assert content["bundle"]["sha256"] == bundle.digest
    entries: list[dict[str, Any]] = content["engines"]
    assert len(lines) == len(entries) + 1  # what is needed, then each engine
    return entries


@builds
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_every_graph_of_nano_builds_as_the_manifest_says(nano: Bundle, tmp_path: Path, precision: Any) -> None:
    entries = export(nano, tmp_path / "out", "sm_86", precision=precision)
    assert [each["graph"] for each in entries] == list(GRAPHS)
    names = {each["file"] for each in entries} | {"engines.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for each in entries:
        content = (tmp_path / "out" / each["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (each["size_bytes"], each["sha256"])
        assert each["source_sha256"] == nano.spec.files[each["source"]].sha256
        assert (each["architecture"], each["precision"]) == ("sm_86", precision)
        for tensor in (*each["inputs"], *each["outputs"]):  # the serialised engine names its tensors
            assert tensor["name"].encode() in content
    by_graph = {each["graph"]: each for each in entries}
    reasoner, segmenter = nano.spec.reasoner, nano.spec.segmenter
    cache = {each["name"]: each for each in by_graph["decoder"]["inputs"]}["past_value.4"]
    shape = ["batch", str(reasoner.n_kv_heads), str(reasoner.max_length), str(reasoner.head_dim)]
    assert (cache["shape"], cache["dtype"]) == (shape, "float16" if precision == "fp16" else "float32")
    assert len(by_graph["decoder"]["profiles"]) == 2
    masks = {each["name"]: each["shape"] for each in by_graph["mask_decoder"]["outputs"]}
    side = str(segmenter.mask_size)
    assert masks["mask_logits"] == ["batch", str(segmenter.n_masks), side, side]
    read = read_engines(tmp_path / "out")  # as the runtime reads it
    assert [each.file for each in read.engines] == [each["file"] for each in entries]
    assert {each.sha256 for each in read.engines} == {
        hashlib.sha256(read.read(each)).hexdigest() for each in read.engines
    }


@builds
def test_four_architectures_build_and_a_second_time_to_the_same_bytes(bundle: Bundle, tmp_path: Path) -> None:
    graphs: Any = ("mask_decoder", "decoder")  # those with several outputs, whose order TensorRT leaves to chance
    lines: list[str] = []
    first = export(bundle, tmp_path / "first", *FOUR, graphs=graphs, lines=lines)
    assert [(each["graph"], each["architecture"]) for each in first] == [(g, a) for g in graphs for a in FOUR]
    hashes = {architecture: {e["sha256"] for e in first if e["architecture"] == architecture} for architecture in FOUR}
    assert hashes["sm_80"].isdisjoint(hashes["sm_120"])  # the architecture is really in it
    if any("addresses are random" in line for line in lines):
        pytest.skip("this system does not let a process fix its addresses, which the same bytes need")
    again = export(bundle, tmp_path / "a" / "second-place", "sm_86", "sm_120", graphs=graphs)
    assert again == [each for each in first if each["architecture"] in ("sm_86", "sm_120")]


@builds
def test_sm_75_builds_in_half_precision_and_says_why_not_in_float32(bundle: Bundle, tmp_path: Path) -> None:
    assert len(export(bundle, tmp_path / "half", "sm_75")) == 4
    with pytest.raises(
        BundleError, match=r"segmenter/decoder\.onnx: TensorRT-RTX cannot build it for sm_75 .*FP32 GEMM"
    ):
        export(bundle, tmp_path / "single", "sm_75", precision="fp32")
    assert not (tmp_path / "single").exists()


@builds
def test_eight_bits_build_with_explicit_marks(nano: Bundle, picture: Path, tmp_path: Path) -> None:
    entries = export(
        nano, tmp_path / "out", "sm_86", precision="int8", calibration=(picture,), graphs=("encoder", "mask_decoder"),
        keep_graphs=True,
    )  # fmt: skip
    assert {each["graph"]: each["precision"] for each in entries} == {"mask_decoder": "fp16", "encoder": "int8"}
    graph = onnx.load(tmp_path / "out" / "encoder.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in graph.graph.node) > 10
    metadata = {each.key: each.value for each in graph.metadata_props}
    assert (metadata["precision"], metadata["dialect"]) == ("int8", "trt")
    whole = export(nano, tmp_path / "half", "sm_86", graphs=("encoder",))
    sizes = [next(each["size_bytes"] for each in some if each["graph"] == "encoder") for some in (entries, whole)]
    assert sizes[0] < sizes[1]


@builds
@pytest.mark.slow
def test_the_true_vit_b_builds_for_four_architectures(toy: Path, picture: Path, tmp_path: Path) -> None:
    bundle = _vit_b(toy, tmp_path)
    entries = export(bundle, tmp_path / "half", *FOUR, graphs=("encoder", "mask_decoder"))
    encoders = [each for each in entries if each["graph"] == "encoder"]
    assert [each["architecture"] for each in encoders] == list(FOUR)
    for each in encoders:
        assert each["inputs"][0]["shape"] == ["batch", "3", "1024", "1024"]
        assert each["outputs"][0]["shape"] == ["batch", "256", "64", "64"]
        assert each["size_bytes"] == pytest.approx(200e6, rel=0.1)
    again = export(bundle, tmp_path / "again", "sm_86", graphs=("encoder", "mask_decoder"))
    assert again == [each for each in entries if each["architecture"] == "sm_86"]
    (eight,) = export(bundle, tmp_path / "int8", "sm_86", graphs=("encoder",), precision="int8", calibration=(picture,))
    assert eight["size_bytes"] < 150e6


def _vit_b(toy: Path, folder: Path) -> Bundle:
    """SAM's true shape with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.SamModel(transformers.SamConfig())
    for parameter in model.parameters():
        if parameter.dim() > 1:  # SamConfig's own range of 1e-10 would give denormals
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "checkpoint")
    export_segmenter(folder / "checkpoint", folder / "segmenter")
    return load_bundle(build_bundle(toy / "reasoner-onnx", folder / "segmenter", folder / "bundle", name="vit-b"))


@builds
@pytest.mark.parametrize("architecture", ["sm_87", "sm_90", "sm_110"])
def test_what_the_builder_cannot_target_is_refused(bundle: Bundle, tmp_path: Path, architecture: str) -> None:
    known = "sm_75, sm_80, sm_86, sm_89, sm_120, sm_121 only"
    with pytest.raises(
        BundleError, match=f"{architecture}: tensorrt_rtx .* builds ahead of time for {known}"
    ) as caught:
        export(bundle, tmp_path / "out", "sm_86", architecture)
    assert "are built on that machine, by its own TensorRT: there" in str(caught.value)
    assert not (tmp_path / "out").exists()


@builds
@pytest.mark.parametrize("architectures", [(), ("86",), ("sm_86", "sm_86"), ("",), ("sm_86a",)])
def test_names_of_architectures_are_checked(bundle: Bundle, tmp_path: Path, architectures: tuple[str, ...]) -> None:
    with pytest.raises(BundleError, match="arch: expected"):
        export(bundle, tmp_path / "out", *architectures)


@builds
def test_a_graph_with_other_tensors_than_planned_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    plans = {plan.name: plan for plan in engine_plans(bundle, EngineLimits())}
    plan = plans["encoder"]
    save_graph(trt_graph(bundle.path(plan.source), plan, metadata={}), tmp_path / "encoder.onnx")
    with pytest.raises(BundleError, match="reads other inputs than planned"):
        build_engine(tmp_path / "encoder.onnx", plans["mask_decoder"], "sm_86", tmp_path / "engine")


@builds
def test_onnx_runtimes_own_operators_are_not_taken(bundle: Bundle, tmp_path: Path) -> None:
    plan = next(plan for plan in engine_plans(bundle, EngineLimits()) if plan.name == "decoder")
    with pytest.raises(BundleError, match=r"reasoner/decoder\.onnx: TensorRT-RTX does not take the graph"):
        build_engine(bundle.path(plan.source), plan, "sm_86", tmp_path / "engine")


def test_a_builder_that_crashes_is_an_error_with_its_last_words(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = next(plan for plan in engine_plans(bundle, EngineLimits()) if plan.name == "encoder")
    worker = tmp_path / "worker.py"
    worker.write_text("import os, sys; print('half a', file=sys.stderr, flush=True); os.abort()")
    monkeypatch.setattr(trt_build.trt_worker, "__file__", str(worker))
    with pytest.raises(BundleError, match=r"segmenter/encoder\.onnx: TensorRT-RTX's builder ended with -6 \(half a"):
        build_engine(tmp_path / "encoder.onnx", plan, "sm_86", tmp_path / "engine")


def _stand_in(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    monkeypatch.setattr(module, "build_engine", lambda *arguments, **_: build(*arguments))
    monkeypatch.setattr(module, "find_builder", lambda _: "tensorrt-rtx")
    monkeypatch.setattr(module, "builder_version", lambda _: "a builder 1.0")
    monkeypatch.setattr(module, "check_architectures", lambda architectures, _: architectures)


def test_what_fails_leaves_nothing(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(graph: Path, _plan: object, _architecture: str, engine: Path) -> None:
        built.append(graph.name)
        if len(built) == 3:
            raise BundleError("no more")
        engine.write_bytes(b"engine")

    _stand_in(monkeypatch, build)
    with pytest.raises(BundleError, match="no more"):
        export(bundle, tmp_path / "out", "sm_86")
    assert len(built) == 3
    assert not (tmp_path / "out").exists()


def test_a_new_export_leaves_no_engine_of_the_old_one(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(monkeypatch, lambda _graph, _plan, architecture, engine: engine.write_text(architecture))
    export(bundle, tmp_path, "sm_80", "sm_86", keep_graphs=True)
    assert len(list(tmp_path.glob("*.engine"))) == 8
    assert len(list(tmp_path.glob("*.onnx"))) == 4
    (tmp_path / "mine.txt").write_text("stays")
    export(bundle, tmp_path, "sm_89", graphs=("vision",))
    assert {path.name for path in tmp_path.glob("*.engine")} == {"vision.sm_89.fp16.engine"}
    assert (tmp_path / "mine.txt").exists()


def test_weights_of_large_graphs_go_beside_them(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def build(graph: Path, _plan: object, _architecture: str, engine: Path) -> None:
        onnx.checker.check_model(str(graph))  # the weights are where the graph says
        seen.append({path.name for path in graph.parent.glob(f"{graph.name}*")})
        engine.write_bytes(b"engine")

    monkeypatch.setattr(module, "LARGEST_INSIDE", 1000)
    _stand_in(monkeypatch, build)
    export(bundle, tmp_path / "out", "sm_86", graphs=("vision",))
    assert seen == [{"vision.onnx", "vision.onnx.data"}]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"vision.sm_86.fp16.engine", "engines.json"}


def test_a_disk_that_is_too_small_is_told_before_anything_is_built(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(monkeypatch, lambda *_: pytest.fail("it was built"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(BundleError, match=r"out: about 0\.0 GB are needed, and 0\.0 GB are free"):
        export(bundle, tmp_path / "out", "sm_86")


def test_engines_do_not_go_into_the_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, lambda *_: pytest.fail("it was built"))
    with pytest.raises(BundleError, match="another folder than the bundle"):
        export(bundle, bundle.root, "sm_86")


def test_eight_bits_without_images_are_refused(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, lambda *_: pytest.fail("it was built"))
    with pytest.raises(BundleError, match="int8 needs images to calibrate with"):
        export(bundle, tmp_path / "out", "sm_86", precision="int8")


def test_without_the_builder_the_extra_is_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    trt_build._trt.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'medreasoner\[tensorrt-rtx\]'"):
        export(bundle, tmp_path / "out", "sm_86")
    trt_build._trt.cache_clear()


@builds
def test_real_engines_of_a_killed_build_are_kept(bundle: Bundle, tmp_path: Path) -> None:
    graphs = ("mask_decoder", "encoder", "vision")
    export(bundle, tmp_path / "whole", "sm_86", graphs=graphs)
    code = (
        "import os, sys\n"
        "from medreasoner_export import EngineOptions, export_engines\n"
        "said = lambda line: os.kill(os.getpid(), 9) if line.startswith('vision') else None\n"
        f"options = EngineOptions(architectures=('sm_86',), graphs={graphs}, builder='tensorrt-rtx')\n"
        "export_engines(sys.argv[1], sys.argv[2], options=options, progress=said)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle.root), str(tmp_path / "out")])
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.export"
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("*.sm_86/*.engine")}
    assert set(before) == {"mask_decoder.sm_86.fp16.engine", "encoder.sm_86.fp16.engine"}
    lines: list[str] = []
    options = EngineOptions(architectures=("sm_86",), graphs=graphs, builder="tensorrt-rtx")
    export_engines(bundle.root, tmp_path / "out", options=options, progress=lines.append)
    assert lines[0].startswith("resumes: mask_decoder.sm_86, encoder.sm_86, vision.graph taken from the stopped build")
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}.items()
    assert len([line for line in lines if ".engine: " in line]) == 1
    if any("addresses are random" in line for line in lines):
        pytest.skip("this system does not let a process fix its addresses, which the same bytes need")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def _command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from medreasoner_cli.start import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "export", "tensorrt", *map(str, arguments)], capture_output=True, text=True
    )


@builds
def test_the_command_builds_tells_and_refuses(bundle: Bundle, tmp_path: Path) -> None:
    done = _command(bundle.root, "--arch", "sm_89", "-o", tmp_path / "out", "--max-batch", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    assert "decoder.sm_89.fp16.engine: " in done.stderr
    profiles = {each.graph: each.profiles for each in read_engines(tmp_path / "out").engines}
    assert profiles["decoder"][0]["batch"] == (1, 1, 3)
    done = _command(bundle.root, "--arch", "sm_87", "-o", tmp_path / "jetson")
    assert done.returncode == 4
    assert "sm_87: tensorrt_rtx" in done.stderr
    assert "Traceback" not in done.stderr
    assert _command(bundle.root, "--arch", "sm_86", "--image-size", "big").returncode == 2
