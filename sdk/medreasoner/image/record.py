"""The one form in which an image travels through the package."""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import ImageReadError

if TYPE_CHECKING:
    import pydicom

    from medreasoner.image.nifti import NiftiSlice

__all__ = ["Image"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Image:
    """One picture as a viewer would show it, with what is needed to write results back.

    The representation holds neither pixels nor the DICOM header, so that it may be logged.

    Parameters
    ----------
    pixels
        (H, W) grey or (H, W, 3) RGB uint8, C-contiguous; kept as a read-only view.
    source
        File name, or ``"array"``, ``"bytes"`` and the like, for messages; no patient data.
    pixel_spacing_mm
        (row, column) distance between pixel centres in the patient, in mm; None where it is not known to hold there.
    warnings
        What the reader had to assume or leave out, one sentence each.
    frame, n_frames
        Index from 0 of this frame (DICOM, animation), page (TIFF) or slice (NIfTI), and how many the source holds.
    dicom
        Header of the source without its pixel data, for writing DICOM SEG.
    nifti
        Place of the picture in its volume, for writing NIfTI.

    Raises
    ------
    ImageReadError
        If the pixels have another dtype, shape or layout.
    """

    pixels: NDArray[np.uint8] = field(repr=False)
    source: str
    pixel_spacing_mm: tuple[float, float] | None = None
    warnings: tuple[str, ...] = ()
    frame: int = 0
    n_frames: int = 1
    dicom: "pydicom.Dataset | None" = field(default=None, repr=False)
    nifti: "NiftiSlice | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape, dtype = self.pixels.shape, self.pixels.dtype
        if dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
            raise ImageReadError(f"pixels are {dtype} {shape}; expected uint8 (H, W) or (H, W, 3)")
        if not self.pixels.flags.c_contiguous:
            raise ImageReadError("pixels are not C-contiguous")
        view = self.pixels.view()
        view.flags.writeable = False
        object.__setattr__(self, "pixels", view)

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.pixels.shape[1])

    def digest(self) -> str:
        """SHA-256 of shape and pixels as 64 hexadecimal digits: equal for equal pictures, whatever their source.

        >>> Image(pixels=np.zeros((8, 8), np.uint8), source="array").digest()[:8]
        '6122dc6b'
        """
        state = hashlib.sha256(repr(self.pixels.shape).encode())
        state.update(self.pixels.data)
        return state.hexdigest()
