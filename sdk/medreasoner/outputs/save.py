"""One call that writes a result in any form."""

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medreasoner import ops
from medreasoner.errors import OutputError
from medreasoner.image.quiet import quiet
from medreasoner.outputs.forms import check_output

if TYPE_CHECKING:
    from medreasoner.result import Grounding

__all__ = ["save"]

_JPEG_SIDE = 65500  # pixels, libjpeg's limit


def save(
    grounding: "Grounding", path: str | os.PathLike[str], *, format: str | None = None, include_query: bool = False
) -> None:
    """Write a result; the file appears whole or not at all.

    Parameters
    ----------
    grounding
        The result. An absent answer is written as an empty mask.
    path
        Where to; a file that is there is replaced.
    format
        One of `medreasoner.outputs.FORMS`; None: by the ending of the name.
    include_query
        Whether DICOM SEG and JSON hold the question, which may name a patient.

    Raises
    ------
    OutputError
        As `check_output`, or if the disk refuses.
    MissingExtraError
        If the form needs a package that is not installed.
    """
    form = check_output(path, format=format, image=grounding.image)
    target = Path(path)
    with quiet():  # libraries quote the header's values in their warnings
        data = _encode(grounding, form, target, include_query)
    _write(target, data)


def _encode(grounding: "Grounding", form: str, target: Path, include_query: bool) -> bytes:
    name = target.name.lower()
    if form == "overlay":
        picture, is_jpeg = grounding.overlay(), name.endswith((".jpg", ".jpeg"))
        if is_jpeg and max(picture.size) > _JPEG_SIDE:
            width, height = picture.size
            raise OutputError(f"{target}: JPEG holds no picture of {width} x {height} pixels; name a .png file")
        return _picture(picture, "JPEG" if is_jpeg else "PNG")
    if form == "mask":
        from PIL import Image

        return _picture(Image.fromarray(grounding.mask.view("uint8") * 255), "PNG")
    if form == "rle":
        return _json(ops.rle_encode(grounding.mask))
    if form == "json":
        return _json(grounding.to_dict(include_query=include_query))
    if form == "nifti":
        from medreasoner.outputs.nifti import encode_nifti

        return encode_nifti(grounding.mask, grounding.image, compress=name.endswith(".gz"))
    from medreasoner.outputs.dicom_seg import encode_seg

    return encode_seg(grounding, include_query=include_query)


def _picture(picture: Any, kind: str) -> bytes:
    stream = io.BytesIO()
    # A PNG of level 2 is a sixth larger than one of Pillow's level 6, and written in a quarter of the time.
    picture.save(stream, kind, **({"quality": 92} if kind == "JPEG" else {"compress_level": 2}))
    return stream.getvalue()


def _json(value: object) -> bytes:
    # A query from a command line may hold bytes that were no text; "\\udcff" is how JSON writes such a half character.
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")


def _write(target: Path, data: bytes) -> None:
    """Write beside the target and rename, so that no reader ever meets half a file."""
    beside = target.with_name(f".{os.getpid()}-{os.urandom(4).hex()}.part")  # short: the name may be as long as allowed
    try:
        try:
            with beside.open("xb") as stream:
                stream.write(data)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as err:
        raise OutputError(f"{target}: it cannot be written ({err.strerror or type(err).__name__})") from err
