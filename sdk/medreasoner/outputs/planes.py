"""Where the plane of a DICOM frame lies in the patient."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medreasoner.image.attributes import first_number, functional_group, numbers

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["PatientPlane", "patient_plane"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatientPlane:
    """Position of the first pixel's centre, directions, and distances of a frame, in LPS millimetres.

    Parameters
    ----------
    position
        (x, y, z) of the centre of the pixel at the top left.
    along_columns, along_rows
        Unit vectors: towards higher column numbers (to the right) and higher row numbers (down).
    spacing
        (row, column) distance between pixel centres.
    thickness
        Of the slice, or else the distance to the next; None if the file tells neither.
    """

    position: tuple[float, ...]
    along_columns: tuple[float, ...]
    along_rows: tuple[float, ...]
    spacing: tuple[float, ...]
    thickness: float | None

    def affine(self) -> NDArray[np.float64]:
        """(4, 4) float64 from indices (column, row, slice) to RAS millimetres, as NIfTI has it."""
        right, down = np.array(self.along_columns), np.array(self.along_rows)
        matrix = np.eye(4)
        matrix[:3, 0] = right * self.spacing[1]
        matrix[:3, 1] = down * self.spacing[0]
        matrix[:3, 2] = np.cross(right, down) * (self.thickness or 1.0)
        matrix[:3, 3] = self.position
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix  # LPS to RAS


def patient_plane(dataset: "Dataset", frame: int) -> PatientPlane | None:
    """Plane of a frame (index from 0), or None if the file does not give all of it.

    References
    ----------
    DICOM PS3.3 C.7.6.2 (Image Plane module) and C.7.6.16.2 (the same in functional groups).
    """
    measures = functional_group(dataset, frame, "PixelMeasuresSequence")
    spacing = numbers(measures, "PixelSpacing")
    position = numbers(functional_group(dataset, frame, "PlanePositionSequence"), "ImagePositionPatient")
    cosines = numbers(functional_group(dataset, frame, "PlaneOrientationSequence"), "ImageOrientationPatient")
    if len(spacing) != 2 or min(spacing) <= 0 or len(position) != 3 or len(cosines) != 6:
        return None
    directions = np.reshape(cosines, (2, 3))
    if not np.allclose(directions @ directions.T, np.eye(2), atol=1e-3):
        return None
    thickness = first_number(measures, "SliceThickness") or first_number(measures, "SpacingBetweenSlices")
    return PatientPlane(
        position=position,
        along_columns=cosines[:3],
        along_rows=cosines[3:],
        spacing=spacing,
        thickness=thickness if thickness is not None and thickness > 0 else None,
    )
