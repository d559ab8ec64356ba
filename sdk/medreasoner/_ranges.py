"""Checks of a manifest's values, for the records that hold them."""

from medreasoner.errors import BundleError

__all__ = ["need", "need_positive"]


def need(condition: bool, key: str, expected: str, found: object) -> None:
    """Refuse a value, with its key and what was expected.

    Raises
    ------
    BundleError
        Unless `condition` holds.
    """
    if not condition:
        raise BundleError(f"{key}: expected {expected}, got {found!r:.120}")


def need_positive(record: object, *keys: str) -> None:
    """Refuse a record with a number below 1 under one of these keys.

    Raises
    ------
    BundleError
        That names the first one.
    """
    for key in keys:
        need(getattr(record, key) >= 1, key, "a positive number", getattr(record, key))
