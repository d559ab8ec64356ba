"""One decoded frame of a DICOM data set, by whichever of pydicom's plug-ins is installed."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medreasoner._text import one_line
from medreasoner.errors import CodecError, ImageReadError
from medreasoner.image.attributes import first_number
from medreasoner.image.codestream import codestream_size
from medreasoner.image.header import PixelHeader

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

__all__ = ["decode_frame", "transfer_syntax"]

_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_RLE = "1.2.840.10008.1.2.5"
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
# Packages that a vendor may embed. pylibjpeg-libjpeg reads more, but it is GPL and must not be recommended.
_JPEG_2000_PACKAGES = "pylibjpeg pylibjpeg-openjpeg"
_PACKAGES = {
    _JPEG_BASELINE: "pillow",
    _JPEG_EXTENDED: "pillow",
    "1.2.840.10008.1.2.4.57": "python-gdcm",
    "1.2.840.10008.1.2.4.70": "python-gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    **{f"1.2.840.10008.1.2.4.{n}": _JPEG_2000_PACKAGES for n in (90, 91, 201, 202, 203)},
}
# GDCM is only for what no other reads, and then in a process of its own: damaged input can bring it down.
_PREFERENCE = ("pydicom", "pyjpegls", "pylibjpeg", "pillow", "gdcm")
_COLOUR_OF_JPEG = ("RGB", "YBR_FULL", "YBR_FULL_422")  # the others change to RGB as they are decoded
_PREFERENCE_JPEG = ("pillow", "gdcm", "pylibjpeg")


def transfer_syntax(dataset: "Dataset") -> "UID":
    """Transfer syntax of the data set; for one without file meta information, the native one it was parsed with."""
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    meta = getattr(dataset, "file_meta", None)
    named = meta.get("TransferSyntaxUID") if meta is not None else None
    if named:
        return UID(str(named))
    implicit, little = getattr(dataset, "original_encoding", (None, None))
    if little is False:
        return ExplicitVRBigEndian
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def decode_frame(dataset: "Dataset", header: PixelHeader, frame: int) -> tuple[NDArray[Any], str, list[str]]:
    """Stored values of one frame, their photometric interpretation after decoding, and warnings.

    Returns
    -------
    tuple
        (rows, columns) or (rows, columns, 3) in the dtype of the stored values, bits outside the stored ones removed.

    Raises
    ------
    CodecError
        If the package that reads the transfer syntax is not installed.
    ImageReadError
        If the pixel data are shorter than declared or cannot be decoded.
    """
    from pydicom.pixels import get_decoder

    syntax = transfer_syntax(dataset)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as err:
        raise ImageReadError(
            f"transfer syntax {_name(syntax)} is not supported; convert it first, a video with ffmpeg to pictures, "
            "anything else with the program that wrote it to Explicit VR Little Endian"
        ) from err
    warnings = [] if decoder.is_encapsulated else _check_native_length(dataset, header)
    plugins = [""] if decoder.is_native else _plugins(syntax, decoder.available_plugins, header)
    if decoder.is_encapsulated:
        encoded = _encoded_frame(dataset, header, frame, syntax)
    if plugins == ["gdcm"]:
        from medreasoner.image.isolated import decode_with_gdcm

        planar = int(first_number(dataset, "PlanarConfiguration") or 0)
        values, photometric = decode_with_gdcm(encoded, header, syntax, planar)
    else:
        values, photometric = _decode(decoder, dataset, plugins, frame, syntax)
    if (photometric == "RGB") != (header.photometric == "RGB") and header.photometric in _COLOUR_OF_JPEG:
        warnings.append(f"the codestream is {photometric} although the header says {header.photometric}")
    return _stored_bits(values, header), photometric, warnings


def _name(syntax: "UID") -> str:
    return f"'{syntax.name}' ({syntax})" if syntax.name != str(syntax) else f"{syntax}"


def _plugins(syntax: "UID", available: tuple[str, ...], header: PixelHeader) -> list[str]:
    order = _PREFERENCE_JPEG if syntax == _JPEG_BASELINE else _PREFERENCE
    plugins = [name for name in order if name in available]
    if syntax == _JPEG_EXTENDED and header.bits_stored != 8:
        # Pillow and GDCM announce this syntax, but read only its 8-bit form.
        plugins = [name for name in plugins if name == "pylibjpeg"]
        if not plugins:
            raise ImageReadError(
                f"transfer syntax {_name(syntax)} with {header.bits_stored} bits is read by no package with a "
                "permissive licence; convert the file first, for example with DCMTK's dcmdjpeg"
            )
    if not plugins:
        packages = _PACKAGES.get(str(syntax))
        advice = (
            f"pip install {packages}"
            if packages
            else "no package is known to read it; convert the file, for example with DCMTK's dcmconv"
        )
        raise CodecError(f"transfer syntax {_name(syntax)} needs a decoder that is not installed: {advice}")
    return [name for name in plugins if name != "gdcm"] or plugins


def _decode(
    decoder: Any, dataset: "Dataset", plugins: list[str], frame: int, syntax: "UID"
) -> tuple[NDArray[Any], str]:
    options: dict[str, Any] = {}
    if decoder.is_native or syntax == _RLE:
        options["correct_unused_bits"] = False  # done below with regard to the high bit, which pydicom leaves out
    if first_number(dataset, "PlanarConfiguration") is None:
        options["planar_configuration"] = 0
    if first_number(dataset, "PixelRepresentation") is None:
        options["pixel_representation"] = 0
    error: Exception | None = None
    for plugin in plugins:
        try:
            values, properties = decoder.as_array(
                dataset, index=frame, raw=True, decoding_plugin=plugin, allow_excess_frames=False, **options
            )
            return values, str(properties["photometric_interpretation"])
        except Exception as err:
            error = err
    assert error is not None
    raise ImageReadError(f"frame {frame} in {_name(syntax)} cannot be decoded: {one_line(error)}") from error


def _check_native_length(dataset: "Dataset", header: PixelHeader) -> list[str]:
    expected = int(-(-header.frame_bytes() * header.n_frames // 1))
    value = dataset[header.keyword].value
    actual = len(value) if isinstance(value, bytes | bytearray | memoryview) else -1
    if actual < 0:
        raise ImageReadError(f"{header.keyword} is empty; fetch the file again from where it came")
    if value[:4] == b"\xfe\xff\x00\xe0" and actual < expected:
        raise ImageReadError("the pixel data are compressed, but the file does not say how (no transfer syntax)")
    if actual < expected:
        raise ImageReadError(
            f"the pixel data are truncated: {actual} bytes where {header.rows} x {header.columns} x {header.samples} "
            f"samples of {header.bits_allocated} bits in {header.n_frames} frame(s) need {expected}; "
            "fetch the file again from where it came"
        )
    if header.photometric == "YBR_FULL_422" and actual >= expected // 2 * 3:
        raise ImageReadError(
            f"the pixel data are {actual} bytes, which suits RGB or YBR_FULL but not YBR_FULL_422 ({expected} bytes)"
        )
    if actual > expected + 1:
        return [f"{actual - expected} bytes after the declared pixel data are left out"]
    return []


def _encoded_frame(dataset: "Dataset", header: PixelHeader, frame: int, syntax: "UID") -> bytes:
    """The compressed frame, its own size compared with the header's."""
    from pydicom.encaps import get_frame

    try:
        encoded = get_frame(dataset.PixelData, frame, number_of_frames=header.n_frames)
    except Exception as err:
        raise ImageReadError(f"frame {frame} of {header.n_frames} is not in the pixel data, or they are cut") from err
    if syntax == _RLE:  # has no size of its own
        return bytes(encoded)
    try:
        size = codestream_size(encoded)
    except ValueError as err:
        raise ImageReadError(f"frame {frame} in {_name(syntax)} is damaged: {err}") from err
    if size != (header.rows, header.columns):
        raise ImageReadError(
            f"the codestream is {size[0]} x {size[1]} pixels (rows x columns), "
            f"but the header says {header.rows} x {header.columns}"
        )
    return bytes(encoded)


def _stored_bits(values: NDArray[Any], header: PixelHeader) -> NDArray[Any]:
    """Values without the bits that do not belong to them: embedded overlays, rubbish (PS3.5 8.1.1)."""
    if values.dtype.kind == "f" or header.bits_stored == header.bits_allocated:
        return values
    width = values.dtype.itemsize * 8
    left = width - 1 - header.high_bit
    if left < 0:
        return values
    if (
        values.dtype.kind == "u"
        and header.high_bit + 1 == header.bits_stored
        and not int(values.max()) >> header.bits_stored
    ):
        return values
    # Shifting up to the top and back down drops both sides, and the way down carries the sign.
    stored: NDArray[Any] = np.left_shift(values, left, dtype=values.dtype.newbyteorder("="))
    stored >>= width - header.bits_stored
    return stored
