"""Distance between pixel centres, where it holds in the patient."""

from typing import TYPE_CHECKING

from medreasoner.image.attributes import first_number, functional_group, is_filled, items, numbers, text

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["patient_spacing"]

Spacing = tuple[float, float]

_CROSS_SECTIONAL = frozenset({"CT", "MR", "PT", "NM", "RTDOSE", "SEG", "OPT"})
# A shadow on a detector: what is near the tube looks larger, so the detector's spacing is not the patient's.
_PROJECTION = frozenset({"CR", "DX", "MG", "RF", "XA", "RG", "RTIMAGE", "PX", "IO", "XC"})
_SMALLEST, _LARGEST = 1e-6, 1e4  # mm: a nanometre and ten metres
_TISSUE_2D = 1  # Region Spatial Format (0018,6012)
_CENTIMETRES = 3  # Physical Units X/Y Direction (0018,6024), (0018,6026)


def patient_spacing(dataset: "Dataset", frame: int) -> tuple[Spacing | None, list[str]]:
    """(row, column) spacing in mm in the patient, or None; and a warning where a spacing was left unused.

    Cross-sectional images: Pixel Spacing. Projections: Pixel Spacing if it is said to be calibrated or differs from the
    detector's Imager Pixel Spacing. Ultrasound: the 2-D regions measured in centimetres, if they agree.

    References
    ----------
    DICOM PS3.3 10.7.1.1 and 10.7.1.3 (Pixel Spacing and its calibration), C.8.5.5 (ultrasound regions).
    """
    measures = functional_group(dataset, frame, "PixelMeasuresSequence")
    spacing, malformed = _pair(measures, "PixelSpacing")
    modality = text(dataset, "Modality")
    regions = items(dataset, "SequenceOfUltrasoundRegions")
    if malformed:
        return None, ["the pixel spacing is zero or malformed; areas are left out"]
    if regions:
        return _region_spacing(regions)
    if spacing is not None and modality not in _PROJECTION:
        # An oriented slice is cross-sectional whatever its modality is called.
        if modality in _CROSS_SECTIONAL or numbers(dataset, "ImageOrientationPatient") or measures is not dataset:
            return spacing, []
        return None, [
            "the pixel spacing is not known to hold in the patient for this kind of image; areas are left out"
        ]
    imager, _ = _pair(dataset, "ImagerPixelSpacing")
    if spacing is not None:
        calibrated = text(dataset, "PixelSpacingCalibrationType") in ("GEOMETRY", "FIDUCIAL")
        if calibrated or (imager is not None and not _close(imager, spacing)):
            return spacing, []
    if spacing is not None or imager is not None:
        return None, ["the pixel spacing is the detector's, not calibrated to the patient; areas are left out"]
    return None, []


def _pair(dataset: "Dataset", keyword: str) -> tuple[Spacing | None, bool]:
    """The two plausible distances of an attribute, and whether it is there but holds something else."""
    found = numbers(dataset, keyword)
    if len(found) == 2 and min(found) >= _SMALLEST and max(found) <= _LARGEST:
        return (found[0], found[1]), False
    return None, is_filled(dataset, keyword)


def _close(a: Spacing, b: Spacing) -> bool:
    return all(abs(x - y) <= 1e-6 * max(x, y) for x, y in zip(a, b, strict=True))


def _region_spacing(regions: "list[Dataset]") -> tuple[Spacing | None, list[str]]:
    found: list[Spacing] = []
    for region in regions:
        if first_number(region, "RegionSpatialFormat") != _TISSUE_2D:
            continue
        units = [first_number(region, f"PhysicalUnits{axis}Direction") for axis in "YX"]
        # The delta is negative where the axis runs against the picture's.
        deltas = [abs(first_number(region, f"PhysicalDelta{axis}") or 0.0) * 10 for axis in "YX"]
        if units == [_CENTIMETRES, _CENTIMETRES] and min(deltas) > 0:
            found.append((deltas[0], deltas[1]))
    if not found:
        return None, []
    if all(_close(found[0], other) for other in found[1:]):
        return found[0], []
    return None, [f"the {len(found)} ultrasound regions have different scales; areas are left out"]
