"""PNG, JPEG, TIFF, BMP and GIF through Pillow."""

import io
from contextlib import suppress
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from medreasoner._text import one_line
from medreasoner.errors import ImageReadError
from medreasoner.image.arrays import array_to_u8, over_black
from medreasoner.image.limits import check_size, select_frame
from medreasoner.image.record import Image

if TYPE_CHECKING:
    from PIL import Image as PilImage

__all__ = ["is_raster", "read_picture", "read_raster"]

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF")
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"GIF87a", b"GIF89a")


def is_raster(head: bytes) -> bool:
    """Whether a file that begins with `head` is of a format read here.

    >>> is_raster(b"GIF89a")
    True
    """
    return head.startswith(_MAGIC)


def read_raster(data: bytes, *, source: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    """Image in the bytes of a picture file.

    Raises
    ------
    ImageReadError
        If the file is malformed, truncated or larger than allowed.
    """
    from PIL import Image as PilImage

    try:
        picture = PilImage.open(io.BytesIO(data), formats=_FORMATS)
    except PilImage.DecompressionBombError as err:
        limit = 2 * (PilImage.MAX_IMAGE_PIXELS or 0)
        raise ImageReadError(
            f"it has more than {limit} pixels, Pillow's own limit (PIL.Image.MAX_IMAGE_PIXELS); reduce it first"
        ) from err
    except Exception as err:
        raise ImageReadError(f"it is not a readable picture ({type(err).__name__})") from err
    with picture:
        return read_picture(picture, source=source, frame=frame, max_pixels=max_pixels)


def read_picture(picture: "PilImage.Image", *, source: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    """Image of a Pillow picture, turned as its EXIF orientation says.

    Grey stays grey; palettes, CMYK and other colour models become RGB; transparent parts are laid over black. Grey
    samples of 16 or 32 bits are scaled from the smallest to the largest value used, because a 12-bit picture in a
    16-bit file would otherwise be black.

    Raises
    ------
    ImageReadError
        If the picture cannot be decoded or is larger than allowed.
    """
    from PIL import ImageOps

    kind = "page" if picture.format == "TIFF" else "frame"
    place = picture.tell()
    try:
        n_frames = max(1, int(getattr(picture, "n_frames", 1)))
        index, warnings = select_frame(frame, n_frames, kind=kind, default=place if n_frames > 1 else 0)
        if n_frames > 1:
            picture.seek(index)
        check_size(picture.height, picture.width, max_pixels)  # after the seek: pages may differ in size
        pixels, notes = _pixels(ImageOps.exif_transpose(picture))
    except ImageReadError:
        raise
    except Exception as err:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, ValueError and others
        raise ImageReadError(f"the {picture.format or 'picture'} cannot be decoded: {one_line(err)}") from err
    finally:
        with suppress(Exception):  # the picture is the caller's; what may be wrong with it has been told
            picture.seek(place)
    return Image(pixels=pixels, source=source, warnings=(*warnings, *notes), frame=index, n_frames=n_frames)


def _pixels(picture: "PilImage.Image") -> tuple[NDArray[np.uint8], list[str]]:
    transparent = "transparency" in picture.info or picture.mode in ("LA", "PA", "La", "RGBA", "RGBa")
    if picture.mode in ("1", "L") and not transparent:
        return array_to_u8(np.asarray(picture))
    if picture.mode.startswith("I") or picture.mode == "F":
        return array_to_u8(np.asarray(picture))
    if not transparent:
        return array_to_u8(np.asarray(picture.convert("RGB")))
    grey = picture.mode in ("1", "L", "LA", "La")
    pixels, warnings = over_black(np.asarray(picture.convert("RGBA")))
    return (np.ascontiguousarray(pixels[:, :, 0]) if grey else pixels), warnings
