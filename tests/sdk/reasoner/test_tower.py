"""The vision tower without its graph: what it gives beside the graph, and where it takes the graph's place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medreasoner import Grounder, ops
from medreasoner.bundle import Bundle, load_bundle
from medreasoner.engine import Engine
from medreasoner.errors import BundleError, ProviderError
from medreasoner.ort_session import OrtSession
from medreasoner.providers import RuntimeOptions
from medreasoner.reasoner.tower import TowerSession, load_tower
from medreasoner.reasoner.vision import vision_grid
from medreasoner_export import ReasonerOptions, export_reasoner, verify_bundle
from medreasoner_export.package import build_bundle
from medreasoner_export.segmenter import export_segmenter
from medreasoner_export.toy import make_toy_reasoner, make_toy_segmenter

needs_tiles = pytest.mark.skipif(not ops.has_tiles(), reason="this processor has no AVX-512 with VNNI")
IMAGE = np.random.default_rng(1).integers(0, 256, (60, 80), dtype=np.uint8)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both checkpoints, and the segmenter's export."""
    folder = tmp_path_factory.mktemp("towers")
    make_toy_reasoner(folder / "reasoner")
    make_toy_segmenter(folder / "segmenter")
    export_segmenter(folder / "segmenter", folder / "s")
    return folder


FORMS = ("fp32-float32", "fp32-float16", "fp32-bfloat16", "fp16-source", "int4-bfloat16")


@pytest.fixture(scope="module", params=FORMS)
def bundle(request: pytest.FixtureRequest, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    precision, weights = request.param.split("-")
    export_reasoner(toy / "reasoner", folder / "r", options=ReasonerOptions(precision=precision, weights=weights))
    out = build_bundle(folder / "r", toy / "s", folder / "bundle", name="tower", bfloat16=True)
    return load_bundle(out, verify="full")


def tower_of(bundle: Bundle, n_threads: int = 2) -> TowerSession:
    spec = bundle.spec.reasoner
    assert spec.tower is not None
    path = bundle.path(spec.tower.file)
    return load_tower(path, spec.tower, spec.vision, out_dim=spec.hidden_dim, n_threads=n_threads)


@needs_tiles
@pytest.mark.parametrize("tokens", [(9, 9), (5, 11), (4, 4), (1, 2), (1, 1)])
def test_an_image_is_what_it_is_to_the_graph(bundle: Bundle, tokens: tuple[int, int]) -> None:
    vision = bundle.spec.reasoner.vision
    rows, columns = tokens
    grid = vision_grid(
        height=28 * rows, width=28 * columns, patch=14, merge=2, window=vision.window_size, head_dim=vision.head_dim
    )
    patches = np.random.default_rng(0).standard_normal((2, 4 * rows * columns, 588)).astype(np.float32)
    given = {"patches": patches, **grid.inputs()}
    session = OrtSession(bundle.path(bundle.spec.reasoner.graphs.vision), RuntimeOptions(device="cpu"))
    expected = session.bind({}, {}).run(given)["image_embeds"]
    tower = tower_of(bundle)
    found = tower.bind({}, {}).run(given)["image_embeds"]
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 0.015 * np.linalg.norm(expected)
    np.testing.assert_array_equal(tower.alone().run(given)["image_embeds"], found)


@needs_tiles
def test_it_takes_the_graphs_place_on_a_cpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    start = OrtSession.__init__

    def watched(self: OrtSession, path: Path, *args: object) -> None:
        opened.append(path.name)
        start(self, path, *args)

    monkeypatch.setattr(OrtSession, "__init__", watched)
    images = [np.roll(IMAGE, shift, axis=1) for shift in range(9)]
    with Grounder.load(bundle.root, device="cpu") as grounder:
        alone = [grounder.ground(image, "Where is it?") for image in images]
        engine = grounder._engine
    with Grounder.load(bundle.root, device="auto", cache_bytes=0) as grounder:
        listed = grounder.ground(images, ["Where is it?"] * len(images))
    assert "vision.onnx" not in opened
    assert isinstance(engine, Engine)
    assert engine.providers[bundle.spec.reasoner.graphs.vision] == "CPUExecutionProvider"
    assert [each.answer for each in listed] == [each.answer for each in alone]
    monkeypatch.setattr("medreasoner.engine.runs_without_graph", lambda tower: False)
    Grounder.load(bundle.root, device="cpu").close()
    assert "vision.onnx" in opened


@needs_tiles
def test_a_bundle_that_does_not_want_it_keeps_the_graph(toy: Path, tmp_path: Path) -> None:
    export = export_reasoner(toy / "reasoner", tmp_path / "r")
    assert export.section["tower"] is not None
    bundle = load_bundle(build_bundle(tmp_path / "r", toy / "s", tmp_path / "bundle", name="plain"))
    with Grounder.load(bundle.root, device="cpu") as grounder:
        assert not isinstance(grounder._engine.reasoner._vision, TowerSession)


@needs_tiles
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:4096], lambda b: b"x" * 10])
def test_a_file_of_another_size_is_refused(bundle: Bundle, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    spec = bundle.spec.reasoner
    assert spec.tower is not None
    file = tmp_path / "vision.onnx.data"
    file.write_bytes(change(bundle.path(spec.tower.file).read_bytes()))
    with pytest.raises(BundleError, match=r"vision\.onnx\.data: \d+ bytes.*export it again"):
        load_tower(file, spec.tower, spec.vision, out_dim=spec.hidden_dim, n_threads=1)


@needs_tiles
def test_inputs_that_do_not_fit_are_told(bundle: Bundle) -> None:
    grid = vision_grid(height=56, width=56, patch=14, merge=2, window=112, head_dim=16)
    with pytest.raises(ProviderError, match="vision tower's kernel failed: patches must be"):
        tower_of(bundle).run({"patches": np.zeros((1, 16, 587), np.float32), **grid.inputs()})


def test_few_bits_and_other_sizes_have_no_tower(toy: Path, tmp_path: Path) -> None:
    export = export_reasoner(toy / "reasoner", tmp_path / "r", options=ReasonerOptions(precision="int8"))
    assert export.section["tower"] is None
    assert not (tmp_path / "r" / "vision.onnx.data").exists()
    with pytest.raises(BundleError, match="bfloat16 is for vision towers"):
        build_bundle(tmp_path / "r", toy / "s", tmp_path / "bundle", name="x", bfloat16=True)
    assert not (tmp_path / "bundle").exists()


def test_ranges_of_the_manifest_are_checked(bundle: Bundle) -> None:
    tower = bundle.spec.reasoner.tower
    assert tower is not None
    for changed in ({"n_heads": 0}, {"mlp_dim": -1}, {"n_layers": 0}, {"rms_norm_eps": 0.0}):
        with pytest.raises(BundleError, match=next(iter(changed))):
            replace(tower, **changed)


@needs_tiles
def test_verify_compares_the_kernel_too(bundle: Bundle, toy: Path) -> None:
    tower = bundle.spec.reasoner.tower
    assert tower is not None
    if bundle.spec.precision == "int4" or tower.matrices != "float32":
        pytest.skip("what else is rounded there is for other tests")
    report = verify_bundle(bundle.root, toy / "reasoner", toy / "segmenter")
    stages = [stage for stage in report.stages if stage.name.startswith("vision") and "without" in stage.name]
    assert len(stages) == 3
    assert all(stage.passed and stage.tolerance == 0.03 for stage in stages)
    assert report.passed
