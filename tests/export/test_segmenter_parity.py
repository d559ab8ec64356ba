"""The segmenter's graphs against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from medreasoner.bundle import Bundle, load_bundle
from medreasoner_export import SegmenterOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.parity_segmenter import segmenter_stages

TOLERANCE = 1e-5
BOX = np.array([[[9.0, 12.5], [40.0, 51.0]], [[3.0, 3.0], [20.0, 60.0]]], np.float32)
POINTS = np.array([[[20.0, 30.0], [30.0, 22.0]], [[8.0, 9.0], [12.5, 40.0]]], np.float32)


@pytest.fixture(scope="module")
def embedding(sam: Any) -> np.ndarray:
    pixels = np.random.default_rng(5).standard_normal((2, 3, 64, 64), dtype=np.float32)
    with torch.inference_mode():
        return np.asarray(sam.get_image_embeddings(torch.from_numpy(pixels)).numpy())


def reference(sam: Any, embedding: np.ndarray, *, box: bool, labels: list[int] | None, multimask: bool) -> Any:
    prompts: dict[str, Any] = {"input_boxes": torch.from_numpy(BOX.reshape(2, 1, 4))} if box else {}
    if labels is not None:
        prompts["input_points"] = torch.from_numpy(POINTS[:, None, : len(labels)])
        prompts["input_labels"] = torch.tensor([[labels]] * 2)
    with torch.inference_mode():
        result = sam(image_embeddings=torch.from_numpy(embedding), multimask_output=multimask, **prompts)
    return result.pred_masks[:, 0].numpy(), result.iou_scores[:, 0].numpy()


def prompt(*, box: bool, labels: list[int] | None) -> dict[str, np.ndarray]:
    """The same in SAM's ONNX convention; without a box SAM adds one padding point."""
    parts = [POINTS[:, : len(labels or [])], BOX if box else np.zeros((2, 1, 2), np.float32)]
    kinds = [*(labels or []), *((2, 3) if box else (-1,))]
    return {"points": np.concatenate(parts, axis=1), "labels": np.tile(kinds, (2, 1))}


PROMPTS: dict[str, tuple[bool, list[int] | None]] = {
    "box and points": (True, [1, 1]),
    "box": (True, None),
    "points": (False, [1, 1]),
    "one point": (False, [1]),
    "a point outside": (False, [1, 0]),
}


@pytest.mark.parametrize(("box", "labels"), PROMPTS.values(), ids=PROMPTS.keys())
def test_masks_equal_transformers_for_any_prompt(
    sam: Any, sessions: Any, embedding: np.ndarray, box: bool, labels: list[int] | None
) -> None:
    inputs = {"image_embedding": embedding, **prompt(box=box, labels=labels)}
    found = sessions["segmenter/decoder"].run(["mask_logits", "predicted_iou"], inputs)
    for ours, theirs in zip(found, reference(sam, embedding, box=box, labels=labels, multimask=False), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_one_embedding_serves_all_prompts(sessions: Any, embedding: np.ndarray) -> None:
    session, inputs = sessions["segmenter/decoder"], prompt(box=True, labels=[1, 1])
    shared = session.run(None, {"image_embedding": embedding[:1], **inputs})[0]
    repeated = session.run(None, {"image_embedding": embedding[[0, 0]], **inputs})[0]
    np.testing.assert_array_equal(shared, repeated)


@pytest.mark.parametrize("name", ["image_embedding", "points", "labels"])
def test_segmenter_parity_breaks_when_an_input_is_disturbed(
    sam: Any, sessions: Any, embedding: np.ndarray, name: str
) -> None:
    inputs = {"image_embedding": embedding, **prompt(box=True, labels=[1, 1])}
    disturbed = inputs[name].copy()
    disturbed.reshape(2, -1)[:, 0] = 0
    found = sessions["segmenter/decoder"].run(["mask_logits"], inputs | {name: disturbed})[0]
    expected, _ = reference(sam, embedding, box=True, labels=[1, 1], multimask=False)
    assert np.abs(found - expected).max() > 10 * TOLERANCE


def test_multimask_returns_the_alternatives(sam: Any, toy: Path, tmp_path: Path, embedding: np.ndarray) -> None:
    export = export_segmenter(toy / "segmenter", tmp_path, options=SegmenterOptions(settings={"multimask": True}))
    assert export.section["n_masks"] == 3
    session = ort.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    found = session.run(
        ["mask_logits", "predicted_iou"], {"image_embedding": embedding, **prompt(box=True, labels=[1])}
    )
    for ours, theirs in zip(found, reference(sam, embedding, box=True, labels=[1], multimask=True), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_all_stages_of_the_segmenter_pass(bundle: Bundle, toy: Path) -> None:
    stages = list(segmenter_stages(bundle, toy / "segmenter", tolerance=TOLERANCE, seed=6))
    assert [stage.name for stage in stages if not stage.passed] == []


def test_a_box_drawn_into_the_mask_prompt_is_verified_as_it_was_exported(toy: Path, tmp_path: Path) -> None:
    # The checkpoint's own medreasoner.json does not ask for it: only the export did.
    options = SegmenterOptions(settings={"box_mask": True})
    export_segmenter(toy / "segmenter", tmp_path / "segmenter", options=options)
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="drawn")
    stages = list(segmenter_stages(load_bundle(folder), toy / "segmenter", tolerance=1e-4, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []


@pytest.mark.parametrize("prompts", ["box", "points"])
def test_each_form_of_prompts_is_verified(toy: Path, tmp_path: Path, prompts: str) -> None:
    export_segmenter(toy / "segmenter", tmp_path / "segmenter", options=SegmenterOptions(settings={"prompts": prompts}))
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="prompted")
    stages = list(segmenter_stages(load_bundle(folder), toy / "segmenter", tolerance=TOLERANCE, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []


def test_a_drawn_box_changes_masks_and_points_alone_stay_as_they_were(
    sessions: Any, toy: Path, tmp_path: Path, embedding: np.ndarray
) -> None:
    export_segmenter(toy / "segmenter", tmp_path, options=SegmenterOptions(settings={"box_mask": True}))
    drawn = ort.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    for box, same in ((False, True), (True, False)):
        inputs = {"image_embedding": embedding, **prompt(box=box, labels=[1, 1])}
        difference = (
            drawn.run(["mask_logits"], inputs)[0] - sessions["segmenter/decoder"].run(["mask_logits"], inputs)[0]
        )
        assert bool(np.abs(difference).max() <= TOLERANCE) is same
