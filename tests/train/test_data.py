"""The index, its split, and the store."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image as PilImage

from medreasoner.errors import BundleError, ImageReadError, MedReasonerError
from medreasoner_train import store
from medreasoner_train.data import (
    Sample,
    by_image,
    frequent_pairs,
    informative_pairs,
    labelled_kinds,
    load_index,
    load_mask,
    load_pixels,
    split,
    validation_groups,
)
from medreasoner_train.targets import box_of, inscribed_points


def sample(source: str, group: str, number: int, category: str = "polyp") -> Sample:
    name = f"{source}/{group}/{number}"
    return Sample(
        id=name,
        image=Path(f"{name}.png"),
        mask=Path(f"{name}_mask.png"),
        source=source,
        modality="endoscopy",
        super_category="lesion",
        category=category,
        group=f"{source}/{group}",
        licence_class="open",
    )


indexes = strategies.lists(
    strategies.tuples(strategies.sampled_from("abc"), strategies.integers(0, 8), strategies.integers(0, 5)),
    unique=True,
    max_size=60,
).map(lambda rows: [sample(source, str(group), number) for source, group, number in rows])


@hypothesis.given(samples=indexes)
def test_no_group_is_in_both_parts_and_no_sample_is_lost(samples: list[Sample]) -> None:
    trained, held = split(samples)
    assert not {s.group for s in trained} & {s.group for s in held}
    assert Counter(s.id for s in trained + held) == Counter(s.id for s in samples)


@hypothesis.given(samples=indexes, data=strategies.data())
def test_the_split_does_not_depend_on_the_order_of_rows(samples: list[Sample], data: Any) -> None:
    assert validation_groups(samples) == validation_groups(data.draw(strategies.permutations(samples)))


@hypothesis.given(samples=indexes)
def test_every_source_with_several_groups_is_trained_on_and_validated(samples: list[Sample]) -> None:
    trained, held = ({s.source for s in part} for part in split(samples))
    for source in {s.source for s in samples}:
        several = len({s.group for s in samples if s.source == source}) > 1
        assert (source in held) == several
        if not several:
            assert source in trained


def test_the_share_of_a_source_is_about_fifteen_percent() -> None:
    samples = [sample(source, str(i), 0) for source in "abc" for i in range(200)]
    _, held = split(samples)
    assert Counter(s.source for s in held) == {"a": 30, "b": 30, "c": 30}


def test_other_sources_do_not_change_the_split_of_a_source() -> None:
    own = [sample("a", str(i), 0) for i in range(40)]
    more = [sample("b", str(i), 0) for i in range(7)]
    assert validation_groups(own) < validation_groups(own + more)


def test_the_index_reads_what_it_was_written_from(grounding_set: Path) -> None:
    samples = load_index(grounding_set)
    rows = [json.loads(line) for line in (grounding_set / "index.jsonl").read_text().splitlines()]
    assert [s.id for s in samples] == [row["id"] for row in rows]
    assert {s.key for s in samples} >= {"MRI/myocardium", "X-ray/left lung"}
    records = by_image(samples)
    assert len(records) == len({row["image"] for row in rows})
    assert max(len(record.samples) for record in records) == 3
    assert [s.id for record in records for s in record.samples] == [s.id for s in samples]


@pytest.mark.parametrize("line", ["{", '{"id": 1}', "[]", "null"])
def test_a_broken_row_is_refused_with_file_and_line(tmp_path: Path, grounding_set: Path, line: str) -> None:
    good = (grounding_set / "index.jsonl").read_text().splitlines()[0]
    (tmp_path / "index.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ImageReadError, match=r"index\.jsonl:2"):
        load_index(tmp_path)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageReadError, match=r"index\.jsonl"):
        load_index(tmp_path)


@pytest.mark.parametrize("read", [load_pixels, load_mask])
def test_a_truncated_picture_is_refused_by_name(tmp_path: Path, grounding_set: Path, read: Any) -> None:
    whole = load_index(grounding_set)[0].image.read_bytes()
    path = tmp_path / "half.png"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageReadError, match=r"half\.png"):
        read(path)


def test_colour_that_is_grey_is_read_as_grey(tmp_path: Path) -> None:
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    PilImage.fromarray(np.repeat(grey[..., None], 3, axis=-1)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(load_pixels(tmp_path / "grey.png"), grey)
    colour = np.stack([grey, grey + 9, grey], axis=-1)
    PilImage.fromarray(colour).save(tmp_path / "colour.png")
    np.testing.assert_array_equal(load_pixels(tmp_path / "colour.png"), colour)


def test_kinds_and_frequent_and_informative_pairs() -> None:
    samples = [sample("a", str(i), 0) for i in range(3)] + [sample("b", "0", 1, "ulcer")]
    assert labelled_kinds(samples) == {"a": {"polyp"}, "b": {"ulcer"}}
    assert frequent_pairs(samples, 3) == {"endoscopy/polyp"}
    assert informative_pairs({"x": 0.74, "y": 0.75}) == {"x"}


def test_the_store_holds_pixels_masks_boxes_and_points(grounding_set: Path) -> None:
    record = by_image(load_index(grounding_set))[-1]
    (item,) = store.load_store([record])
    np.testing.assert_array_equal(item.pixels, load_pixels(record.image))
    for k, own in enumerate(record.samples):
        mask = np.asarray(PilImage.open(own.mask)) > 127
        np.testing.assert_array_equal(item.masks[k], mask)
        assert tuple(item.boxes[k]) == box_of(mask)
        np.testing.assert_array_equal(item.points[k], inscribed_points(mask))


def test_images_of_rare_structures_and_of_chosen_sources_are_drawn_more_often(grounding_set: Path) -> None:
    stored = store.load_store(by_image(load_index(grounding_set)))
    plain = store.sampling_weights(stored)
    chosen = store.sampling_weights(stored, {"acdc_mri": 4.0})
    assert plain.sum() == pytest.approx(1)
    assert chosen.sum() == pytest.approx(1)
    own = np.array([item.record.source == "acdc_mri" for item in stored])
    odds = [weights[own].sum() / weights[~own].sum() for weights in (plain, chosen)]
    assert odds[1] == pytest.approx(4 * odds[0])
    with pytest.raises(MedReasonerError, match=r"acdc_ct; there are acdc_mri, .*kvasir_seg"):
        store.sampling_weights(stored, {"acdc_ct": 2.0})


def test_the_cache_spares_the_points_and_grows_with_new_images(
    grounding_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = by_image(load_index(grounding_set))[:6]
    cache = tmp_path / "new" / "points.npz"
    first = store.load_store(records[:4], cache=cache)
    worked_out = []

    def count(mask: Any) -> Any:
        worked_out.append(mask)
        return np.ones((2, 2))

    monkeypatch.setattr(store, "inscribed_points", count)
    again = store.load_store(records[:4], cache=cache)
    assert not worked_out
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.points, b.points)
    store.load_store(records, cache=cache)
    assert len(worked_out) == sum(len(record.samples) for record in records[4:])
    store.load_store(records, cache=cache)
    assert len(worked_out) == sum(len(record.samples) for record in records[4:])
    assert [path.name for path in cache.parent.iterdir()] == ["points.npz"]


def test_a_damaged_cache_is_named(grounding_set: Path, tmp_path: Path) -> None:
    cache = tmp_path / "points.npz"
    cache.write_bytes(b"PK")
    with pytest.raises(BundleError, match=cache.name):
        store.load_store(by_image(load_index(grounding_set))[:1], cache=cache)
