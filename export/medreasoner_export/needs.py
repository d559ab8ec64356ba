"""What an export will take of disk and memory, told before it starts and refused if it is not there."""

import ctypes
import gc
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from medreasoner.errors import BundleError
from medreasoner_export.graph import BITS, Precision, Storage, are_large, width
from medreasoner_export.quantise import BLOCK
from medreasoner_export.rounding import SPAN

__all__ = [
    "PROGRAM_BYTES",
    "Needs",
    "check_needs",
    "free_disk",
    "give_back_memory",
    "reasoner_needs",
    "segmenter_needs",
]

# What Python, NumPy and ONNX hold before the first tensor is read.
PROGRAM_BYTES = 400 * 2**20
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that an export writes, and the most that it holds in memory (mapped files not counted)."""

    disk: int
    memory: int

    def __str__(self) -> str:
        disk = f"{self.disk / 1e9:.1f} GB" if self.disk >= 1e9 else f"{self.disk / 1e6:.0f} MB"
        return f"{disk} on disk and {self.memory / 2**30:.1f} GiB of memory"


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps pieces below 32 MiB, gigabytes after a large session."""
    gc.collect()
    with suppress(OSError, TypeError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def reasoner_needs(
    shapes: Mapping[str, Sequence[int]], storage: Storage, precision: Precision, *, calibrated: bool = False
) -> Needs:
    """Of :func:`export_reasoner`, from the shapes of a checkpoint's tensors by name; the prompts not counted."""
    disk = 0
    for name, shape in shapes.items():
        in_layers = "layers." in name and "visual" not in name
        bits = BITS.get(precision) if in_layers and len(shape) == 2 and shape[1] % BLOCK == 0 else None
        # Beside its levels a block has a float32 scale and a zero point, a row of the vision tower a float32 scale.
        few = None if bits is None else bits / 8 + (4 + bits / 8) / BLOCK
        if precision == "int8" and "visual" in name and len(shape) > 1:
            few = 1 + 4 / math.prod(shape[1:])
        outside = name.endswith(("embed_tokens.weight", "lm_head.weight"))  # beside the graphs, as stored
        each = few if few is not None else 2 if precision == "fp16" and not outside else width(storage)
        disk += math.ceil(math.prod(shape) * each)
    needs = _needs(disk, shapes.values(), storage)
    return _with_calibration(needs, shapes, storage) if calibrated else needs


def _with_calibration(needs: Needs, shapes: Mapping[str, Sequence[int]], storage: Storage) -> Needs:
    """A layer is written, and held by ONNX Runtime in float32 and once more as it packs it, beside its moments."""
    layer = [shape for name, shape in shapes.items() if "layers.0." in name and "visual" not in name]
    numbers = sum(math.prod(shape) for shape in layer)
    moments = sum(shape[1] * min(shape[1], SPAN) for shape in layer if len(shape) == 2)
    return Needs(disk=needs.disk + numbers * width(storage), memory=needs.memory + 8 * (numbers + moments))


def segmenter_needs(shapes: Mapping[str, Sequence[int]], storage: Storage) -> Needs:
    """Of :func:`export_segmenter`, from the shapes of a checkpoint's tensors by name."""
    return _needs(sum(math.prod(shape) * width(storage) for shape in shapes.values()), shapes.values(), storage)


def _needs(disk: int, shapes: Collection[Sequence[int]], storage: Storage) -> Needs:
    sizes = [math.prod(shape) for shape in shapes]
    # One tensor as stored, in float32 and as it is written; a small model's graphs as a whole, and once more as text.
    inside = 0 if are_large(shapes, storage) else 2 * sum(sizes) * width(storage)
    return Needs(disk=disk, memory=PROGRAM_BYTES + 12 * max(sizes, default=0) + inside)


def check_needs(needs: Needs, folder: Path) -> None:
    """Refuse an export that would not fit.

    Parameters
    ----------
    needs
        What it takes.
    folder
        Where it will be written; need not exist yet.

    Raises
    ------
    BundleError
        If the disk has too little room, or the machine too little memory; the message gives both figures.
    """
    free = free_disk(folder)
    if free < needs.disk:
        raise BundleError(f"{folder}: {needs.disk / 1e9:.1f} GB will be written, {free / 1e9:.1f} GB are free there")
    available = _available_memory()
    if available is not None and available < needs.memory:
        raise BundleError(
            f"{needs.memory / 2**30:.1f} GiB of memory are needed, {available / 2**30:.1f} GiB are available; "
            "close other programs, or export on a larger machine"
        )


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _available_memory() -> int | None:
    """Bytes that new programs can have, or None where the system does not say."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return int(found[1]) * 1024 if found else None
