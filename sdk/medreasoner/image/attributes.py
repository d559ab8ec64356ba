"""Values of a DICOM data set, read so that a malformed one is None and never an exception."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["first_number", "functional_group", "is_filled", "items", "numbers", "text"]


def _value(dataset: "Dataset", keyword: str) -> Any:
    try:
        return dataset.get(keyword)
    except Exception:  # pydicom converts on access, and raises whatever the conversion of a broken value raises
        return None


def numbers(dataset: "Dataset", keyword: str) -> tuple[float, ...]:
    """All finite values of a numeric attribute; empty if it is absent or one of them is no finite number."""
    value = _value(dataset, keyword)
    if value is None or isinstance(value, bytes):
        return ()
    try:
        several = list(value) if not isinstance(value, str | int | float) and hasattr(value, "__iter__") else [value]
        found = tuple(float(one) for one in several)
    except (TypeError, ValueError):
        return ()
    return found if all(math.isfinite(one) for one in found) else ()


def first_number(dataset: "Dataset", keyword: str) -> float | None:
    """First value of a numeric attribute, or None if it is absent or malformed."""
    found = numbers(dataset, keyword)
    return found[0] if found else None


def is_filled(dataset: "Dataset", keyword: str) -> bool:
    """Whether an attribute is there with a value, be it one that cannot be read."""
    return keyword in dataset and bool(dataset.get_item(keyword).value)


def text(dataset: "Dataset", keyword: str) -> str:
    """A code string in capitals without padding; empty if it is absent."""
    value = _value(dataset, keyword)
    return value.strip(" \0").upper() if isinstance(value, str) else ""


def items(dataset: "Dataset", keyword: str) -> "list[Dataset]":
    """Items of a sequence; empty if it is absent or malformed."""
    value = _value(dataset, keyword)
    if value is None or isinstance(value, str | bytes | int | float):
        return []
    return [item for item in value if hasattr(item, "get")]


def functional_group(dataset: "Dataset", frame: int, keyword: str) -> "Dataset":
    """Where an attribute of one frame is found: its own functional group, the shared one, or the data set itself.

    References
    ----------
    DICOM PS3.3 C.7.6.16.2 (functional group macros; a group is in either sequence, not in both).
    """
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    candidates = per_frame[frame : frame + 1] + items(dataset, "SharedFunctionalGroupsSequence")
    for candidate in candidates:
        group = items(candidate, keyword)
        if group:
            return group[0]
    return dataset
