"""Small DICOM data sets made to order, and the public files of pydicom and pydicom-data."""

import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import data_store
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medreasoner.image import Image, read_image

MakeDataset = Callable[..., FileDataset]


def _make(pixels: NDArray[Any], *, photometric: str = "MONOCHROME2", **attributes: Any) -> FileDataset:
    """A data set of native pixels: (H, W), (F, H, W) or, for three samples, (H, W, 3) integers."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = attributes.pop("syntax", ExplicitVRLittleEndian)
    syntax = meta.TransferSyntaxUID
    dataset = FileDataset(
        "", {}, preamble=b"\0" * 128, file_meta=meta,
        is_implicit_VR=syntax.is_implicit_VR, is_little_endian=syntax.is_little_endian,
    )  # fmt: skip
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    dataset.Modality = "CT"
    dataset.PatientName, dataset.PatientID = "Secret^Person", "SECRET-4711"
    dataset.SamplesPerPixel = 1 if photometric.startswith(("MONO", "PAL")) else 3
    dataset.PhotometricInterpretation = photometric
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
        dataset.Rows, dataset.Columns = pixels.shape[:2]
    else:
        dataset.Rows, dataset.Columns = pixels.shape[-2:]
        if pixels.ndim == 3:
            dataset.NumberOfFrames = pixels.shape[0]
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if dataset.BitsAllocated <= 8 else "OW"
    return dataset


@pytest.fixture(scope="session")
def make_dataset() -> MakeDataset:
    return _make


@pytest.fixture(scope="session")
def to_bytes() -> Callable[[FileDataset], bytes]:
    def save(dataset: FileDataset) -> bytes:
        stream = io.BytesIO()
        dataset.save_as(stream, enforce_file_format=True)
        return stream.getvalue()

    return save


@pytest.fixture(scope="session")
def corpus() -> Mapping[str, Path]:
    """Every public test file: ``"name"`` for pydicom-data, ``"pydicom/path"`` for pydicom itself."""
    own = Path(pydicom.__file__).parent / "data" / "test_files"
    extra = Path(data_store.__file__).parent / "data"
    files = {f"pydicom/{path.relative_to(own).as_posix()}": path for path in own.rglob("*") if path.is_file()}
    files |= {path.relative_to(extra).as_posix(): path for path in extra.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if "__pycache__" not in name and not name.endswith(".py")}


@pytest.fixture(scope="session")
def read_first(corpus: Mapping[str, Path]) -> Callable[[str], Image]:
    """First frame of a file of the corpus, by its name there; decoded once for all who only look at it."""
    return functools.cache(lambda name: read_image(corpus[name]))


@pytest.fixture(scope="session")
def ramp() -> NDArray[np.int16]:
    """(32, 32) int16 from -512 to 511."""
    return np.arange(-512, 512, dtype=np.int16).reshape(32, 32)
