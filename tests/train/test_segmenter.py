"""The small SAM: prompts of every form, its loss, and what it draws into a mask prompt."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from medreasoner.errors import MedReasonerError
from medreasoner_train.model import to_tensor
from medreasoner_train.segmenter import (
    BOTH,
    BOX,
    POINTS,
    SIZE,
    Prompts,
    SegmenterData,
    box_mask,
    build_segmenter,
    disturb,
    mask_loss,
    prompts,
    segment,
)
from medreasoner_train.store import Stored
from medreasoner_train.targets import box_of


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_segmenter()


@pytest.fixture(scope="module")
def data(stored: list[Stored]) -> SegmenterData:
    return SegmenterData(stored)


def given(forms: list[int], images: list[int]) -> Prompts:
    """One prompt a form, each with a box of its own."""
    rows = []
    for k, (form, image) in enumerate(zip(forms, images, strict=True)):
        mask = np.zeros((SIZE, SIZE), bool)
        mask[40 + 10 * k : 120, 30 : 140 + 10 * k] = True
        points = np.array([[60.0 + k, 90.0], [100.0, 100.0 + k]])
        rows.append((image, np.array(box_of(mask)), points, form, mask))
    return prompts(rows)


def test_every_form_of_prompt_gives_one_mask_and_its_row(model: Any) -> None:
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mixed = given([POINTS, BOTH, BOX, BOTH], [0, 1, 1, 0])
    with torch.no_grad():
        logits, scores, order = segment(model, images, mixed)
        assert logits.shape == (4, 64, 64)
        assert scores.shape == (4,)
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        for at, row in enumerate(order.tolist()):  # alone, a prompt gives the same mask
            alone = Prompts(**{name: getattr(mixed, name)[row : row + 1] for name in Prompts.__dataclass_fields__})
            own, score, _ = segment(model, images, alone)
            torch.testing.assert_close(own[0], logits[at], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(score[0], scores[at], rtol=1e-4, atol=1e-4)


def test_box_and_points_and_image_all_matter(model: Any) -> None:
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    one = given([BOTH], [0])
    with torch.no_grad():
        first = segment(model, images, one)[0]
        for name, other in (("boxes", one.boxes + 20), ("points", one.points + 20), ("image", torch.tensor([1]))):
            fields = {field: getattr(one, field) for field in Prompts.__dataclass_fields__} | {name: other}
            assert (segment(model, images, Prompts(**fields))[0] - first).abs().max() > 1e-3, name


def test_the_drawn_box_is_positive_inside_and_grows_to_its_middle() -> None:
    drawn = box_mask(torch.tensor([[64.0, 128.0, 192.0, 160.0]]))[0, 0]
    assert drawn.shape == (64, 64)
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[32:40, 16:48] = True  # a cell is four pixels
    assert torch.equal(drawn > 0, inside)
    assert float(drawn[36, 30]) == pytest.approx(3.5 / 2)
    assert float(drawn[32, 16]) == pytest.approx(0.5 / 2)
    assert float(drawn[0, 0]) == -2.0
    assert float(drawn.max()) <= 2.0


def test_a_quarter_of_the_prompts_stay_exact_and_all_stay_in_the_image() -> None:
    rng = np.random.default_rng(0)
    box, points = np.array([10.0, 20.0, 250.0, 200.0]), np.array([[12.0, 30.0], [240.0, 190.0]])
    exact = 0
    for _ in range(300):
        moved, shifted = disturb(box, points, np.array([40.0, 40.0]), rng)
        exact += bool((moved == box).all() and (shifted == points).all())
        assert ((moved >= 0) & (moved <= SIZE)).all()
        assert ((shifted >= 0) & (shifted <= SIZE)).all()
        assert (moved[2:] - moved[:2] >= 4).all()
    assert 50 < exact < 100


def test_points_of_thin_targets_stay_near() -> None:
    box = np.array([10.0, 10.0, 250.0, 250.0])
    points = np.full((2, 2), 128.0)
    moves = {
        depth: np.concatenate(
            [disturb(box, points, np.full(2, depth), np.random.default_rng(seed))[1] - points for seed in range(200)]
        )
        for depth in (2.0, 80.0)
    }
    assert np.abs(moves[2.0]).max() < 8
    assert np.abs(moves[80.0]).max() > 40


def test_points_follow_a_box_that_is_off() -> None:
    box, points = np.array([80.0, 80.0, 176.0, 176.0]), np.full((2, 2), 128.0)
    off = []
    for seed in range(400):
        moved, shifted = disturb(box, points, np.full(2, 48.0), np.random.default_rng(seed))
        off.append([*(moved - box).reshape(2, 2).mean(0), *(shifted - points).mean(0)])
    together = np.corrcoef(np.array(off).T)
    assert together[0, 2] > 0.3  # x with x
    assert together[1, 3] > 0.3
    assert abs(together[0, 3]) < 0.15  # x with y


def test_a_box_that_would_become_too_small_stays() -> None:
    box = np.array([10.0, 10.0, 13.0, 40.0])
    stayed = 0
    for seed in range(60):
        moved, _ = disturb(box, np.full((2, 2), 11.0), np.ones(2), np.random.default_rng(seed))
        stayed += bool((moved == box).all())
        assert (moved == box).all() or (moved[2:] - moved[:2] >= 4).all()
    assert stayed > 40  # a quarter stays in any case


def test_a_batch_holds_prompts_of_its_images_and_depends_on_its_step_alone(data: SegmenterData) -> None:
    images, own = data.batch(3, count=3, per_image=2, seed=0)
    again_images, again = data.batch(3, count=3, per_image=2, seed=0)
    assert images.shape == (3, 3, SIZE, SIZE)
    assert own.image.tolist() == [0, 0, 1, 1, 2, 2]
    assert own.masks.shape == (6, SIZE, SIZE)
    assert own.masks.flatten(1).any(1).all()
    assert torch.equal(images, again_images)
    assert torch.equal(own.boxes, again.boxes)
    assert torch.equal(own.form, again.form)


def test_all_forms_are_trained_on(data: SegmenterData) -> None:
    forms = torch.cat([data.batch(step, count=4, per_image=3, seed=0)[1].form for step in range(4)])
    assert set(forms.tolist()) == {BOTH, BOX, POINTS}


def test_pixels_come_in_minus_one_to_one() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 1] = 255, 0, 51
    tensor = to_tensor(pixels)
    assert tensor[:, 0, 1].tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_the_loss_falls_on_one_batch(data: SegmenterData) -> None:
    torch.manual_seed(0)
    model = build_segmenter()
    images, own = data.batch(0, count=1, per_image=3, seed=0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values: list[float] = []
    parts: dict[str, float] = {}
    for _ in range(10):
        loss, parts = mask_loss(model, images, own)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        values.append(loss.item())
    assert min(values[-2:]) < 0.8 * values[0]
    assert np.isfinite(list(parts.values())).all()


def test_the_loss_of_the_true_mask_is_least(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = given([BOTH, BOX], [0, 0])
    small = torch.nn.functional.avg_pool2d(own.masks[:, None].float(), 4)[:, 0]
    results = []
    for sign in (1.0, -1.0):
        answer = (sign * (small - 0.5) * 40, torch.full((2,), (1 + sign) / 2), torch.arange(2))
        monkeypatch.setattr("medreasoner_train.segmenter.segment", lambda *_, answer=answer: answer)
        results.append(mask_loss(model, torch.zeros(1, 3, SIZE, SIZE), own))
    (right, right_parts), (wrong, wrong_parts) = results
    assert float(right) < 0.2 < 2.0 < float(wrong)
    assert right_parts["dice"] > 0.97
    assert wrong_parts["dice"] < 0.05


def test_an_image_whose_structures_vanish_is_passed_over(data: SegmenterData) -> None:
    item = data.stored[0]
    height, width = item.pixels.shape[:2]
    big = np.zeros((1, 20 * height, 20 * width), bool)
    big[0, 7, 7] = True  # far less than a pixel of the segmenter's grid
    lost = dataclasses.replace(
        item,
        record=dataclasses.replace(item.record, samples=item.record.samples[:1]),
        pixels=np.zeros(big.shape[1:], np.uint8),
        masks=big,
        points=np.full((1, 2, 2), 7.5),
        boxes=np.array([[7.0, 7.0, 8.0, 8.0]]),
    )
    both = SegmenterData([lost, item])
    for step in range(4):
        assert both.batch(step, count=3, per_image=2, seed=0)[1].masks.flatten(1).any(1).all()
    with pytest.raises(MedReasonerError, match="no structure is left"):
        SegmenterData([lost]).batch(0, count=1, per_image=1, seed=0)
