"""Named weights, and those of a checkpoint folder: ``config.json`` and safetensors, tensor by tensor, without torch.

A safetensors file is an 8-byte little-endian length, a JSON header of that length and the raw tensors. Tensors are
mapped, not loaded: an export holds one of them in memory at a time.

References
----------
https://github.com/huggingface/safetensors (README, "Format")
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from medreasoner._text import printable
from medreasoner.errors import BundleError

__all__ = ["Checkpoint", "Entry", "Progress", "Weights", "numbered", "read_header", "read_json", "sha256_of"]

DTYPES: Mapping[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types that weights may have. Others (integers, fp8) are refused when they are read."""

# The safetensors library refuses longer headers too; without a limit a hostile length would ask for all memory.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor in a file: its element type as safetensors calls it, its shape, and how to read it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]


Progress: TypeAlias = Callable[[int, int, str], None]
"""Told how many tensors have been read, how many there are, and the name of the last one."""


class Weights:
    """Named tensors with the configuration of the model that they belong to.

    Parameters
    ----------
    path
        Folder or file, for messages.
    config
        In the form of a ``config.json`` that transformers writes.
    entries
        The tensors by their names in transformers.
    files
        That hold them.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry], files: Sequence[Path]
    ) -> None:
        self.path = path
        self.config = dict(config)
        self._entries, self._files = dict(entries), list(files)
        self._unread = set(self._entries)
        self.progress: Progress | None = None

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The tensors by name."""
        return self._entries

    @property
    def files(self) -> Sequence[Path]:
        """What holds them, and makes up :meth:`sha256`."""
        return self._files

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def count(self, start: str) -> int:
        """How many numbered parts follow `start`, such as layers.

        Raises
        ------
        BundleError
            If one is missing among them.
        """
        return numbered(self.path, self._entries, start)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def prefix(self, candidates: Iterable[str], probe: str) -> str:
        """The first of `candidates` for which ``candidate + probe`` is a tensor.

        Raises
        ------
        BundleError
            If there is none.
        """
        names = [candidate + probe for candidate in candidates]
        for name in names:
            if name in self._entries:
                return name[: len(name) - len(probe)]
        raise BundleError(f"{self.path}: none of the tensors {', '.join(names)} is in the checkpoint")

    def tensor(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The tensor `name`, read-only, in its stored type (float64, float32, float16 or bfloat16).

        Raises
        ------
        BundleError
            If it is absent, has another shape, or holds a value that is not finite.
        """
        entry = self.expect(name, shape)
        if entry.dtype not in DTYPES:
            raise BundleError(f"{entry.file}: tensor {name}: expected one of {sorted(DTYPES)}, got {entry.dtype}")
        array = entry.read()
        if not np.isfinite(array).all():
            raise BundleError(f"{entry.file}: tensor {name} holds values that are not finite; it is damaged")
        self._unread.discard(name)
        if self.progress is not None:
            self.progress(len(self._entries) - len(self._unread), len(self._entries), name)
        return array

    def expect(self, name: str, shape: tuple[int, ...]) -> Entry:
        """The entry of a tensor, which is not read.

        Raises
        ------
        BundleError
            If it is absent, or has another shape.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: tensor {name} is missing")
        if entry.shape != shape:
            raise BundleError(f"{entry.file}: tensor {name}: expected shape {shape}, got {entry.shape}")
        return entry

    def dtype(self, name: str) -> str:
        """The stored element type of `name`: ``"float32"``, ``"bfloat16"``, ...

        Raises
        ------
        BundleError
            If it is absent or of an unsupported type.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: tensor {name} is missing")
        if entry.dtype not in DTYPES:
            raise BundleError(f"{entry.file}: tensor {name}: expected one of {sorted(DTYPES)}, got {entry.dtype}")
        return str(DTYPES[entry.dtype].name)

    @property
    def unread(self) -> frozenset[str]:
        """Names of the tensors that nothing has read yet."""
        return frozenset(self._unread)

    def mark_read(self, names: Iterable[str]) -> None:
        """Count tensors as read: what was made of them is there already."""
        self._unread -= set(names)

    def check_all_read(self, *, ignore: tuple[str, ...] = ()) -> None:
        """Refuse a checkpoint with tensors that the graphs do not use: they would be dropped silently.

        Parameters
        ----------
        ignore
            Parts of names that may be left out, such as ``"inv_freq"``.

        Raises
        ------
        BundleError
            Naming the first of them.
        """
        left = sorted(name for name in self._unread if not any(part in name for part in ignore))
        if left:
            raise BundleError(
                f"{self.path}: {len(left)} tensors are not part of this architecture, first {printable(left[0])[:120]}"
            )

    def sha256(self) -> str:
        """Digest of the weights: of the file, or of the lines ``digest  name`` of the shards."""
        digests = [(sha256_of(file), file.name) for file in self._files]
        if len(digests) == 1:
            return digests[0][0]
        text = "".join(f"{digest}  {name}\n" for digest, name in digests)
        return hashlib.sha256(text.encode()).hexdigest()


class Checkpoint(Weights):
    """A folder with ``config.json`` and ``model.safetensors``, or shards named by ``model.safetensors.index.json``.

    Parameters
    ----------
    folder
        As written by ``save_pretrained``.

    Raises
    ------
    BundleError
        If a file is missing, truncated or malformed; the message names it.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if folder.is_file():
            raise BundleError(f"{folder} is a file; give the folder of a checkpoint, with config.json in it")
        config, files = read_json(folder / "config.json"), _weight_files(folder)
        entries: dict[str, Entry] = {}
        for file in files:
            found = read_header(file)
            if twice := sorted(entries.keys() & found.keys()):
                first = f"{printable(twice[0])[:120]} is also in {entries[twice[0]].file.name}"
                raise BundleError(f"{file}: tensor {first}; which one counts is not known")
            entries |= found
        super().__init__(folder, config, entries, files)


def numbered(path: Path, names: Iterable[str], start: str) -> int:
    """How many parts with numbers from 0 on follow `start` among the `names` in a file.

    Raises
    ------
    BundleError
        If one is missing among them; the message names the file.
    """
    found = {name[len(start) :].partition(".")[0] for name in names if name.startswith(start)}
    if found != {str(index) for index in range(len(found))}:
        raise BundleError(f"{path}: {start}: expected parts numbered from 0 on, found {', '.join(sorted(found)[:9])}")
    return len(found)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises
    ------
    BundleError
        If the file is missing or holds something else.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise BundleError(f"{path} cannot be read as JSON: it is no file")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as err:
        reason = err.strerror if isinstance(err, OSError) else err
        raise BundleError(f"{path} cannot be read as JSON: {reason}") from err
    if not isinstance(data, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise BundleError(f"{folder} holds neither {single.name} nor {index.name}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise BundleError(f"{index}: weight_map: expected an object with file names")
    files = []
    for name in sorted({str(name) for name in names.values()}):
        if Path(name).name != name or "\0" in name or not (folder / name).is_file():
            raise BundleError(f"{index}: {name[:120]!r} is not a file beside it; get the shards that are missing")
        files.append(folder / name)
    return files


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, mapped when they are read.

    Raises
    ------
    BundleError
        If the file is truncated or malformed; the message names it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise BundleError(
                    f"{path} is not a safetensors file, or is truncated: {size} bytes, header of {length}; get it again"
                )
            header = json.loads(file.read(length))
    except OSError as err:
        raise BundleError(f"{path}: it cannot be read ({err.strerror})") from err
    except (ValueError, RecursionError) as err:
        raise BundleError(f"{path}: the safetensors header is not JSON: {err}") from err
    if not isinstance(header, dict):
        raise BundleError(f"{path}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, value, start=8 + length, size=size) for name, value in header.items()}


def _entry(path: Path, name: str, value: Any, *, start: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
            raise TypeError("sizes and offsets must be whole numbers")
    except (KeyError, TypeError, ValueError) as err:
        raise BundleError(f"{path}: tensor {name}: malformed header entry: {err}") from err
    if not begin <= end <= size - start:
        raise BundleError(f"{path} is truncated: tensor {name} ends at byte {start + end} of {size}; get it again")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise BundleError(f"{path}: tensor {name}: {end - begin} bytes do not hold {dtype} of shape {shape}")
    stored = DTYPES.get(dtype, np.dtype("u1"))  # of another type it is refused before it is read
    read = partial(np.memmap, path, dtype=stored, mode="r", offset=start + begin, shape=shape)
    return Entry(file=path, dtype=dtype, shape=shape, read=read)
