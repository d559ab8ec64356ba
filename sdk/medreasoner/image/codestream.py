"""Size that a compressed frame claims for itself, read without decoding it.

A codec allocates what the codestream says, not what the DICOM header says, so the two are compared first.
"""

import struct

__all__ = ["codestream_size"]

_START_OF_FRAME = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7))
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))


def codestream_size(frame: bytes) -> tuple[int, int]:
    """(height, width) from the header of a JPEG, JPEG-LS or JPEG 2000 codestream.

    Parameters
    ----------
    frame
        One encapsulated frame: a bare codestream, or for JPEG 2000 also a JP2 file.

    Raises
    ------
    ValueError
        If no such header is found.

    References
    ----------
    ISO/IEC 10918-1 B.2.2 (SOF), 14495-1 C.2.2 (SOF55), 15444-1 A.5.1 (SIZ) and I.4 (boxes).

    >>> codestream_size(bytes.fromhex("ffd8 ffc0 0011 08 0040 0020 03"))
    (64, 32)
    """
    if frame[:2] == b"\xff\xd8":
        return _jpeg_size(frame)
    start = _codestream_start(frame)
    if frame[start : start + 4] != b"\xff\x4f\xff\x51" or len(frame) < start + 24:
        raise ValueError("no JPEG or JPEG 2000 header")
    x1, y1, x0, y0 = struct.unpack_from(">4I", frame, start + 8)
    return y1 - y0, x1 - x0


def _codestream_start(frame: bytes) -> int:
    """Offset of the codestream inside a JP2 file, 0 where there is none around it."""
    if not frame.startswith(b"\0\0\0\x0cjP  "):
        return 0
    at = 12
    while at + 8 <= len(frame):
        length = int.from_bytes(frame[at : at + 4], "big")
        if frame[at + 4 : at + 8] == b"jp2c":
            return at + 8
        if length < 8:  # pydicom would look at the same box for ever
            raise ValueError(f"a JP2 box of {length} bytes")
        at += length
    raise ValueError("a JP2 file without a codestream")


def _jpeg_size(frame: bytes) -> tuple[int, int]:
    at = 2
    while at + 9 <= len(frame):
        if frame[at] != 0xFF:
            break
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">2H", frame, at + 5)
            return height, width
        else:
            at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    raise ValueError("no JPEG frame header")
