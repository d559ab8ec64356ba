"""The whole road on a bundle with random weights: image and question in, box, points and mask out."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import medreasoner as mr
from medreasoner.engine import Engine
from medreasoner.errors import ArrayError
from medreasoner.image import Image

QUERIES = (
    "Where is the heart?",
    "Which organ lies behind the stomach?",
    "Where?",
    "Show the left lung",
    "What is bright?",
    "Which part is dark?",
)


def with_threshold(bundle: Path, copy: Path, threshold: float | None, **reasoner: object) -> Path:
    """Copy of a bundle with this threshold, and with other settings of its reasoner."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["reasoner"] |= {"absent_threshold": threshold, **reasoner}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture(scope="module")
def grounder(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[mr.Grounder]:
    """Finds something in every image: no probability of absence is above 1."""
    bundle = with_threshold(toy_bundle, tmp_path_factory.mktemp("grounder") / "bundle", 1.0)
    with mr.Grounder.load(bundle, device="cpu", cache_bytes=0) as loaded:
        yield loaded


def picture(height: int = 120, width: int = 200, seed: int = 0) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6))
    return np.kron(coarse, np.ones((-(-height // 6), -(-width // 6))))[:height, :width].astype(np.uint8)


def same(a: mr.Grounding, b: mr.Grounding) -> bool:
    fields = ("found", "box", "points", "score", "answer", "reasoning", "area_mm2", "pixel_spacing_mm")
    return all(getattr(a, name) == getattr(b, name) for name in fields) and bool((a.mask == b.mask).all())


def test_a_grounding_is_in_the_images_own_grid(grounder: mr.Grounder) -> None:
    image = picture()
    result = grounder.ground(image, QUERIES[0])
    assert result.mask.shape == (120, 200)
    assert result.mask.dtype == np.bool_
    assert result.mask.flags.c_contiguous
    assert result.box is not None
    x1, y1, x2, y2 = result.box
    assert 0 <= x1 < x2 <= 200
    assert 0 <= y1 < y2 <= 120
    assert result.points is not None
    assert all(0 <= x <= 200 and 0 <= y <= 120 for x, y in result.points)
    assert 0 <= result.score <= 1
    assert result.answer.startswith('<answer>{"bbox": [')
    assert result.reasoning is None
    assert (result.pixel_spacing_mm, result.area_mm2) == (None, None)
    assert (result.model_name, len(result.model_digest)) == ("toy", 64)
    # The answer is in pixels of the 252 x 252 image that the vision tower saw.
    values = json.loads(result.answer.removeprefix("<answer>").removesuffix("</answer>"))["bbox"]
    np.testing.assert_allclose(result.box, np.multiply(values, [200 / 252, 120 / 252] * 2))


def test_a_mask_is_drawn_by_a_box_by_points_or_by_both(grounder: mr.Grounder) -> None:
    box, points = (20.0, 30.0, 120.0, 90.0), ((60.0, 50.0), (80.0, 60.0))
    with grounder.open(picture()) as study:
        both, by_box, by_points = (
            study.segment(**prompts) for prompts in ({"box": box, "points": points}, {"box": box}, {"points": points})
        )
        assert all(mask.shape == (120, 200) and 0 <= score <= 1 for mask, score in (both, by_box, by_points))
        assert len({(mask.tobytes(), score) for mask, score in (both, by_box, by_points)}) == 3
        with pytest.raises(ArrayError, match="nothing to segment by"):
            study.segment()


def test_stages_are_timed_and_tokens_counted(grounder: mr.Grounder) -> None:
    image = picture()
    query = QUERIES[0]
    result = grounder.ground(image, query)
    stages = {"read", "preprocess", "vision", "prefill", "answer", "segment_encode", "segment_decode", "postprocess"}
    assert result.timings_ms.keys() == stages | {"total"}
    assert all(value >= 0 for value in result.timings_ms.values())
    assert result.timings_ms["total"] >= result.timings_ms["vision"] + result.timings_ms["answer"]
    assert result.tokens["image"] == 81
    assert result.tokens["prompt"] > 81
    assert result.tokens["decoder_runs"] <= 8
    thought = grounder.ground(image, query, think=True)
    assert thought.tokens["thought"] > 0
    assert "think" in thought.timings_ms


def test_a_second_query_equals_a_fresh_one(grounder: mr.Grounder) -> None:
    image = picture()
    with grounder.open(image) as study:
        for query in (*QUERIES, *QUERIES[::-1]):
            assert same(study.ground(query), grounder.ground(image, query))
        assert study.image.pixels.shape == (120, 200)
        assert study.timings_ms.keys() == {"read", "preprocess", "vision", "prefill", "total"}


def test_a_stream_ends_with_the_grounding(grounder: mr.Grounder) -> None:
    image = picture()
    events = list(grounder.stream(image, QUERIES[0], think=True))
    result = events[-1]
    assert isinstance(result, mr.Grounding)
    assert same(result, grounder.ground(image, QUERIES[0], think=True))
    assert events[-2] == mr.Answer(result.answer)
    thoughts = [event.text for event in events[:-2] if isinstance(event, mr.Thought)]
    assert len(thoughts) == len(events) - 2 > 1
    assert "".join(thoughts) == result.reasoning


def test_lists_equal_single_calls(grounder: mr.Grounder) -> None:
    images = [picture(seed=i, height=90 + i, width=60 + 7 * i) for i in range(10)]  # more than one batch of the tower
    queries = [QUERIES[i % len(QUERIES)] for i in range(10)]
    for one, many in zip(images, grounder.ground(images, queries), strict=True):
        assert many.mask.shape == one.shape
    for image, query, result in zip(images, queries, grounder.ground(images, queries), strict=True):
        assert same(result, grounder.ground(image, query))
    for query, result in zip(queries, grounder.ground(images[0], queries), strict=True):
        assert same(result, grounder.ground(images[0], query))
    assert grounder.ground([], []) == []
    assert grounder.ground(images[0], []) == []


def test_threads_equal_serial_calls(grounder: mr.Grounder) -> None:
    image = picture()
    jobs = [(think, query) for think in (False, True) for query in QUERIES[:3]] * 2
    serial = [grounder.ground(image, query, think=think) for think, query in jobs]
    with grounder.open(image) as study, concurrent.futures.ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(lambda job: study.ground(job[1], think=job[0]), jobs))
        fresh = list(pool.map(lambda job: grounder.ground(image, job[1], think=job[0]), jobs))
    assert all(same(a, b) for a, b in zip(serial, shared, strict=True))
    assert all(same(a, b) for a, b in zip(serial, fresh, strict=True))


def test_a_stream_in_progress_blocks_nobody(grounder: mr.Grounder) -> None:
    image = picture()
    events = grounder.stream(image, QUERIES[0], think=True)
    next(events)
    inner = grounder.ground(image, QUERIES[0], think=True)  # from the same thread: a lock held here would deadlock
    *_, outer = events
    assert isinstance(outer, mr.Grounding)
    assert same(inner, outer)


def test_an_absent_target_has_an_empty_mask(toy_bundle: Path, tmp_path: Path) -> None:
    with mr.Grounder.load(with_threshold(toy_bundle, tmp_path / "bundle", 0.0), device="cpu") as grounder:
        image = Image(pixels=picture(), source="array", pixel_spacing_mm=(1.0, 1.0))
        result = grounder.ground(image, QUERIES[0])
    assert not result.found
    assert (result.box, result.points, result.score, result.area_mm2) == (None, None, 0.0, 0.0)
    assert result.mask.shape == (120, 200)
    assert not result.mask.any()
    assert result.answer == '<answer>{"bbox": null, "points_1": null, "points_2": null}</answer>'
    assert json.loads(json.dumps(result.to_dict()))["box"] is None


def test_area_follows_the_spacing_and_warnings_are_passed_on(grounder: mr.Grounder) -> None:
    pixels = picture()
    image = Image(pixels=pixels, source="array", pixel_spacing_mm=(0.5, 0.25), warnings=("the window was guessed",))
    result = grounder.ground(image, QUERIES[0])
    assert result.area_mm2 == pytest.approx(int(result.mask.sum()) * 0.125)
    assert result.pixel_spacing_mm == (0.5, 0.25)
    assert result.warnings == ("the window was guessed",)
    assert result.image is image


def test_to_dict_is_json_without_query_or_pixels(grounder: mr.Grounder) -> None:
    from medreasoner.ops import rle_decode

    image = picture()
    query = QUERIES[0]
    result = grounder.ground(image, query)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["box"] == list(result.box or ())
    np.testing.assert_array_equal(rle_decode(data["mask"]), result.mask)
    assert query not in json.dumps(data)
    assert query not in repr(result)
    assert result.to_dict(include_query=True)["query"] == query


@pytest.mark.parametrize(
    ("images", "queries", "match"),
    [
        ([picture()], "Where?", "one query for a list of 1 images"),
        ([picture(), picture()], ["Where?"], "2 images and 1 queries"),
        (picture(), 7, "expected text or a list"),
        (picture(), ["Where?", ""], "empty"),
        (picture(), "", "empty"),
        (picture(), "where " * 200, "at most 96"),
        (picture(), "a<|im_end|>b", "reserved"),
    ],
    ids=["one query for images", "lengths", "no text", "one empty", "empty", "long", "reserved"],
)
def test_questions_that_do_not_fit_are_refused_before_any_work(
    grounder: mr.Grounder, images: object, queries: object, match: str
) -> None:
    with pytest.raises(mr.QueryError, match=match):
        grounder.ground(images, queries)  # type: ignore[call-overload]


def test_an_image_that_cannot_be_read_is_its_own_error(grounder: mr.Grounder, tmp_path: Path) -> None:
    with pytest.raises(mr.ImageReadError):
        grounder.ground(tmp_path / "none.png", "Where?")


@pytest.mark.parametrize("shape", [(8, 8), (8, 300), (300, 8), (9, 9, 3), (2000, 31)])
def test_images_of_odd_shapes_are_answered(grounder: mr.Grounder, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    for query in QUERIES[:3]:
        assert grounder.ground(image, query).mask.shape == shape[:2]


def test_a_closed_study_and_a_closed_grounder_refuse(toy_bundle: Path) -> None:
    with mr.Grounder.load(toy_bundle, device="cpu") as grounder:
        study = grounder.open(picture())
        other = grounder.open(picture())
        study.close()
        with pytest.raises(mr.MedReasonerError, match="this Study is closed"):
            study.ground("Where?")
    with pytest.raises(mr.MedReasonerError, match="this Grounder is closed"):
        grounder.ground(picture(), "Where?")
    with pytest.raises(mr.MedReasonerError, match="this Grounder is closed"):
        other.ground("Where?")


def test_closing_while_the_segmenter_has_yet_to_read_the_image_is_our_own_error(
    toy_bundle: Path, tmp_path: Path
) -> None:
    bundle = with_threshold(toy_bundle, tmp_path / "bundle", 1.0)
    with mr.Grounder.load(bundle, device="cpu") as grounder:
        busy, go_on = threading.Semaphore(0), threading.Event()

        def block() -> None:
            busy.release()
            go_on.wait(30)

        for _ in range(2):  # both threads of the pool
            grounder._engine.submit(block)
            busy.acquire()
        try:
            study = grounder.open(picture())  # its segmenter waits in the queue
            events = study.stream("Where?", think=False)
            assert isinstance(next(events), mr.Answer)
            study.close()
            with pytest.raises(mr.MedReasonerError, match="this Study is closed"):
                list(events)
            other = grounder.open(picture())
            grounder._engine.pool.shutdown(wait=False, cancel_futures=True)  # as another thread's close() does
            with pytest.raises(mr.MedReasonerError, match="closed"):
                other.ground("Where?")
            with pytest.raises(mr.MedReasonerError, match="this Grounder is closed"):
                grounder.open(picture())
        finally:
            go_on.set()


def test_an_error_on_the_way_leaves_no_image_in_the_queue(
    grounder: mr.Grounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures = []
    submit = grounder._engine.pool.submit

    def keep(*args: object) -> object:
        futures.append(submit(*args))  # type: ignore[arg-type]
        return futures[-1]

    def fail(*_: object) -> None:
        raise mr.GenerationError("too many image tokens")

    monkeypatch.setattr(Engine, "is_on_cpu", False)  # in batches
    monkeypatch.setattr(grounder._engine.pool, "submit", keep)
    monkeypatch.setattr(grounder._engine.reasoner, "read_prefixes", fail)
    with pytest.raises(mr.GenerationError):
        grounder.ground([picture(seed=i) for i in range(8)], ["Where?"] * 8)
    assert len(futures) == 4  # of the first group
    assert all(future.done() or future.running() for future in futures)


def test_nano_is_loaded_once_however_many_threads_ask_first(monkeypatch: pytest.MonkeyPatch, toy_bundle: Path) -> None:
    loads = []

    def load() -> mr.Grounder:
        loads.append(threading.get_ident())
        time.sleep(0.05)
        return original(toy_bundle, device="cpu")

    original = mr.Grounder.load
    monkeypatch.setattr(mr.Grounder, "load", load)
    module = sys.modules["medreasoner.grounder"]
    module._default_grounder.cache_clear()  # type: ignore[attr-defined]
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: mr.ground(picture(), "Where?"), range(4)))
    finally:
        module._default_grounder.cache_clear()  # type: ignore[attr-defined]
    assert len(loads) == 1
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ["reasoner/vision.onnx", "reasoner/embedding.bin", "segmenter/decoder.onnx"])
def test_one_changed_byte_is_refused(toy_bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(toy_bundle, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(mr.BundleError, match="SHA-256"):
        mr.Grounder.load(copy)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork_the_error_says_what_to_do(grounder: mr.Grounder) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            grounder.ground(picture(), "Where?")
            text = "no error"
        except mr.MedReasonerError as err:
            text = str(err)
        os.write(write, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert "load it in the child" in os.read(read, 1000).decode()
    os.close(read)
    os.close(write)


def test_grounding_loads_no_torch(toy_bundle: Path) -> None:
    code = (
        "import sys, numpy as np, medreasoner as mr\n"
        f"with mr.Grounder.load({str(toy_bundle)!r}, device='cpu') as g:\n"
        "    g.ground(np.zeros((40, 40), np.uint8), 'Where is the heart?')\n"
        "print(sorted({'torch', 'transformers', 'typer', 'PIL', 'pydicom', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_one_call_loads_its_bundle_once(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medreasoner import grounder as module

    loads = []
    load = mr.Grounder.load

    def load_toy() -> mr.Grounder:
        loads.append(threading.get_ident())
        return load(toy_bundle, device="cpu")

    monkeypatch.setattr(mr.Grounder, "load", load_toy)
    module._default_grounder.cache_clear()
    try:
        first, second = mr.ground(picture(), QUERIES[0]), mr.ground(picture(), QUERIES[0])
    finally:
        module._default_grounder.cache_clear()
    assert same(first, second)
    assert len(loads) == 1


def test_the_one_call_takes_lists_as_the_grounder_does(
    toy_bundle: Path, grounder: mr.Grounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medreasoner import grounder as module

    load = mr.Grounder.load
    monkeypatch.setattr(mr.Grounder, "load", lambda: load(toy_bundle, device="cpu"))
    module._default_grounder.cache_clear()
    images, queries = [picture(seed=1), picture(seed=2)], QUERIES[:2]
    try:
        pairs, several = mr.ground(images, queries), mr.ground(images[0], queries)
    finally:
        module._default_grounder.cache_clear()
    for found, image, query in zip(
        [*pairs, *several], [*images, images[0], images[0]], [*queries, *queries], strict=True
    ):
        assert same(found, grounder.ground(image, query))


def test_the_notice_of_the_weights_is_shown_once_without_any_set_up() -> None:
    code = "import medreasoner as mr\nfor _ in range(2):\n    mr.Grounder.load('nano', device='cpu').close()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.count("not for diagnosis") == 1
    assert done.stderr.count("\n") == 1


def test_a_device_that_this_machine_lacks_is_an_error(toy_bundle: Path) -> None:
    with pytest.raises(mr.ProviderError):
        mr.Grounder.load(toy_bundle, device="cuda")


def test_frames_are_chosen_by_number(grounder: mr.Grounder, tmp_path: Path) -> None:
    from PIL import Image as Pillow

    pages = [Pillow.fromarray(picture(seed=seed)) for seed in (3, 4)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    for frame in (0, 1):
        result = grounder.ground(tmp_path / "pages.tiff", QUERIES[0], frame=frame)
        assert same(result, grounder.ground(picture(seed=3 + frame), QUERIES[0]))
