"""A mask as NIfTI."""

import gzip
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medreasoner._extras import require
from medreasoner.image import Image
from medreasoner.outputs.planes import patient_plane

__all__ = ["encode_nifti"]

_NIFTI_1_SIDE = 32767  # its header counts in signed 16-bit numbers


def encode_nifti(mask: NDArray[np.bool_], image: Image, *, compress: bool) -> bytes:
    """Bytes of a NIfTI-1 file of 0 and 1 (uint8); NIfTI-2 where a side is longer than NIfTI-1 can say, 32767.

    Parameters
    ----------
    mask
        (H, W) bool in the grid of `image`.
    image
        From NIfTI: the mask lies in a volume of the same shape, affine and unit. From DICOM with a known plane: one
        slice at its place in the patient. Else one slice whose orientation is marked as unknown, turned so that viewers
        show it as the picture was.
    compress
        Whether to pack it with gzip; the same mask always gives the same bytes.

    Raises
    ------
    MissingExtraError
        If nibabel is not installed.
    """
    nibabel = require("nibabel", extra="nifti", feature="Writing NIfTI")
    data: bytes = _volume(nibabel, mask.astype(np.uint8), image).to_bytes()
    return gzip.compress(data, mtime=0) if compress else data


def _volume(nibabel: Any, mask: NDArray[np.uint8], image: Image) -> Any:
    shape = mask.shape if image.nifti is None else image.nifti.shape
    kind = nibabel.Nifti1Image if max(shape) <= _NIFTI_1_SIDE else nibabel.Nifti2Image
    if image.nifti is not None:
        volume = kind(image.nifti.mask_to_volume(mask), image.nifti.affine)
        # Where the source names no unit, the readers of both take millimetres.
        volume.header.set_xyzt_units("mm" if image.nifti.unit == "unknown" else image.nifti.unit)
        return volume
    # NIfTI counts columns before rows.
    plane = patient_plane(image.dicom, image.frame) if image.dicom is not None else None
    if plane is not None:
        volume = kind(mask.T[:, :, np.newaxis], plane.affine())
        volume.set_qform(plane.affine(), code="scanner")
        volume.set_sform(plane.affine(), code="scanner")
        volume.header.set_xyzt_units("mm")
        return volume
    # Without an orientation, readers take the first axis as right to left and the second as back to front.
    volume = kind(mask[::-1].T[:, :, np.newaxis], None)
    if image.pixel_spacing_mm is not None:
        row, column = image.pixel_spacing_mm
        volume.header.set_zooms((column, row, 1.0))
        volume.header.set_xyzt_units("mm")
    return volume
