"""SAM 2's graphs against transformers' ``Sam2Model``, from single features to a mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from medreasoner import Grounder
from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner_export import SegmenterOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.parity_segmenter import segmenter_stages

TOLERANCE = 1e-5
# Narrow, with windows that divide no grid: 24, 12, 6 and 3 patches at 96 px, and positions that are no square.
NARROW: dict[str, Any] = {
    "hidden_size": 16, "num_attention_heads": 1, "embed_dim_per_stage": [16, 32, 64, 128],
    "blocks_per_stage": [1, 2, 3, 2], "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [4],
    "window_positional_embedding_background_size": [5, 7],
}  # fmt: skip
BuildSam2 = Callable[..., Any]
Graphs = tuple[ort.InferenceSession, ort.InferenceSession]


def build_narrow(build_sam2: BuildSam2, **decoder: Any) -> Any:
    decoder = {"mlp_dim": 64, "iou_head_hidden_dim": 32, **decoder}
    return build_sam2(96, hiera=NARROW, channels=32, **decoder)


@pytest.fixture(scope="module")
def narrow(build_sam2: BuildSam2) -> Any:
    return build_narrow(build_sam2)


@pytest.fixture(scope="module")
def folder(narrow: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("narrow")
    narrow.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def graphs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    out = tmp_path_factory.mktemp("graphs")
    export_segmenter(folder, out)
    return sessions(out)


def sessions(folder: Path) -> Graphs:
    encoder, decoder = (
        ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "decoder")
    )
    return encoder, decoder


def drawn(size: int, count: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (n, 3, size, size), points (n, 2, 2) and boxes (n, 2, 2)."""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((count, 3, size, size), dtype=np.float32)
    points, corners = (rng.uniform(0, size, (count, 2, 2)).astype(np.float32) for _ in range(2))
    return pixels, points, np.sort(corners, axis=1)


def places_in_order(grid: int, doublings: int) -> list[tuple[int, int]]:
    """Row and column of each fine place in the order of the graphs, place by place and quarter by quarter."""
    found = [(row, column) for row in range(grid) for column in range(grid)]
    for _ in range(doublings):
        found = [(2 * row + down, 2 * column + right) for row, column in found for down in (0, 1) for right in (0, 1)]
    return found


def expected_features(model: Any, pixels: np.ndarray) -> tuple[Any, dict[str, np.ndarray]]:
    """What the model takes as embeddings, and the same as the encoder's outputs."""
    with torch.inference_mode():
        embeddings = model.get_image_embeddings(torch.from_numpy(pixels))
    finest, finer, embedding = (part.numpy() for part in embeddings)
    named = {"image_embedding": embedding}
    for name, planes, doublings in (("high_res_s1", finer, 1), ("high_res_s0", finest, 2)):
        rows, columns = zip(*places_in_order(embedding.shape[-1], doublings), strict=True)
        named[name] = planes[:, :, rows, columns].transpose(0, 2, 1)
    return embeddings, named


def expected_masks(
    model: Any, embeddings: Any, *, points: np.ndarray | None, box: np.ndarray | None, multimask: bool
) -> tuple[np.ndarray, np.ndarray]:
    prompts: dict[str, Any] = {}
    if points is not None:
        prompts["input_points"] = torch.from_numpy(points)[:, None]
        prompts["input_labels"] = torch.ones(len(points), 1, 2, dtype=torch.int64)
    if box is not None:
        prompts["input_boxes"] = torch.from_numpy(box.reshape(-1, 1, 4))
    with torch.inference_mode():
        result = model(image_embeddings=embeddings, multimask_output=multimask, **prompts)
    return result.pred_masks[:, 0].numpy(), result.iou_scores[:, 0].numpy()


def prompt(points: np.ndarray | None, box: np.ndarray | None) -> dict[str, np.ndarray]:
    """As the decoder takes it: the padding point comes with any prompt."""
    given = [part for part in (points, box) if part is not None]
    kinds = [1, 1] * (points is not None) + [2, 3] * (box is not None) + [-1]
    places = np.concatenate([*given, np.zeros((len(given[0]), 1, 2), np.float32)], axis=1)
    return {"points": places, "labels": np.tile(kinds, (len(places), 1))}


def run(graphs: Graphs, pixels: np.ndarray, prompts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    encoder, decoder = graphs
    names = [output.name for output in encoder.get_outputs()]
    features = dict(zip(names, encoder.run(None, {"pixel_values": pixels}), strict=True))
    masks, iou = decoder.run(["mask_logits", "predicted_iou"], features | prompts)
    return features | {"masks": masks, "iou": iou}


def differences(model: Any, graphs: Graphs, *, size: int, multimask: bool = True, count: int = 2) -> dict[str, float]:
    """Largest differences of the graphs from the model, by stage, relative to the largest value."""
    pixels, points, box = drawn(size, count)
    embeddings, expected = expected_features(model, pixels)
    masks, iou = expected_masks(model, embeddings, points=points, box=box, multimask=multimask)
    found = run(graphs, pixels, prompt(points, box))
    expected |= {"masks": masks, "iou": iou}
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].shape == expected[name].shape
    return {name: float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in found}


@pytest.mark.parametrize("multimask", [True, False])
def test_every_stage_of_a_narrow_model_equals_transformers(
    narrow: Any, folder: Path, tmp_path: Path, multimask: bool
) -> None:
    export = export_segmenter(folder, tmp_path, options=SegmenterOptions(settings={"multimask": multimask}))
    assert export.section["architecture"] == "sam2"
    assert export.section["n_masks"] == (3 if multimask else 1)
    assert export.recognised == ("SAM 2 as transformers stores it, Hiera with 8 layers of 16 and more, images of 96 px")
    assert max(differences(narrow, sessions(tmp_path), size=96, multimask=multimask).values()) < TOLERANCE


@pytest.mark.parametrize(
    ("size", "arch"),
    [(128, "auto"), pytest.param(512, "medsam2", marks=pytest.mark.slow),
     pytest.param(1024, "sam2", marks=pytest.mark.slow)],
)  # fmt: skip
def test_every_stage_of_the_true_tiny_equals_transformers(
    build_sam2: BuildSam2, tmp_path: Path, size: int, arch: Any
) -> None:
    model = build_sam2(size)
    model.save_pretrained(tmp_path / "model")
    export = export_segmenter(tmp_path / "model", tmp_path / "out", options=SegmenterOptions(arch=arch))
    assert "Hiera-tiny with 12 layers of 96" in export.recognised
    assert export.section["resize"] == {"rule": "stretch", "width": size, "height": size}
    count = 1 if size > 128 else 2
    assert max(differences(model, sessions(tmp_path / "out"), size=size, count=count).values()) < TOLERANCE


@pytest.mark.parametrize("form", ["points", "box"])
def test_points_alone_and_a_box_alone_equal_transformers(narrow: Any, graphs: Graphs, form: str) -> None:
    pixels, points, box = drawn(96)
    given: dict[str, Any] = {"points": points if form == "points" else None, "box": box if form == "box" else None}
    embeddings, _ = expected_features(narrow, pixels)
    masks, iou = expected_masks(narrow, embeddings, multimask=True, **given)
    found = run(graphs, pixels, prompt(given["points"], given["box"]))
    np.testing.assert_allclose(found["masks"], masks, rtol=0, atol=TOLERANCE * np.abs(masks).max())
    np.testing.assert_allclose(found["iou"], iou, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["image_embedding", "high_res_s1", "high_res_s0", "points", "labels", "padding"])
def test_parity_breaks_when_an_input_of_the_decoder_is_disturbed(narrow: Any, graphs: Graphs, name: str) -> None:
    pixels, points, box = drawn(96)
    embeddings, inputs = expected_features(narrow, pixels)
    masks, _ = expected_masks(narrow, embeddings, points=points, box=box, multimask=True)
    inputs = inputs | prompt(points, box)
    if name == "padding":  # which SAM, but not SAM 2, leaves away beside a box
        inputs |= {key: inputs[key][:, :-1] for key in ("points", "labels")}
    else:
        inputs[name] = inputs[name].copy()
        inputs[name][:, 0] = 0
    found = graphs[1].run(["mask_logits"], inputs)[0]
    assert np.abs(found - masks).max() > 10 * TOLERANCE * np.abs(masks).max()


@pytest.mark.parametrize(
    "name",
    [
        "vision_encoder.backbone.patch_embed.projection.bias",
        "vision_encoder.backbone.pos_embed",
        "vision_encoder.backbone.pos_embed_window",
        "vision_encoder.backbone.blocks.0.attn.qkv.weight",
        "vision_encoder.backbone.blocks.1.proj.weight",
        "vision_encoder.backbone.blocks.3.layer_norm1.bias",
        "vision_encoder.backbone.blocks.4.attn.qkv.bias",
        "vision_encoder.backbone.blocks.7.mlp.proj_out.weight",
        "vision_encoder.neck.convs.0.weight",
        "vision_encoder.neck.convs.2.bias",
        "no_memory_embedding",
        "mask_decoder.conv_s0.weight",
        "mask_decoder.conv_s1.bias",
        "mask_decoder.obj_score_token.weight",
        "mask_decoder.transformer.layers.1.mlp.proj_in.weight",
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image.o_proj.bias",
        "mask_decoder.iou_prediction_head.proj_out.bias",
        "prompt_encoder.point_embed.weight",
        "prompt_encoder.not_a_point_embed.weight",
        "prompt_encoder.shared_embedding.positional_embedding",
        "shared_image_embedding.positional_embedding",
    ],
)
def test_parity_breaks_when_a_weight_is_disturbed(
    build_sam2: BuildSam2, narrow: Any, tmp_path: Path, name: str
) -> None:
    other = build_narrow(build_sam2)
    value = other.state_dict()[name]
    value += 0.1 * torch.randn_like(value)
    other.save_pretrained(tmp_path / "other")
    export_segmenter(tmp_path / "other", tmp_path / "out")
    graphs = sessions(tmp_path / "out")
    assert max(differences(narrow, graphs, size=96).values()) > 10 * TOLERANCE
    assert max(differences(other, graphs, size=96).values()) < TOLERANCE


def test_attention_is_far_from_uniform_and_from_a_choice_of_one(narrow: Any) -> None:
    """Else parity would say little of the order of queries, keys and windows."""
    narrow.set_attn_implementation("eager")
    pixels, _, _ = drawn(96, count=1)
    with torch.inference_mode():
        queries = narrow.vision_encoder.backbone.blocks[0].attn
        seen: list[torch.Tensor] = []
        hook = queries.qkv.register_forward_hook(lambda *args: seen.append(args[2]))
        narrow.get_image_embeddings(torch.from_numpy(pixels))
        hook.remove()
    narrow.set_attn_implementation("sdpa")
    q, k, _ = seen[0].flatten(1, 2).chunk(3, dim=-1)
    shares = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    largest = float(shares.max(-1).values.mean())
    assert 3 / shares.shape[-1] < largest < 0.9


def test_a_single_mask_is_the_stable_one_or_the_best_of_the_others(build_sam2: BuildSam2, tmp_path: Path) -> None:
    pixels, points, box = drawn(96, count=8)
    plain = build_narrow(build_sam2, dynamic_multimask_via_stability=False)
    embeddings, _ = expected_features(plain, pixels)
    single, _ = expected_masks(plain, embeddings, points=points, box=box, multimask=False)
    margin = 0.3
    stability = (single > margin).sum((1, 2, 3)) / (single > -margin).sum((1, 2, 3))
    threshold = float(np.median(stability))  # half of them on either side
    stable = stability >= threshold
    assert 0 < stable.sum() < len(stable)
    changes = {"dynamic_multimask_stability_delta": margin, "dynamic_multimask_stability_thresh": threshold}
    for model, always in ((plain, True), (build_narrow(build_sam2, **changes), False)):
        model.save_pretrained(tmp_path / "model")
        options = SegmenterOptions(settings={"multimask": False})
        export_segmenter(tmp_path / "model", tmp_path / "out", options=options)
        found = run(sessions(tmp_path / "out"), pixels, prompt(points, box))
        masks, iou = expected_masks(model, embeddings, points=points, box=box, multimask=False)
        np.testing.assert_allclose(found["masks"], masks, rtol=0, atol=TOLERANCE * np.abs(masks).max())
        np.testing.assert_allclose(found["iou"], iou, rtol=0, atol=TOLERANCE)
        same = np.abs(found["masks"] - single).max((1, 2, 3)) < TOLERANCE * np.abs(masks).max()
        assert same.tolist() == ([True] * 8 if always else stable.tolist())


def test_one_image_serves_all_prompts(graphs: Graphs) -> None:
    pixels, points, box = drawn(96)
    shared = run(graphs, pixels[:1], prompt(points, box))
    repeated = run(graphs, pixels[[0, 0]], prompt(points, box))
    np.testing.assert_allclose(shared["masks"], repeated["masks"], rtol=0, atol=TOLERANCE)


def bundle_of(folder: Path, toy: Path, out: Path, **options: Any) -> Path:
    export_segmenter(folder, out / "segmenter", options=SegmenterOptions(**options))
    export_reasoner(toy / "reasoner", out / "reasoner")
    return build_bundle(out / "reasoner", out / "segmenter", out / "bundle", name="sam2")


@pytest.mark.parametrize(
    "settings",
    [{}, {"prompts": "box"}, {"prompts": "points"}, {"multimask": False}, {"box_mask": True}],
    ids=str,
)
def test_a_bundle_with_it_is_verified(folder: Path, toy: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    bundle = load_bundle(bundle_of(folder, toy, tmp_path, settings=settings))
    stages = list(segmenter_stages(bundle, folder, tolerance=TOLERANCE, seed=0))
    assert [stage.name for stage in stages] == [
        "image embedding", "high res s1", "high res s0", "mask logits", "predicted IoU", "final mask"
    ]  # fmt: skip
    assert [stage.name for stage in stages if not stage.passed] == []


def test_verify_refuses_a_checkpoint_of_another_kind(folder: Path, toy: Path, tmp_path: Path) -> None:
    sizes = {
        96: "its masks have 32 pixels a side, those of the bundle 24",
        128: "it gives image_embedding, the bundle's",
    }
    for size, words in sizes.items():
        resize = {"rule": "stretch", "width": size, "height": size}
        bundle = load_bundle(bundle_of(folder, toy, tmp_path / str(size), settings={"resize": resize}))
        with pytest.raises(BundleError, match=f"segmenter: {words}"):
            list(segmenter_stages(bundle, toy / "segmenter", tolerance=TOLERANCE, seed=0))


@pytest.mark.parametrize("shape", [(70, 150, 3), (133, 61)], ids=str)
def test_the_whole_road_gives_the_mask_of_transformers(
    narrow: Any, folder: Path, toy: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    image = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    height, width = shape[:2]
    box, points = (0.2 * width, 0.1 * height, 0.9 * width, 0.8 * height), ((0.4 * width, 0.5 * height),) * 2
    small = Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC).convert("RGB")
    planes = (np.asarray(small) / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = planes.astype(np.float32).transpose(2, 0, 1)[None]
    scale = np.array([96 / width, 96 / height])
    embeddings, _ = expected_features(narrow, pixels)
    masks, iou = expected_masks(
        narrow,
        embeddings,
        points=(np.array([points]) * scale).astype(np.float32),
        box=(np.array(box).reshape(1, 2, 2) * scale).astype(np.float32),
        multimask=True,
    )
    best = torch.from_numpy(masks[:, [int(iou[0].argmax())]])
    expected = torch.nn.functional.interpolate(best, (height, width), mode="bilinear")[0, 0].numpy()
    with (
        Grounder.load(bundle_of(folder, toy, tmp_path), cache_dir=tmp_path / "cache") as grounder,
        grounder.open(image) as study,
    ):
        mask, score = study.segment(box=box, points=points)
    sure = np.abs(expected) > 1e-4
    assert sure.mean() > 0.99
    assert 0.02 < (expected > 0).mean() < 0.98
    np.testing.assert_array_equal(mask[sure], expected[sure] > 0)
    assert score == pytest.approx(float(iou.max()), abs=1e-5)


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_large_weights_lie_beside_the_graph_and_short_ones_are_rounded_once(
    narrow: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any
) -> None:
    import medreasoner_export.graph as module

    export_segmenter(folder, tmp_path / "inside", options=SegmenterOptions(weights=weights))
    monkeypatch.setattr(module, "LARGEST_INSIDE", 1000)
    export_segmenter(folder, tmp_path / "outside", options=SegmenterOptions(weights=weights))
    assert (tmp_path / "outside" / "encoder.onnx.data").is_file()
    pixels, points, box = drawn(96)
    found = [run(sessions(tmp_path / name), pixels, prompt(points, box)) for name in ("inside", "outside")]
    for name, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][name])
    assert max(differences(narrow, sessions(tmp_path / "outside"), size=96).values()) < 0.2
    inside, outside = ((tmp_path / name / "encoder.onnx").stat().st_size for name in ("inside", "outside"))
    assert outside < 0.5 * inside
