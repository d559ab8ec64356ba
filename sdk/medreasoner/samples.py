"""Real DICOM images to try things on, from the optional package pydicom-data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from medreasoner._extras import require
from medreasoner.errors import ImageReadError, MissingExtraError

__all__ = ["SAMPLES", "Sample", "sample_path"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A sample image: what it shows, a query that suits it, and the file of pydicom-data that holds it."""

    name: str
    description: str
    query: str
    filename: str


_ALL = (
    Sample(
        name="chest",
        description="Frontal chest radiograph (CR, MONOCHROME1) with many round opacities in both lungs",
        query="Which paired organs fill with air on every breath?",
        filename="RG1_UNCR.dcm",
    ),
    Sample(
        name="leg",
        description="Frontal radiograph of a lower leg and ankle (CR, MONOCHROME1), a lucent area in the distal tibia",
        query="Which long bone carries most of the weight between knee and ankle?",
        filename="RG3_UNCR.dcm",
    ),
    Sample(
        name="shoulder-mr",
        description="Coronal MR of a shoulder, the marrow of the humerus bright",
        query="Which bone's rounded head turns in the socket of this joint?",
        filename="MR2_UNCR.dcm",
    ),
    Sample(
        name="abdomen-mr",
        description="Axial contrast-enhanced abdominal MR: liver with a dark round lesion, both kidneys, spleen",
        query="Which large organ makes bile?",
        filename="MR-SIEMENS-DICOM-WithOverlays.dcm",
    ),
    Sample(
        name="head-ct",
        description="Axial head CT: dark collection under the skull on the picture's right, midline pushed over",
        query="Where does fluid outside the brain press on it?",
        filename="693_UNCR.dcm",
    ),
    Sample(
        name="ultrasound",
        description="Colour (power Doppler) ultrasound of an oval lymph node, its vessels in orange",
        query="Which structure shows the branching blood flow?",
        filename="US1_UNCR.dcm",
    ),
    Sample(
        name="heart-ultrasound",
        description="Sector ultrasound of a beating heart, 120 frames (JPEG)",
        query="Which large dark chamber pumps the blood out to the body?",
        filename="color3d_jpeg_baseline.dcm",
    ),
)

SAMPLES: Mapping[str, Sample] = MappingProxyType({sample.name: sample for sample in _ALL})


def sample_path(name: str) -> Path:
    """Path of a sample's file.

    Parameters
    ----------
    name
        One of `SAMPLES`; ``read_image("sample:chest")`` reads the one called ``"chest"``.

    Raises
    ------
    ImageReadError
        If there is no sample of this name.
    MissingExtraError
        If pydicom-data is not installed, or an edition of it without the file.
    """
    if name not in SAMPLES:
        raise ImageReadError(f"no such sample; there are {', '.join(sorted(SAMPLES))}")
    store = require("data_store", extra="samples", feature="A sample image", package="pydicom-data")
    path = Path(str(store.__file__)).parent / "data" / SAMPLES[name].filename
    if not path.is_file():
        raise MissingExtraError(f"pydicom-data holds no {path.name}: pip install --upgrade 'medreasoner[samples]'")
    return path
