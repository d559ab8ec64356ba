"""Where pixels are kept: a file, or the bytes of one. Nothing is decoded before it is asked for."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medreasoner.image import Image, read_image
from medreasoner_train.data import collapse_grey

__all__ = ["MAX_PIXELS", "Picture"]

MAX_PIXELS = 100_000_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image file of any kind that :func:`medreasoner.image.read_image` reads, or its bytes.

    Small enough to send to another process if it is a file.

    Parameters
    ----------
    path, data
        One of them.
    frame
        As of `read_image`; None: the first frame, the middle slice.
    max_pixels
        As of `read_image`.
    """

    path: Path | None = None
    data: bytes | None = dataclasses.field(default=None, repr=False)
    frame: int | None = None
    max_pixels: int = MAX_PIXELS

    def missing(self) -> bool:
        """Whether it is a file that does not exist."""
        return self.path is not None and not self.path.is_file()

    def read(self) -> Image:
        """The image, decoded.

        Raises
        ------
        ImageReadError
            If it cannot be read.
        """
        source = self.data if self.path is None else self.path
        return read_image(b"" if source is None else source, frame=self.frame, max_pixels=self.max_pixels)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """(H, W) uint8 if it is grey (also when stored as colour), else (H, W, 3)."""
        return collapse_grey(self.read().pixels)

    def mask(self) -> npt.NDArray[np.bool_]:
        """(H, W) bool: above 127 in the lightest channel; in a picture of zeros and ones, the ones.

        A mask of one frame belongs to any `frame` of its image.
        """
        image = dataclasses.replace(self, frame=None).read()
        pixels = image.pixels if self.frame is None or image.n_frames == 1 else self.read().pixels
        if pixels.ndim == 3:
            pixels = pixels.max(axis=2)
        return pixels > (0 if int(pixels.max()) <= 1 else 127)

    def fingerprint(self) -> str:
        """Changes when the picture does, as far as a look at the file's size and time can tell."""
        if self.path is None:
            state = hashlib.sha256(self.data or b"").hexdigest()
        else:
            stat = self.path.stat()
            state = f"{self.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        return f"{state}|{self.frame}|{self.max_pixels}"
