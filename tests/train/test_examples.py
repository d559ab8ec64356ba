"""Data sets of three forms, good rows and bad ones. What a row says is worked out here by hand or by other means."""

import csv
import io
import json
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as PilImage

from medreasoner.errors import MissingExtraError
from medreasoner_train.data import load_index, load_mask, load_pixels, split
from medreasoner_train.examples import (
    DataError,
    Example,
    Loaded,
    draw_question,
    load_examples,
    split_examples,
)
from medreasoner_train.language import load_phrasings
from medreasoner_train.looking import Facts, placed
from medreasoner_train.picture import Picture
from medreasoner_train.rows import Draft, Fault
from medreasoner_train.umrg import question_in

Pixels = NDArray[np.uint8]
HEADER = ["image", "query", "mask", "x1", "y1", "x2", "y2", "p1x", "p1y", "p2x", "p2y", "id", "category", "group"]


def png(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    PilImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(height: int, width: int, shade: int = 90) -> Pixels:
    pixels = np.full((height, width), shade, np.uint8)
    pixels[:, ::3] = 30
    return pixels


def square(height: int, width: int, box: tuple[int, int, int, int]) -> Pixels:
    """A mask of 0 and 255 that fills a box."""
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return mask


def write_csv(folder: Path, rows: list[dict[str, Any]], header: list[str] = HEADER) -> Path:
    path = folder / "cases.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image of 40 x 60 (rows x columns) and the mask of the box 10, 5, 30, 25."""
    (tmp_path / "a.png").write_bytes(png(picture(40, 60)))
    (tmp_path / "b.png").write_bytes(png(picture(40, 60, 120)))
    (tmp_path / "a_mask.png").write_bytes(png(square(40, 60, (10, 5, 30, 25))))
    return tmp_path


def shape_of(example: Example) -> tuple[tuple[int, ...], int]:
    mask = example.mask()
    return example.pixels().shape, 0 if mask is None else int(mask.sum())


# --- the plain folder


def test_a_csv_gives_boxes_points_masks_and_absent_targets(folder: Path) -> None:
    write_csv(
        folder,
        [
            {"image": "a.png", "query": "Which square?", "mask": "a_mask.png", "group": "p1"},
            {"image": "a.png", "query": "Where?", "x1": 1, "y1": 2, "x2": 60, "y2": 40.0},
            {"image": "b.png", "query": "Where is what is not there?"},
            {
                **{"image": "b.png", "query": "Both?", "mask": "a_mask.png", "x1": 9, "y1": 4, "x2": 31, "y2": 26},
                **{"p1x": 12.5, "p1y": 7, "p2x": 20, "p2y": 20, "id": "mine"},
            },
        ],
    )
    masked, boxed, absent, both = load_examples(folder).examples
    assert masked.box == (10, 5, 30, 25)
    assert masked.points is not None
    mask = masked.mask()
    assert mask is not None
    assert all(mask[int(y), int(x)] for x, y in masked.points)
    assert np.array_equal(mask, square(40, 60, (10, 5, 30, 25)) > 0)
    assert np.array_equal(masked.pixels(), picture(40, 60))
    assert (masked.group, masked.query, masked.id) == ("p1", "Which square?", "cases.csv:2")
    assert (boxed.box, boxed.points, boxed.mask()) == ((1, 2, 60, 40), None, None)
    assert (absent.box, absent.points, absent.mask(), absent.absent) == (None, None, None, True)
    assert (both.id, both.box, both.points) == ("mine", (9, 4, 31, 26), ((12.5, 7), (20, 20)))
    assert not both.absent


def test_rows_without_a_group_are_grouped_by_the_pixels_of_their_image(folder: Path) -> None:
    (folder / "copy.tif").write_bytes(b"")
    PilImage.fromarray(picture(40, 60)).save(folder / "copy.tif")  # the same picture under another name
    write_csv(folder, [{"image": name, "query": "?"} for name in ("a.png", "copy.tif", "b.png")])
    first, copy, other = load_examples(folder).examples
    assert first.group == copy.group != other.group


def test_grey_that_is_stored_as_colour_is_grey_and_colour_stays(folder: Path) -> None:
    colour = np.stack([picture(40, 60), picture(40, 60, 20), picture(40, 60, 70)], axis=-1)
    (folder / "a.png").write_bytes(png(np.repeat(picture(40, 60)[..., None], 3, axis=-1)))
    (folder / "b.png").write_bytes(png(colour))
    write_csv(folder, [{"image": "a.png", "query": "?"}, {"image": "b.png", "query": "?"}])
    grey, coloured = load_examples(folder).examples
    assert grey.pixels().shape == (40, 60)
    assert np.array_equal(coloured.pixels(), colour)


def test_a_mask_of_zeros_and_ones_is_a_mask(folder: Path) -> None:
    (folder / "a_mask.png").write_bytes(png(square(40, 60, (3, 4, 9, 8)) // 255))
    write_csv(folder, [{"image": "a.png", "query": "?", "mask": "a_mask.png"}])
    assert load_examples(folder).examples[0].box == (3, 4, 9, 8)


def test_dicom_and_nifti_are_read_with_the_masks_of_the_same_slice(folder: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    from medreasoner.samples import sample_path

    volume = np.random.default_rng(0).integers(0, 900, (20, 30, 4)).astype(np.int16)
    mask = np.zeros((20, 30, 4), np.uint8)
    mask[5:12, 10:14, 3] = 1
    for name, values in (("volume", volume), ("seg", mask)):
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1, 1, 1])), folder / f"{name}.nii.gz")
    (folder / "chest.dcm").write_bytes(sample_path("leg").read_bytes())
    rows: list[dict[str, Any]] = [
        {"image": "volume.nii.gz", "mask": "seg.nii.gz", "query": "?", "frame": 3},
        {"image": "chest.dcm", "query": "?", "frame": ""},
    ]
    scan, film = load_examples(write_csv(folder, rows, ["image", "mask", "query", "frame"])).examples
    found = scan.mask()
    assert found is not None
    assert int(found.sum()) == 7 * 4
    assert found.shape == scan.pixels().shape
    assert film.pixels().ndim == 2


BAD = {
    "missing image": {"image": "gone.png"},
    "unreadable image": {"image": "text.png"},
    "missing mask": {"mask": "gone.png"},
    "unreadable mask": {"mask": "text.png"},
    "empty mask": {"mask": "empty.png"},
    "size mismatch": {"mask": "small.png"},
    "path outside the folder": {"image": "../secret.png"},
    "unknown category": {"query": "", "category": "unheard-of"},
    "duplicate id": {"id": "good"},
    "malformed row": {"frame": "-1"},
}
BOXES: list[tuple[Any, ...]] = [
    (5, 5, 5, 9),  # no width
    (9, 5, 5, 9),  # turned round
    (-1, 0, 5, 5),
    (0, 0, 61, 5),
    (0, 0, 5, 40.5),
    ("a", 0, 5, 5),
    ("nan", 0, 5, 5),
    (0, 0, 5, ""),
]
POINTS: list[tuple[Any, ...]] = [(60, 5, 1, 1), (1, 1, 5, 40), (-0.5, 1, 1, 1), (1, 1, 1, ""), ("inf", 1, 1, 1)]


def bad_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from BAD.items()
    for box in BOXES:
        yield "bad box", dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
    for points in POINTS:
        own = {"x1": 0, "y1": 0, "x2": 9, "y2": 9}
        yield "bad point", own | dict(zip(("p1x", "p1y", "p2x", "p2y"), points, strict=True))
    yield "bad box", {"p1x": 1, "p1y": 1, "p2x": 2, "p2y": 2}  # points alone


@pytest.fixture
def spoilt(folder: Path) -> Path:
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(png(np.zeros((40, 60), np.uint8)))
    (folder / "small.png").write_bytes(png(square(20, 30, (1, 1, 9, 9))))
    (folder.parent / "secret.png").write_bytes(png(picture(40, 60)))
    return folder


@pytest.mark.parametrize(("kind", "row"), list(bad_rows()))
def test_a_bad_row_is_named_and_refused_or_left_out(
    spoilt: Path, kind: str, row: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    good = {"image": "a.png", "query": "Where?", "id": "good"}
    path = write_csv(spoilt, [good, {"image": "b.png", "query": "Where?"} | row], [*HEADER, "frame"])
    with pytest.raises(DataError, match=rf"1 of 2 rows cannot be used\. cases\.csv:3: {kind}: .*; .*bad_rows='skip'"):
        load_examples(path)
    with caplog.at_level(logging.WARNING):
        loaded = load_examples(path, bad_rows="skip")
    assert [example.id for example in loaded.examples] == ["good"]
    assert [(problem.row, problem.kind) for problem in loaded.problems] == [("cases.csv:3", kind)]
    assert loaded.problems[0].way_out
    assert "1 of 2 rows are left out" in caplog.text


def test_the_first_bad_row_is_named_and_the_rest_are_counted_by_kind(spoilt: Path) -> None:
    rows = [
        {"image": "a.png", "query": "Where?"},
        {"image": "a.png", "query": "Where?", "mask": "empty.png"},  # found out later than the next, told before it
        {"image": "../secret.png", "query": "Where?"},
        {"image": "gone.png", "query": "Where?"},
        {"image": "gone.png", "query": "Where?"},
    ]
    with pytest.raises(DataError) as caught:
        load_examples(write_csv(spoilt, rows))
    message = str(caught.value)
    assert "4 of 5 rows" in message
    assert "cases.csv:3: empty mask" in message
    assert "Besides: 2 x missing image, 1 x path outside the folder." in message
    assert "\n" not in message
    assert len(caught.value.problems) == 4


def test_a_link_out_of_the_folder_is_refused(spoilt: Path) -> None:
    (spoilt / "link.png").symlink_to(spoilt.parent / "secret.png")
    write_csv(spoilt, [{"image": "link.png", "query": "?"}])
    with pytest.raises(DataError, match="path outside the folder"):
        load_examples(spoilt, bad_rows="skip")  # no row is left, so that skipping helps nothing


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("query,mask\n?,a_mask.png\n", "no column 'image'"),
        ("image,query,xmin,ymin,xmax,ymax\na.png,?,1,2,3,4\n", "neither a column 'mask' nor x1"),
        ("image,mask,mask\na.png,a_mask.png,\n", "stands twice"),
        ("image,query,mask\n", "no rows"),
        ("", "no column 'image'"),
        ('image,query,mask\na.png,"never closed,\n', "cannot be read as CSV"),
        ("image,query,mask\na.png,?\n", "more or fewer cells"),
        ("image,query,mask\na.png,?,,4\n", "more or fewer cells"),
    ],
)
def test_a_csv_that_is_none_is_refused(folder: Path, text: str, words: str) -> None:
    (folder / "cases.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        load_examples(folder)


def test_columns_that_mean_nothing_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cases.csv").write_text("image,mask,query,Site\na.png,a_mask.png,?,north\n")
    with caplog.at_level(logging.WARNING):
        assert len(load_examples(folder).examples) == 1
    assert "unknown columns are left out: Site" in caplog.text


def test_what_is_no_data_set_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"index\.jsonl"):
        load_examples(folder)
    with pytest.raises(DataError, match="no such file"):
        load_examples(folder / "none")
    with pytest.raises(DataError, match="no data set"):
        load_examples(folder / "a.png")
    for name in ("one", "two"):
        (folder / f"{name}.csv").write_text("image,mask\n")
    with pytest.raises(DataError, match="2 CSV files"):
        load_examples(folder)


@given(
    size=st.tuples(st.integers(8, 2000), st.integers(8, 2000)),
    box=st.tuples(*[st.integers(-2, 842)] * 4),
    grid=st.sampled_from([None, 840.0]),
)
def test_a_box_is_taken_if_and_only_if_it_lies_in_its_image(
    size: tuple[int, int], box: tuple[int, int, int, int], grid: float | None
) -> None:
    draft = Draft(
        row="r",
        id="i",
        group=None,
        source="s",
        modality="m",
        super_category="c",
        category="c",
        query="?",
        thought=None,
        image=Picture(),
        mask=None,
        box=box,
        points=None,
        grid=grid,
    )
    facts = Facts(height=size[0], width=size[1], digest="", box=None, points=None)
    height, width = size if grid is None else (840, 840)
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        with pytest.raises(Fault) as caught:
            placed(draft, facts)
        assert caught.value.kind == "bad box"
        return
    found, points = placed(draft, facts)
    assert points is None
    assert found is not None
    assert found[2] <= size[1]  # not one bit beyond
    assert found[3] <= size[0]
    assert np.divide(found, [size[1], size[0]] * 2) == pytest.approx(np.divide(box, [width, height] * 2))


# --- the grounding set


def test_the_grounding_set_is_read_as_its_own_loader_reads_it(grounding_set: Path) -> None:
    samples = load_index(grounding_set)
    examples = load_examples(grounding_set).examples
    assert [example.id for example in examples] == [sample.id for sample in samples]
    for example, sample in zip(examples, samples, strict=True):
        mask = example.mask()
        assert mask is not None
        assert np.array_equal(mask, load_mask(sample.mask))
        assert np.array_equal(example.pixels(), load_pixels(sample.image))
        assert (example.key, example.group, example.query) == (sample.key, sample.group, None)
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        assert example.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert example.points is not None
        assert all(mask[int(y), int(x)] for x, y in example.points)


def test_examples_are_split_as_samples_are(grounding_set: Path) -> None:
    trained, held = split_examples(load_examples(grounding_set / "index.jsonl").examples)
    expected = split(load_index(grounding_set))
    assert [e.id for e in trained] == [s.id for s in expected[0]]
    assert [e.id for e in held] == [s.id for s in expected[1]]
    assert held
    assert not {e.group for e in trained} & {e.group for e in held}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("{", "broken JSON"),
        ("[1]", "malformed row"),
        ('{"id": "x"}', "malformed row"),
        (None, "duplicate id"),
    ],
)
def test_a_bad_row_of_the_index_is_named(grounding_set: Path, tmp_path: Path, line: str | None, kind: str) -> None:
    first = (grounding_set / "index.jsonl").read_text(encoding="utf-8").splitlines()[0]
    row = json.loads(first)
    for name in (row["image"], row["mask"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((grounding_set / name).read_bytes())
    (tmp_path / "index.jsonl").write_text(f"{first}\n\n{first if line is None else line}\n", encoding="utf-8")
    loaded = load_examples(tmp_path, bad_rows="skip")
    assert [(p.row, p.kind) for p in loaded.problems] == [("index.jsonl:3", kind)]
    assert len(loaded.examples) == 1


def test_a_question_is_drawn_for_an_example_that_has_none(grounding_set: Path) -> None:
    example = load_examples(grounding_set).examples[0]
    phrasings = load_phrasings("heldout")
    rng = np.random.default_rng(0)
    drawn = {draw_question(example, phrasings, rng) for _ in range(30)}
    assert len(drawn) > 5
    assert drawn <= set(phrasings[example.key].queries)
    with pytest.raises(DataError, match="no phrasings"):
        draw_question(example, {}, rng)


def test_an_unknown_category_without_a_question_is_a_bad_row(grounding_set: Path) -> None:
    with pytest.raises(DataError, match=r"unknown category: .*'polyp'"):
        load_examples(grounding_set, categories={"left lung"})


def test_examples_work_in_other_processes(grounding_set: Path) -> None:
    examples = load_examples(grounding_set).examples[:3]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # which cannot import this file
        there = [list(pool.map(methodcaller(name), examples)) for name in ("pixels", "mask")]
    for example, pixels, mask in zip(examples, *there, strict=True):
        np.testing.assert_array_equal(pixels, example.pixels())
        np.testing.assert_array_equal(mask, example.mask())
    assert len(pickle.dumps(examples[0])) < 2000


def test_what_was_worked_out_is_kept_and_forgotten_when_a_file_changes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    path = write_csv(folder, [{"image": "a.png", "query": "?", "mask": "a_mask.png"}])
    decoded: list[Picture] = []
    read = Picture.read

    def counted(self: Picture) -> Any:
        decoded.append(self)
        return read(self)

    monkeypatch.setattr(Picture, "read", counted)
    first = load_examples(path, cache=cache)
    assert len(decoded) == 2
    assert load_examples(path, cache=cache) == first
    assert len(decoded) == 2
    (folder / "a_mask.png").write_bytes(png(square(40, 60, (0, 0, 11, 12))))
    assert load_examples(path, cache=cache).examples[0].box == (0, 0, 11, 12)
    (cache / "facts.json").write_text("{")
    assert load_examples(path, cache=cache).examples[0].box == (0, 0, 11, 12)


# --- U-MRG-14K


def truth(box: Any, points: Any) -> str:
    return json.dumps({"bbox_2d": box, "point_2d": points})


def umrg_row(number: int = 1, **changed: Any) -> dict[str, Any]:
    """A row in the published form: a picture of 840 x 840, and of its mask."""
    mask = square(840, 840, (100, 200, 400, 500))
    row = {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": "Which chamber sends blood into the aorta?"}],
        "images": [{"bytes": png(picture(840, 840, 80 + number)), "path": None}],
        "masks": [{"bytes": png(mask), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": truth([100, 200, 400, 500], [[150, 250], [350, 450]])},
        "extra_info": {"id": f"heart_{number}", "supercategory": "Heart", "category": "left ventricle"},
    }
    return row | changed


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(rows: list[dict[str, Any]], name: str = "train.parquet") -> Path:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        return tmp_path / name

    return write


def test_umrg_is_read_from_a_file_and_from_a_folder(write_parquet: Callable[..., Path]) -> None:
    path = write_parquet([umrg_row(1), umrg_row(2)])
    write_parquet([umrg_row(3)], "test.parquet")
    example, other = load_examples(path).examples
    assert (example.id, example.super_category, example.category) == ("heart_1", "Heart", "left ventricle")
    assert (example.source, example.query) == ("umrg", "Which chamber sends blood into the aorta?")
    assert (example.box, example.points) == ((100, 200, 400, 500), ((150, 250), (350, 450)))
    mask = example.mask()
    assert mask is not None
    assert int(mask.sum()) == 300 * 300
    assert np.array_equal(example.pixels(), picture(840, 840, 81))
    assert example.group != other.group
    assert {e.id for e in load_examples(path.parent).examples} == {"heart_1", "heart_2", "heart_3"}


def test_coordinates_follow_an_image_of_another_size(write_parquet: Callable[..., Path]) -> None:
    small = umrg_row(
        images=[{"bytes": png(picture(420, 1680)), "path": None}],
        masks=[{"bytes": png(square(420, 1680, (200, 100, 800, 250))), "path": None}],
    )
    (example,) = load_examples(write_parquet([small])).examples
    assert example.box == (200, 100, 800, 250)  # x twice as large as on 840, y half
    assert example.points == ((300, 125), (700, 225))


def test_images_may_be_paths_or_bare_bytes(write_parquet: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(png(picture(840, 840)))
    path = write_parquet([umrg_row(images=["images/one.png"], masks=[png(square(840, 840, (1, 2, 30, 40)))])])
    (example,) = load_examples(path).examples
    assert np.array_equal(example.pixels(), picture(840, 840))
    assert example.mask() is not None


def test_pictures_of_a_parquet_file_are_kept_as_files_in_the_cache(
    write_parquet: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    path = write_parquet([umrg_row()])
    (held,), (kept,) = load_examples(path).examples, load_examples(path, cache=cache).examples
    assert np.array_equal(held.pixels(), kept.pixels())
    assert len(pickle.dumps(kept)) < 2000 < len(pickle.dumps(held))
    assert load_examples(path, cache=cache).examples == (kept,)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("broken JSON", {"reward_model": {"ground_truth": "{"}}),
        ("broken JSON", {"reward_model": {"ground_truth": '{"bbox": [1, 2, 3, 4]}'}}),
        ("bad box", {"reward_model": {"ground_truth": truth([100, 200, 400], [[1, 1], [2, 2]])}}),
        ("bad box", {"reward_model": {"ground_truth": truth([100, 200, 841, 400], [[1, 1], [2, 2]])}}),
        ("bad box", {"reward_model": {"ground_truth": truth([100, 200, True, 400], [[1, 1], [2, 2]])}}),
        ("bad box", {"reward_model": {"ground_truth": truth(None, [[1, 1], [2, 2]])}}),
        ("bad point", {"reward_model": {"ground_truth": truth([100, 200, 400, 500], [[1, 1], [2, 840]])}}),
        ("bad point", {"reward_model": {"ground_truth": truth([100, 200, 400, 500], [[1, 1]])}}),
        ("unreadable image", {"images": [{"bytes": b"\x89PNG\r\n\x1a\n broken", "path": None}]}),
        ("missing image", {"images": []}),
        ("malformed row", {"images": [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}]}),
        ("empty mask", {"masks": [{"bytes": png(np.zeros((840, 840), np.uint8)), "path": None}]}),
        ("size mismatch", {"masks": [{"bytes": png(square(420, 420, (1, 1, 9, 9))), "path": None}]}),
        ("missing image", {"images": [{"bytes": None, "path": "gone.png"}]}),
        ("path outside the folder", {"images": [{"bytes": None, "path": "/etc/hostname"}]}),
        ("malformed row", {"prompt": [{"role": "user", "content": "<image>"}]}),
        ("duplicate id", {"extra_info": {"id": "heart_1", "supercategory": "Heart", "category": "left ventricle"}}),
    ],
)
def test_a_bad_row_of_umrg_is_named(write_parquet: Callable[..., Path], kind: str, changed: dict[str, Any]) -> None:
    path = write_parquet([umrg_row(1), umrg_row(2, **changed)])
    loaded = load_examples(path, bad_rows="skip")
    assert [(p.row, p.kind) for p in loaded.problems] == [("train.parquet:2", kind)]
    assert [example.id for example in loaded.examples] == ["heart_1"]
    with pytest.raises(DataError, match=f"train.parquet:2: {kind}"):
        load_examples(path)


def test_an_absent_target_of_umrg_has_neither_box_nor_points(write_parquet: Callable[..., Path]) -> None:
    path = write_parquet([umrg_row(masks=[], reward_model={"ground_truth": truth(None, None)}), umrg_row(2)])
    absent, _ = load_examples(path).examples
    assert (absent.box, absent.points, absent.mask()) == (None, None, None)


def test_what_is_no_umrg_is_refused(write_parquet: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks the field images, reward_model"):
        load_examples(write_parquet([{"prompt": "?"}], "other.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="not a readable parquet file"):
        load_examples(tmp_path / "broken.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtraError, match=r"pip install 'medreasoner\[train\]'"):
        load_examples(tmp_path)


WRAPPED = "<image>\nThis is a localization task.\nThink first.\nQuestion: {}\n\nGuidelines:\n1. Look at the question."


@pytest.mark.parametrize(
    "text", ["{}", "<image>{}", WRAPPED, "<image>\nPlease answer {} with bbox and points.\n\nOutput Formats: JSON"]
)
@pytest.mark.parametrize("question", ["Which chamber pumps?", "Locate it, with care (upper part)."])
def test_instructions_around_a_question_are_taken_off(text: str, question: str) -> None:
    assert question_in(text.format(question), None) == question


def test_a_pattern_of_ones_own_finds_the_question_or_the_row_is_bad(write_parquet: Callable[..., Path]) -> None:
    asked = umrg_row(prompt=[{"role": "system", "content": "Be exact."}, {"role": "user", "content": "Q=[why?] Now."}])
    path = write_parquet([asked, umrg_row(2)])
    pattern = r"Q=\[(?P<question>.*?)\]"
    loaded: Loaded = load_examples(path, bad_rows="skip", question_pattern=pattern)
    assert [example.query for example in loaded.examples] == ["why?"]
    assert loaded.problems[0].row == "train.parquet:2"
