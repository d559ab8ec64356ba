"""The Image Pixel module of a DICOM data set, checked before anything is decoded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medreasoner.errors import ImageReadError
from medreasoner.image.attributes import first_number, text
from medreasoner.image.limits import check_size

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["PixelHeader", "pixel_header"]

_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420", "YBR_PARTIAL_422")


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelHeader:
    """How the pixel data are laid out (PS3.3 C.7.6.3).

    ``high_bit`` is the place of a value's most significant bit, ``bits_stored - 1`` unless overlays or an old scanner
    put it higher.
    """

    keyword: str
    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    photometric: str
    n_frames: int

    def frame_bytes(self) -> float:
        """Length of one frame without compression; a fraction where frames of single bits do not end on a byte."""
        samples = 2 if self.photometric == "YBR_FULL_422" else self.samples
        return self.rows * self.columns * samples * self.bits_allocated / 8


def _integer(dataset: "Dataset", keyword: str, default: int | None = None) -> int:
    value = first_number(dataset, keyword)
    if value is None:
        if keyword in dataset and dataset.get_item(keyword).value not in (None, b"", ""):
            raise ImageReadError(f"{keyword} is malformed")
        if default is None:
            raise ImageReadError(f"{keyword} is missing, without which the pixel data cannot be read")
        return default
    if value != int(value):
        raise ImageReadError(f"{keyword} is {value}; expected an integer")
    return int(value)


def _keyword(dataset: "Dataset") -> str:
    found = [keyword for keyword in _KEYWORDS if keyword in dataset]
    if len(found) == 1:
        return found[0]
    if found:
        raise ImageReadError(f"it holds {' and '.join(found)}, of which only one is allowed")
    if "DirectoryRecordSequence" in dataset:
        raise ImageReadError("a DICOMDIR is an index and holds no image; give one of the files it lists")
    modality = text(dataset, "Modality")
    kind = f" (modality {modality})" if modality.isalnum() and len(modality) <= 16 else ""
    raise ImageReadError(
        f"it holds no pixel data{kind}, or the file ends before them; give an image of the series, or fetch it again"
    )


def pixel_header(dataset: "Dataset", max_pixels: int) -> PixelHeader:
    """Layout of the pixel data.

    Raises
    ------
    ImageReadError
        If there are no pixel data, a needed attribute is missing or contradicts another, or the size is refused.
    """
    keyword = _keyword(dataset)
    rows, columns = _integer(dataset, "Rows"), _integer(dataset, "Columns")
    check_size(rows, columns, max_pixels)
    is_float = keyword != "PixelData"
    bits_allocated = _integer(dataset, "BitsAllocated")
    bits_stored = bits_allocated if is_float else _integer(dataset, "BitsStored", bits_allocated)
    header = PixelHeader(
        keyword=keyword,
        rows=rows,
        columns=columns,
        samples=_integer(dataset, "SamplesPerPixel", 1),
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        high_bit=bits_stored - 1 if is_float else _integer(dataset, "HighBit", bits_stored - 1),
        signed=not is_float and _integer(dataset, "PixelRepresentation", 0) == 1,
        photometric=text(dataset, "PhotometricInterpretation"),
        n_frames=_integer(dataset, "NumberOfFrames", 1),
    )
    _check(header)
    return header


def _check(header: PixelHeader) -> None:
    if header.bits_allocated not in (1, 8, 16, 32, 64):
        raise ImageReadError(f"BitsAllocated is {header.bits_allocated}; expected 1, 8, 16, 32 or 64")
    if not 1 <= header.bits_stored <= header.high_bit + 1 <= header.bits_allocated:
        raise ImageReadError(
            f"BitsAllocated {header.bits_allocated}, BitsStored {header.bits_stored} and HighBit {header.high_bit} "
            "contradict one another"
        )
    accepted = {1: _GREY, 3: _COLOUR}.get(header.samples, ())
    if header.photometric not in accepted:
        raise ImageReadError(
            f"PhotometricInterpretation with {header.samples} samples per pixel is not one that can be shown; "
            f"accepted: 1 sample with {', '.join(_GREY)}, 3 samples with {', '.join(_COLOUR)}"
        )
    if header.n_frames < 1:
        raise ImageReadError(f"NumberOfFrames is {header.n_frames}; expected at least 1")
