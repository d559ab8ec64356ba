"""Stored values of a grey image to what a viewer shows: modality, VOI and presentation, in this order (PS3.3 C.11).

Every step maps one stored value to one shade, so for integers the whole chain is computed once for each value that
can occur and the picture is one table look-up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medreasoner.image.attributes import first_number, functional_group, is_filled, items, text
from medreasoner.image.header import PixelHeader
from medreasoner.image.limits import finite, min_max_u8
from medreasoner.image.lut import read_lut

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["grey_to_u8", "window_shades"]

_MAX_TABLE = 65536
_AT_ONCE = 1 << 15  # pixels; NumPy makes eight bytes of each index, which would be fresh memory for a whole picture
Floats = NDArray[np.float64]


def window_shades(values: NDArray[Any], center: float, width: float, function: str = "LINEAR") -> Floats:
    """Shade in [0, 1] of each value under a window.

    Parameters
    ----------
    values
        Any shape, in the unit of the window (for CT: Hounsfield units).
    center, width
        Window Center (0028,1050) and Width (0028,1051).
    function
        VOI LUT Function (0028,1056): ``LINEAR``, ``LINEAR_EXACT`` or ``SIGMOID``.

    Raises
    ------
    ValueError
        If the function is unknown or the width out of its range: at least 1 for LINEAR, above 0 for the others.

    References
    ----------
    DICOM PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2 (LINEAR_EXACT).

    >>> window_shades(np.array([-10.0, 40.0, 90.0]), 40, 100, "LINEAR_EXACT").tolist()
    [0.0, 0.5, 1.0]
    """
    x = values.astype(np.float64)
    if function == "LINEAR" and width >= 1:
        x -= center - 0.5
        width -= 1
        if width == 0:
            return (x > 0).astype(np.float64)
    elif function == "LINEAR_EXACT" and width > 0:
        x -= center
    elif function == "SIGMOID" and width > 0:
        # Beyond 700 the exponential overflows; the shade is 0 or 1 to the last bit long before.
        shades: Floats = 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700)))
        return shades
    else:
        raise ValueError(f"window width {width:g} with VOI LUT function {function}")
    return np.clip(x / width + 0.5, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Domain:
    """Values for which the chain is computed, and which of them the picture really holds.

    ``values`` (n,) stored values; ``used`` (n,) bool: occurs in the picture; ``padding`` (n,) bool: is padding;
    ``index`` (H, W) integer place of each pixel in ``values``.
    """

    values: NDArray[Any]
    used: NDArray[np.bool_]
    padding: NDArray[np.bool_]
    index: NDArray[np.integer]


def grey_to_u8(
    stored: NDArray[Any], dataset: "Dataset", header: PixelHeader, *, frame: int, little_endian: bool
) -> tuple[NDArray[np.uint8], list[str]]:
    """Display values of a MONOCHROME1 or MONOCHROME2 frame, and warnings.

    Parameters
    ----------
    stored
        (H, W) stored values, integer or floating point.
    dataset
        Where rescale, look-up tables, windows and padding are found.
    header
        Signedness and photometric interpretation of the values.
    frame
        Index of the frame, whose own functional groups go before the shared ones and the data set.
    little_endian
        Byte order of look-up tables.

    Raises
    ------
    ImageReadError
        If the pixel data are floating point and none is finite.
    """
    warnings: list[str] = []
    if stored.dtype.kind == "f":
        stored, warnings = finite(stored)
    domain = _domain(stored, _padding_range(dataset, header))
    values, notes = _modality(domain.values, dataset, header, frame, little_endian=little_endian)
    warnings += notes
    shades, notes = _voi(values, domain, dataset, frame, little_endian=little_endian)
    warnings += notes
    table = min_max_u8(shades, low=0.0, high=1.0) if shades is not None else _min_max(values, domain, warnings)
    inverted, notes = _inverted(dataset, header)
    warnings += notes
    if inverted:
        table = 255 - table
    if shades is None:
        table[domain.padding] = 0  # padding is no tissue: black, on an inverted image too
    return _look_up(table, domain.index), warnings


def _padding_range(dataset: "Dataset", header: PixelHeader) -> tuple[float, float] | None:
    """Lowest and highest stored value that is padding (PS3.3 C.7.5.1.1.2)."""
    first = first_number(dataset, "PixelPaddingValue")
    if first is None:
        return None
    last = first_number(dataset, "PixelPaddingRangeLimit")
    ends = [first, first if last is None else last]
    if header.signed:  # the attribute is US or SS and is not always parsed as it was meant
        ends = [end - 2**header.bits_allocated if end >= 2 ** (header.bits_allocated - 1) else end for end in ends]
    return min(ends), max(ends)


def _domain(stored: NDArray[Any], padding: tuple[float, float] | None) -> _Domain:
    low, high = stored.min(), stored.max()
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 4 and int(high) - int(low) < _MAX_TABLE:
        index = _above(stored, int(low))
        values: NDArray[Any] = np.arange(int(low), int(high) + 1)
        used = np.zeros(values.size, np.bool_)
        for part in _parts(index):
            used[part] = True
    else:
        values, inverse = np.unique(stored, return_inverse=True)
        index = inverse.reshape(stored.shape)
        used = np.ones(values.size, np.bool_)
    is_padding = np.zeros(values.size, np.bool_)
    if padding is not None:
        is_padding = (values >= padding[0]) & (values <= padding[1])
        if not (used & ~is_padding).any():  # nothing but padding: then it is the picture
            is_padding[:] = False
    return _Domain(values=values, used=used, padding=is_padding, index=index)


def _above(stored: NDArray[Any], low: int) -> NDArray[np.integer]:
    """How far each integer lies above the lowest one, which is less than 65536."""
    if low == 0 and stored.dtype.kind == "u":
        return stored
    # Without their upper bits, so that they wrap around: the differences fit into sixteen.
    return np.subtract(stored.astype(np.uint16, copy=False), np.uint16(low & 0xFFFF), dtype=np.uint16)


def _parts(index: NDArray[np.integer]) -> Iterator[NDArray[np.integer]]:
    flat = index.reshape(-1)
    return (flat[start : start + _AT_ONCE] for start in range(0, flat.size, _AT_ONCE))


def _look_up(table: NDArray[np.uint8], index: NDArray[np.integer]) -> NDArray[np.uint8]:
    found = np.empty(index.size, np.uint8)
    for number, part in enumerate(_parts(index)):
        found[number * _AT_ONCE :][: part.size] = table[part]
    return found.reshape(index.shape)


def _modality(
    values: NDArray[Any], dataset: "Dataset", header: PixelHeader, frame: int, *, little_endian: bool
) -> tuple[NDArray[Any], list[str]]:
    """Values in the modality's unit: by table, by slope and intercept, or as stored (PS3.3 C.11.1)."""
    source = functional_group(dataset, frame, "PixelValueTransformationSequence")
    try:
        table = read_lut(
            source, "ModalityLUTSequence", span=_span(values), signed=header.signed, little_endian=little_endian
        )
    except (ValueError, TypeError, AttributeError):
        return values, ["the modality look-up table is malformed and was not applied"]
    if table is not None:
        return table(values), []
    slope, intercept = first_number(source, "RescaleSlope"), first_number(source, "RescaleIntercept")
    for keyword, found in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if found is None and is_filled(source, keyword):
            return values, ["the rescale slope or intercept is no number; rescaling was not applied"]
    if slope is None and intercept is None:
        return values, []
    if slope == 0:
        return values, ["the rescale slope is 0; rescaling was not applied"]
    return values * (1.0 if slope is None else slope) + (0.0 if intercept is None else intercept), []


def _span(values: NDArray[Any]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _voi(
    values: NDArray[Any], domain: _Domain, dataset: "Dataset", frame: int, *, little_endian: bool
) -> tuple[Floats | None, list[str]]:
    """Shade in [0, 1] of each value by the first VOI table or else the first window; None if neither is usable."""
    source = functional_group(dataset, frame, "FrameVOILUTSequence")
    warnings = []
    try:
        # The values are in the modality's unit by now, whose sign Pixel Representation does not tell.
        table = read_lut(source, "VOILUTSequence", span=_span(values), signed=None, little_endian=little_endian)
        if table is not None:
            return table(values) / (2**table.bits - 1), []
    except (ValueError, TypeError, AttributeError):
        warnings.append("the VOI look-up table is malformed and was not applied")
    center, width = first_number(source, "WindowCenter"), first_number(source, "WindowWidth")
    if center is None or width is None:
        return None, warnings
    function = text(source, "VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        warnings.append("the VOI LUT function is unknown; LINEAR was used")
        function = "LINEAR"
    try:
        shades = window_shades(values, center, width, function)
    except ValueError:
        return None, [*warnings, f"the window (center {center:g}, width {width:g}, {function}) is not valid"]
    seen = shades[domain.used & ~domain.padding]
    if values[domain.used].min() != values[domain.used].max() and (seen.max() < 1 / 255 or seen.min() > 254 / 255):
        return None, [*warnings, f"the window (center {center:g}, width {width:g}) would show one flat shade"]
    return shades, warnings


def _min_max(values: NDArray[Any], domain: _Domain, warnings: list[str]) -> NDArray[np.uint8]:
    seen = values[domain.used & ~domain.padding]
    low, high = float(seen.min()), float(seen.max())
    if low == high:
        warnings.append("all pixels have the same value; the picture is black")
    else:
        warnings.append(f"no usable window; scaled from the smallest to the largest value ({low:g} to {high:g})")
    return min_max_u8(values, low=low, high=high)


def _inverted(dataset: "Dataset", header: PixelHeader) -> tuple[bool, list[str]]:
    """Whether the smallest value is white. Inversion follows the VOI step (PS3.3 C.7.6.3.1.2 and C.11.6.1.2)."""
    shape = text(dataset, "PresentationLUTShape")
    monochrome1 = header.photometric == "MONOCHROME1"
    warnings = []
    if items(dataset, "PresentationLUTSequence"):
        warnings.append("a presentation look-up table is present and was not applied")
    if shape in ("IDENTITY", "INVERSE") and (shape == "INVERSE") != monochrome1:
        warnings.append(f"{header.photometric} contradicts the presentation LUT shape {shape}; shown inverted")
    return monochrome1 or shape == "INVERSE", warnings
