"""Renderings beside DCMTK's, an independent implementation of the same pipeline.

Tolerance: 1 of 255. DCMTK cuts the fraction off where we round to the nearest, so about half of all pixels differ by 1.

Known differences, each with its reason:

- JPEG 2000 and HTJ2K: DCMTK reads neither; the twins in test_corpus.py stand in.
- A window that would leave the whole picture black or white is replaced by the range of values, with a warning;
  dcm2pnm obeys it. These files are rendered there with its min-max window, as are the files without one.
- 32-bit samples in big endian: dcm2pnm swaps them as pairs of 16 bits. The little-endian twins agree.
- 32-bit colour, segmented palettes, and a file whose header has an unknown VR: dcm2pnm refuses them.
- Windows and rescaling in functional groups of enhanced objects: dcm2pnm does not look there.
- YBR_FULL without compression: dcm2pnm cuts the fraction off in each of three terms, so up to 2 of 255.
"""

import io
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image as PilImage

from medreasoner.errors import ImageReadError
from medreasoner.image import read_image
from medreasoner.image.decode import transfer_syntax

pytestmark = pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="DCMTK's dcm2pnm is not on PATH")

TOLERANCE = 1
WIDER = {"SC_ybr_full_uncompressed.dcm": 2}
NOT_COMPARED = {
    "pydicom/rtdose_expb.dcm": "swaps 32-bit samples as pairs of 16",
    "pydicom/rtdose_expb_1frame.dcm": "swaps 32-bit samples as pairs of 16",
    "SC_rgb_32bit.dcm": "refuses 32-bit colour",
    "SC_rgb_32bit_2frame.dcm": "refuses 32-bit colour",
    "SC_rgb_expb_32bit.dcm": "refuses 32-bit colour",
    "SC_rgb_expb_32bit_2frame.dcm": "refuses 32-bit colour",
    "gdcm-US-ALOKA-16.dcm": "refuses segmented palettes",
    "gdcm-US-ALOKA-16_big.dcm": "refuses segmented palettes",
    "pydicom/SC_rgb_jpeg.dcm": "fails on an unknown VR",
    "eCT_Supplemental.dcm": "does not read functional groups",
}
JPEG_2000 = range(90, 204)


def _render(path, image):
    """DCMTK's picture, or None if the transfer syntax is none of its own."""
    syntax = str(transfer_syntax(image.dicom))
    tool = "dcm2pnm"
    if syntax.startswith("1.2.840.10008.1.2.4."):
        number = int(syntax.rpartition(".")[2])
        if number in JPEG_2000:
            return None
        tool = "dcml2pnm" if number in (80, 81) else "dcmj2pnm"
    window = []
    if image.pixels.ndim == 2:
        window = ["+Wl", "1"] if "VOILUTSequence" in image.dicom else ["+Wi", "1"]
        if any("no usable window" in warning for warning in image.warnings):
            window = ["+Wm"]
    return _run(tool, [*window, "-O", "+F", str(image.frame + 1)], path)


def _run(tool, arguments, path):
    result = subprocess.run([tool, "-q", *arguments, str(path)], capture_output=True, check=True)
    return np.asarray(PilImage.open(io.BytesIO(result.stdout)))


@pytest.mark.slow
def test_every_file_that_dcmtk_reads_looks_the_same_there(corpus, read_first):
    wrong, compared = [], 0
    for name, path in corpus.items():
        if name in NOT_COMPARED:
            continue
        try:
            first = read_first(name)
        except ImageReadError:
            continue
        for frame in {0, first.n_frames - 1}:
            image = read_image(path, frame=frame) if frame else first
            reference = _render(path, image)
            if reference is None:
                continue
            compared += 1
            if reference.shape != image.pixels.shape:
                wrong.append(f"{name}: {image.pixels.shape}, DCMTK {reference.shape}")
                continue
            worst = int(np.abs(reference.astype(int) - image.pixels).max())
            if worst > WIDER.get(name, TOLERANCE):
                wrong.append(f"{name} frame {frame}: differs by {worst}")
    assert wrong == []
    assert compared > 120


@pytest.mark.parametrize("function", ["LINEAR", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [(40, 400), (0, 1), (-200, 37), (100, 3000)])
def test_windows_and_inversion_agree(make_dataset, ramp, tmp_path, function, photometric, window):
    dataset = make_dataset(
        ramp, photometric=photometric, WindowCenter=window[0], WindowWidth=window[1], VOILUTFunction=function,
        RescaleSlope="2", RescaleIntercept="-10", RescaleType="HU",
    )  # fmt: skip
    path = tmp_path / "made.dcm"
    dataset.save_as(path)
    reference = _run("dcm2pnm", ["+Wi", "1", "+Wfs" if function == "SIGMOID" else "+Wfl"], path)
    assert np.abs(read_image(path).pixels.astype(int) - reference).max() <= TOLERANCE


@pytest.mark.parametrize("signed", [False, True])
def test_masking_of_foreign_bits_agrees(make_dataset, tmp_path, signed):
    values = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
    dataset = make_dataset(values.view(np.int16) if signed else values, BitsStored=12, HighBit=13)
    path = tmp_path / "made.dcm"
    dataset.save_as(path)
    reference = _run("dcm2pnm", ["+Wm", "-O"], path)
    assert np.abs(read_image(path).pixels.astype(int) - reference).max() <= TOLERANCE
