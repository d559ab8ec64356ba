"""The grounding set on disk: an index of (image, category, mask) rows, split by patient or group."""

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage

from medreasoner.errors import ImageReadError, MedReasonerError

__all__ = [
    "ImageRecord",
    "Sample",
    "by_image",
    "collapse_grey",
    "informative_pairs",
    "leave_out",
    "load_index",
    "load_mask",
    "load_pixels",
    "split",
    "validation_groups",
]

VALIDATION_PERCENT = 15


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row of the index: a structure that is labelled in an image."""

    id: str
    image: Path
    mask: Path
    source: str
    modality: str
    super_category: str
    category: str
    group: str
    licence_class: str

    @property
    def key(self) -> str:
        """Name of the (modality, category) pair, as the phrasing files use it."""
        return f"{self.modality}/{self.category}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One image with every structure labelled in it."""

    image: Path
    source: str
    modality: str
    group: str
    samples: tuple[Sample, ...]


def load_index(root: Path, *, on_bad: Callable[[str, str], None] | None = None) -> list[Sample]:
    """Read ``index.jsonl`` under `root`.

    `on_bad` is told of each row that is none, its file and line and what is wrong, which is then left out; without it
    such a row is refused.

    Raises
    ------
    ImageReadError
        If the index is missing or a row lacks a field; the message names file and line.
    """
    path = root / "index.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as err:
        raise ImageReadError(
            f"{path}: cannot be read ({err.strerror}); give the folder that holds index.jsonl"
        ) from err
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            samples.append(
                Sample(
                    id=row["id"],
                    image=root / row["image"],
                    mask=root / row["mask"],
                    source=row["source"],
                    modality=row["modality"],
                    super_category=row["super_category"],
                    category=row["category"],
                    group=row["patient_or_group_id"],
                    licence_class=row["licence_class"],
                )
            )
        except (KeyError, TypeError, ValueError) as err:
            reason = f"not a row of the grounding index ({err})"
            if on_bad is None:
                raise ImageReadError(f"{path}:{number}: {reason}") from err
            on_bad(f"{path.name}:{number}", reason)
    return samples


def leave_out(samples: Sequence[Sample], sources: Sequence[str]) -> list[Sample]:
    """The samples of all other sources.

    Raises
    ------
    MedReasonerError
        If there is no such source; the message lists them.
    """
    there = {sample.source for sample in samples}
    if unknown := sorted(set(sources) - there):
        raise MedReasonerError(f"no samples of the source {', '.join(unknown)}; there are {', '.join(sorted(there))}")
    return [sample for sample in samples if sample.source not in sources]


class Grouped(Protocol):
    """Anything that is split by group."""

    @property
    def source(self) -> str:
        """The data set that it comes from."""

    @property
    def group(self) -> str:
        """The patient, or whatever must not be on both sides of a split."""


G = TypeVar("G", bound=Grouped)


def validation_groups(samples: Iterable[Grouped], percent: int = VALIDATION_PERCENT) -> frozenset[str]:
    """Groups set apart for validation: of each source, the first in the order of a hash of their names.

    Groups are taken until they hold `percent` of the source's samples; a source with a single group gives none. Neither
    a seed nor the order of the rows matters.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        sizes[sample.source][sample.group] += 1
    chosen: set[str] = set()
    for groups in sizes.values():
        if len(groups) == 1:
            continue
        wanted = sum(groups.values()) * percent / 100
        for group in sorted(groups, key=lambda name: hashlib.sha256(f"medreasoner/{name}".encode()).digest()):
            if wanted <= 0:
                break
            chosen.add(group)
            wanted -= groups[group]
    return frozenset(chosen)


def split(samples: Sequence[G], percent: int = VALIDATION_PERCENT) -> tuple[list[G], list[G]]:
    """Training and validation samples; no group is in both."""
    apart = validation_groups(samples, percent)
    return [s for s in samples if s.group not in apart], [s for s in samples if s.group in apart]


def by_image(samples: Iterable[Sample]) -> list[ImageRecord]:
    """Gather the samples of each image, in the order in which images first appear."""
    rows: dict[Path, list[Sample]] = defaultdict(list)
    for sample in samples:
        rows[sample.image].append(sample)
    return [
        ImageRecord(image=image, source=own[0].source, modality=own[0].modality, group=own[0].group, samples=tuple(own))
        for image, own in rows.items()
    ]


def labelled_kinds(samples: Iterable[Sample]) -> dict[str, frozenset[str]]:
    """Categories that each source labels at all: there, an unlabelled structure of a kind is taken as absent."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        kinds[sample.source].add(sample.category)
    return {source: frozenset(own) for source, own in kinds.items()}


def frequent_pairs(samples: Sequence[Sample], at_least: int = 20) -> frozenset[str]:
    """(modality, category) keys with `at_least` samples."""
    counts = Counter(sample.key for sample in samples)
    return frozenset(key for key, count in counts.items() if count >= at_least)


def informative_pairs(prior_iou: dict[str, float], below: float = 0.75) -> frozenset[str]:
    """Keys whose prior box (:mod:`medreasoner_train.prior`) overlaps less than `below`: the rest fill their image."""
    return frozenset(key for key, iou in prior_iou.items() if iou < below)


def load_pixels(path: Path) -> npt.NDArray[np.uint8]:
    """Pixels of an image file: (H, W) uint8 if it is grey (also when stored as colour), else (H, W, 3)."""
    try:
        with PilImage.open(path) as image:
            pixels = np.asarray(image.convert("L" if image.mode in {"L", "1", "I;16", "I"} else "RGB"))
    except OSError as err:
        raise ImageReadError(f"{path}: not a readable image ({err})") from err
    return collapse_grey(pixels)


def collapse_grey(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(H, W) of a (H, W, 3) uint8 picture whose channels differ by rounding only; any other as it is."""
    if pixels.ndim == 3 and int(np.ptp(pixels.astype(np.int16), axis=2).max()) <= 2:
        return np.ascontiguousarray(pixels[..., 0])
    return pixels


def load_mask(path: Path) -> npt.NDArray[np.bool_]:
    """A mask file as (H, W) bool."""
    try:
        with PilImage.open(path) as image:
            return np.asarray(image.convert("L")) > 127
    except OSError as err:
        raise ImageReadError(f"{path}: not a readable mask ({err})") from err
