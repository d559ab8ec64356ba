import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from medreasoner import ops
from medreasoner.errors import ArrayError

many = settings(deadline=None, max_examples=120)
MASKS = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=25))


def by_coco(mask: np.ndarray) -> ops.Rle:
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


@many
@given(mask=MASKS)
def test_encoding_equals_pycocotools_and_decodes_to_the_mask(mask):
    rle = ops.rle_encode(mask)
    assert rle == by_coco(mask)
    decoded = ops.rle_decode(rle)
    assert decoded.dtype == np.bool_
    np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(np.zeros((700, 500), bool), id="empty"),
        pytest.param(np.ones((700, 500), bool), id="full"),
        pytest.param(np.random.default_rng(0).random((300, 517)) < 0.5, id="noise"),
        pytest.param((np.indices((900, 801)) // 200).sum(0) % 2 == 0, id="squares"),
        pytest.param(np.indices((64, 64))[1] % 2 == 0, id="columns"),
        pytest.param(np.indices((64, 64))[0] % 2 == 1, id="rows"),
    ],
)
def test_encoding_equals_pycocotools_on_larger_masks(mask):
    assert ops.rle_encode(mask) == by_coco(mask)
    np.testing.assert_array_equal(ops.rle_decode(ops.rle_encode(mask)), mask)


@many
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    text=st.text(alphabet=st.characters(max_codepoint=130), max_size=12),
)
def test_any_text_decodes_to_a_mask_or_is_refused(height, width, text):
    try:
        mask = ops.rle_decode({"size": [height, width], "counts": text})
    except ArrayError:
        return
    assert ops.rle_encode(mask) == by_coco(mask)
    # What is accepted means what pycocotools takes it for.
    assert coco.area({"size": [height, width], "counts": text.encode()}) == mask.sum()


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({"size": [2, 2], "counts": "3"}, id="too short"),
        pytest.param({"size": [2, 2], "counts": "5"}, id="too long"),
        pytest.param({"size": [2, 2], "counts": ""}, id="nothing"),
        pytest.param({"size": [2, 2], "counts": "P"}, id="cut within a number"),
        pytest.param({"size": [2, 2], "counts": "P" * 200 + "0"}, id="endless number"),
        pytest.param({"size": [2, 2], "counts": "O5"}, id="negative run"),
        pytest.param({"size": [2, 2], "counts": "4\x00"}, id="control character"),
        pytest.param({"size": [2, 2], "counts": "4é"}, id="not ASCII"),
        pytest.param({"size": [2, 2], "counts": "4\ud800"}, id="half a character"),
        pytest.param({"size": [10**9, 10**9], "counts": "0"}, id="huge"),
        pytest.param({"size": [0, 2], "counts": "0"}, id="no rows"),
        pytest.param({"size": [-2, -2], "counts": "4"}, id="negative size"),
        pytest.param({"size": [2], "counts": "4"}, id="one size"),
        pytest.param({"size": [2.0, 2.0], "counts": "4"}, id="float size"),
        pytest.param({"size": [2, 2], "counts": [4]}, id="plain list"),
        pytest.param({"size": [2, 2]}, id="no counts"),
        pytest.param(None, id="None"),
    ],
)
def test_a_malformed_rle_is_refused(bad):
    with pytest.raises(ArrayError):
        ops.rle_decode(bad)
