"""Real files cut short and with bits turned over: whatever happens, nothing but ImageReadError comes out.

The damage is drawn with a fixed seed and bounded.
"""

import contextlib
import gzip
import io

import nibabel
import numpy as np
import pytest
from PIL import Image as PilImage

from medreasoner.errors import ImageReadError
from medreasoner.image import read_image

FILES = [
    "693_UNCR.dcm",
    "pydicom/693_J2KI.dcm",
    "pydicom/MR_small.dcm",
    "pydicom/MR_small_RLE.dcm",
    "pydicom/MR_small_bigendian.dcm",
    "pydicom/MR_small_implicit.dcm",
    "pydicom/MR_small_jp2klossless.dcm",
    "pydicom/MR_small_jpeg_ls_lossless.dcm",
    "pydicom/image_dfl.dcm",
    "pydicom/SC_rgb_dcmtk_+eb+cy+np.dcm",
    "pydicom/SC_rgb_rle_2frame.dcm",
    "pydicom/SC_ybr_full_422_uncompressed.dcm",
    "pydicom/examples_palette.dcm",
    "pydicom/liver_1frame.dcm",
    "pydicom/rtdose_rle.dcm",
    "emri_small_jpeg_ls_lossless.dcm",
    "gdcm-US-ALOKA-16.dcm",
    "mlut_18.dcm",
    "vlut_04.dcm",
]
ROUNDS = 40


def _damaged(data, rng):
    """A cut, some turned bits, a run of random bytes or a lost stretch; mostly near the front, where headers are."""
    data = bytearray(data)
    reach = len(data) if rng.random() < 0.4 else min(len(data), 3000)
    kind = rng.integers(4)
    if kind == 0:
        return bytes(data[: rng.integers(reach)])
    at = int(rng.integers(reach))
    if kind == 1:
        for place in rng.integers(0, reach, rng.integers(1, 12)):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data[at : at + 8] = rng.bytes(min(8, len(data) - at))
    else:
        del data[at : at + int(rng.integers(1, 200))]
    return bytes(data)


def _read_damaged(data, seed):
    """Messages of the errors met; whatever is not an ImageReadError goes through."""
    rng = np.random.default_rng(seed)
    messages = []
    for _ in range(ROUNDS):
        try:
            read_image(_damaged(data, rng), max_pixels=2_000_000)
        except ImageReadError as err:
            messages.append(str(err))
    return messages


def _assert_tidy(messages, records):
    assert messages
    assert all("\n" not in message and len(message) < 500 for message in messages)
    assert records == []


@pytest.mark.parametrize("name", FILES)
def test_damaged_dicom_files_raise_nothing_but_image_read_errors(corpus, name, caplog):
    _assert_tidy(_read_damaged(corpus[name].read_bytes(), seed=len(name)), caplog.records)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
def test_damaged_pictures_raise_nothing_but_image_read_errors(name, caplog):
    stream = io.BytesIO()
    PilImage.effect_noise((60, 40), 50).save(stream, name)
    _assert_tidy(_read_damaged(stream.getvalue(), seed=1), caplog.records)


@pytest.mark.parametrize("packed", ["not", "inside", "outside"])
def test_damaged_volumes_raise_nothing_but_image_read_errors(packed, caplog):
    """Damage without compression, below it, and in the compressed bytes themselves."""
    volume = np.random.default_rng(0).integers(0, 99, (20, 24, 6), dtype=np.int16)
    data = nibabel.Nifti1Image(volume, np.diag([1.0, 2, 3, 1])).to_bytes()
    if packed != "inside":
        _assert_tidy(_read_damaged(gzip.compress(data) if packed == "outside" else data, seed=2), caplog.records)
        return
    rng = np.random.default_rng(7)
    for _ in range(ROUNDS):
        with contextlib.suppress(ImageReadError):
            read_image(gzip.compress(_damaged(data, rng), 1), max_pixels=2_000_000)
    assert caplog.records == []


MAGICS = {
    "DICOM": b"\0" * 128 + b"DICM",
    "bare data set": b"\x08\0\x05\0CS",
    "bare file meta": b"\x02\0\0\0UL\x04\0",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "JPEG": b"\xff\xd8\xff\xe0",
    "TIFF": b"II*\0",
    "BMP": b"BM",
    "GIF": b"GIF89a",
    "gzip": b"\x1f\x8b\x08",
    "NIfTI-1": b"\0" * 344 + b"n+1\0",
    "NIfTI-2": b"\0\0\0\0n+2\0\r\n\x1a\n",
}


@pytest.mark.parametrize("magic", MAGICS)
def test_random_bytes_behind_a_magic_are_refused(magic):
    rng = np.random.default_rng(3)
    for length in (0, 1, 7, 60, 700):
        with pytest.raises(ImageReadError):
            read_image(MAGICS[magic] + rng.bytes(length))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["JPEG-LL.dcm", "pydicom/SC_rgb_jpeg_gdcm.dcm"])
def test_damage_that_brings_gdcm_down_leaves_this_process_alive(corpus, name):
    data, rng = corpus[name].read_bytes(), np.random.default_rng(5)
    for _ in range(ROUNDS // 4):
        with contextlib.suppress(ImageReadError):
            read_image(_damaged(data, rng), max_pixels=2_000_000)
