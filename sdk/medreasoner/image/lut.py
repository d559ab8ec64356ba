"""Look-up tables of DICOM: modality, VOI and palette, plain and segmented."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medreasoner.image.attributes import items

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["LookupTable", "expand_segments", "palette_table", "read_lut"]


@dataclass(frozen=True, slots=True)
class LookupTable:
    """`entries` (n,) int64 of `bits` bits; the input value `first` selects the first of them."""

    first: int
    bits: int
    entries: NDArray[np.int64]

    def __call__(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Entry for each value; values before the first or after the last take the nearest (PS3.3 C.11.1.1)."""
        whole = values if values.dtype.kind in "iu" else np.rint(values)
        index = np.clip(whole.astype(np.int64) - self.first, 0, self.entries.size - 1)
        return self.entries[index]


def _descriptor(value: Any, *, signed: bool) -> tuple[int, int, int]:
    count, first, bits = (int(one) for one in value)
    # The second value is US or SS by Pixel Representation, which writers and parsers get wrong in both directions.
    if signed and first > 32767:
        first -= 65536
    elif not signed and first < 0:
        first += 65536
    if not 1 <= bits <= 16:
        raise ValueError(f"{bits} bits per entry")
    return (count % 65536) or 65536, first, bits


def _is_signed(value: Any, span: tuple[float, float]) -> bool:
    """Which reading of the first mapped value puts the table where the values are; as parsed if both do or neither."""
    parsed = int(value[1]) < 0

    def meets(signed: bool) -> bool:
        count, first, _ = _descriptor(value, signed=signed)
        return first <= span[1] and span[0] < first + count

    return not parsed if meets(not parsed) and not meets(parsed) else parsed


def _entries(data: Any, count: int, bits: int, *, little_endian: bool) -> NDArray[np.int64]:
    order = "<" if little_endian else ">"
    if isinstance(data, int):
        data = [data]
    if not isinstance(data, bytes | bytearray):
        data = np.asarray(list(data), np.int64).astype(np.uint16).astype(f"{order}u2").tobytes()
    if bits <= 8 and count <= len(data) <= count + 1:  # two entries share a word
        return np.frombuffer(data, np.uint8)[:count].astype(np.int64)
    if len(data) < 2 * count:
        raise ValueError(f"{len(data)} bytes for {count} entries")
    return np.frombuffer(data, f"{order}u2")[:count].astype(np.int64)


def read_lut(
    dataset: "Dataset", keyword: str, *, span: tuple[float, float], signed: bool | None, little_endian: bool
) -> LookupTable | None:
    """Table in the first item of ModalityLUTSequence or VOILUTSequence; None if there is no such item.

    Parameters
    ----------
    dataset, keyword
        Where the sequence is found, and its name.
    span
        Lowest and highest value to look up.
    signed
        Whether the values to look up are signed, which decides how the first mapped value is read. None: it is not
        known, and the value is taken as it was parsed, unless the table then lies beside `span` and otherwise does not.
    little_endian
        Byte order of 16-bit entries.

    Raises
    ------
    ValueError, TypeError, AttributeError
        If the descriptor or the data are malformed.

    References
    ----------
    DICOM PS3.3 C.11.1.1 and C.11.2.1.1.
    """
    found = items(dataset, keyword)
    if not found:
        return None
    descriptor = found[0].LUTDescriptor
    if signed is None:
        signed = _is_signed(descriptor, span)
    count, first, bits = _descriptor(descriptor, signed=signed)
    return LookupTable(first, bits, _entries(found[0].LUTData, count, bits, little_endian=little_endian))


def palette_table(dataset: "Dataset", colour: str, *, signed: bool, little_endian: bool) -> LookupTable:
    """Palette of one colour (``"Red"``, ``"Green"``, ``"Blue"``) with entries brought to 8 bits.

    Raises
    ------
    ValueError, TypeError, AttributeError
        If the palette is absent or malformed.

    References
    ----------
    DICOM PS3.3 C.7.6.3.1.5, C.7.6.3.1.6 and C.7.9.2 (segmented).
    """
    name = f"{colour}PaletteColorLookupTable"
    count, first, bits = _descriptor(dataset[f"{name}Descriptor"].value, signed=signed)
    if f"{name}Data" in dataset:
        entries = _entries(dataset[f"{name}Data"].value, count, bits, little_endian=little_endian)
    else:
        data = dataset[f"Segmented{name}Data"].value
        words = np.frombuffer(data, np.uint8 if bits <= 8 else ("<u2" if little_endian else ">u2"))
        entries = expand_segments(words.astype(np.int64), count)
    # Some writers declare 16 bits and store 8-bit entries, others store them in the upper byte.
    if bits > 8 and entries.max(initial=0) > 255:
        entries = entries >> (bits - 8)
    return LookupTable(first, 8, np.minimum(entries, 255))


def expand_segments(words: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Table of `count` entries from its discrete and linear segments.

    Raises
    ------
    ValueError
        If a segment is malformed, or indirect: no scanner is known to write those, and readers disagree on their unit.

    References
    ----------
    DICOM PS3.3 C.7.9.2.1 and C.7.9.2.2.

    >>> expand_segments(np.array([0, 1, 7, 1, 3, 10]), 4).tolist()
    [7, 8, 9, 10]
    """
    table: list[int] = []
    at = 0
    while at + 2 < words.size and len(table) < count:
        kind, length = int(words[at]), int(words[at + 1])
        if kind == 0 and at + 2 + length <= words.size:
            table.extend(int(word) for word in words[at + 2 : at + 2 + length])
            at += 2 + length
        elif kind == 1 and table:
            ramp = np.linspace(table[-1], int(words[at + 2]), length + 1)[1:]
            table.extend(int(value) for value in np.floor(ramp + 0.5))
            at += 3
        else:
            raise ValueError(f"segment of kind {kind} at {at} is not supported")
    if len(table) < count:
        raise ValueError(f"the segments make {len(table)} entries; the descriptor says {count}")
    return np.asarray(table[:count], np.int64)
