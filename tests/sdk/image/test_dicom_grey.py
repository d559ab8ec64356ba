import math

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medreasoner import ops
from medreasoner.errors import ImageReadError
from medreasoner.image import read_image
from medreasoner.image.voi import _domain, window_shades


def _pseudo_code(x, center, width, function):
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.2 and C.11.2.1.3.1, one value at a time, output range 0 to 255."""
    if function == "SIGMOID":
        exponent = -4 * (x - center) / width
        return 255 / (1 + math.exp(exponent)) if exponent < 700 else 0.0
    if function == "LINEAR":
        if x <= center - 0.5 - (width - 1) / 2:
            return 0.0
        if x > center - 0.5 + (width - 1) / 2:
            return 255.0
        return ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
    if x <= center - width / 2:
        return 0.0
    if x > center + width / 2:
        return 255.0
    return ((x - center) / width + 0.5) * 255


def _lut(entries, first, bits, *, vr="US"):
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item.LUTData = list(entries) if vr == "US" else np.asarray(entries, "<u2").tobytes()
    item["LUTData"].VR = vr
    return Sequence([item])


@given(
    dtype=st.sampled_from(["u1", "i1", "<u2", ">u2", "<i2", ">i2", "<u4", ">i4"]),
    low=st.integers(-(2**31), 2**32 - 65537),
    above=st.lists(st.integers(0, 65535), min_size=1, max_size=40),
)
def test_a_value_is_looked_up_at_its_distance_from_the_lowest(dtype, low, above):
    limits = np.iinfo(dtype)
    low = min(max(low, limits.min), limits.max - min(65535, limits.max - limits.min))
    values = [min(low + each, limits.max) for each in (0, *above)]
    domain = _domain(np.array([values, values[::-1]], dtype), None)
    assert domain.values[domain.index].tolist() == [values, values[::-1]]
    assert domain.values[domain.used].tolist() == sorted(set(values))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(40, 400), (0, 1), (-100.5, 2), (2048, 4096), (3, 0.25)])
def test_windows_follow_the_standards_pseudo_code(function, center, width):
    if function == "LINEAR" and width < 1:
        pytest.skip("LINEAR asks for a width of at least 1")
    values = np.concatenate([np.linspace(-300, 300, 601), [center - width / 2, center + width / 2, center - 0.5]])
    expected = [_pseudo_code(x, center, width, function) for x in values.tolist()]
    np.testing.assert_allclose(window_shades(values, center, width, function) * 255, expected, atol=1e-9)


@given(st.floats(-5000, 5000), st.floats(1, 9000), st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]))
def test_shades_rise_with_the_value_and_stay_in_range(center, width, function):
    shades = window_shades(np.linspace(-10000, 10000, 400), center, width, function)
    assert (np.diff(shades) >= 0).all()
    assert shades.min() >= 0
    assert shades.max() <= 1


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("invert", [False, True])
def test_the_rendered_frame_equals_the_compiled_window(make_dataset, ramp, function, invert):
    dataset = make_dataset(
        ramp,
        photometric="MONOCHROME1" if invert else "MONOCHROME2",
        RescaleSlope="2.5",
        RescaleIntercept="-30",
        WindowCenter="40",
        WindowWidth="400",
        VOILUTFunction=function,
    )
    kernel = ops.window_u8(ramp, 2.5, -30, 40, 400, function=function, invert=invert)
    # Half a shade lies exactly between two for some values; the kernel computes them in another order.
    assert np.abs(read_image(dataset).pixels.astype(int) - kernel).max() <= 1
    assert (read_image(dataset).pixels == kernel).mean() > 0.99


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_applies_to_rescaled_values_as_in_pydicom(make_dataset, ramp, function):
    dataset = make_dataset(
        ramp, RescaleSlope="2", RescaleIntercept="-100", WindowCenter=["40", "900"], WindowWidth=["400", "1"],
        VOILUTFunction=function,
    )  # fmt: skip
    reference = apply_windowing(ramp * 2.0 - 100, dataset, index=0)
    low, high = -32768 * 2 - 100, 32767 * 2 - 100
    expected = (reference - low) / (high - low) * 255
    image = read_image(dataset)
    assert np.abs(image.pixels - expected).max() <= 0.51
    assert image.warnings == ()


def test_monochrome1_is_inverted_after_the_window(make_dataset):
    values = np.tile(np.array([0, 10, 20, 30, 40, 50, 60, 70], np.uint16), (8, 1))
    window = {"WindowCenter": "20", "WindowWidth": "20", "VOILUTFunction": "LINEAR_EXACT"}
    plain = read_image(make_dataset(values, **window)).pixels
    inverted = read_image(make_dataset(values, photometric="MONOCHROME1", **window)).pixels
    assert plain[0].tolist() == [0, 0, 128, 255, 255, 255, 255, 255]
    np.testing.assert_array_equal(inverted, 255 - plain)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted", "warns"),
    [
        ("MONOCHROME2", "IDENTITY", False, False),
        ("MONOCHROME2", "INVERSE", True, True),
        ("MONOCHROME1", "INVERSE", True, False),
        ("MONOCHROME1", "IDENTITY", True, True),
    ],
)
def test_presentation_lut_shape_and_photometric_interpretation_invert_once(
    make_dataset, ramp, photometric, shape, inverted, warns
):
    dataset = make_dataset(
        ramp, photometric=photometric, WindowCenter="0", WindowWidth="1024", PresentationLUTShape=shape
    )
    image = read_image(dataset)
    assert (image.pixels[0, 0] > image.pixels[-1, -1]) == inverted
    assert any("contradicts" in warning for warning in image.warnings) == warns


@pytest.mark.parametrize("vr", ["US", "OW"])
def test_a_modality_table_goes_before_the_window(make_dataset, vr):
    stored = np.tile(np.arange(8, dtype=np.uint16), (8, 1))
    dataset = make_dataset(stored, WindowCenter="100", WindowWidth="200", VOILUTFunction="LINEAR_EXACT")
    dataset.ModalityLUTSequence = _lut([50, 100, 150, 200], 2, 16, vr=vr)  # maps 2..5; the ends hold outside
    dataset.RescaleSlope, dataset.RescaleIntercept = "9", "9"  # not used beside a table
    assert read_image(dataset).pixels[0].tolist() == [64, 64, 64, 128, 191, 255, 255, 255]


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_voi_table_goes_before_a_window_and_takes_rescaled_values(make_dataset, to_bytes, vr, syntax):
    stored = np.tile(np.arange(8, dtype=np.int16), (8, 1))
    dataset = make_dataset(
        stored, WindowCenter="0", WindowWidth="1", RescaleSlope="1", RescaleIntercept="-4", syntax=syntax
    )
    dataset.VOILUTSequence = _lut([0, 1000, 2000, 4095], -2, 12, vr=vr)
    expected = [0, 0, 0, 62, 125, 255, 255, 255]  # entries / 4095 * 255
    assert read_image(dataset).pixels[0].tolist() == expected
    assert read_image(to_bytes(dataset)).pixels[0].tolist() == expected


@pytest.mark.parametrize("slope", [b"SE", b"2..0"])
def test_a_slope_that_is_no_number_is_said(make_dataset, to_bytes, ramp, slope):
    dataset = make_dataset(ramp, WindowCenter="0", WindowWidth="1024", RescaleSlope="77.77777", RescaleIntercept="5")
    data = to_bytes(dataset).replace(b"77.77777", slope.ljust(8))
    image = read_image(data)
    assert any("no number" in warning for warning in image.warnings)
    np.testing.assert_array_equal(
        image.pixels, read_image(make_dataset(ramp, WindowCenter="0", WindowWidth="1024")).pixels
    )


def _describe(item, descriptor):
    item.add_new(0x00283002, "SS" if descriptor[1] < 0 else "US", descriptor)


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("first", [-1024, 64512])  # the same bits, parsed as SS and as US
@pytest.mark.parametrize("lowest", [-100, 0])  # whether this very picture holds a negative value
def test_a_signed_table_is_read_alike_whether_or_not_a_value_is_negative(make_dataset, keyword, first, lowest):
    stored = np.tile(np.arange(lowest, lowest + 800, 100, dtype=np.int16), (8, 1))
    dataset = make_dataset(stored)
    setattr(dataset, keyword, _lut(list(range(0, 32 * 2048, 32)), -1024, 16))
    _describe(getattr(dataset, keyword)[0], [2048, first, 16])
    pixels = read_image(dataset).pixels[0].astype(int)
    expected = (np.arange(lowest, lowest + 800, 100) + 1024) * 32
    if keyword == "VOILUTSequence":
        np.testing.assert_allclose(pixels, expected / 65535 * 255, atol=0.51)
    else:  # no window: from the smallest to the largest
        np.testing.assert_allclose(pixels, np.linspace(0, 255, 8), atol=0.51)


def test_a_voi_table_far_above_zero_stays_there(make_dataset):
    stored = np.tile(np.arange(40000, 40800, 100, dtype=np.uint16), (8, 1))
    dataset = make_dataset(stored)
    dataset.VOILUTSequence = _lut([0, 65535], 0, 16)
    _describe(dataset.VOILUTSequence[0], [2, 40300 - 65536, 16])  # US, but parsed as SS
    assert read_image(dataset).pixels[0].tolist() == [0] * 4 + [255] * 4


def test_eight_bit_entries_may_share_words(make_dataset):
    stored = np.tile(np.arange(8, dtype=np.uint8), (8, 1))
    dataset = make_dataset(stored)
    dataset.VOILUTSequence = _lut([0x2010, 0x4030, 0x6050, 0xFF70], 0, 8)
    dataset.VOILUTSequence[0].LUTDescriptor = [8, 0, 8]
    assert read_image(dataset).pixels[0].tolist() == [0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0xFF]


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize("descriptor", [[4, 0], [4000, 0, 16], [4, 0, 40], None])
def test_a_malformed_table_is_left_out_with_a_warning(make_dataset, ramp, keyword, descriptor):
    dataset = make_dataset(ramp, WindowCenter="0", WindowWidth="1024")
    plain = read_image(dataset).pixels
    setattr(dataset, keyword, _lut([0, 1, 2, 3], 0, 16))
    if descriptor is None:
        del getattr(dataset, keyword)[0].LUTData
    else:
        getattr(dataset, keyword)[0].LUTDescriptor = descriptor
    image = read_image(dataset)
    np.testing.assert_array_equal(image.pixels, plain)
    assert "table is malformed" in image.warnings[0]


@pytest.mark.parametrize(
    "window",
    [
        pytest.param({}, id="none"),
        pytest.param({"WindowCenter": "40"}, id="no width"),
        pytest.param({"WindowCenter": "40", "WindowWidth": "0"}, id="width 0"),
        pytest.param({"WindowCenter": "40", "WindowWidth": "0.5"}, id="LINEAR below 1"),
        pytest.param({"WindowCenter": "40", "WindowWidth": "-400"}, id="negative"),
        pytest.param({"WindowCenter": "40", "WindowWidth": "0", "VOILUTFunction": "SIGMOID"}, id="sigmoid 0"),
        pytest.param({"WindowCenter": "90000", "WindowWidth": "10"}, id="above all values"),
        pytest.param({"WindowCenter": "-90000", "WindowWidth": "10"}, id="below all values"),
    ],
)
def test_without_a_usable_window_the_range_of_values_is_shown(make_dataset, ramp, window):
    image = read_image(make_dataset(ramp, **window))
    expected = np.floor((ramp + 512.0) / 1023 * 255 + 0.5)
    np.testing.assert_array_equal(image.pixels, expected)
    assert "smallest to the largest value (-512 to 511)" in image.warnings[-1]


def test_a_window_that_is_no_number_counts_as_missing(make_dataset, ramp, to_bytes):
    data = to_bytes(make_dataset(ramp, WindowCenter="40", WindowWidth="4000"))
    assert data.count(b"4000") == 1
    image = read_image(data.replace(b"4000", b"wide"))
    assert "no usable window" in image.warnings[0]


def test_an_unknown_voi_function_is_taken_as_linear_with_a_warning(make_dataset, ramp):
    window = {"WindowCenter": "0", "WindowWidth": "500"}
    image = read_image(make_dataset(ramp, VOILUTFunction="CUBIC", **window))
    np.testing.assert_array_equal(image.pixels, read_image(make_dataset(ramp, **window)).pixels)
    assert "LINEAR was used" in image.warnings[0]


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param({"PixelPaddingValue": -2000}, id="one value"),
        pytest.param({"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1000}, id="range"),
        pytest.param({"PixelPaddingValue": -1000, "PixelPaddingRangeLimit": -2000}, id="range from above"),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_left_out_of_the_range(make_dataset, ramp, attributes, photometric):
    stored = ramp.copy()
    stored[:4] = -2000
    image = read_image(make_dataset(stored, photometric=photometric, **attributes))
    shades = np.floor((stored - float(stored[4:].min())) / (511 - float(stored[4:].min())) * 255 + 0.5)
    expected = shades if photometric == "MONOCHROME2" else 255 - shades
    np.testing.assert_array_equal(image.pixels[4:], expected[4:])
    assert (image.pixels[:4] == 0).all()


def test_a_picture_of_nothing_but_padding_is_still_shown(make_dataset):
    image = read_image(make_dataset(np.full((8, 8), -2000, np.int16), PixelPaddingValue=-2000))
    assert (image.pixels == 0).all()
    assert "same value" in image.warnings[0]


@pytest.mark.parametrize("signed", [False, True])
def test_bits_that_do_not_belong_to_the_value_are_masked_out(make_dataset, signed):
    """12 bits stored at bits 2 to 13, an overlay in bit 0, rubbish in bit 15."""
    rng = np.random.default_rng(1)
    values = rng.integers(-2048, 2048, (16, 16)) if signed else rng.integers(0, 4096, (16, 16))
    rubbish = rng.integers(0, 2, (16, 16)) | rng.integers(0, 2, (16, 16)) << 15
    packed = ((values & 0xFFF) << 2 | rubbish).astype(np.uint16)
    stored = packed.view(np.int16) if signed else packed
    dataset = make_dataset(
        stored, BitsStored=12, HighBit=13, WindowCenter="0" if signed else "2048", WindowWidth="4096"
    )
    clean = make_dataset(values.astype(np.int16), WindowCenter=dataset.WindowCenter, WindowWidth="4096")
    np.testing.assert_array_equal(read_image(dataset).pixels, read_image(clean).pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
def test_every_sample_width_and_sign_is_scaled_alike(make_dataset, dtype):
    info = np.iinfo(dtype)
    stored = np.tile(np.array([info.min, info.min // 2 + info.max // 2, info.max, 0], dtype), (8, 2))
    shades = read_image(make_dataset(stored)).pixels[0, :4].astype(int)
    assert shades[[0, 2]].tolist() == [0, 255]
    assert abs(shades[1] - 127) <= 1


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels_are_read_and_holes_filled(make_dataset, keyword):
    dtype = np.float32 if keyword == "FloatPixelData" else np.float64
    values = np.tile(np.array([0, 1, 2, np.nan, np.inf, 4, 3, 2], dtype), (8, 1))
    dataset = make_dataset(np.zeros((8, 8), np.uint16), BitsAllocated=dtype().itemsize * 8)
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    setattr(dataset, keyword, values.tobytes())
    image = read_image(dataset)
    assert image.pixels[0].tolist() == [0, 64, 128, 0, 0, 255, 191, 128]
    assert "16 of 64 values are not finite" in image.warnings[0]
    setattr(dataset, keyword, np.full((8, 8), np.nan, dtype).tobytes())
    with pytest.raises(ImageReadError, match="finite"):
        read_image(dataset)


def test_big_and_little_endian_show_the_same(make_dataset, to_bytes, ramp):
    little = make_dataset(ramp)
    big = make_dataset(ramp, syntax=ExplicitVRBigEndian)
    big.PixelData = ramp.astype(">i2").tobytes()
    np.testing.assert_array_equal(read_image(to_bytes(little)).pixels, read_image(to_bytes(big)).pixels)


@pytest.mark.parametrize("slope", ["0", "abc"])
def test_a_senseless_slope_is_not_applied(make_dataset, ramp, to_bytes, slope):
    dataset = make_dataset(ramp, WindowCenter="0", WindowWidth="1024")
    plain = read_image(dataset).pixels
    dataset.RescaleSlope = "7"
    data = to_bytes(dataset)
    place = data.index(b"\x28\x00\x53\x10DS\x02\x00") + 8
    image = read_image(data[:place] + slope[:2].encode().ljust(2) + data[place + 2 :])
    np.testing.assert_array_equal(image.pixels, plain)


def _enhanced(make_dataset, frames, groups, shared):
    dataset = make_dataset(frames)
    dataset.PerFrameFunctionalGroupsSequence = Sequence([_group(**group) for group in groups])
    dataset.SharedFunctionalGroupsSequence = Sequence([_group(**shared)])
    return dataset


def _group(**macros):
    group = Dataset()
    for keyword, attributes in macros.items():
        macro = Dataset()
        for name, value in attributes.items():
            setattr(macro, name, value)
        setattr(group, keyword, Sequence([macro]))
    return group


def test_every_frame_of_an_enhanced_object_has_its_own_rescale_window_and_spacing(make_dataset):
    frames = np.stack([np.tile(np.arange(8, dtype=np.uint16) * 10, (8, 1))] * 2)
    rescale = [{"RescaleSlope": "1", "RescaleIntercept": "0"}, {"RescaleSlope": "2", "RescaleIntercept": "-20"}]
    window = {"WindowCenter": "40", "WindowWidth": "80", "VOILUTFunction": "LINEAR_EXACT"}
    groups = [
        {"PixelValueTransformationSequence": rescale[0], "PixelMeasuresSequence": {"PixelSpacing": ["1", "2"]}},
        {"PixelValueTransformationSequence": rescale[1], "PixelMeasuresSequence": {"PixelSpacing": ["3", "4"]}},
    ]
    dataset = _enhanced(make_dataset, frames, groups, {"FrameVOILUTSequence": window})
    first, second = read_image(dataset, frame=0), read_image(dataset, frame=1)
    assert first.pixels[0].tolist() == [0, 32, 64, 96, 128, 159, 191, 223]
    assert second.pixels[0].tolist() == [0, 0, 64, 128, 191, 255, 255, 255]
    assert (first.pixel_spacing_mm, second.pixel_spacing_mm) == ((1, 2), (3, 4))
    assert (second.frame, second.n_frames, second.warnings) == (1, 2, ())


def test_the_first_of_several_frames_is_shown_with_a_warning(make_dataset):
    frames = np.random.default_rng(2).integers(0, 255, (3, 8, 8), dtype=np.uint8)
    dataset = make_dataset(frames, WindowCenter="128", WindowWidth="256")
    image = read_image(dataset)
    np.testing.assert_array_equal(image.pixels, frames[0])
    assert (image.frame, image.n_frames) == (0, 3)
    assert "frame 0 of 3" in image.warnings[0]
    for frame in range(3):
        np.testing.assert_array_equal(read_image(dataset, frame=frame).pixels, frames[frame])
    with pytest.raises(ImageReadError, match=r"holds 3 \(0 to 2\)"):
        read_image(dataset, frame=3)


def test_single_bits_are_unpacked_across_byte_borders(make_dataset):
    bits = np.random.default_rng(3).integers(0, 2, (3, 9, 9), dtype=np.uint8)  # 81 bits a frame
    dataset = make_dataset(bits, BitsAllocated=1, BitsStored=1, HighBit=0)
    dataset.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes() + b"\0"
    for frame in range(3):
        np.testing.assert_array_equal(read_image(dataset, frame=frame).pixels, bits[frame] * 255)


def test_reading_leaves_the_data_set_as_it_was_and_keeps_the_header(make_dataset, ramp):
    dataset = make_dataset(ramp, WindowCenter="0", WindowWidth="100")
    before = dataset.to_json()
    image = read_image(dataset)
    assert dataset.to_json() == before
    assert image.dicom is not None
    assert "PixelData" not in image.dicom
    assert image.dicom.SOPInstanceUID == dataset.SOPInstanceUID
    assert image.dicom.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert isinstance(image.dicom, pydicom.Dataset)
