"""Reads a manifest's JSON into the records of `medreasoner.spec`, strictly: by the records' own type hints."""

import hashlib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from medreasoner.errors import BundleError
from medreasoner.spec import SCHEMA_VERSION, BundleSpec, PadResize, Resize, SmartResize, StretchResize

__all__ = ["manifest_sha256", "parse_manifest", "read_record"]

Record = TypeVar("Record")

_RESIZE_RULES = {"stretch": StretchResize, "smart": SmartResize, "longest_pad": PadResize}


def parse_manifest(text: str | bytes) -> BundleSpec:
    """Record of a bundle's manifest.

    Parameters
    ----------
    text
        Content of ``manifest.json``, UTF-8.

    Raises
    ------
    BundleError
        If it is not JSON, of another schema version, lacks a key, holds an unknown one, or a value has another type or
        range; the message names the key.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise BundleError(f"manifest.json is not JSON: {err}") from err
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != SCHEMA_VERSION:  # before anything else, since another version may have other keys
        raise BundleError(
            f"schema_version: expected {SCHEMA_VERSION}, got {found!r:.80}; the bundle is for another release"
        )
    stated = data.pop("sha256", None)  # manifests that people write by hand have none
    if stated is not None and stated != manifest_sha256(data):
        raise BundleError("manifest.json: its SHA-256 is not the one that it states; it was altered or damaged")
    return read_record(BundleSpec, data, "")


def manifest_sha256(data: Mapping[str, Any]) -> str:
    """SHA-256, 64 hexadecimal digits, of a manifest's content without its own ``sha256``, whatever its layout.

    >>> manifest_sha256({"b": 1, "a": 2}) == manifest_sha256({"a": 2, "b": 1, "sha256": "..."})
    True
    """
    content = {key: value for key, value in data.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_record(record: type[Record], data: Any, key: str) -> Record:
    """A record of parsed JSON, by the record's own type hints.

    Parameters
    ----------
    record
        A dataclass whose hints are of the forms that those of `medreasoner.spec` have.
    data
        The JSON object.
    key
        Where it stands, for messages.

    Raises
    ------
    BundleError
        If a key without a default is missing, or a key is unknown, or of another type or range.
    """
    if not isinstance(data, dict):
        raise _mismatch(key, "an object", data)
    hints = get_type_hints(record)
    optional = {field.name: field.default is not MISSING for field in fields(record)}  # type: ignore[arg-type]
    for name in sorted(data.keys() ^ optional.keys()):
        if not optional.get(name):
            raise BundleError(f"{_join(key, name)}: {'unknown key' if name in data else 'missing'}")
    values = {name: _read(hints[name], data[name], _join(key, name)) for name in optional if name in data}
    try:
        return record(**values)
    except BundleError as err:
        raise BundleError(_join(key, str(err))) from err


def _read(hint: Any, value: Any, key: str) -> Any:
    """Value of a key as its hint asks; the hints of the records are the few forms below."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint == Resize:
        return _read_resize(value, key)
    if is_dataclass(hint):
        return read_record(hint, value, key)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in inner:
            raise _mismatch(key, f"one of {', '.join(map(str, inner))}", value)
        return value
    if origin is types.UnionType:  # X | None
        return None if value is None else _read(inner[0], value, key)
    if origin is tuple:
        return _read_tuple(inner, value, key)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _mismatch(key, "an object", value)
        return types.MappingProxyType({name: _read(inner[1], each, _join(key, name)) for name, each in value.items()})
    return value if hint is Any else _read_scalar(hint, value, key)


def _read_scalar(hint: Any, value: Any, key: str) -> str | int | float:
    # JSON has no integer type of its own, and Python takes True for 1.
    if hint is str and isinstance(value, str):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
        return float(value)
    raise _mismatch(key, {str: "text", int: "an integer of at least 0", float: "a finite number"}[hint], value)


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floating-point numbers
        return False


def _read_tuple(inner: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    is_open = len(inner) == 2 and inner[1] is Ellipsis
    if not isinstance(value, list) or not (is_open or len(value) == len(inner)):
        raise _mismatch(key, "an array" if is_open else f"an array of {len(inner)}", value)
    return tuple(_read(inner[0], each, f"{key}[{index}]") for index, each in enumerate(value))


def _read_resize(value: Any, key: str) -> Resize:
    if not isinstance(value, dict) or value.get("rule") not in _RESIZE_RULES:
        raise _mismatch(f"{key}.rule", f"one of {', '.join(_RESIZE_RULES)}", value)
    rest = {name: each for name, each in value.items() if name != "rule"}
    if value["rule"] == "stretch" and rest.keys() == {"size"}:  # a square, as segmenters have it
        rest = {"width": rest["size"], "height": rest["size"]}
    resize: Resize = read_record(_RESIZE_RULES[value["rule"]], rest, key)
    return resize


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _mismatch(key: str, expected: str, value: object) -> BundleError:
    return BundleError(f"{key}: expected {expected}, got {value!r:.120}")
