import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage
from PIL import ImageFilter

from medreasoner.image import Image
from medreasoner.render import ANSWER, TRUTH, _over_square, draw


def _grey(height, width, value=100):
    return Image(pixels=np.full((height, width), value, np.uint8), source="array")


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        pytest.param(64, 64, 8, id="small square"),
        pytest.param(300, 200, 2, id="enlarged by a whole number"),
        pytest.param(1, 1, 512, id="one pixel"),
        pytest.param(512, 30, 1, id="long enough"),
        pytest.param(900, 700, 1, id="large"),
    ],
)
def test_small_images_are_enlarged_by_a_whole_number(make_grounding, height, width, scale):
    picture = make_grounding(_grey(height, width)).overlay()
    assert picture.mode == "RGB"
    assert picture.width == max(360, width * scale)
    assert picture.height > height * scale  # the caption


def test_large_images_are_reduced_on_request_only(make_grounding):
    grounding = make_grounding(_grey(2000, 1000))
    assert grounding.overlay().width == 1000
    assert grounding.overlay(max_side=800).width == 400


def test_pixels_outside_of_the_drawing_are_those_of_the_image(make_grounding):
    values = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    grounding = make_grounding(Image(pixels=values, source="array"))
    drawn = np.asarray(grounding.overlay())[:600]
    changed = (drawn != values).any(axis=2)
    x1, y1, x2, y2 = (round(edge) for edge in grounding.box)
    outside = np.ones((600, 600), bool)
    outside[y1 - 6 : y2 + 6, x1 - 6 : x2 + 6] = False
    assert not changed[outside].any()
    assert changed[grounding.mask].mean() > 0.99


def test_mask_is_tinted_and_the_image_shows_through(make_grounding):
    dark = np.asarray(make_grounding(_grey(600, 600, 0)).overlay())[360, 225]
    bright = np.asarray(make_grounding(_grey(600, 600, 255)).overlay())[360, 225]
    assert bright.astype(int).sum() - dark.astype(int).sum() > 400
    assert dark[2] > dark[0]
    assert bright[2] > bright[0]


def test_box_lies_around_its_pixels_and_not_on_them(make_grounding):
    grounding = make_grounding(
        _grey(600, 600), box=(100.0, 200.0, 300.0, 400.0), points=None, mask=np.zeros((600, 600), bool)
    )
    changed = (np.asarray(grounding.overlay())[:600] != 100).any(axis=2)
    assert not changed[200:400, 100:300].any()
    assert changed[199, 100:300].all()
    assert changed[400, 100:300].all()
    assert changed[200:400, 99].all()
    assert changed[200:400, 300].all()


def test_absent_answer_leaves_the_image_as_it_is_and_says_so(make_grounding):
    values = np.random.default_rng(1).integers(0, 256, (600, 600), np.uint8)
    absent = make_grounding(Image(pixels=values, source="array"), found=False).overlay()
    assert (np.asarray(absent)[:600, :, 0] == values).all()
    assert (np.asarray(absent)[600:] > 200).any()  # light text


def test_caption_does_not_depend_on_the_query(make_grounding):
    first, second = (np.asarray(make_grounding(query=query).overlay()) for query in ("a", "b" * 200))
    assert (first == second).all()


def test_thin_structures_survive_the_reduction(make_grounding):
    mask = np.zeros((4000, 400), bool)
    mask[:, 200:202] = True
    grounding = make_grounding(_grey(4000, 400), mask=mask, box=None, points=None)
    changed = (np.asarray(grounding.overlay(max_side=1000))[:1000] != 100).any(axis=2)
    # The caption needs more width than the picture, which stands in the middle of it.
    assert changed[100:900, 130:230].any(axis=1).all()


@pytest.mark.parametrize("place", ["corner", "whole", "outside"])
def test_drawing_at_the_border_does_not_fail(make_grounding, place):
    image = _grey(50, 70)
    mask = np.zeros((50, 70), bool)
    if place == "corner":
        mask[:1, :1] = True
        changes = {"box": (0.0, 0.0, 1.0, 1.0), "points": ((0.0, 0.0), (70.0, 50.0))}
    elif place == "whole":
        mask[:] = True
        changes = {"box": (0.0, 0.0, 70.0, 50.0), "points": ((0.0, 50.0), (70.0, 0.0))}
    else:
        changes = {"box": (69.5, 49.5, 70.0, 50.0), "points": ((70.0, 50.0), (70.0, 50.0))}
    assert make_grounding(image, mask=mask, **changes).overlay().width == 560


@given(
    height=st.integers(1, 20), width=st.integers(1, 20), reach=st.integers(1, 5), seed=st.integers(0, 50),
    share=st.sampled_from([0.1, 0.5, 0.9]),
)  # fmt: skip
def test_the_square_around_each_pixel_is_that_of_pillows_filters(height, width, reach, seed, share):
    rim = reach + 1
    mask = np.pad(np.random.default_rng(seed).random((height, width)) < share, rim)
    picture = PilImage.fromarray(mask.view(np.uint8) * np.uint8(255))
    for combine, kind in ((np.logical_and, ImageFilter.MinFilter), (np.logical_or, ImageFilter.MaxFilter)):
        expected = np.asarray(picture.filter(kind(2 * reach + 1))) > 0
        found = _over_square(mask, reach, combine)
        inner = np.s_[reach:-reach, reach:-reach]
        np.testing.assert_array_equal(found[inner], expected[inner])
        assert not found[:reach].any()


def test_the_truth_is_an_outline_of_its_own_colour_over_the_image():
    truth = np.zeros((600, 600), bool)
    truth[100:300, 200:400] = True
    pixels = np.full((600, 600), 100, np.uint8)
    drawn = np.asarray(draw(pixels, truth=truth, line=5)).astype(int)
    outline = (drawn == TRUTH).all(axis=2)
    assert outline[100:103, 200:400].all()
    assert outline[100:300, 397:400].all()
    assert not outline[103:297, 203:397].any()
    assert (drawn[110:290, 210:390] == 100).all()
    assert not outline[~truth].any()
    both = np.asarray(draw(pixels, mask=truth, truth=truth, line=5)).astype(int)
    assert (both[100:103, 300] == TRUTH).all()  # on top, and thinner
    assert (both[103:105, 300] == ANSWER).all()


def test_a_drawing_has_no_caption_and_an_overlay_begins_with_it(make_grounding):
    grounding = make_grounding(_grey(600, 700))
    drawn = draw(grounding.image.pixels, mask=grounding.mask, box=grounding.box, points=grounding.points)
    assert drawn.size == (700, 600)
    assert (np.asarray(grounding.overlay())[:600] == np.asarray(drawn)).all()
