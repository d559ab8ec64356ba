"""Files that must be refused, and what the refusal says."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    MPEG4HP41,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
)

from medreasoner.errors import CodecError, ImageReadError
from medreasoner.image import read_image
from medreasoner.image.codestream import codestream_size


def _jpeg(height, width):
    stream = io.BytesIO()
    PilImage.fromarray(np.zeros((height, width), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def _encapsulated(make_dataset, syntax, frame, **attributes):
    dataset = make_dataset(np.zeros((16, 16), np.uint8), syntax=syntax, **attributes)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB"
    return dataset


def test_a_bare_data_set_is_recognised_in_either_encoding(make_dataset, ramp):
    expected = read_image(make_dataset(ramp)).pixels
    for implicit in (False, True):
        dataset = make_dataset(ramp, syntax=ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)
        dataset.preamble = None
        del dataset.file_meta
        stream = io.BytesIO()
        dataset.save_as(stream, implicit_vr=implicit, little_endian=True)
        np.testing.assert_array_equal(read_image(stream.getvalue()).pixels, expected)


@pytest.mark.parametrize("missing", [1, 2, 100, 2047])
def test_native_pixel_data_that_are_too_short_are_refused_with_both_lengths(make_dataset, ramp, missing):
    dataset = make_dataset(ramp)
    dataset.PixelData = dataset.PixelData[:-missing]
    with pytest.raises(ImageReadError, match=rf"truncated: {2048 - missing} bytes .* need 2048"):
        read_image(dataset)


@pytest.mark.parametrize("cut", [1, 50, 1500, 2047])
def test_a_truncated_file_is_refused(make_dataset, to_bytes, ramp, cut):
    data = to_bytes(make_dataset(ramp))
    with pytest.raises(ImageReadError, match=r"truncated|ends before"):
        read_image(data[:-cut])


def test_more_frames_than_the_data_hold_are_refused_even_if_the_first_is_asked_for(make_dataset, ramp):
    with pytest.raises(ImageReadError, match="in 2 frame"):
        read_image(make_dataset(ramp, NumberOfFrames=2), frame=0)


def test_size_is_checked_before_decoding(make_dataset):
    dataset = make_dataset(np.zeros((8, 8), np.uint8))
    dataset.Rows = dataset.Columns = 60000
    del dataset.PixelData
    dataset.PixelData = b"\0\0"
    with pytest.raises(ImageReadError, match=r"60000 x 60000 = 3600000000 pixels is above max_pixels = 100000000"):
        read_image(dataset)
    with pytest.raises(ImageReadError, match="truncated"):
        read_image(dataset, max_pixels=4_000_000_000)


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "BitsAllocated"])
def test_a_missing_attribute_is_named(make_dataset, ramp, keyword):
    dataset = make_dataset(ramp)
    delattr(dataset, keyword)
    with pytest.raises(ImageReadError, match=f"{keyword} is missing"):
        read_image(dataset)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"BitsAllocated": 12}, "BitsAllocated is 12"),
        ({"BitsStored": 17}, "contradict"),
        ({"BitsStored": 0}, "contradict"),
        ({"HighBit": 16}, "contradict"),
        ({"HighBit": 3}, "contradict"),
        ({"NumberOfFrames": 0}, "NumberOfFrames is 0"),
        ({"NumberOfFrames": -3}, "NumberOfFrames is -3"),
        ({"Rows": 0}, "too small"),
        ({"Rows": 3}, "too small"),
        ({"FloatPixelData": b"\0" * 4096}, "only one is allowed"),
    ],
)
def test_contradictions_are_refused(make_dataset, ramp, attributes, reason):
    dataset = make_dataset(ramp)
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    with pytest.raises(ImageReadError, match=reason):
        read_image(dataset)


def test_objects_without_pixels_say_what_they_are(make_dataset, ramp):
    dataset = make_dataset(ramp, Modality="SR")
    del dataset.PixelData
    with pytest.raises(ImageReadError, match=r"no pixel data \(modality SR\)"):
        read_image(dataset)
    with pytest.raises(ImageReadError, match="no pixel data"):
        read_image(Dataset())


@pytest.mark.parametrize(
    ("syntax", "package"),
    [
        (JPEG2000Lossless, "pylibjpeg-openjpeg"),
        (HTJ2KLossless, "pylibjpeg-openjpeg"),
        (JPEGLSLossless, "pyjpegls"),
        (JPEGLosslessSV1, "python-gdcm"),
        (JPEGBaseline8Bit, "pillow"),
    ],
)
def test_a_missing_decoder_names_the_syntax_and_the_package(make_dataset, monkeypatch, syntax, package):
    from pydicom.pixels import get_decoder

    monkeypatch.setattr(get_decoder(syntax), "_available", {})
    with pytest.raises(CodecError) as caught:
        read_image(_encapsulated(make_dataset, syntax, b"\0" * 64))
    message = str(caught.value)
    assert syntax.name in message
    assert str(syntax) in message
    assert f"pip install {package}" in message.replace("pylibjpeg pylibjpeg-openjpeg", "pylibjpeg-openjpeg")
    assert "libjpeg " not in message.replace("pylibjpeg ", "")
    assert "pylibjpeg-libjpeg" not in message


def test_twelve_bit_jpeg_is_refused_with_a_way_out(make_dataset):
    dataset = _encapsulated(make_dataset, JPEGExtended12Bit, b"\0" * 64, BitsAllocated=16, BitsStored=12, HighBit=11)
    with pytest.raises(ImageReadError, match=r"12 bits .* dcmdjpeg"):
        read_image(dataset)


@pytest.mark.parametrize("syntax", [MPEG4HP41, UID("1.2.3.4.5")])
def test_unknown_and_video_syntaxes_are_refused_by_name(make_dataset, syntax):
    dataset = _encapsulated(make_dataset, JPEGBaseline8Bit, b"\0" * 64)
    dataset.file_meta.TransferSyntaxUID = syntax
    with pytest.raises(ImageReadError, match=f"{syntax}.* is not supported"):
        read_image(dataset)


def test_a_codestream_larger_than_its_header_says_is_refused_before_decoding(make_dataset):
    assert read_image(_encapsulated(make_dataset, JPEGBaseline8Bit, _jpeg(16, 16))).height == 16
    with pytest.raises(ImageReadError, match=r"codestream is 24 x 16 .* header says 16 x 16"):
        read_image(_encapsulated(make_dataset, JPEGBaseline8Bit, _jpeg(24, 16)))


def test_a_jp2_box_without_length_does_not_hang_the_reader(make_dataset):
    stream = io.BytesIO()
    PilImage.fromarray(np.zeros((16, 16), np.uint8)).save(stream, "JPEG2000")
    frame = stream.getvalue()
    assert read_image(_encapsulated(make_dataset, JPEG2000Lossless, frame)).height == 16
    with pytest.raises(ImageReadError, match="JP2 box of 0 bytes"):
        read_image(_encapsulated(make_dataset, JPEG2000Lossless, frame[:12] + b"\0\0\0\0" + frame[16:]))


@pytest.mark.parametrize("damage", [b"", b"\xff\xd9", b"\0" * 400])
def test_gdcm_fails_in_a_process_of_its_own(make_dataset, corpus, damage):
    """GDCM ends the process on some of these; the message, not the process, is what the user sees."""
    frame = get_frame(pydicom.dcmread(corpus["pydicom/SC_rgb_jpeg_gdcm.dcm"]).PixelData, 0, number_of_frames=1)
    frame = bytearray(frame[:700] + damage)
    start = frame.index(b"\xff\xc3")
    frame[start + 5 : start + 9] = b"\0\x10\0\x10"  # 16 x 16
    dataset = _encapsulated(make_dataset, JPEGLosslessSV1, bytes(frame))
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    try:
        assert read_image(dataset).height == 16
    except ImageReadError as err:
        assert "GDCM" in str(err)  # noqa: PT017 - whether it fails is up to the version of GDCM


def test_a_damaged_codestream_is_refused_with_the_decoders_reason(make_dataset):
    frame = _jpeg(16, 16)
    with pytest.raises(ImageReadError, match="frame 0 in 'JPEG Baseline") as caught:
        read_image(_encapsulated(make_dataset, JPEGBaseline8Bit, frame[:200]))
    assert "\n" not in str(caught.value)


def test_compressed_data_without_a_transfer_syntax_are_refused(make_dataset):
    dataset = _encapsulated(make_dataset, JPEGBaseline8Bit, _jpeg(16, 16))
    del dataset.file_meta
    dataset.Rows = dataset.Columns = 100
    with pytest.raises(ImageReadError, match="no transfer syntax"):
        read_image(dataset)


def test_jpeg_colours_that_contradict_the_header_are_reported(make_dataset):
    stream = io.BytesIO()
    PilImage.new("RGB", (16, 16), (200, 30, 30)).save(stream, "JPEG", quality=95)  # JFIF: YCbCr by definition
    dataset = make_dataset(np.zeros((16, 16, 3), np.uint8), photometric="RGB", syntax=JPEGBaseline8Bit)
    dataset.PixelData = encapsulate([stream.getvalue()])
    image = read_image(dataset)
    assert np.abs(image.pixels[0, 0].astype(int) - [200, 30, 30]).max() <= 4
    assert "although the header says RGB" in image.warnings[0]


def test_a_deflated_data_set_that_inflates_without_end_is_refused(make_dataset, to_bytes):
    dataset = make_dataset(np.zeros((16, 16), np.uint8), syntax=DeflatedExplicitVRLittleEndian)
    data = to_bytes(dataset)
    assert read_image(data).height == 16
    start = data.index(b"1.2.840.10008.1.2.1.99")
    head = data[: start + 22]
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(80)) + packer.flush()
    assert len(bomb) < 100_000
    group_length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, start + 22 - 144)
    with pytest.raises(ImageReadError, match="grows beyond"):
        read_image(head[:132] + group_length + head[144:] + bomb, max_pixels=1000)
    with pytest.raises(ImageReadError, match="corrupt"):
        read_image(head[:132] + group_length + head[144:] + b"\xff" * 100)


def test_a_malformed_element_elsewhere_costs_the_header_but_not_the_picture(make_dataset, to_bytes, ramp):
    dataset = make_dataset(ramp, AccessionNumber="")
    data = to_bytes(dataset).replace(b"\x08\x00\x50\x00SH", b"\x08\x00\x50\x00QQ")
    image = read_image(data)
    np.testing.assert_array_equal(image.pixels, read_image(dataset).pixels)
    assert image.dicom is None
    assert "cannot be written as DICOM" in image.warnings[-1]


def test_messages_hold_no_patient_data(make_dataset, to_bytes, ramp):
    good = to_bytes(make_dataset(ramp))
    broken = [
        good[:-100],
        good.replace(b"MONOCHROME2", b"SECRET-4711"),
        good.replace(b"\x28\x00\x10\x00US\x02\x00\x20\x00", b"\x28\x00\x10\x00DS\x02\x00XX"),
    ]
    for data in broken:
        with pytest.raises(ImageReadError) as caught:
            read_image(data)
        assert "secret" not in str(caught.value).lower()
        assert str(caught.value).startswith("bytes: ")


@given(st.binary(max_size=200))
def test_the_codestream_parser_survives_any_bytes(data):
    for head in (b"", b"\xff\xd8", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"):
        with contextlib.suppress(ValueError):
            assert len(codestream_size(head + data)) == 2


@pytest.mark.parametrize(("height", "width"), [(8, 9), (300, 17)])
def test_the_codestream_parser_agrees_with_the_encoders(height, width):
    picture = PilImage.fromarray(np.zeros((height, width), np.uint8))
    for name, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG2000", {}),
        ("JPEG2000", {"no_jp2": True}),
    ):
        stream = io.BytesIO()
        picture.save(stream, name, **options)
        assert codestream_size(stream.getvalue()) == (height, width)
