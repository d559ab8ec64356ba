"""Typed access to one object of a ``config.json``, with errors that name the key."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medreasoner.errors import BundleError

__all__ = ["ConfigSection", "naming"]

_FILE = "config.json"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the place of a ``config.json`` before what errors say of it.

    Parameters
    ----------
    path
        The checkpoint's folder; or its only file, whose weights told the sizes.
    """
    try:
        yield
    except BundleError as err:
        text = str(err)
        if not text.startswith(_FILE):
            raise
        place = str(path / _FILE) if path.is_dir() else f"{path}: what its weights say of the sizes"
        raise BundleError(place + text.removeprefix(_FILE)) from err


class ConfigSection:
    """An object of ``config.json``.

    Parameters
    ----------
    data
        The object, as parsed.
    name
        Where it stands, for messages.

    Raises
    ------
    BundleError
        From every method, if a value is missing without a default, of another type, or out of range.
    """

    def __init__(self, data: Any, name: str) -> None:
        if not isinstance(data, dict):
            raise BundleError(f"config.json: {name}: expected an object, got {type(data).__name__}")
        self.data = data
        self.name = name

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.data.get(key, default)
        if type(value) is not int or value < 1:
            raise BundleError(f"config.json: {self.name}.{key}: expected a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive, finite number."""
        value = self.data.get(key, default)
        if type(value) not in (int, float) or not 0.0 < value < float("inf"):
            raise BundleError(f"config.json: {self.name}.{key}: expected a positive number, got {value!r}")
        return float(value)

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Integers from 0 on."""
        value = self.data.get(key, default)
        if not isinstance(value, list | tuple) or any(type(item) is not int or item < 0 for item in value):
            raise BundleError(f"config.json: {self.name}.{key}: expected a list of whole numbers, got {value!r}")
        return tuple(value)

    def expect(self, key: str, expected: Any) -> None:
        """Refuse any other value than `expected`, which is also what an absent key means."""
        value = self.data.get(key, expected)
        if value != expected:
            raise BundleError(f"config.json: {self.name}.{key}: only {expected!r} is supported, got {value!r}")
