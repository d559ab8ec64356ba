"""SAM's image encoder without its graph: what it sees beside the graph, and where it takes the graph's place."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import SamConfig, SamModel

from medreasoner import Grounder, _kernels, ops
from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError, ProviderError
from medreasoner.image_tower import ImageTowerSession, load_image_tower
from medreasoner.manifest import read_record
from medreasoner.ort_session import OrtSession
from medreasoner.providers import RuntimeOptions
from medreasoner.spec import SegmenterSpec
from medreasoner_export import ReasonerOptions, SegmenterOptions, export_reasoner, export_segmenter, verify_bundle
from medreasoner_export.package import build_bundle
from medreasoner_export.toy import make_toy_reasoner, make_toy_segmenter

needs_tiles = pytest.mark.skipif(not ops.has_tiles(), reason="this processor has no AVX-512 with VNNI")
IMAGE = np.random.default_rng(1).integers(0, 256, (60, 80), dtype=np.uint8)
SIZES = {
    "nano's": {"window_size": 8},
    "a grid that windows do not divide": {"window_size": 7},
    "SAM's windows": {"window_size": 14, "hidden_size": 160, "num_attention_heads": 2},
    "wide and shallow": {"window_size": 3, "hidden_size": 192, "num_attention_heads": 12, "mlp_dim": 96},
    "a larger grid": {"window_size": 14, "image_size": 128, "patch_size": 4},
}
"""What differs from 64 wide, 4 heads, 16 x 16 patches of 8 pixels."""


def make_sam(folder: Path, **changes: int) -> Path:
    """A SamModel of random weights, relative positions among them."""
    sizes = {"image_size": 128, "patch_size": 8} | {
        k: v for k, v in changes.items() if k in ("image_size", "patch_size")
    }
    vision = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_dim": 128, "global_attn_indexes": [1],
        "output_channels": 32, "num_pos_feats": 16, **changes, **sizes,
    }  # fmt: skip
    prompts = {**sizes, "hidden_size": 32, "image_embedding_size": sizes["image_size"] // sizes["patch_size"]}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(0.1 * noise + float(name.endswith("weight")))
            else:
                weight.copy_(noise / (3 if "rel_pos" in name else weight[0].numel() ** 0.5 if weight.ndim > 1 else 4))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SIZES)
def sam(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sam(tmp_path_factory.mktemp("sam"), **SIZES[request.param])


FORMS = ("fp32-float32", "fp32-bfloat16", "fp32-float16", "fp16-source")


@pytest.fixture(scope="module", params=FORMS)
def export(
    request: pytest.FixtureRequest, sam: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SegmenterSpec]:
    precision, weights = request.param.split("-")
    folder = tmp_path_factory.mktemp("export")
    section = export_segmenter(sam, folder, options=SegmenterOptions(precision=precision, weights=weights)).section
    return folder, read_record(SegmenterSpec, dict(section), "segmenter")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SegmenterSpec]:
    folder = tmp_path_factory.mktemp("small")
    section = export_segmenter(
        make_sam(folder / "sam", **SIZES["a grid that windows do not divide"]), folder / "s"
    ).section
    return folder / "s", read_record(SegmenterSpec, dict(section), "segmenter")


def kernel_of(export: tuple[Path, SegmenterSpec], products: str = "bfloat16", n_threads: int = 1) -> ImageTowerSession:
    folder, spec = export
    assert spec.tower is not None
    tower = replace(spec.tower, products=products)
    return load_image_tower(folder / tower.file, spec, tower, n_threads=n_threads)


def pixels(spec: SegmenterSpec, batch: int = 1) -> dict[str, NDArray[np.float32]]:
    side = spec.resize.sides[0]
    return {"pixel_values": np.random.default_rng(batch).standard_normal((batch, 3, side, side)).astype(np.float32)}


@pytest.mark.usefixtures("tile_road")
@pytest.mark.parametrize(("products", "limit"), [("bfloat16", 0.02), ("int8", 0.04)])
def test_an_image_is_what_it_is_to_the_graph(export: tuple[Path, SegmenterSpec], products: str, limit: float) -> None:
    folder, spec = export
    assert spec.tower is not None
    if products == "int8" and (spec.tower.hidden_dim % 64 or spec.tower.mlp_dim % 64):
        if _kernels.tile_road() != "amx-bf16":
            with pytest.raises(BundleError, match="multiples of 64 to be packed"):
                kernel_of(export, products)
        return
    given = pixels(spec, 2)
    graph = OrtSession(folder / spec.graphs.encoder, RuntimeOptions(device="cpu")).bind({}, {})
    expected = graph.run(given)["image_embedding"]
    found = kernel_of(export, products).bind({}, {}).run(given)["image_embedding"]
    assert found.shape == expected.shape
    for ours, theirs in zip(found, expected, strict=True):
        assert np.linalg.norm(ours - theirs) < limit * np.linalg.norm(theirs)


@pytest.mark.usefixtures("tile_road")
@pytest.mark.parametrize("products", ["bfloat16", "int8"])
def test_threads_and_callers_change_no_bit(small: tuple[Path, SegmenterSpec], products: str) -> None:
    given = pixels(small[1], 3)
    expected = kernel_of(small, products).run(given)["image_embedding"]
    for n_threads in (2, 3, 8):
        kernel = kernel_of(small, products, n_threads)
        sessions = [kernel, kernel.alone()]
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(sessions[number % 2].run, given) for number in range(12)]
            for call in calls:
                np.testing.assert_array_equal(call.result()["image_embedding"], expected)


@needs_tiles
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :2],
        lambda x: x[:, :, :-1],
        lambda x: x[..., :64],
        lambda x: x[0],
        lambda x: x.astype(np.float64),
    ],
)
def test_what_does_not_fit_is_told(
    small: tuple[Path, SegmenterSpec], change: Callable[[NDArray[np.float32]], NDArray[np.generic]]
) -> None:
    with pytest.raises(ProviderError, match="image encoder's kernel failed"):
        kernel_of(small).run({"pixel_values": change(pixels(small[1])["pixel_values"])})


@needs_tiles
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:4096], lambda b: b"x" * 10])
def test_a_file_of_another_size_is_refused(
    small: tuple[Path, SegmenterSpec], tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    folder, spec = small
    assert spec.tower is not None
    file = tmp_path / "encoder.onnx.data"
    file.write_bytes(change((folder / spec.tower.file).read_bytes()))
    with pytest.raises(BundleError, match=r"encoder\.onnx\.data: \d+ bytes.*export it again"):
        load_image_tower(file, spec, spec.tower, n_threads=1)


@needs_tiles
def test_sizes_that_do_not_belong_together_are_refused(small: tuple[Path, SegmenterSpec]) -> None:
    folder, spec = small
    assert spec.tower is not None
    path = folder / spec.tower.file
    for changed in ({"n_layers": 1}, {"n_heads": 2}, {"mlp_dim": 64}, {"window_size": 9}, {"global_layers": ()}):
        with pytest.raises(BundleError, match=r"encoder\.onnx\.data"):
            load_image_tower(path, spec, replace(spec.tower, **changed), n_threads=1)
    for key, value in (("n_heads", 0), ("n_heads", 7), ("patch_size", 0), ("window_size", -1), ("norm_eps", 0.0)):
        with pytest.raises(BundleError, match=key):
            replace(spec.tower, **{key: value})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose segmenter sees without its graph, in bytes, and its checkpoints beside it."""
    folder = tmp_path_factory.mktemp("bundle")
    make_toy_reasoner(folder / "reasoner")
    make_sam(folder / "segmenter", window_size=8)
    export_reasoner(folder / "reasoner", folder / "r", options=ReasonerOptions(precision="int8"))
    export_segmenter(folder / "segmenter", folder / "s")
    return build_bundle(folder / "r", folder / "s", folder / "bundle", name="bytes", integer_images=True)


@needs_tiles
def test_it_takes_the_graphs_place_on_a_cpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_bundle(bundle).spec.segmenter.tower.products == "int8"
    box, points = (10.0, 5.0, 60.0, 50.0), ((20.0, 20.0), (40.0, 30.0))
    masks, features = [], []
    for device in ("cpu", "auto"):
        with Grounder.load(bundle, device=device) as grounder:
            assert isinstance(grounder._engine.segmenter._encoder, ImageTowerSession)
            products = "bfloat16" if ops.tile_road() == "amx-bf16" else "int8"
            assert grounder.kernels == {"segmenter/encoder.onnx": products}
            towers = grounder._engine.open_towers()
            assert towers is None or isinstance(towers.encoder, ImageTowerSession)
            study = grounder.open(IMAGE)
            features.append(study._reading.embedded.result()[0].features["image_embedding"])
            masks.append(study.segment(box=box, points=points)[0])
    monkeypatch.setattr("medreasoner.engine.runs_without_graph", lambda weights: False)
    with Grounder.load(bundle, device="cpu") as grounder:
        assert isinstance(grounder._engine.segmenter._encoder, OrtSession)
        assert grounder.kernels == {}
        plain = grounder.open(IMAGE)._reading.embedded.result()[0].features["image_embedding"]
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_array_equal(masks[0], masks[1])
    assert 0 < np.linalg.norm(features[0] - plain) < 0.04 * np.linalg.norm(plain)


@needs_tiles
def test_verify_compares_the_kernel_too(bundle: Path) -> None:
    report = verify_bundle(bundle, bundle.parent / "reasoner", bundle.parent / "segmenter")
    stages = {stage.name: stage for stage in report.stages if stage.name.endswith("without the graph")}
    assert stages["image embedding without the graph"].passed


def test_other_encoders_keep_their_graph(tmp_path: Path) -> None:
    make_toy_segmenter(tmp_path / "segmenter")
    section = export_segmenter(tmp_path / "segmenter", tmp_path / "s").section
    assert section["tower"] is None
    make_toy_reasoner(tmp_path / "reasoner")
    export_reasoner(tmp_path / "reasoner", tmp_path / "r", options=ReasonerOptions(precision="int8"))
    with pytest.raises(BundleError, match="images in eight bits are for"):
        build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "bundle", name="x", integer_images=True)
    assert not (tmp_path / "bundle").exists()
    make_sam(tmp_path / "wide", window_size=20)  # more than the 16 of the grid
    assert export_segmenter(tmp_path / "wide", tmp_path / "w").section["tower"] is None
    make_sam(tmp_path / "sam", window_size=8)
    in_bits = export_segmenter(tmp_path / "sam", tmp_path / "i", options=SegmenterOptions(precision="int8")).section
    assert in_bits["tower"] is None
