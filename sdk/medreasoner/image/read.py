"""One entrance for every kind of image."""

import os
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medreasoner._text import printable
from medreasoner.errors import ImageReadError, MissingExtraError
from medreasoner.image.arrays import read_array
from medreasoner.image.quiet import quiet
from medreasoner.image.record import Image

if TYPE_CHECKING:
    import PIL.Image
    import pydicom

__all__ = ["ImageSource", "read_image"]

# pydicom, Pillow and nibabel are imported by the reader that needs them: a cold start pays only for its own.
ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[Any] | PIL.Image.Image | pydicom.Dataset | Image"

_HEAD = 352  # of a NIfTI-1 header with its magic, the longest that is looked at


def read_image(source: ImageSource, *, frame: SupportsIndex | None = None, max_pixels: int = 100_000_000) -> Image:
    """Image as a viewer would show it, from a file, bytes or an object in memory.

    Parameters
    ----------
    source
        Path of a DICOM, NIfTI, PNG, JPEG, TIFF, BMP or GIF file, told apart by content and not by ending; the same as
        bytes; ``"sample:chest"`` and the other names of `medreasoner.samples`; an array (H, W), (H, W, 3) or (H, W, 4),
        where uint8 is taken as it is and other dtypes are scaled from minimum to maximum; a Pillow picture, which no
        other thread may use meanwhile; a pydicom data set. An `Image` is returned unchanged.
    frame
        Index from 0 of the frame of a multi-frame DICOM or animation, the page of a TIFF, or the axial slice of a NIfTI
        volume counted from the feet up. None: the first, for NIfTI the middle, with a warning if there are several.
    max_pixels
        Largest height times width that is decoded; checked before decoding. Pillow's own limit,
        ``2 * PIL.Image.MAX_IMAGE_PIXELS``, holds beside it for picture files.

    Raises
    ------
    ImageReadError
        If the source cannot be read or must not be; the message names it and the reason in one line.
    CodecError
        If it is DICOM in a transfer syntax whose decoder is not installed.
    MissingExtraError
        If it needs an optional package: nibabel for NIfTI, pydicom-data for a sample.

    Notes
    -----
    What the reader had to assume is in ``Image.warnings``. Nothing of a DICOM header gets into messages.

    >>> read_image(np.zeros((16, 24), np.uint8)).pixels.shape
    (16, 24)
    """
    name = _name(source)
    try:
        with quiet():
            return _read(source, name, frame, max_pixels)
    except MissingExtraError:
        raise
    except ImageReadError as err:
        raise type(err)(f"{name}: {err}") from err.__cause__
    except Exception as err:  # malformed input may raise anything, also from places that no reader foresaw
        raise ImageReadError(f"{name}: it cannot be read ({type(err).__name__})") from err


def _name(source: ImageSource) -> str:
    """What messages call the source: no folder, whose name may be a patient's."""
    if isinstance(source, Image):
        return source.source
    if isinstance(source, str | os.PathLike):
        text = os.fsdecode(source)
        name = text if text.startswith("sample:") else Path(text).name
        return printable(name)
    if isinstance(source, bytes | bytearray | memoryview):
        return "bytes"
    return {"ndarray": "array"}.get(type(source).__name__, type(source).__name__)


def _read(source: Any, name: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    if isinstance(source, Image):
        if frame is not None and frame != source.frame:
            raise ImageReadError(f"it was read as frame {source.frame}; frame {frame} must be read from the file again")
        return source
    if isinstance(source, np.ndarray):
        return read_array(source, source=name, frame=frame, max_pixels=max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_bytes(bytes(source), name, frame, max_pixels)
    if isinstance(source, str | os.PathLike):
        return _read_bytes(_load(os.fsdecode(source)), name, frame, max_pixels)
    # An object of a library that was never imported cannot exist, so neither library is imported to ask.
    pil, pydicom = sys.modules.get("PIL.Image"), sys.modules.get("pydicom")
    if pil is not None and isinstance(source, pil.Image):
        from medreasoner.image.raster import read_picture

        return read_picture(source, source=name, frame=frame, max_pixels=max_pixels)
    if pydicom is not None and isinstance(source, pydicom.Dataset):
        from medreasoner.image.dicom import read_dataset

        return read_dataset(source, source=name, frame=frame, max_pixels=max_pixels)
    raise ImageReadError("expected a path, bytes, a NumPy array, a Pillow picture, a pydicom data set or an Image")


def _load(source: str) -> bytes:
    if source.startswith("sample:"):
        from medreasoner.samples import sample_path

        path = sample_path(source.removeprefix("sample:"))
    else:
        path = Path(source)
    try:
        if path.is_dir():
            raise ImageReadError("it is a folder; give one file")
        if not path.exists():
            raise ImageReadError("no such file; check the path")
        if not path.is_file():  # a device or a pipe may never end
            raise ImageReadError("it is not a regular file")
        return path.read_bytes()
    except ImageReadError:
        raise
    except (OSError, ValueError, MemoryError) as err:
        raise ImageReadError(getattr(err, "strerror", None) or f"it cannot be opened ({type(err).__name__})") from err


def _read_bytes(data: bytes, name: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    if not data:
        raise ImageReadError("it is empty; fetch it again from where it came")
    if data[128:132] == b"DICM" or _is_bare_dataset(data):
        from medreasoner.image.dicom import read_dicom

        return read_dicom(data, source=name, frame=frame, max_pixels=max_pixels)
    from medreasoner.image.raster import is_raster, read_raster

    if is_raster(data):
        return read_raster(data, source=name, frame=frame, max_pixels=max_pixels)
    from medreasoner.image.nifti import is_nifti, read_nifti

    head = _unpacked_head(data)
    if is_nifti(head):
        return read_nifti(data, source=name, frame=frame, max_pixels=max_pixels)
    if head[344:348] == b"ni1\0":
        raise ImageReadError("it is one half of a NIfTI pair; convert it to a single .nii file")
    packed = " (inside gzip)" if data[:2] == b"\x1f\x8b" else ""
    raise ImageReadError(f"unknown format{packed}; accepted: DICOM, NIfTI (.nii, .nii.gz), PNG, JPEG, TIFF, BMP, GIF")


def _unpacked_head(data: bytes) -> bytes:
    if data[:2] != b"\x1f\x8b":
        return data[:_HEAD]
    try:
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(data, _HEAD)
    except zlib.error:
        return b""


def _is_bare_dataset(data: bytes) -> bool:
    """Whether the bytes begin like a DICOM data set without preamble: an element of group 2 or 8, in any encoding."""
    group, element = data[:2], data[2:4]
    if group not in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08") or len(data) < 16:
        return False
    little = group[1] == 0
    if int.from_bytes(element, "little" if little else "big") > 0x2FFF:
        return False
    if data[4:6].isalpha() and data[4:6].isupper():  # explicit VR
        return True
    # Implicit VR is always little endian; the first elements of these groups are short.
    return little and int.from_bytes(data[4:8], "little") <= 1024
