"""Dense targets and the first stage's loss."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medreasoner_train import pretrain
from medreasoner_train.augment import NO_CHANGE, Options
from medreasoner_train.data import load_index
from medreasoner_train.dense import DenseHeads, dense_loss, giou, pooled_geometry
from medreasoner_train.model import NanoConfig, build_reasoner, tower
from medreasoner_train.pretrain import DenseData, ImageTargets
from medreasoner_train.store import Stored
from medreasoner_train.targets import box_of


@pytest.fixture
def data(grounding_set: Path, stored: list[Stored]) -> DenseData:
    return DenseData(load_index(grounding_set), stored, patch=14)


def toy_visual(config: NanoConfig) -> Any:
    torch.manual_seed(0)
    return build_reasoner(
        config, vocab_size=16, tokens={n: i for i, n in enumerate(pretrain.SPECIAL_TOKENS)}
    ).model.visual


def test_coverage_is_the_share_of_each_patch() -> None:
    mask = np.zeros((56, 56), bool)
    mask[0:7, 0:14] = True  # half of the first patch
    mask[28:42, 14:28] = True  # the whole of one
    targets = ImageTargets(3, 4)
    targets.add(1, mask, np.array([[3.5, 3.5], [20.5, 35.5]]))
    expected = np.zeros((4, 4))
    expected[0, 0], expected[2, 1] = 0.5, 1.0
    np.testing.assert_allclose(targets.coverage[1], expected)
    np.testing.assert_allclose(targets.geometry[1, :4], np.array([0, 0, 28, 42]) / 56)
    np.testing.assert_allclose(targets.geometry[1, 4:], np.array([3.5, 3.5, 20.5, 35.5]) / 56)
    assert targets.present.tolist() == [False, True, False]


def test_absence_is_known_only_where_it_can_be_trusted(data: DenseData) -> None:
    rng = np.random.default_rng(0)
    for index, item in enumerate(data.stored):
        _, targets, masks = data.image(index, 56, rng, NO_CHANGE)
        named = {name for name in data.categories if targets.known[data.column(name)]}
        assert masks.keys() == {sample.category for sample in item.record.samples}
        assert masks.keys() <= named
        if item.record.source == "shenzhen_cxr":  # shows the heart too, which nobody labelled there
            assert "left ventricle" not in named
            assert "polyp" in named
        if item.record.source == "acdc_mri":
            assert "right ventricle" in named


def test_an_image_comes_in_minus_one_to_one(data: DenseData) -> None:
    image, _, masks = data.image(0, 84, np.random.default_rng(0), NO_CHANGE)
    assert image.shape == (3, 84, 84)
    assert image.dtype == torch.float32
    assert -1 <= float(image.min()) < float(image.max()) <= 1
    assert all(mask.shape == (84, 84) for mask in masks.values())


def test_a_batch_depends_on_step_and_seed_alone(data: DenseData) -> None:
    first, second = (data.batch(3, count=4, size=56, seed=1) for _ in range(2))
    other = data.batch(4, count=4, size=56, seed=1)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].geometry, second[1].geometry)
    assert not torch.equal(first[0], other[0])


def test_rare_pairs_are_seen_more_often(data: DenseData) -> None:
    assert data.weights.sum() == pytest.approx(1.0)
    many = dataclasses.replace(data.stored[0].record)
    repeated = [dataclasses.replace(data.stored[0], record=many)] * 60 + [data.stored[-1]]
    samples = [sample for item in data.stored for sample in item.record.samples]
    weights = DenseData(samples, repeated, patch=14).weights
    assert weights[-1] / weights[0] == pytest.approx((60 / 15) ** 0.5)


def test_generalised_overlap_agrees_with_its_definition() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [3.0, 0.0, 4.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    generalised, plain = giou(a, b)
    torch.testing.assert_close(plain, torch.tensor([1 / 3, 0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(generalised, torch.tensor([1 / 3, -0.5, 1.0]), atol=1e-5, rtol=0)


def test_the_pooled_geometry_is_that_of_the_tokens_that_claim_the_category() -> None:
    coverage = torch.full((1, 2, 4, 4), -40.0)
    coverage[0, 0, 2:, :2] = 40.0  # category 0 covers token 2
    coverage[0, 1, :2, 2:] = 40.0  # category 1 covers token 1
    geometry = torch.arange(4 * 2 * 8, dtype=torch.float32).view(1, 4, 2, 8)
    pooled = pooled_geometry(coverage, geometry)
    torch.testing.assert_close(pooled[0, 0], geometry[0, 2, 0])
    torch.testing.assert_close(pooled[0, 1], geometry[0, 1, 1])


def test_read_outs_of_a_token_cover_its_own_patches() -> None:
    heads = DenseHeads(8, 3)
    embeds = torch.zeros(1, 9, 8)
    embeds[0, 5] = torch.randn(8, generator=torch.Generator().manual_seed(0)) * 9
    with torch.no_grad():
        heads.coverage.bias.zero_()
        coverage, geometry, place = heads(embeds)
    assert coverage.shape == (1, 3, 6, 6)
    assert geometry.shape == (1, 9, 3, 8)
    assert place.shape == (1, 9, 2)
    touched = (coverage != 0).any(1)[0]
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[2:4, 4:6] = True  # token 5: row 1, column 2
    assert torch.equal(touched, expected)


def test_the_loss_falls_on_one_batch(data: DenseData, toy_config: NanoConfig) -> None:
    visual = toy_visual(toy_config)
    heads = DenseHeads(32, len(data.categories))
    images, targets = data.batch(0, count=4, size=84, seed=0)
    optimiser = torch.optim.AdamW([*visual.parameters(), *heads.parameters()], lr=3e-3)
    values = []
    for _ in range(25):
        loss, parts = dense_loss(heads, tower(visual, images), targets)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        values.append(loss.item())
        assert np.isfinite(list(parts.values())).all()
    assert values[-1] < 0.7 * values[0]


def test_evaluation_of_perfect_read_outs_is_perfect(
    data: DenseData, toy_config: NanoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perfect(_: object, images: torch.Tensor) -> Any:
        return images

    def heads(images: torch.Tensor) -> Any:
        rng = np.random.default_rng(0)
        rows = [data.image(i, 84, rng, NO_CHANGE)[1] for i in range(len(images))]
        geometry = torch.from_numpy(np.stack([row.geometry for row in rows]))
        return torch.zeros(len(images), len(data.categories), 6, 6), geometry[:, None].expand(-1, 9, -1, -1), None

    monkeypatch.setattr(pretrain, "tower", perfect)
    data.stored = data.stored[:32]  # one batch of the evaluation
    result = pretrain.evaluate(toy_visual(toy_config), heads, data, size=84)  # type: ignore[arg-type]
    assert result["val_iou"] == pytest.approx(1.0, abs=1e-3)


def test_the_box_in_the_targets_is_that_of_the_changed_mask(data: DenseData) -> None:
    rng = np.random.default_rng(5)
    for index in range(0, len(data.stored), 5):
        _, targets, masks = data.image(index, 84, rng, Options())
        for name, mask in masks.items():
            np.testing.assert_allclose(targets.geometry[data.column(name), :4] * 84, box_of(mask), atol=1e-4)


def test_a_batch_without_any_structure_has_a_finite_loss(data: DenseData) -> None:
    empty = pretrain.stack([ImageTargets(len(data.categories), 6)])
    heads = DenseHeads(32, len(data.categories))
    embeds = torch.randn(1, 9, 32, requires_grad=True)
    loss, parts = dense_loss(heads, embeds, empty)
    loss.backward()  # type: ignore[no-untyped-call]
    assert np.isfinite([loss.item(), *parts.values()]).all()
    assert embeds.grad is not None
    assert embeds.grad.isfinite().all()
