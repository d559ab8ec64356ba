"""Every public test file of pydicom and pydicom-data is read, or refused for the reason in this table."""

import io
import re
import shutil
import subprocess

import numpy as np
import pydicom
import pytest
from PIL import Image as PilImage
from pydicom.encaps import generate_frames

from medreasoner.errors import ImageReadError
from medreasoner.image import read_image

# Kind of refusal: what the message says.
KINDS = {
    "index": "DICOMDIR is an index",
    "no pixels": "holds no pixel data",
    "no rows": "Rows is missing",
    "not an image": "unknown format",
    "small": "3 x 3 pixels .* too small",
    "cut": "pixel data are truncated: 8130 bytes .* need 8192",
    "12-bit JPEG": "12 bits is read by no package with a permissive licence",
    "codestream": "codestream is 1024 x 3722445056 pixels .* header says 1024 x 256",
    "frames": "NumberOfFrames is malformed",
}
# Path (pydicom-data, or pydicom/... for its own files) -> kind. Patterns cover families of like files.
REFUSED = {
    r"pydicom/ExplVR_(Big|Lit)EndNoMeta\.dcm": "no pixels",  # RT plan
    r"pydicom/JPEG-lossy\.dcm": "12-bit JPEG",
    r"pydicom/JPGExtended\.dcm": "12-bit JPEG",
    r"pydicom/JPEG2000-embedded-sequence-delimiter\.dcm": "codestream",  # a delimiter was written into its SIZ marker
    r"pydicom/MR_truncated\.dcm": "cut",
    r"pydicom/SC_rgb_small_odd(_big_endian|_jpeg)?\.dcm": "small",
    r"pydicom/UN_sequence\.dcm": "no pixels",
    r"pydicom/badVR\.dcm": "frames",  # Number of Frames is "1A"
    r"pydicom/dicomdirtests/(TINY_ALPHA/)?DICOMDIR.*": "index",
    r"pydicom/dicomdirtests/TINY_ALPHA/PT000000/.*": "no pixels",
    r"pydicom/empty_charset_LEI\.dcm": "no pixels",
    r"pydicom/(meta_missing_tsyntax|nested_priv_SQ)\.dcm": "no rows",
    r"pydicom/no_meta\.dcm": "not an image",  # its first byte is missing
    r"pydicom/(no_meta_group_length|priv_SQ)\.dcm": "no pixels",
    r"pydicom/reportsi(_with_empty_number_tags)?\.dcm": "no pixels",
    r"pydicom/test-SR\.dcm": "no pixels",
    r"pydicom/rtplan(_truncated)?\.dcm": "no pixels",
    r"pydicom/rtstruct\.dcm": "no pixels",
    r"pydicom/waveform_ecg\.dcm": "no pixels",
    r".*\.(txt|json|dump|icc|gz)|.*/README": "not an image",
    r"emri_small_jpeg_2k_lossless_too_short\.dcm": "no pixels",  # ends inside the pixel data
}
# Same picture, other encoding. The lossy twins (J2KI) are compared with the uncompressed form of the lossy result.
TWINS = [
    ("693_J2KR.dcm", "693_UNCR.dcm"),
    ("693_UNCI.dcm", "pydicom/693_J2KI.dcm"),
    ("MR2_J2KR.dcm", "MR2_UNCR.dcm"),
    ("MR2_J2KI.dcm", "MR2_UNCI.dcm"),
    ("RG1_J2KR.dcm", "RG1_UNCR.dcm"),
    ("RG1_J2KI.dcm", "RG1_UNCI.dcm"),
    ("RG3_J2KR.dcm", "RG3_UNCR.dcm"),
    ("RG3_J2KI.dcm", "RG3_UNCI.dcm"),
    ("US1_J2KR.dcm", "US1_UNCR.dcm"),
    ("US1_J2KI.dcm", "US1_UNCI.dcm"),
    ("pydicom/JPEG2000.dcm", "JPEG2000_UNC.dcm"),
    ("pydicom/MR_small_jp2klossless.dcm", "pydicom/MR_small.dcm"),
    ("pydicom/MR_small_jpeg_ls_lossless.dcm", "pydicom/MR_small.dcm"),
    ("pydicom/MR_small_RLE.dcm", "pydicom/MR_small.dcm"),
    ("pydicom/MR_small_expb.dcm", "pydicom/MR_small.dcm"),
    ("pydicom/MR_small_implicit.dcm", "pydicom/MR_small.dcm"),
    ("pydicom/MR_small_padded.dcm", "pydicom/MR_small.dcm"),
    ("emri_small_jpeg_2k_lossless.dcm", "emri_small.dcm"),
    ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm"),
    ("emri_small_RLE.dcm", "emri_small.dcm"),
    ("emri_small_big_endian.dcm", "emri_small.dcm"),
    ("OBXXXX1A_rle.dcm", "OBXXXX1A.dcm"),
    ("OBXXXX1A_expb.dcm", "OBXXXX1A.dcm"),
    ("pydicom/SC_rgb_rle.dcm", "SC_rgb.dcm"),
    ("pydicom/SC_rgb_jpeg_gdcm.dcm", "SC_rgb.dcm"),
    ("pydicom/SC_rgb_rle_16bit.dcm", "SC_rgb_16bit.dcm"),
    ("pydicom/SC_rgb_rle_32bit.dcm", "SC_rgb_32bit.dcm"),
    ("SC_rgb_expb_32bit.dcm", "SC_rgb_32bit.dcm"),
    ("SC_rgb_32bit_2frame.dcm", "SC_rgb.dcm"),
    ("SC_rgb_expb_32bit_2frame.dcm", "SC_rgb_32bit_2frame.dcm"),
    ("color-pl.dcm", "color-px.dcm"),
    ("gdcm-US-ALOKA-16_big.dcm", "gdcm-US-ALOKA-16.dcm"),
    ("pydicom/rtdose_expb.dcm", "pydicom/rtdose.dcm"),
    ("pydicom/rtdose_expb_1frame.dcm", "pydicom/rtdose_1frame.dcm"),
    ("pydicom/rtdose_rle.dcm", "pydicom/rtdose.dcm"),
    ("liver_expb.dcm", "liver.dcm"),
]
# Lossy colour: the same 100 x 100 test chart, as uncompressed RGB the oracle; 4:2:0 smears the edges.
CHARTS = {
    "pydicom/SC_rgb_dcmtk_+eb+cr.dcm": "SC_rgb_dcmtk_ebcr_dcmd.dcm",
    "pydicom/SC_rgb_dcmtk_+eb+cy+n1.dcm": "SC_rgb_dcmtk_ebcyn1_dcmd.dcm",
    "pydicom/SC_rgb_dcmtk_+eb+cy+n2.dcm": "SC_rgb_dcmtk_ebcyn2_dcmd.dcm",
    "pydicom/SC_rgb_dcmtk_+eb+cy+np.dcm": "SC_rgb_dcmtk_ebcynp_dcmd.dcm",
    "pydicom/SC_rgb_dcmtk_+eb+cy+s2.dcm": "SC_rgb_dcmtk_ebcys2_dcmd.dcm",
    "pydicom/SC_rgb_dcmtk_+eb+cy+s4.dcm": "SC_rgb_dcmtk_ebcys4_dcmd.dcm",
    "pydicom/SC_rgb_gdcm_KY.dcm": "SC_rgb.dcm",
    "SC_ybr_full_uncompressed.dcm": "SC_rgb.dcm",
    "pydicom/SC_rgb_jpeg.dcm": "pydicom/SC_rgb_jpeg_dcmd.dcm",
}


def _kind(name):
    found = [kind for pattern, kind in REFUSED.items() if re.fullmatch(pattern, name)]
    assert len(found) <= 1, f"{name} stands twice in the table"
    return found[0] if found else None


def test_every_file_is_read_or_refused_as_the_table_says(corpus, read_first):
    wrong = []
    for name, path in corpus.items():
        kind = _kind(name)
        try:
            image = read_first(name)
        except ImageReadError as err:
            message = str(err)
            if kind is None or not re.search(KINDS[kind], message) or "\n" in message or path.name not in message:
                wrong.append(f"{name}: refused with {message!r}, expected {kind or 'an image'}")
        else:
            if kind is not None:
                wrong.append(f"{name}: read, expected {kind}")
            elif image.pixels.min() == image.pixels.max():
                wrong.append(f"{name}: one flat shade")
    assert wrong == []
    assert len(corpus) > 200


def test_every_row_of_the_table_stands_for_a_file(corpus):
    unused = [pattern for pattern in REFUSED if not any(re.fullmatch(pattern, name) for name in corpus)]
    assert unused == []


@pytest.mark.parametrize(("name", "twin"), TWINS)
def test_encodings_of_the_same_pixels_look_the_same(read_first, name, twin):
    one, other = read_first(name), read_first(twin)
    difference = np.abs(one.pixels.astype(int) - other.pixels)
    # The uncompressed forms of the lossy files were written with another JPEG 2000 decoder, which may round otherwise.
    assert difference.max() <= (1 if "KI" in name + twin else 0)
    assert one.pixel_spacing_mm == other.pixel_spacing_mm


@pytest.mark.parametrize(("name", "chart"), CHARTS.items())
def test_colour_encodings_of_the_test_chart_look_alike(read_first, name, chart):
    difference = np.abs(read_first(name).pixels.astype(int) - read_first(chart).pixels)
    assert difference.mean() < 1.0
    # The writer of the uncompressed YBR file cut its chrominance to whole numbers (pydicom finds the same colours).
    assert difference.max() <= (6 if name == "SC_ybr_full_uncompressed.dcm" else 4)


def _codestream(path):
    (frame,) = generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1)
    return frame[frame.index(b"\xff\x4f\xff\x51") :]


def _windowed(values, center, width):
    """PS3.3 C.11.2.1.2.1, in the words of the standard."""
    scaled = ((values - (center - 0.5)) / (width - 1) + 0.5) * 255
    return np.clip(scaled, 0, 255)


def test_jpeg_2000_of_colour_is_what_pillow_decodes(corpus):
    path = corpus["pydicom/examples_jpeg2k.dcm"]
    np.testing.assert_array_equal(read_image(path).pixels, np.asarray(PilImage.open(io.BytesIO(_codestream(path)))))


@pytest.mark.skipif(shutil.which("opj_decompress") is None, reason="OpenJPEG's opj_decompress is not on PATH")
def test_jpeg_2000_that_only_openjpeg_reads(corpus, tmp_path):
    path, stream, picture = corpus["pydicom/GDCMJ2K_TextGBR.dcm"], tmp_path / "a.j2k", tmp_path / "a.ppm"
    stream.write_bytes(_codestream(path))
    subprocess.run(["opj_decompress", "-i", stream, "-o", picture], check=True, capture_output=True)
    np.testing.assert_array_equal(read_image(path).pixels, np.asarray(PilImage.open(picture)))


def test_jpeg_2000_whose_signedness_differs_from_the_header(corpus):
    """The codestream holds 13-bit unsigned samples, the header says signed: the header's reading is meant."""
    path = corpus["pydicom/J2K_pixelrep_mismatch.dcm"]
    samples = np.asarray(PilImage.open(io.BytesIO(_codestream(path)))).astype(int) >> 3  # Pillow widens 13 bits to 16
    dataset = pydicom.dcmread(path)
    values = np.where(samples < 4096, samples, samples - 8192) * dataset.RescaleSlope + dataset.RescaleIntercept
    expected = _windowed(values, dataset.WindowCenter[0], dataset.WindowWidth[0])
    assert np.abs(read_image(path).pixels - expected).max() <= 0.5


def test_jpeg_2000_with_private_elements_of_unknown_vr(corpus):
    path = corpus["explicit_VR-UN.dcm"]
    values = np.asarray(PilImage.open(io.BytesIO(_codestream(path)))).astype(
        float
    )  # Pillow adds 2^15 to signed samples
    expected = (values - values.min()) / np.ptp(values) * 255  # the file has no window
    assert np.abs(read_image(path).pixels - expected).max() <= 0.5


@pytest.mark.parametrize("frame", [0, 1])
def test_window_and_rescale_of_functional_groups(corpus, frame):
    """Enhanced CT; the numbers are those of its frame VOI LUT and pixel value transformation macros."""
    path = corpus["eCT_Supplemental.dcm"]
    dataset = pydicom.dcmread(path)
    size = dataset.Rows * dataset.Columns
    values = np.frombuffer(dataset.PixelData, "<u2")[frame * size :][:size].reshape(dataset.Rows, dataset.Columns)
    assert np.abs(read_image(path, frame=frame).pixels - _windowed(values - 1024.0, 49, 102)).max() <= 0.5


def test_the_second_frame_of_32_bit_colour_is_the_first_inverted(corpus):
    """As pydicom-data describes the file."""
    path = corpus["SC_rgb_32bit_2frame.dcm"]
    np.testing.assert_array_equal(read_image(path, frame=1).pixels, 255 - read_image(path).pixels)


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("693_UNCR.dcm", (0.478516, 0.478516)),
        ("MR2_UNCR.dcm", (0.195313, 0.195313)),
        ("RG1_UNCR.dcm", None),  # Pixel Spacing is 0.000
        ("RG3_UNCR.dcm", None),
        ("OBXXXX1A.dcm", (0.262288, 0.262288)),
        ("SC_rgb.dcm", None),
        ("pydicom/dicomdirtests/77654033/CR1/6154", None),  # the detector's
        ("liver.dcm", (0.810547, 0.810547)),  # functional groups
        ("US1_UNCR.dcm", None),
    ],
)
def test_spacing_of_real_files(corpus, name, spacing):
    found = read_image(corpus[name]).pixel_spacing_mm
    assert found is None if spacing is None else found == pytest.approx(spacing, abs=1e-6)


def test_real_overlays_do_not_reach_the_picture(corpus):
    """The overlay planes are in their own elements; hiding them changes nothing."""
    dataset = pydicom.dcmread(corpus["MR-SIEMENS-DICOM-WithOverlays.dcm"])
    with_overlays = read_image(dataset).pixels
    for tag in [element.tag for element in dataset if element.tag.group & 0xFF00 == 0x6000]:
        del dataset[tag]
    np.testing.assert_array_equal(read_image(dataset).pixels, with_overlays)
