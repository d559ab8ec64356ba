"""Size that a compressed frame claims for itself, read without decoding it.

A codec allocates what the codestream says, not what the DICOM header says, so the two are compared first.
"""

import struct

__all__ = ["codestream_size"]

_START_OF_FRAME = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7))
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(height, width) from the header of a JPEG, JPEG-LS or JPEG 2000 codestream; None if none is found.

    Parameters
    ----------
    frame
        One encapsulated frame: a bare codestream, or for JPEG 2000 also a JP2 file.

    References
    ----------
    ISO/IEC 10918-1 B.2.2 (SOF), 14495-1 C.2.2 (SOF55), 15444-1 A.5.1 (SIZ).

    >>> codestream_size(bytes.fromhex("ffd8 ffc0 0011 08 0040 0020 03"))
    (64, 32)
    """
    if frame[:2] == b"\xff\xd8":
        return _jpeg_size(frame)
    start = frame.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(frame) < start + 24:
        return None
    x1, y1, x0, y0 = struct.unpack_from(">4I", frame, start + 8)
    return y1 - y0, x1 - x0


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(frame):
        if frame[at] != 0xFF:
            return None
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
    return None
