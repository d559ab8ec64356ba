import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medreasoner.image.spacing import patient_spacing


def _dataset(modality, **attributes):
    dataset = Dataset()
    dataset.Modality = modality
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def _region(dy, dx, *, units=3, form=1):
    region = Dataset()
    region.RegionSpatialFormat = form
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = units
    region.PhysicalDeltaX, region.PhysicalDeltaY = dx, dy
    return region


OWN, DETECTOR = ["0.5", "0.25"], ["0.6", "0.3"]
ORIENTED = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}


@pytest.mark.parametrize(
    ("modality", "attributes", "expected", "warns"),
    [
        pytest.param("CT", {"PixelSpacing": OWN}, (0.5, 0.25), False, id="CT"),
        pytest.param("MR", {"PixelSpacing": OWN}, (0.5, 0.25), False, id="MR"),
        pytest.param("MR", {}, None, False, id="MR without"),
        pytest.param("MR", {"PixelSpacing": ["0", "0"]}, None, True, id="zero"),
        pytest.param("MR", {"PixelSpacing": ["1e200", "1e200"]}, None, True, id="beyond the planet"),
        pytest.param("OT", {"PixelSpacing": OWN}, None, True, id="secondary capture"),
        pytest.param("OT", {"PixelSpacing": OWN, **ORIENTED}, (0.5, 0.25), False, id="oriented slice"),
        pytest.param("DX", {"PixelSpacing": OWN}, None, True, id="DX, calibration unknown"),
        pytest.param("DX", {"ImagerPixelSpacing": DETECTOR}, None, True, id="detector alone"),
        pytest.param("DX", {"PixelSpacing": OWN, "ImagerPixelSpacing": OWN}, None, True, id="DX, equal to detector"),
        pytest.param("DX", {"PixelSpacing": OWN, "ImagerPixelSpacing": ["0.50", "0.250"]}, None, True, id="equal text"),
        pytest.param("DX", {"PixelSpacing": OWN, "ImagerPixelSpacing": DETECTOR}, (0.5, 0.25), False, id="differs"),
        pytest.param(
            "CR", {"PixelSpacing": OWN, "PixelSpacingCalibrationType": "GEOMETRY"}, (0.5, 0.25), False, id="geometry"
        ),
        pytest.param(
            "CR", {"PixelSpacing": OWN, "PixelSpacingCalibrationType": "FIDUCIAL"}, (0.5, 0.25), False, id="fiducial"
        ),
        pytest.param(
            "CR", {"PixelSpacing": OWN, "PixelSpacingCalibrationType": "GUESS"}, None, True, id="other calibration"
        ),
        pytest.param("CR", {"PixelSpacing": OWN, **ORIENTED}, None, True, id="a projection is never a slice"),
        pytest.param("CT", {"PixelSpacing": ["0", "0"]}, None, True, id="zero"),
        pytest.param("CT", {"PixelSpacing": ["-1", "1"]}, None, True, id="negative"),
        pytest.param("CT", {"PixelSpacing": ["1"]}, None, True, id="one number"),
        pytest.param("CT", {"PixelSpacing": ["1", "1", "1"]}, None, True, id="three numbers"),
        pytest.param("CT", {"PixelSpacing": None}, None, False, id="empty"),
        pytest.param("US", {}, None, False, id="US without regions"),
        pytest.param("US", {"PixelSpacing": OWN}, None, True, id="US without calibration"),
    ],
)
def test_spacing_is_given_only_where_it_holds_in_the_patient(modality, attributes, expected, warns):
    spacing, warnings = patient_spacing(_dataset(modality, **attributes), 0)
    assert spacing == expected
    assert bool(warnings) == warns


@pytest.mark.parametrize(
    ("regions", "expected", "warns"),
    [
        pytest.param([_region(0.01, 0.02)], (0.1, 0.2), False, id="one"),
        pytest.param([_region(-0.01, 0.02)], (0.1, 0.2), False, id="axis upwards"),
        pytest.param([_region(0.01, 0.02), _region(0.01, 0.02)], (0.1, 0.2), False, id="two alike"),
        pytest.param([_region(0.01, 0.02), _region(0.01, 0.03)], None, True, id="two scales"),
        pytest.param([_region(0.01, 0.02), _region(5.0, 0.1, form=3)], (0.1, 0.2), False, id="M-mode beside"),
        pytest.param([_region(0.01, 0.02, units=4)], None, False, id="not in centimetres"),
        pytest.param([_region(0.0, 0.02)], None, False, id="zero"),
    ],
)
def test_ultrasound_regions_are_measured_in_centimetres(regions, expected, warns):
    dataset = _dataset("US", SequenceOfUltrasoundRegions=Sequence(regions))
    spacing, warnings = patient_spacing(dataset, 0)
    assert (spacing is None) == (expected is None)
    if expected is not None:
        np.testing.assert_allclose(spacing, expected)
    assert bool(warnings) == warns
