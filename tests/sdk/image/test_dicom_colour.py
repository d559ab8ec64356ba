import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image as PilImage
from pydicom.pixels.processing import _expand_segmented_lut
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, RLELossless

from medreasoner.errors import ImageReadError
from medreasoner.image import read_image
from medreasoner.image.colour import colour_to_u8
from medreasoner.image.lut import expand_segments


@pytest.fixture(scope="module")
def rgb():
    return np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)


def test_rgb_is_taken_as_it_is_in_both_planar_configurations(make_dataset, rgb):
    dataset = make_dataset(rgb, photometric="RGB")
    np.testing.assert_array_equal(read_image(dataset).pixels, rgb)
    del dataset.PlanarConfiguration  # often forgotten; by pixel is the custom
    np.testing.assert_array_equal(read_image(dataset).pixels, rgb)
    dataset.PlanarConfiguration = 1
    dataset.PixelData = rgb.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(read_image(dataset).pixels, rgb)


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint16, 16), (np.uint16, 12), (np.uint32, 32)])
def test_deeper_colour_is_scaled_by_its_full_range(make_dataset, dtype, bits):
    top = 2**bits - 1
    samples = np.zeros((8, 8, 3), dtype)
    samples[..., 0], samples[..., 1] = top, top // 2
    image = read_image(make_dataset(samples, photometric="RGB", BitsStored=bits, HighBit=bits - 1))
    assert image.pixels[0, 0].tolist() in ([255, 127, 0], [255, 128, 0])


def _ybr(rgb, *, partial=False):
    """(H, W, 3) float YCbCr by PS3.3 C.7.6.3.1.2, forward direction."""
    matrix = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    offset = [0, 128, 128]
    if partial:
        matrix = [[0.2568, 0.5041, 0.0979], [-0.1482, -0.2910, 0.4392], [0.4392, -0.3678, -0.0714]]
        offset = [16, 128, 128]
    return rgb @ np.array(matrix).T + offset


@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_PARTIAL_420"])
def test_luminance_and_chrominance_become_rgb(rgb, photometric):
    encoded = np.rint(_ybr(rgb, partial="PARTIAL" in photometric)).clip(0, 255).astype(np.uint8)
    decoded = colour_to_u8(encoded, photometric, 8)
    assert np.abs(decoded.astype(int) - rgb).max() <= 3  # the rounding of three 8-bit samples


def test_ybr_full_agrees_with_pillow():
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3), axis=-1).reshape(-1, 52, 3).astype(np.uint8)
    reference = np.asarray(PilImage.merge("YCbCr", PilImage.fromarray(grid).split()).convert("RGB"))
    assert np.abs(colour_to_u8(grid, "YBR_FULL", 8).astype(int) - reference).max() <= 1


def test_native_ybr_full_422_is_expanded(make_dataset):
    pixels = np.full((8, 8, 3), 128, np.uint8)
    dataset = make_dataset(pixels, photometric="YBR_FULL_422")
    dataset.PixelData = bytes([76, 150, 85, 255]) * 32  # Y1 Y2 Cb Cr
    image = read_image(dataset)
    assert image.pixels[0, 0].tolist() == [254, 0, 0]
    assert image.pixels[0, 1, 0] == 255
    dataset.PixelData = pixels.tobytes()
    with pytest.raises(ImageReadError, match="suits RGB or YBR_FULL"):
        read_image(dataset)


@pytest.mark.parametrize(
    ("samples", "photometric"), [(1, "RGB"), (3, "MONOCHROME2"), (3, "HSV"), (4, "ARGB"), (4, "CMYK"), (2, "RGB")]
)
def test_samples_that_do_not_suit_the_colour_space_are_refused(make_dataset, rgb, samples, photometric):
    dataset = make_dataset(rgb, photometric="RGB")
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = samples, photometric
    with pytest.raises(ImageReadError, match="PhotometricInterpretation"):
        read_image(dataset)


def _with_palette(dataset, tables, *, first=0, bits=16, big=False):
    for colour, entries in zip(("Red", "Green", "Blue"), tables, strict=True):
        name = f"{colour}PaletteColorLookupTable"
        setattr(dataset, f"{name}Descriptor", [len(entries), first, bits])
        data = np.asarray(entries, ">u2" if big else "<u2") if bits == 16 else np.asarray(entries, np.uint8)
        setattr(dataset, f"{name}Data", data.tobytes())
    return dataset


@pytest.mark.parametrize(
    ("bits", "factor"),
    [pytest.param(8, 1, id="8 bits"), pytest.param(16, 257, id="16 bits"), pytest.param(16, 256, id="upper byte"),
     pytest.param(16, 1, id="8 bits in 16")],
)  # fmt: skip
@pytest.mark.parametrize("first", [0, 3])
def test_palettes_of_every_depth_give_the_same_colours(make_dataset, bits, factor, first):
    stored = np.random.default_rng(4).integers(0, 12, (9, 9), dtype=np.uint8)
    palette = np.random.default_rng(5).integers(0, 256, (3, 6))
    palette[:, 0] = 255
    dataset = make_dataset(stored, photometric="PALETTE COLOR")
    image = read_image(_with_palette(dataset, palette * factor, first=first, bits=bits))
    index = np.clip(stored.astype(int) - first, 0, 5)
    np.testing.assert_array_equal(image.pixels, palette[:, index].transpose(1, 2, 0))


def test_palettes_of_big_endian_files_are_read_in_their_byte_order(make_dataset, to_bytes):
    stored = np.tile(np.arange(8, dtype=np.uint16), (8, 1))
    dataset = make_dataset(stored, photometric="PALETTE COLOR", syntax=ExplicitVRBigEndian)
    dataset.PixelData = stored.astype(">u2").tobytes()
    palette = np.arange(24).reshape(3, 8) * 1000
    image = read_image(to_bytes(_with_palette(dataset, palette, big=True)))
    np.testing.assert_array_equal(image.pixels[0], (palette >> 8).T)


def test_a_missing_or_short_palette_is_refused(make_dataset):
    dataset = make_dataset(np.zeros((8, 8), np.uint8), photometric="PALETTE COLOR")
    with pytest.raises(ImageReadError, match="palette"):
        read_image(dataset)
    _with_palette(dataset, np.zeros((3, 8), int))
    dataset.GreenPaletteColorLookupTableData = b"\0\0"
    with pytest.raises(ImageReadError, match="palette"):
        read_image(dataset)


@given(st.lists(st.one_of(
    st.lists(st.integers(0, 255), min_size=1, max_size=9).map(lambda entries: (0, len(entries), *entries)),
    st.tuples(st.just(1), st.integers(1, 40), st.integers(0, 255)),
), min_size=1, max_size=8))  # fmt: skip
def test_segmented_palettes_expand_as_in_pydicom(segments):
    segments = [(0, 2, 7, 200), *segments]
    words = [word for segment in segments for word in segment]
    expected = _expand_segmented_lut(tuple(words), "<B")
    found = expand_segments(np.array(words), len(expected))
    # A ramp that meets exactly half a step is rounded up here and to even there.
    assert np.abs(found - expected).max() <= 1
    assert found[-1] == expected[-1]


@given(hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(0, 255)), st.integers(1, 60))
def test_malformed_segments_raise_value_error_only(words, count):
    with contextlib.suppress(ValueError):
        assert expand_segments(words, count).size == count


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compression_without_loss_changes_nothing(make_dataset, to_bytes, syntax):
    rgb = np.random.default_rng(6).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    dataset = make_dataset(rgb, photometric="RGB")
    if syntax == RLELossless:
        dataset.compress(syntax, generate_instance_uid=False)
    else:
        dataset.PhotometricInterpretation = "YBR_RCT"
        dataset.compress(syntax, rgb, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    np.testing.assert_array_equal(read_image(to_bytes(dataset)).pixels, rgb)
