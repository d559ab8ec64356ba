"""Files that appear whole or not at all, and arrays that are kept in them between runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner.errors import BundleError

__all__ = ["appearing", "keep_arrays", "kept_arrays"]


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path beside `path`, of the same ending, to write to; what is there takes its place when the block ends.

    Processes that write the same file at once each have one: the last to end is kept, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def keep_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays to a .npz file, for :func:`kept_arrays`."""
    with appearing(path) as beside, beside.open("wb") as file:  # savez would put an ending of its own to a name
        np.savez_compressed(file, **arrays)


def kept_arrays(path: Path, names: tuple[str, ...]) -> tuple[npt.NDArray[Any], ...]:
    """Arrays of a .npz file, in the order of their `names`.

    Raises
    ------
    BundleError
        If they are not there or the file is damaged; the message names it.
    """
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return tuple(file[name] for name in names)
    except Exception as err:  # numpy and zipfile raise many kinds for a damaged file
        raise BundleError(f"{path}: no file with {', '.join(names)} ({type(err).__name__}); delete it") from err
