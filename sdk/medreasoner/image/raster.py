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

_PHOTOMETRIC = 262  # TIFF's PhotometricInterpretation
_LEAST_DEEP = 32  # of 255: a picture that stays below has its values in the bits that were cut
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
        deep, inverted = _is_deep_colour(picture), _is_white_zero(picture)
        pixels, notes = _pixels(ImageOps.exif_transpose(picture))
        if inverted:
            pixels = 255 - pixels
        if deep:
            notes = [*notes, _deep_note(pixels)]
    except ImageReadError:
        raise
    except Exception as err:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, ValueError and others
        raise ImageReadError(f"the {picture.format or 'picture'} cannot be decoded: {one_line(err)}") from err
    finally:
        with suppress(Exception):  # the picture is the caller's; what may be wrong with it has been told
            picture.seek(place)
    return Image(pixels=pixels, source=source, warnings=(*warnings, *notes), frame=index, n_frames=n_frames)


def _is_deep_colour(picture: "PilImage.Image") -> bool:
    """Whether Pillow will cut samples of 16 bits to their upper 8, having no such colour; known until it loads them."""
    stored = [str(tile[3]) for tile in getattr(picture, "tile", ())]  # names such as RGB;16B
    return picture.mode in ("RGB", "RGBA", "RGBX", "LA", "CMYK") and any(";16" in name for name in stored)


def _deep_note(pixels: NDArray[np.uint8]) -> str:
    if pixels.max() < _LEAST_DEEP:
        raise ImageReadError(
            "its colours have 16 bits, of which the upper 8 are nearly empty; scale them to 8 bits and save it again"
        )
    return "its colours have 16 bits, of which the upper 8 are read"


def _is_white_zero(picture: "PilImage.Image") -> bool:
    """Whether 0 is white in grey samples that Pillow leaves as they are: it turns those of 8 bits itself."""
    tags = getattr(picture, "tag_v2", {})
    return tags.get(_PHOTOMETRIC) == 0 and (picture.mode.startswith("I") or picture.mode == "F")


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
