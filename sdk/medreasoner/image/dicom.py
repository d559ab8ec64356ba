"""DICOM files and data sets."""

import io
import zlib
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import ImageReadError
from medreasoner.image.attributes import items, text
from medreasoner.image.colour import colour_to_u8, palette_to_u8
from medreasoner.image.decode import decode_frame, transfer_syntax
from medreasoner.image.header import PixelHeader, pixel_header
from medreasoner.image.limits import select_frame
from medreasoner.image.record import Image
from medreasoner.image.spacing import patient_spacing
from medreasoner.image.voi import grey_to_u8

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["read_dataset", "read_dicom"]

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_CHUNK = 1 << 20


def read_dicom(data: bytes, *, source: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    """Image in a DICOM file, or in a bare data set without file meta information.

    Raises
    ------
    CodecError
        If the transfer syntax needs a package that is not installed.
    ImageReadError
        If the file is malformed, truncated, holds no image or a larger one than allowed.
    """
    from pydicom import dcmread

    _refuse_inflation_bomb(data, max_pixels)
    try:
        dataset = dcmread(io.BytesIO(data), force=True)
    except Exception as err:  # no promise is made about what a malformed file raises
        raise ImageReadError(f"it cannot be parsed as DICOM ({type(err).__name__})") from err
    return read_dataset(dataset, source=source, frame=frame, max_pixels=max_pixels)


def read_dataset(dataset: "Dataset", *, source: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    """Image in a data set that is in memory; the data set itself is left as it is.

    Raises
    ------
    CodecError, ImageReadError
        As `read_dicom`.
    """
    header = pixel_header(dataset, max_pixels)
    index, warnings = select_frame(frame, header.n_frames)
    stored, photometric, notes = decode_frame(dataset, header, index)
    warnings += notes
    pixels, notes = _display(stored, photometric, dataset, header, index)
    warnings += notes
    spacing, notes = patient_spacing(dataset, index)
    warnings += notes
    kept = _without_pixels(dataset)
    if kept is None:
        warnings.append("the header is malformed; results cannot be written as DICOM")
    return Image(
        pixels=pixels,
        source=source,
        pixel_spacing_mm=spacing,
        warnings=tuple(warnings),
        frame=index,
        n_frames=header.n_frames,
        dicom=kept,
    )


def _display(
    stored: NDArray[np.generic], photometric: str, dataset: "Dataset", header: PixelHeader, frame: int
) -> tuple[NDArray[np.uint8], list[str]]:
    little_endian = bool(transfer_syntax(dataset).is_little_endian)
    if header.samples == 3:
        return colour_to_u8(stored, photometric, header.bits_stored), []
    if header.photometric == "PALETTE COLOR":
        return palette_to_u8(stored, dataset, little_endian=little_endian), []
    pixels, warnings = grey_to_u8(stored, dataset, header, frame=frame, little_endian=little_endian)
    if text(dataset, "PixelPresentation") in ("COLOR", "MIXED") or items(dataset, "EnhancedPaletteColorLUTSequence"):
        warnings.append("the supplemental colour palette was not applied; shown in grey")
    return pixels, warnings


def _without_pixels(dataset: "Dataset") -> "Dataset | None":
    """A copy of the header, so that a study does not hold the stored pixels while it lives; None if it is malformed."""
    try:
        header = dataset[:0x7FE00000]
    except Exception:  # pydicom converts some elements as it copies them; the picture is good without them
        return None
    if hasattr(dataset, "file_meta"):
        header.file_meta = dataset.file_meta
    return header


def _refuse_inflation_bomb(data: bytes, max_pixels: int) -> None:
    """Refuse a deflated data set that grows beyond any image allowed, since pydicom inflates without a bound."""
    if _DEFLATED not in data[:4096]:
        return
    from pydicom.filereader import read_dataset as read_elements
    from pydicom.filereader import read_preamble

    stream = io.BytesIO(data)
    try:
        read_preamble(stream, force=True)
        read_elements(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    except Exception as err:
        raise ImageReadError(f"it cannot be parsed as DICOM ({type(err).__name__})") from err
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    limit = 8 * max_pixels + 64 * _CHUNK  # the widest samples, and room for the rest of the header
    pending, total = data[stream.tell() :], 0
    while pending and not inflater.eof:
        try:
            total += len(inflater.decompress(pending, _CHUNK))
        except zlib.error as err:
            raise ImageReadError("its deflated data set is corrupt") from err
        pending = inflater.unconsumed_tail
        if total > limit:
            raise ImageReadError(f"its deflated data set grows beyond {limit} bytes, set by max_pixels = {max_pixels}")
