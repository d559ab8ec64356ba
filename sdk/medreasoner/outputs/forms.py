"""Which form a file gets, and whether it can be written, both known before any work is done."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from medreasoner._extras import require
from medreasoner.errors import OutputError
from medreasoner.image.quiet import quiet

if TYPE_CHECKING:
    from pydicom import Dataset

    from medreasoner.image import Image

__all__ = ["FORMS", "check_output", "check_reference", "form_of"]

_IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")

FORMS: Mapping[str, str] = MappingProxyType(
    {
        "overlay": "picture with mask, box and points drawn in (.png, .jpg, .jpeg)",
        "mask": "mask of 0 and 255 in the image's own grid (a name that ends in mask.png)",
        "rle": "mask as COCO run lengths (.rle.json)",
        "json": "the whole answer (.json)",
        "nifti": "mask in the volume of the NIfTI input, or one slice (.nii, .nii.gz)",
        "seg": "DICOM SEG that refers to the DICOM input (.dcm)",
    }
)
"""Forms and what they hold."""

# The first that fits is taken, so the longer endings stand before the shorter ones that they end in.
_ENDINGS = (
    ("mask.png", "mask"),
    (".png", "overlay"),
    (".jpg", "overlay"),
    (".jpeg", "overlay"),
    (".rle.json", "rle"),
    (".json", "json"),
    (".nii.gz", "nifti"),
    (".nii", "nifti"),
    (".dcm", "seg"),
)


def form_of(path: str | os.PathLike[str], *, format: str | None = None) -> str:
    """Form in which a file is written: the one asked for, or else the one of its ending.

    Raises
    ------
    OutputError
        If neither is known; the message lists those that are.

    Examples
    --------
    >>> form_of("left.mask.png"), form_of("left.png"), form_of("left.png", format="mask")
    ('mask', 'overlay', 'mask')
    """
    name = Path(path).name
    if format is not None:
        if format not in FORMS:
            raise OutputError(f"unknown format {format!r}; known: {', '.join(FORMS)}")
        return format
    for ending, form in _ENDINGS:
        if name.lower().endswith(ending):
            return form
    known = ", ".join(ending if ending.startswith(".") else f"*{ending}" for ending, _ in _ENDINGS)
    raise OutputError(f"{name}: unknown ending; known: {known}")


def check_reference(image: "Image") -> "Dataset":
    """Header of an image that a DICOM SEG can refer to.

    Raises
    ------
    OutputError
        If the image was not DICOM, or lacks a UID that a reference needs.
    """
    if image.dicom is None:
        raise OutputError(f"DICOM SEG refers to a DICOM image, and {image.source} is none; write a .nii or mask.png")
    with quiet():
        missing = [keyword for keyword in _IDENTITY if not image.dicom.get(keyword)]
    if missing:
        raise OutputError(
            f"DICOM SEG needs {', '.join(missing)}, and {image.source} has none; write a .nii or mask.png"
        )
    return image.dicom


def check_output(path: str | os.PathLike[str], *, format: str | None = None, image: "Image | None" = None) -> str:
    """Form of a file that can be written, so that a caller learns of a fault before the work and not after it.

    Parameters
    ----------
    path
        The file to write; what is there is replaced.
    format
        One of `FORMS`; None: by the ending.
    image
        What the result will be about, if it is known yet.

    Raises
    ------
    OutputError
        If the folder is missing, the path is no regular file, the ending is unknown, or the form does not suit the
        image.
    MissingExtraError
        If the form needs a package that is not installed.
    """
    form = form_of(path, format=format)
    target = Path(path)
    try:
        has_folder, is_taken = target.parent.is_dir(), target.exists() and not target.is_file()
    except (OSError, ValueError) as err:  # a name that is too long, or holds a zero
        raise OutputError(f"{str(target)[:80]}: {getattr(err, 'strerror', None) or err}") from err
    if not has_folder:
        raise OutputError(f"{target}: there is no folder {str(target.parent)!r}; create it first")
    if is_taken:
        raise OutputError(f"{target}: it exists and is not a file")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: the folder {str(target.parent)!r} cannot be written to")
    if form == "seg":
        require("highdicom", extra="dicom", feature="Writing DICOM SEG")
        if image is not None:
            check_reference(image)
    if form == "nifti":
        require("nibabel", extra="nifti", feature="Writing NIfTI")
    return form
