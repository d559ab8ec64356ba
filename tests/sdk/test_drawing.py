"""The mask decoder without its graph: what it draws beside the graph, and where it takes the graph's place."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import SamConfig, SamModel

from medreasoner import Grounder, ops
from medreasoner.bundle import load_bundle
from medreasoner.drawing import DrawingSession, load_drawing
from medreasoner.errors import BundleError, ProviderError
from medreasoner.manifest import read_record
from medreasoner.ort_session import OrtSession
from medreasoner.providers import RuntimeOptions
from medreasoner.spec import SegmenterSpec
from medreasoner_export import ReasonerOptions, SegmenterOptions, export_reasoner, export_segmenter, verify_bundle
from medreasoner_export.package import build_bundle
from medreasoner_export.toy import make_toy_reasoner, make_toy_segmenter

needs_tiles = pytest.mark.skipif(not ops.has_tiles(), reason="this processor has no AVX-512 with VNNI")
IMAGE = np.random.default_rng(1).integers(0, 256, (60, 80), dtype=np.uint8)
SIZES = {"nano's": (128, 4, 64), "SAM's": (256, 8, 128), "wide heads": (128, 2, 64)}
"""Channels, heads, and pixels of an image, 8 of which are a place."""
FORMS = {"plain": {}, "box_mask": {"box_mask": True}, "multimask": {"multimask": True}, "box": {"prompts": "box"}}


def make_sam(folder: Path, channels: int, heads: int, side: int) -> Path:
    """A SamModel of random weights, large enough that what they do shows."""
    sizes = {"image_size": side, "patch_size": 8}
    config = SamConfig(
        vision_config={
            **sizes, "hidden_size": 32, "output_channels": channels, "num_hidden_layers": 1, "num_attention_heads": 2,
            "window_size": 4, "global_attn_indexes": [0], "num_pos_feats": channels // 2, "mlp_dim": 64,
        },
        prompt_encoder_config={**sizes, "hidden_size": channels, "image_embedding_size": side // 8},
        mask_decoder_config={
            "hidden_size": channels, "mlp_dim": 2 * channels, "num_attention_heads": heads, "iou_head_hidden_dim": 64,
        },
    )  # fmt: skip
    model = SamModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(0.1 * noise + float(name.endswith("weight")))
            else:
                weight.copy_(noise / (weight[0].numel() ** 0.5 if weight.ndim > 1 else 4))
        model.shared_image_embedding.positional_embedding.copy_(torch.randn(2, channels // 2, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SIZES)
def sam(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sam(tmp_path_factory.mktemp("sam"), *SIZES[request.param])


@pytest.fixture(scope="module", params=[(form, storage) for form in FORMS for storage in ("float32", "bfloat16")])
def export(
    request: pytest.FixtureRequest, sam: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SegmenterSpec]:
    form, storage = request.param
    folder = tmp_path_factory.mktemp("export")
    options = SegmenterOptions(settings=FORMS[form], weights=storage)
    section = export_segmenter(sam, folder, options=options).section
    return folder, read_record(SegmenterSpec, dict(section), "segmenter")


def kernel_of(export: tuple[Path, SegmenterSpec]) -> DrawingSession:
    folder, spec = export
    assert spec.drawing is not None
    return load_drawing(folder / spec.drawing.file, spec, spec.drawing)


def prompts(spec: SegmenterSpec, labels: list[int], batch: int, *, images: int = 1) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(len(labels))
    assert spec.drawing is not None
    grid, side = spec.mask_size // 4, spec.drawing.image_size
    points = rng.uniform(0, side, (batch, len(labels), 2)).astype(np.float32)
    if labels[-2:] == [2, 3]:
        points[:, -2:].sort(axis=1)
    return {
        "image_embedding": rng.standard_normal((images, spec.drawing.n_channels, grid, grid)).astype(np.float32),
        "points": points,
        "labels": np.tile(np.array(labels, np.int64), (batch, 1)),
    }


@pytest.mark.usefixtures("tile_road")
@pytest.mark.parametrize("labels", [[1, 1, 2, 3], [2, 3], [1, 1, -1], [1, 0, 1, 1, 0, -1], [1, 1, 0, 0, 1, 1, 0, 2, 3]])
def test_masks_are_those_of_the_graph(export: tuple[Path, SegmenterSpec], labels: list[int]) -> None:
    folder, spec = export
    given = prompts(spec, labels, 3)
    graph = OrtSession(folder / spec.graphs.decoder, RuntimeOptions(device="cpu")).bind({}, {})
    expected, found = graph.run(given), kernel_of(export).bind({}, {}).run(given)
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert found[name].shape == theirs.shape
        least = 0.01 if name == "predicted_iou" else 0.0  # scores of random weights are nearly nothing
        assert np.linalg.norm(found[name] - theirs) < 0.02 * np.linalg.norm(theirs) + least
    logits, theirs = found["mask_logits"], expected["mask_logits"]
    apart = (logits > 0) != (theirs > 0)
    assert apart.mean() < 0.02
    assert np.abs(theirs[apart]).max(initial=0) < 0.05 * np.abs(theirs).max()  # only where it hardly decides
    each = prompts(spec, labels, 2, images=2)
    ours, theirs = kernel_of(export).run(each)["mask_logits"], graph.run(each)["mask_logits"]
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.usefixtures("tile_road")
def test_a_prompt_gets_the_same_from_many_threads_and_beside_others(export: tuple[Path, SegmenterSpec]) -> None:
    kernel, given = kernel_of(export), prompts(export[1], [1, 1, 2, 3], 5)
    whole = kernel.run(given)["mask_logits"]

    def alone(index: int) -> NDArray[np.generic]:
        one = {**given, **{name: given[name][index : index + 1] for name in ("points", "labels")}}
        return kernel.run(one)["mask_logits"]

    with ThreadPoolExecutor(6) as pool:
        for index, found in enumerate(pool.map(alone, [i % 5 for i in range(30)])):
            np.testing.assert_array_equal(found[0], whole[index % 5])


@needs_tiles
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.full((1, 4), 4)}, "labels must be from -1 to 3"),
        ({"labels": np.full((1, 4), -2)}, "labels must be from -1 to 3"),
        ({"labels": np.ones((1, 3), np.int64)}, "points must be"),
        ({"points": np.zeros((1, 4, 3), np.float32)}, "points must be"),
        (
            {"points": np.zeros((1, 12, 2), np.float32), "labels": np.ones((1, 12), np.int64)},
            "there are too many points",
        ),
        ({"image_embedding": np.zeros((2, 128, 8, 8), np.float32)}, "image_embedding must be"),
        ({"image_embedding": np.zeros((1, 128, 4, 4), np.float32)}, "image_embedding must be"),
        ({"image_embedding": np.zeros((128, 8, 8), np.float32)}, "image_embedding must be"),
    ],
)
def test_what_does_not_fit_is_told(
    export: tuple[Path, SegmenterSpec], change: dict[str, NDArray[np.generic]], message: str
) -> None:
    with pytest.raises(ProviderError, match=f"mask decoder's kernel failed: {message}"):
        kernel_of(export).run(prompts(export[1], [1, 1, 2, 3], 1) | change)


@needs_tiles
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:4096], lambda b: b"x" * 10])
def test_a_file_of_another_size_is_refused(
    export: tuple[Path, SegmenterSpec], tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    folder, spec = export
    assert spec.drawing is not None
    file = tmp_path / "decoder.onnx.data"
    file.write_bytes(change((folder / spec.drawing.file).read_bytes()))
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: \d+ bytes.*export it again"):
        load_drawing(file, spec, spec.drawing)


@needs_tiles
def test_sizes_that_do_not_belong_together_are_refused(export: tuple[Path, SegmenterSpec]) -> None:
    folder, spec = export
    assert spec.drawing is not None
    path = folder / spec.drawing.file
    for changed in ({"n_heads": 1}, {"n_heads": spec.drawing.inner_dim}, {"n_layers": 1}, {"iou_depth": 2}):
        with pytest.raises(BundleError, match=r"decoder\.onnx\.data"):
            load_drawing(path, spec, replace(spec.drawing, **changed))
    with pytest.raises(BundleError, match="places must be a multiple of 32"):
        load_drawing(path, replace(spec, mask_size=2**32), spec.drawing)
    for key, value in (("n_heads", 0), ("n_heads", 7), ("box_channels", 3), ("first_mask", -1), ("norm_eps", 0.0)):
        with pytest.raises(BundleError, match=key):
            replace(spec.drawing, **{key: value})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose vision and masks do without graphs, and its checkpoints beside it."""
    folder = tmp_path_factory.mktemp("bundle")
    make_toy_reasoner(folder / "reasoner")
    make_sam(folder / "segmenter", *SIZES["nano's"])
    export_reasoner(folder / "reasoner", folder / "r")
    export_segmenter(folder / "segmenter", folder / "s", options=SegmenterOptions(settings={"box_mask": True}))
    return build_bundle(folder / "r", folder / "s", folder / "bundle", name="tiles", bfloat16=True)


@needs_tiles
def test_it_takes_the_graphs_place_on_a_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box, points = (10.0, 5.0, 60.0, 50.0), ((20.0, 20.0), (40.0, 30.0))
    masks = []
    for device in ("cpu", "auto"):
        with Grounder.load(bundle, device=device) as grounder:
            assert isinstance(grounder._engine.segmenter._decoder, DrawingSession)
            assert grounder.kernels == dict.fromkeys(("reasoner/vision.onnx", "segmenter/decoder.onnx"), "bfloat16")
            masks.append(grounder.open(IMAGE).segment(box=box, points=points)[0])
    monkeypatch.setattr("medreasoner.engine.runs_without_graph", lambda weights: False)
    with Grounder.load(bundle, device="cpu") as grounder:
        assert isinstance(grounder._engine.segmenter._decoder, OrtSession)
        assert grounder.kernels == {}
        plain = grounder.open(IMAGE).segment(box=box, points=points)[0]
    assert masks[0] is not None
    assert plain is not None
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != plain).mean() < 0.02


@needs_tiles
def test_verify_compares_the_kernel_too(bundle: Path) -> None:
    report = verify_bundle(bundle, bundle.parent / "reasoner", bundle.parent / "segmenter")
    assert report.passed
    stages = {stage.name: stage for stage in report.stages if stage.name.endswith("without the graph")}
    assert {"mask logits without the graph", "predicted IoU without the graph"} <= stages.keys()
    assert all(stage.tolerance == 0.03 for stage in stages.values())


def test_other_sizes_have_no_drawing(tmp_path: Path) -> None:
    make_toy_segmenter(tmp_path / "segmenter")
    section = export_segmenter(tmp_path / "segmenter", tmp_path / "s").section
    assert section["drawing"] is None
    assert not (tmp_path / "s" / "decoder.onnx.data").exists()
    make_toy_reasoner(tmp_path / "reasoner")
    export_reasoner(tmp_path / "reasoner", tmp_path / "r", options=ReasonerOptions(precision="int8"))
    with pytest.raises(BundleError, match="bfloat16 is for vision towers"):
        build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "bundle", name="x", bfloat16=True)
    assert not (tmp_path / "bundle").exists()


def test_a_manifest_without_what_kernels_need_still_loads(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["segmenter"]["drawing"], manifest["reasoner"]["tower"], manifest["sha256"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    spec = load_bundle(copy).spec
    assert (spec.segmenter.drawing, spec.reasoner.tower) == (None, None)
    with Grounder.load(copy, device="cpu") as grounder:
        assert grounder.kernels == {}
