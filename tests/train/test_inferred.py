"""Unlabelled organs: drawn images whose every structure is known, of which some are kept from the rules."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from medreasoner_train.augment import NO_CHANGE
from medreasoner_train.data import ImageRecord, Sample
from medreasoner_train.inferred import LEAST, with_inferred
from medreasoner_train.language import load_phrasings
from medreasoner_train.prior import box_iou
from medreasoner_train.sft_data import SftData, SftOptions
from medreasoner_train.store import Stored
from medreasoner_train.targets import box_of, inscribed_points
from medreasoner_train.tasks import GroundingTasks
from medreasoner_train.vocabulary import Vocabulary

SIDE = 64
PARTLY, WHOLLY = "shenzhen_cxr", "covid_cxr"
LABELS = {
    PARTLY: ("left lung", "right lung", "lung"),
    WHOLLY: ("left lung", "right lung", "cardiomediastinum", "ground glass opacity", "airway"),
}
SUPER = {"ground glass opacity": "lesion"}


def chest(rng: np.random.Generator) -> dict[str, npt.NDArray[np.bool_]]:
    """A film: the heart fills the gap of the lungs' lower half, an opacity half of a lung, an airway anywhere."""
    x, y = rng.integers(6, 14, 2)
    width, height, gap = rng.integers(12, 18), rng.integers(28, 40), rng.integers(6, 12)
    masks = {name: np.zeros((SIDE, SIDE), bool) for name in dict.fromkeys(sum(LABELS.values(), ()))}
    masks["right lung"][y : y + height, x : x + width] = True
    masks["left lung"][y : y + height, x + width + gap : x + 2 * width + gap] = True
    masks["lung"] = masks["right lung"] | masks["left lung"]
    masks["cardiomediastinum"][y + height // 2 : y + height, x + width - 2 : x + width + gap + 6] = True
    masks["ground glass opacity"][y : y + height // 2, x : x + width] = True
    a, b = rng.integers(2, 40, 2)
    masks["airway"][b : b + rng.integers(6, 20), a : a + rng.integers(6, 20)] = True
    return masks


def film(
    source: str,
    number: int,
    masks: dict[str, npt.NDArray[np.bool_]],
    *,
    shown: tuple[str, ...] | None = None,
    patient: int | None = None,
) -> Stored:
    shown = LABELS[source] if shown is None else shown
    own = np.stack([masks[name] for name in shown])
    group = f"{source}/{number if patient is None else patient}"
    samples = tuple(
        Sample(
            id=f"{group}/{name}", image=Path(f"{group}.png"), mask=Path(f"{group} {name}.png"), source=source,
            modality="X-ray", super_category=SUPER.get(name, "organ"), category=name, group=group, licence_class="nc",
        )
        for name in shown
    )  # fmt: skip
    return Stored(
        record=ImageRecord(image=samples[0].image, source=source, modality="X-ray", group=group, samples=samples),
        pixels=(own.sum(0) * 40).astype(np.uint8),
        masks=own,
        boxes=np.array([box_of(mask) for mask in own]),
        points=np.stack([inscribed_points(mask) for mask in own]),
    )


def films(count: int) -> tuple[list[Stored], list[dict[str, npt.NDArray[np.bool_]]]]:
    rng = np.random.default_rng(3)
    drawn = [chest(rng) for _ in range(2 * count)]
    return [film((PARTLY, WHOLLY)[k % 2], k, masks) for k, masks in enumerate(drawn)], drawn


def named(item: Stored) -> dict[str, int]:
    return {sample.category: k for k, sample in enumerate(item.record.samples)}


def test_an_organ_is_where_its_neighbours_predict_it_and_a_union_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stored, truth = films(LEAST + 10)
    found = with_inferred(stored)
    overlaps = []
    for item, before, masks in zip(found, stored, truth, strict=True):
        labelled = len(before.masks)
        np.testing.assert_array_equal(item.masks[:labelled], before.masks)
        np.testing.assert_array_equal(item.points[:labelled], before.points)
        assert len(item.masks) == len(item.boxes) == len(item.points) == len(item.record.samples)
        if item.record.source == WHOLLY:
            assert set(named(item)) - set(LABELS[WHOLLY]) == {"lung"}
            np.testing.assert_array_equal(item.masks[named(item)["lung"]], masks["lung"])
            assert not item.guessed
            continue
        # An opacity can lie anywhere, and nothing tells where this airway is.
        assert set(named(item)) - set(LABELS[PARTLY]) == {"cardiomediastinum"} == item.guessed
        heart = named(item)["cardiomediastinum"]
        overlaps.append(float(box_iou(item.boxes[heart][None], np.array(box_of(masks["cardiomediastinum"]))[None])[0]))
        for x, y in item.points[heart]:
            assert masks["cardiomediastinum"][int(y), int(x)]
    assert np.mean(overlaps) > 0.85
    assert f"{PARTLY}: cardiomediastinum inferred on {LEAST + 10} images" in caplog.text
    assert f"{WHOLLY}: lung inferred on {LEAST + 10} images" in caplog.text


def test_nothing_is_inferred_from_few_images() -> None:
    stored, _ = films(LEAST - 1)
    assert with_inferred(stored) == stored


def test_rules_of_some_images_hold_for_others() -> None:
    stored, _ = films(LEAST + 10)
    known, others = stored[: 2 * LEAST], stored[2 * LEAST :]
    found = with_inferred(others, learned_from=known)
    assert with_inferred(others) == others
    assert all(
        len(item.record.samples) == len(before.record.samples) + 1 for item, before in zip(found, others, strict=True)
    )


def test_images_of_few_patients_are_few() -> None:
    _, drawn = films(2 * LEAST)
    stored = [film((PARTLY, WHOLLY)[k % 2], k, masks, patient=k % (LEAST - 2)) for k, masks in enumerate(drawn)]
    assert not any(item.guessed for item in with_inferred(stored))


def test_an_organ_that_often_lacks_beside_its_neighbours_is_not_inferred() -> None:
    _, drawn = films(2 * LEAST)
    without = tuple(name for name in LABELS[WHOLLY] if name != "cardiomediastinum")
    stored = [
        film((PARTLY, WHOLLY)[k % 2], k, masks, shown=without if k % 8 == 1 else None) for k, masks in enumerate(drawn)
    ]
    assert not any(item.guessed for item in with_inferred(stored))


def test_a_structure_that_hides_another_is_no_union() -> None:
    """What is nearly equal to one of two is predicted from both, but is not exact."""
    _, drawn = films(LEAST + 2)
    for masks in drawn:
        masks["lung"] = masks["right lung"].copy()
        masks["left lung"] = np.zeros_like(masks["right lung"])
        masks["left lung"][:1, :2] = True
    found = with_inferred([film((PARTLY, WHOLLY)[k % 2], k, masks) for k, masks in enumerate(drawn)])
    assert all("lung" in item.guessed for item in found if "lung" in named(item) and item.record.source == WHOLLY)


def test_what_is_guessed_does_not_depend_on_labels_of_lesions() -> None:
    """An opacity that both sources label now and then is no neighbour."""
    _, drawn = films(2 * LEAST)
    spotted = (*LABELS[PARTLY], "ground glass opacity")
    stored = [
        film((PARTLY, WHOLLY)[k % 2], k, masks, shown=spotted if k % 8 == 0 else None) for k, masks in enumerate(drawn)
    ]
    found = with_inferred(stored)
    assert all(item.guessed == {"cardiomediastinum"} for item in found if item.record.source == PARTLY)


def test_an_image_without_the_neighbours_stays_as_it_is() -> None:
    stored, _ = films(LEAST + 1)
    first = stored[0]
    alone = dataclasses.replace(
        first,
        record=dataclasses.replace(first.record, samples=first.record.samples[:1]),
        masks=first.masks[:1],
        boxes=first.boxes[:1],
        points=first.points[:1],
    )
    found = with_inferred([alone, *stored[1:]])
    assert found[0] is alone
    assert "cardiomediastinum" in named(found[2])


def test_what_is_guessed_is_asked_about_but_has_no_shape(vocabulary: Vocabulary) -> None:
    stored, _ = films(LEAST + 1)
    found = with_inferred(stored)
    samples = [sample for item in stored for sample in item.record.samples]
    options = SftOptions(images=2, branches=3, size=84, absent=0.0, plain=0.0, spatial=0.0)
    data = SftData(samples, found, vocabulary=vocabulary, phrasings=load_phrasings("train"), options=options)
    rng = np.random.default_rng(0)
    _, targets, masks = data.image(0, 84, rng, NO_CHANGE)
    heart = data.column("cardiomediastinum")
    assert not targets.present[heart]
    assert not targets.known[heart]
    assert targets.present[data.column("left lung")]
    np.testing.assert_allclose(targets.geometry[heart, :4] * SIDE, found[0].boxes[-1], atol=2)
    asked = [data.question(found[0], targets, masks, rng) for _ in range(60)]
    assert any(each.category == "cardiomediastinum" and each.geometry is not None for each in asked)
    thought = [data.branch(found[0], targets, masks, rng, think=True)[1] for _ in range(60)]
    assert {mark.thought > 0 for mark in thought if mark.category == heart} == {False}
    assert {mark.thought > 0 for mark in thought if mark.category != heart} == {True}
    compared = SftData(
        samples,
        found,
        vocabulary=vocabulary,
        phrasings=load_phrasings("train"),
        options=dataclasses.replace(options, spatial=1.0),
    )
    questions = [compared.question(found[0], targets, masks, rng) for _ in range(60)]
    assert {each.category for each in questions} <= set(LABELS[PARTLY])


def test_grpo_judges_what_is_guessed_by_box_and_points(vocabulary: Vocabulary) -> None:
    stored, _ = films(LEAST + 1)
    samples = [sample for item in stored for sample in item.record.samples]
    options = SftOptions(size=84, absent=0.0, plain=0.0, spatial=0.0)
    data = SftData(
        samples, with_inferred(stored), vocabulary=vocabulary, phrasings=load_phrasings("train"), options=options
    )
    tasks = GroundingTasks(data, think=0.0, per_image=4).draw(0, count=80, seed=0)
    assert all(task.truth.box is not None for task in tasks)
    shapeless = sum(task.mask is None for task in tasks)
    assert 4 < shapeless < 40  # one of four structures of every second film
