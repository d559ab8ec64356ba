"""What the segmenter's encoder is shown."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from medreasoner import read_image
from medreasoner.errors import ArrayError, GenerationError
from medreasoner.segmenter import Segmenter


class Recorder:
    """A session that keeps its inputs."""

    providers = ("NumPy",)

    max_rows = None

    def __init__(self, outputs: Mapping[str, Any]) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs = outputs

    def bind(self, _inputs: Mapping[str, Any], _outputs: Mapping[str, Any]) -> "Recorder":
        return self

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.inputs = {name: value.copy() for name, value in inputs.items()}
        return dict(self.outputs)


FEATURES = {"image_embedding": np.zeros((1, 2, 4, 4), np.float32)}
MASKS = {
    "mask_logits": np.arange(3, dtype=np.float32)[None, :, None, None] * np.ones((16, 16), np.float32),
    "predicted_iou": np.array([[0.2, 0.9, 0.4]], np.float32),
}


@pytest.fixture
def shown(spec):
    """Pixels (3, 64, 64) that an image becomes, with these entries of the segmenter's section."""

    def show(pixels: np.ndarray, **changes: Any) -> np.ndarray:
        encoder = Recorder(FEATURES)
        Segmenter(dataclasses.replace(spec.segmenter, **changes), encoder=encoder, decoder=encoder).encode(
            read_image(pixels)
        )
        return encoder.inputs["pixel_values"][0]

    return show


PIXELS = np.random.default_rng(0).integers(40, 91, (32, 48), np.uint8)


def test_fixed_values_do_not_depend_on_the_image(shown):
    seen = shown(PIXELS)
    plain = shown(PIXELS, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))[:, :43]
    assert 0.1 < plain.min() < plain.max() < 0.4  # a bicubic resize may overshoot a little
    mean, std = np.array([0.485, 0.456, 0.406])[:, None, None], np.array([0.229, 0.224, 0.225])[:, None, None]
    np.testing.assert_allclose(seen[:, :43], (plain - mean) / std, atol=1e-5)
    assert not seen[:, 43:].any()


def test_minmax_stretches_what_the_image_holds_and_leaves_the_padding_at_zero(shown):
    unit = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    seen, plain = (shown(PIXELS, rescale=kind, **unit) for kind in ("minmax", "fixed"))
    content = plain[:, :43]
    low, high = content.min(), content.max()
    assert low > 0  # else the padding would take part unseen
    np.testing.assert_allclose(seen[:, :43], (content - low) / (high - low), atol=1e-6)
    assert (seen[:, :43].min(), seen[:, :43].max()) == (0.0, pytest.approx(1.0))
    assert not seen[:, 43:].any()


def test_minmax_normalises_after_it_has_stretched(shown):
    unit = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    stretched = shown(PIXELS, rescale="minmax", **unit)[:, :43]
    seen = shown(PIXELS, rescale="minmax", image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.25, 0.1))[:, :43]
    for plane, mean, std in ((0, 0.5, 0.5), (1, 0.4, 0.25), (2, 0.3, 0.1)):
        np.testing.assert_allclose(seen[plane], (stretched[plane] - mean) / std, atol=1e-5)


def test_an_image_of_one_grey_stays_finite(shown):
    seen = shown(np.full((20, 20), 77, np.uint8), rescale="minmax", image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    assert np.isfinite(seen).all()
    assert not seen.any()


@pytest.fixture
def decoded(spec):
    """What the decoder is given for a box and two points, with these outputs of the encoder and entries of the spec."""

    def decode(features: Mapping[str, np.ndarray], **changes: Any) -> dict[str, Any]:
        encoder, decoder = Recorder(features), Recorder(MASKS)
        segmenter = Segmenter(dataclasses.replace(spec.segmenter, **changes), encoder=encoder, decoder=decoder)
        image = segmenter.encode(read_image(PIXELS))
        corners, points = np.array([[1.0, 2.0], [30.0, 20.0]]), np.array([[5.0, 6.0], [7.0, 8.0]])
        logits, score = segmenter.decode(image, corners=corners, points=points)
        assert (logits == 1).all()  # the mask with the highest predicted IoU
        assert score == pytest.approx(0.9)
        return decoder.inputs

    return decode


def test_the_decoder_is_given_whatever_the_encoder_gives_by_the_same_names(decoded):
    rng = np.random.default_rng(0)
    features = {name: rng.random((1, 3, 5), np.float32) for name in ("image_embedding", "one", "two")}
    given = decoded(features)
    assert given.keys() == {*features, "points", "labels"}
    for name, value in features.items():
        np.testing.assert_array_equal(given[name], value)


@pytest.mark.parametrize(
    ("architecture", "prompts", "labels"),
    [
        ("sam", "joint", [1, 1, 2, 3]),
        ("sam", "box", [2, 3]),
        ("sam", "points", [1, 1, -1]),
        ("sam2", "joint", [1, 1, 2, 3, -1]),
        ("sam2", "box", [2, 3, -1]),
        ("sam2", "points", [1, 1, -1]),
    ],
)
def test_each_architecture_has_its_padding_point(decoded, architecture, prompts, labels):
    given = decoded(FEATURES, architecture=architecture, prompts=prompts)
    assert given["labels"].tolist() == [labels]
    scale = np.array([64 / 48, 43 / 32])  # 48 x 32 pixels become 64 x 43
    places = {1: [[5, 6], [7, 8]], 2: [[1, 2]], 3: [[30, 20]], -1: [[0, 0]]}
    expected = [row for label in dict.fromkeys(labels) for row in places[label]]
    np.testing.assert_allclose(given["points"][0], expected * scale, rtol=1e-6)


@pytest.mark.parametrize("name", ["mask_logits", "predicted_iou"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_an_error_and_no_empty_mask(spec, name, value):
    broken = {key: each.copy() for key, each in MASKS.items()}
    broken[name][0, 1] = value  # of the mask with the highest score
    session = Recorder({**FEATURES, **broken})
    segmenter = Segmenter(spec.segmenter, encoder=session, decoder=session)
    embedded = segmenter.encode(read_image(PIXELS))
    with pytest.raises(GenerationError, match="not finite"):
        segmenter.decode(embedded, corners=np.array([[1.0, 1], [9, 9]]), points=np.array([[2.0, 2], [5, 5]]))


@pytest.mark.parametrize(
    ("architecture", "given", "labels"),
    [
        ("sam", "box", [2, 3]),
        ("sam", "points", [1, 1, -1]),
        ("sam2", "box", [2, 3, -1]),
        ("sam2", "points", [1, 1, -1]),
    ],
)
def test_a_box_or_points_alone_are_given_as_to_a_segmenter_that_takes_no_more(
    spec, decoded, architecture, given, labels
):
    decoder = Recorder({**FEATURES, **MASKS})
    segmenter = Segmenter(dataclasses.replace(spec.segmenter, architecture=architecture, prompts="joint"),
                          encoder=decoder, decoder=decoder)  # fmt: skip
    prompts = {"box": np.array([[1.0, 2.0], [30.0, 20.0]]), "points": np.array([[5.0, 6.0], [7.0, 8.0]])}
    embedded = segmenter.encode(read_image(PIXELS))
    segmenter.decode(
        embedded,
        corners=prompts["box"] if given == "box" else None,
        points=prompts["points"] if given == "points" else None,
    )
    assert decoder.inputs["labels"].tolist() == [labels]
    alone = decoded(FEATURES, architecture=architecture, prompts=given)
    np.testing.assert_array_equal(decoder.inputs["points"], alone["points"])


@pytest.mark.parametrize(("prompts", "wanted"), [("box", "a box"), ("points", "two points"), ("joint", "or both")])
def test_a_prompt_that_the_segmenter_does_not_take_is_refused(spec, prompts, wanted):
    session = Recorder({**FEATURES, **MASKS})
    segmenter = Segmenter(dataclasses.replace(spec.segmenter, prompts=prompts), encoder=session, decoder=session)
    embedded = segmenter.encode(read_image(PIXELS))
    other = np.array([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ArrayError, match=wanted):
        segmenter.decode(
            embedded, corners=other if prompts == "points" else None, points=other if prompts == "box" else None
        )
