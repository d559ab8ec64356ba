"""One axial slice of a NIfTI volume, and the way back for its mask."""

import gzip
import io
from dataclasses import dataclass, field
from typing import Any, BinaryIO, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from medreasoner._extras import require
from medreasoner.errors import ImageReadError, OutputError
from medreasoner.image.limits import check_size, finite, min_max_u8, select_frame
from medreasoner.image.record import Image

__all__ = ["NiftiSlice", "is_nifti", "read_nifti"]

_MM_PER_UNIT = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
_LOW, _HIGH = 0.5, 99.5  # percentiles of the window


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NiftiSlice:
    """Where a displayed slice lies in the stored volume.

    The picture is radiological: the patient's right on its left, anterior up.

    Parameters
    ----------
    affine
        (4, 4) float64, voxel indices to RAS in `unit`.
    unit
        Unit of length that the file names: ``"mm"``, ``"micron"``, ``"meter"`` or ``"unknown"``.
    shape
        Of the volume (the first three axes of the file).
    axis, index
        The stored axis that the slice cuts, nearest to the patient's long axis, and the stored index on it.
    transpose
        Whether the picture's row number runs along the later of the two other stored axes.
    flip_rows, flip_columns
        Whether the stored index falls from the top down, or from left to right.
    """

    affine: NDArray[np.float64] = field(repr=False)
    unit: str
    shape: tuple[int, int, int]
    axis: int
    index: int
    transpose: bool
    flip_rows: bool
    flip_columns: bool

    def to_display(self, plane: NDArray[Any]) -> NDArray[Any]:
        """(H, W) picture of a stored plane, its two axes in stored order."""
        turned = plane.T if self.transpose else plane
        return turned[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def mask_to_volume(self, mask: NDArray[Any]) -> NDArray[Any]:
        """Volume of the stored shape that holds `mask` in this slice and zeros elsewhere.

        Parameters
        ----------
        mask
            (H, W) in the picture's grid, any dtype; the volume has the same.

        Raises
        ------
        OutputError
            If the mask has another shape than the slice.
        """
        volume = np.zeros(self.shape, mask.dtype)
        plane = np.moveaxis(volume, self.axis, 0)[self.index]  # a view on the volume
        place = self.to_display(plane)
        if place.shape != mask.shape:
            raise OutputError(f"the mask is {mask.shape}; the slice is {place.shape} (rows, columns)")
        place[...] = mask
        return volume


def is_nifti(head: bytes) -> bool:
    """Whether a file that begins with `head` (352 bytes, unpacked) is NIfTI-1 or NIfTI-2 in one file."""
    return head[344:348] == b"n+1\0" or head[4:12] == b"n+2\0\r\n\x1a\n"


def read_nifti(data: bytes, *, source: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    """Axial slice of a .nii or .nii.gz file; the middle one if `frame` is None. Slices count from the feet up.

    Only the planes that are needed are unpacked, so that a small compressed file cannot fill the memory.

    Raises
    ------
    MissingExtraError
        If nibabel is not installed.
    ImageReadError
        If the file is malformed, truncated or larger than allowed.
    """
    nibabel = require("nibabel", extra="nifti", feature="Reading NIfTI")
    stream: BinaryIO = io.BytesIO(data)
    if data[:2] == b"\x1f\x8b":
        stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
    try:
        return _read(nibabel, stream, source=source, frame=frame, max_pixels=max_pixels)
    except ImageReadError:
        raise
    except Exception as err:
        raise ImageReadError(f"it cannot be read as NIfTI, or is truncated ({type(err).__name__})") from err


def _read(nibabel: Any, stream: BinaryIO, *, source: str, frame: SupportsIndex | None, max_pixels: int) -> Image:
    second_version = stream.read(7)[4:] == b"n+2"
    stream.seek(0)
    holder = nibabel.FileHolder(fileobj=stream)
    image = (nibabel.Nifti2Image if second_version else nibabel.Nifti1Image).from_file_map(
        {"header": holder, "image": holder}
    )
    if image.get_data_dtype().kind not in "iuf":
        raise ImageReadError(f"its voxels are {image.get_data_dtype()}; expected integers or floating point")
    place, index, warnings = _choose(nibabel, image, frame)
    height, width = (place.shape[axis] for axis in _picture_axes(place))
    check_size(height, width, max_pixels)
    if place.shape[0] * place.shape[1] > max_pixels:
        raise ImageReadError(f"its planes of {place.shape[:2]} voxels are above max_pixels = {max_pixels}")
    if len(image.shape) > 3 and max(image.shape[3:]) > 1:
        warnings.append(f"the first of {int(np.prod(image.shape[3:]))} volumes is shown")
    pixels, notes = _window(place.to_display(_plane(image, place)))
    warnings += notes
    spacing, notes = _spacing(place)
    return Image(
        pixels=pixels,
        source=source,
        pixel_spacing_mm=spacing,
        warnings=(*warnings, *notes),
        frame=index,
        n_frames=place.shape[place.axis],
        nifti=place,
    )


def _choose(nibabel: Any, image: Any, frame: SupportsIndex | None) -> tuple[NiftiSlice, int, list[str]]:
    """The slice to show, its index counted from the feet up, and warnings."""
    shape = tuple(int(n) for n in image.shape[:3])
    shape += (1,) * (3 - len(shape))
    affine = np.asarray(image.affine, np.float64)
    orientation = nibabel.io_orientation(affine)  # (3, 2): for each stored axis the RAS axis and +1 or -1
    if min(shape) < 1 or not np.isfinite(orientation).all():
        raise ImageReadError(f"its volume of shape {shape} has no size or no orientation")
    x, y, z = (int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3))
    index, warnings = select_frame(frame, shape[z], kind="slice", default=shape[z] // 2)
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        warnings.append("the file gives no orientation; left and right are assumed")
    place = NiftiSlice(
        affine=affine,
        unit=image.header.get_xyzt_units()[0],
        shape=(shape[0], shape[1], shape[2]),
        axis=z,
        index=index if orientation[z, 1] > 0 else shape[z] - 1 - index,
        transpose=y > x,
        # RAS counts towards the right and the front; the picture towards the left and the back.
        flip_rows=bool(orientation[y, 1] > 0),
        flip_columns=bool(orientation[x, 1] > 0),
    )
    return place, index, warnings


def _picture_axes(place: NiftiSlice) -> tuple[int, int]:
    """Stored axes along which the picture's row number and its column number grow."""
    first, second = (axis for axis in range(3) if axis != place.axis)
    return (second, first) if place.transpose else (first, second)


def _plane(image: Any, place: NiftiSlice) -> NDArray[Any]:
    """Stored plane, scaled to its unit, read without unpacking more than one stored plane at a time."""
    data = image.dataobj
    if len(image.shape) == 2:
        data = np.asarray(data)[:, :, np.newaxis]
    first_volume = (0,) * (len(image.shape) - 3)
    if place.axis == 2:
        return np.asarray(data[(slice(None), slice(None), place.index, *first_volume)])
    rows = []
    for k in range(place.shape[2]):
        plane = np.asarray(data[(slice(None), slice(None), k, *first_volume)])
        # A copy, since a view would keep the whole plane in memory.
        rows.append((plane[place.index] if place.axis == 0 else plane[:, place.index]).copy())
    return np.stack(rows, axis=1)


def _window(values: NDArray[Any]) -> tuple[NDArray[np.uint8], list[str]]:
    """Display values under a window that leaves out the darkest and the brightest half percent."""
    values, warnings = finite(values.astype(np.float64))
    low, high = (float(one) for one in np.percentile(values, [_LOW, _HIGH]))
    if not high > low:  # nearly everything has one value: a label map, an almost empty slice
        low, high = float(values.min()), float(values.max())
    warnings.append(f"window from {low:g} to {high:g}, the {_LOW} and {_HIGH} percentiles of the slice or its extremes")
    return np.ascontiguousarray(min_max_u8(values, low=low, high=high)), warnings


def _spacing(place: NiftiSlice) -> tuple[tuple[float, float] | None, list[str]]:
    lengths = np.linalg.norm(place.affine[:3, :3], axis=0) * _MM_PER_UNIT.get(place.unit, np.nan)
    row, column = (float(lengths[axis]) for axis in _picture_axes(place))
    if not (np.isfinite([row, column]).all() and min(row, column) > 0):
        return None, ["the voxel size is not known; areas are left out"]
    if place.unit == "unknown":
        return (row, column), ["the file names no unit of length; millimetres are assumed"]
    return (row, column), []
