"""The folder of an export: its files appear together, and a description last that says what they are."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from medreasoner.errors import BundleError, MedReasonerError

__all__ = ["DESCRIPTION", "describe", "writing_export"]

DESCRIPTION = "export.json"
"""Name of the file in an export's folder that says what it is."""


@contextmanager
def writing_export(
    out_dir: str | Path, *, description: str = DESCRIPTION, stale: Sequence[str] = ("*.onnx.data",)
) -> Iterator[Path]:
    """A folder to write an export into, inside of `out_dir`; its files move there when the block ends.

    The description of an earlier export goes at once: should this one fail, the other is not taken for it. Nothing of
    the failed one stays.

    Parameters
    ----------
    out_dir
        The folder, made if absent.
    description
        Name of the description.
    stale
        Files of an earlier export that must not stay, as patterns.

    Raises
    ------
    BundleError
        If the folder cannot be written; the message names it.
    """
    out = Path(out_dir)
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / description).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as scratch:
            yield Path(scratch)
            for path in [path for pattern in stale for path in out.glob(pattern)]:
                path.unlink()
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == description):
                path.replace(out / path.name)
    except BaseException as err:
        if made:
            with suppress(OSError):
                out.rmdir()  # only if it is empty
        if isinstance(err, OSError) and not isinstance(err, MedReasonerError):  # an unreadable image is both
            raise BundleError(f"{out}: it cannot be written ({err.strerror or type(err).__name__})") from err
        raise


def describe(folder: Path, description: Mapping[str, Any]) -> None:
    """Write the description of what is in `folder`, with the names of the weights beside their graphs."""
    data = sorted(path.name for path in folder.glob("*.onnx.data"))
    (folder / DESCRIPTION).write_text(json.dumps({**description, "data": data}, indent=1) + "\n")
