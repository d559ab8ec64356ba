"""A run's settings as a TOML file: read into frozen dataclasses, every key checked."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from medreasoner.errors import MedReasonerError

__all__ = ["ConfigError", "read_section", "read_toml"]

T = TypeVar("T")


class ConfigError(MedReasonerError, ValueError):
    """A settings file that cannot be used: names the file, the key and what is expected."""


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables.

    Raises
    ------
    ConfigError
        If it cannot be read or is no TOML; the message names it and the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read ({err.strerror})") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not TOML ({err})") from err


def read_section(kind: type[T], values: Mapping[str, Any], where: str, *, base: Path = Path()) -> T:
    """A table of a settings file as a dataclass.

    Parameters
    ----------
    kind
        A dataclass; fields may be numbers, words, booleans, paths, literals, tuples, string-keyed tables, optional ones
        and other dataclasses.
    values
        The table.
    where
        What messages call it, such as ``"grpo.toml: [loss]"``.
    base
        Folder that relative paths are in.

    Raises
    ------
    ConfigError
        If a key is unknown, missing, or of the wrong kind.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    if unknown := sorted(values.keys() - fields.keys()):
        raise ConfigError(f"{where}: unknown key {', '.join(unknown)}; there are {', '.join(fields)}")
    given = {name: _value(hints[name], value, f"{where} {name}", base) for name, value in values.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    try:
        return kind(**given)
    except (ValueError, TypeError) as err:
        raise ConfigError(f"{where}: {err}") from err


def _value(hint: Any, value: Any, where: str, base: Path) -> Any:
    """`value` as the type `hint`."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (own,) = (part for part in parts if part is not type(None))
        return _value(own, value, where, base)
    if origin is Literal:
        if value in parts:
            return value
        raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(str, parts))}")
    if origin is tuple and isinstance(value, list):
        return tuple(_value(parts[0], each, where, base) for each in value)
    if origin in (dict, Mapping) and isinstance(value, dict):
        return {key: _value(parts[1], each, f"{where}.{key}", base) for key, each in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return read_section(hint, value, where, base=base)
    if hint is Path and isinstance(value, str):
        return (base / Path(value).expanduser()) if value else Path()
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ConfigError(f"{where}: expected {name}, got {value!r}")
