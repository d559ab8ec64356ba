"""Colour frames of DICOM to 8-bit RGB."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import ImageReadError
from medreasoner.image.lut import palette_table

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["colour_to_u8", "palette_to_u8"]

# R, G, B from (Y, Cb - 128, Cr - 128), ITU-R BT.601 as PS3.3 C.7.6.3.1.2 states it for YBR_FULL.
_FROM_FULL = np.array([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]], np.float32)
# The same for YBR_PARTIAL, where black is 16 and white 235.
_FROM_PARTIAL = np.array(
    [[1.164384, 0.0, 1.596027], [1.164384, -0.391762, -0.812968], [1.164384, 2.017232, 0.0]], np.float32
)


def colour_to_u8(samples: NDArray[Any], photometric: str, bits: int) -> NDArray[np.uint8]:
    """8-bit RGB of a frame with three samples per pixel.

    Parameters
    ----------
    samples
        (H, W, 3) unsigned integers of `bits` bits.
    photometric
        ``RGB`` or one of ``YBR_FULL``, ``YBR_FULL_422``, ``YBR_PARTIAL_420``, ``YBR_PARTIAL_422``; 4:2:2 and 4:2:0
        data come expanded. The JPEG 2000 transforms YBR_ICT and YBR_RCT are undone by the decoder, which then says RGB.
    bits
        Bits Stored (0028,0101); the full range becomes 0 to 255.

    Raises
    ------
    ImageReadError
        If the samples are not unsigned integers, or the photometric interpretation is another.

    References
    ----------
    DICOM PS3.3 C.7.6.3.1.2.

    >>> colour_to_u8(np.array([[[76, 85, 255]]], np.uint8), "YBR_FULL", 8).tolist()
    [[[254, 0, 0]]]
    """
    if samples.dtype.kind != "u":
        raise ImageReadError(f"colour samples are {samples.dtype}; expected unsigned integers")
    if bits != 8:
        samples = np.floor(samples * (255.0 / (2**bits - 1)) + 0.5).astype(np.uint8)
    if photometric == "RGB":
        return np.ascontiguousarray(samples, np.uint8)
    if photometric in ("YBR_FULL", "YBR_FULL_422"):
        black, matrix = 0, _FROM_FULL
    elif photometric in ("YBR_PARTIAL_420", "YBR_PARTIAL_422"):
        black, matrix = 16, _FROM_PARTIAL
    else:
        raise ImageReadError(f"colour space {photometric} is not one that can be shown")
    centred = samples.astype(np.float32) - np.array([black, 128, 128], np.float32)
    rgb: NDArray[np.float32] = centred @ matrix.T  # (H, W, 3)
    rounded: NDArray[np.uint8] = np.clip(np.floor(rgb + 0.5), 0, 255).astype(np.uint8)
    return rounded


def palette_to_u8(stored: NDArray[Any], dataset: "Dataset", *, little_endian: bool) -> NDArray[np.uint8]:
    """8-bit RGB of a PALETTE COLOR frame.

    Parameters
    ----------
    stored
        (H, W) stored values.
    dataset
        Where the palettes are found.
    little_endian
        Byte order of their words.

    Raises
    ------
    ImageReadError
        If a palette is missing or malformed.

    References
    ----------
    DICOM PS3.3 C.7.6.3.1.5 and C.7.6.3.1.6.
    """
    signed = stored.dtype.kind == "i"
    try:
        tables = [
            palette_table(dataset, name, signed=signed, little_endian=little_endian)
            for name in ("Red", "Green", "Blue")
        ]
    except Exception as err:  # a missing element is a KeyError, a malformed one whatever its conversion raises
        raise ImageReadError("the colour palette is missing or malformed") from err
    return np.stack([table(stored).astype(np.uint8) for table in tables], axis=-1)
