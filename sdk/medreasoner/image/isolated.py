"""Decoding in a process of its own, for the one codec that cannot be trusted with damaged input."""

import io
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medreasoner.errors import ImageReadError
from medreasoner.image.header import PixelHeader

if TYPE_CHECKING:
    from pydicom.uid import UID

__all__ = ["decode_with_gdcm"]

_TIMEOUT_S = 60.0
_WORKER = Path(__file__).with_name("gdcm_worker.py")


def decode_with_gdcm(frame: bytes, header: PixelHeader, syntax: "UID", planar: int) -> tuple[NDArray[Any], str]:
    """Stored values of one encoded frame and their photometric interpretation.

    Parameters
    ----------
    frame
        The codestream.
    header
        Layout that the data set declares.
    syntax
        Its transfer syntax.
    planar
        Planar Configuration (0028,0006).

    Raises
    ------
    ImageReadError
        If GDCM refuses the frame, ends its process, takes more than a minute, or no interpreter can be started.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_WORKER)],  # -P: the modules beside the worker must not shadow others
            input=_minimal_file(frame, header, syntax, planar),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise ImageReadError(f"GDCM could not be run to its end ({type(err).__name__})") from err
    if done.returncode:
        ending = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "refused it"
        raise ImageReadError(f"GDCM {ending}; the pixel data are damaged")
    photometric, _, array = done.stdout.partition(b"\n")
    return np.load(io.BytesIO(array), allow_pickle=False), photometric.decode("ascii")


def _minimal_file(frame: bytes, header: PixelHeader, syntax: "UID", planar: int) -> bytes:
    """A data set of nothing but the frame and its layout: no patient data leave the process."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SamplesPerPixel = header.samples
    dataset.PhotometricInterpretation = header.photometric
    dataset.PlanarConfiguration = planar
    dataset.Rows, dataset.Columns = header.rows, header.columns
    dataset.BitsAllocated, dataset.BitsStored = header.bits_allocated, header.bits_stored
    dataset.HighBit, dataset.PixelRepresentation = header.high_bit, int(header.signed)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()
