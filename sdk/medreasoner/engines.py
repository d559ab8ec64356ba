"""Engines that were built ahead of time: reads ``engines.json``, and says which of them fit a GPU and a bundle."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medreasoner.bundle import Bundle
from medreasoner.errors import BundleError
from medreasoner.manifest import read_record

__all__ = ["ENGINES", "ENGINES_VERSION", "EngineFolder", "EngineRecord", "TensorRecord", "read_engines"]

ENGINES = "engines.json"
"""Name of the file that says which engines are in a folder."""

ENGINES_VERSION = 1
_MAX_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """An input or output: element type as NumPy names it; of each dimension the size, or a name if it varies."""

    name: str
    dtype: str
    shape: tuple[str, ...]

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int] | None:
        """What the names stand for in a shape, or None if the shape is another one.

        >>> TensorRecord(name="x", dtype="float32", shape=("batch", "3")).sizes((5, 3))
        {'batch': 5}
        """
        pairs = list(zip(self.shape, shape, strict=False))
        fixed = all(int(name) == size for name, size in pairs if name.isdecimal())
        if len(shape) != len(self.shape) or not fixed:
            return None
        return {name: size for name, size in pairs if not name.isdecimal()}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """One engine: its file, what it computes, and for what.

    `graph` names it for people, `source` is the bundle's graph that it computes and `source_sha256` that file's hash;
    `graph_sha256` is the hash of the graph in standard operators that it was built from. A profile holds the least, the
    usual and the largest size of each dimension that varies.
    """

    file: str
    sha256: str
    size_bytes: int
    architecture: str
    precision: str
    graph: str
    source: str
    source_sha256: str
    graph_sha256: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    profiles: tuple[Mapping[str, tuple[int, int, int]], ...]

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or self.file.startswith("."):
            raise BundleError(f"file: {self.file!r:.120} is not a plain name")
        if "\0" in self.file:
            raise BundleError("file: a name holds no zero byte")
        varying = {name for each in self.inputs for name in each.shape if not name.isdecimal()}
        if varying and not self.profiles:
            raise BundleError(f"profiles: none says how large {', '.join(sorted(varying))} may be")
        for index, profile in enumerate(self.profiles):
            if missing := sorted(varying - profile.keys()):
                raise BundleError(f"profiles[{index}]: {', '.join(missing)} is missing")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFolder:
    """A folder of engines, and what built them, such as ``"tensorrt_rtx 1.7.1.116"``."""

    root: Path
    builder: str
    engines: tuple[EngineRecord, ...] = field(repr=False)

    def fitting(
        self, bundle: Bundle, source: str, *, architecture: str, runtime: str
    ) -> tuple[EngineRecord | None, str]:
        """The engine for a graph of a bundle on a GPU, or why there is none.

        Parameters
        ----------
        bundle
            The bundle in use.
        source
            The graph's path in it.
        architecture
            Of the GPU, such as ``"sm_86"``.
        runtime
            Name and version of what would run the engine: it reads only what its own version built.
        """
        candidates = [each for each in self.engines if each.source == source]
        if not candidates:
            return None, f"{self.root} has no engine of {source}"
        expected = bundle.spec.files[source].sha256
        candidates = [each for each in candidates if each.source_sha256 == expected]
        if not candidates:
            return None, f"the engines of {source} in {self.root} were built from another bundle"
        known = ", ".join(dict.fromkeys(each.architecture for each in candidates))
        candidates = [each for each in candidates if each.architecture == architecture]
        if not candidates:
            return None, f"the engines of {source} are for {known}, and this GPU is {architecture}"
        if self.builder != runtime:
            return None, f"the engines were built by {self.builder}, and {runtime} is installed"
        return candidates[0], ""

    def read(self, engine: EngineRecord) -> bytes:
        """Content of an engine's file.

        Raises
        ------
        BundleError
            If the file is missing, or not what ``engines.json`` says: nothing else is handed to the driver.
        """
        try:
            content = (self.root / engine.file).read_bytes()
        except OSError as err:
            raise BundleError(f"{self.root / engine.file}: {err.strerror}; build the engines again") from err
        if hashlib.sha256(content).hexdigest() != engine.sha256:
            raise BundleError(
                f"{self.root / engine.file}: its SHA-256 is not that of {ENGINES}; the file was altered or damaged; "
                "build the engines again"
            )
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    schema_version: int
    bundle: Mapping[str, Any]
    builder: str
    engines: tuple[EngineRecord, ...]


def read_engines(folder: Path) -> EngineFolder:
    """The engines that `medreasoner-cli export tensorrt` wrote into a folder.

    Raises
    ------
    BundleError
        If there are none, or ``engines.json`` is malformed or of another release; the message names the key.
    """
    path = folder / ENGINES
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise BundleError(f"{path}: more than {_MAX_BYTES} bytes; build the engines again")
        data = json.loads(text)
    except OSError as err:
        raise BundleError(f"{path}: {err.strerror}; 'medreasoner-cli export tensorrt' writes it") from err
    except (ValueError, RecursionError) as err:
        raise BundleError(f"{path} is not JSON: {err}") from err
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != ENGINES_VERSION:
        raise BundleError(f"{path}: schema_version: expected {ENGINES_VERSION}, got {found!r:.80}; build them again")
    try:
        content = read_record(_Content, data, "")
    except BundleError as err:
        raise BundleError(f"{path}: {err}") from err
    return EngineFolder(root=folder, builder=content.builder, engines=content.engines)
