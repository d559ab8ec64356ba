"""Model folders: finds them, reads their manifest, and proves that their files are what the manifest says.

Nothing in a bundle is unpickled or executed; no path in a manifest may leave the folder.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from medreasoner.errors import BundleError
from medreasoner.manifest import parse_manifest
from medreasoner.spec import BundleSpec

__all__ = ["Bundle", "Verify", "find_bundle", "load_bundle"]

logger = logging.getLogger(__name__)

Verify = Literal["auto", "full"]
"""Whether a file above 64 MB whose content was hashed before is hashed again."""

SHIPPED = ("nano",)
MANIFEST = "manifest.json"

_SMALL_BYTES = 64 * 1024 * 1024
_MANIFEST_MAX_BYTES = 4 * 1024 * 1024
_CHUNK_BYTES = 4 * 1024 * 1024  # between two of them a thread may have to wait for the interpreter
_noticed: set[tuple[str, str]] = set()  # licence notices that this process has shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified model folder.

    Parameters
    ----------
    root
        The folder, resolved.
    spec
        Its manifest.
    digest
        SHA-256 of the manifest, which through the hashes in it names the whole content.
    """

    root: Path
    spec: BundleSpec
    digest: str

    def path(self, name: str) -> Path:
        """Path of a file of the manifest."""
        return self.root / name

    def check(self, name: str) -> None:
        """Prove a file again, which is read later than the bundle was loaded.

        Raises
        ------
        BundleError
            If it is no longer what the manifest says.
        """
        _prove(name, _sha256(self.path(name)), self.spec)


def find_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """Folder of a bundle: a name that ships with the package, or a path.

    Raises
    ------
    BundleError
        If there is no such folder, or the nano bundle was left out of this build.
    """
    text = os.fspath(name_or_path)
    shipped = Path(__file__).parent / "bundles"
    root = shipped / text if text in SHIPPED else Path(text)
    if not text:
        raise BundleError(f"the name of the bundle is empty; give a folder, or one of the names {', '.join(SHIPPED)}")
    if text in SHIPPED and not root.is_dir():
        raise BundleError(f"this build has no {text!r} bundle; give the path of a bundle")
    if not root.is_dir():
        names = ", ".join(SHIPPED)
        raise BundleError(f"no bundle {text!r}: expected a folder with {MANIFEST}, or one of the names {names}")
    return root.resolve()


def load_bundle(
    name_or_path: str | os.PathLike[str], *, verify: Verify = "auto", cache_dir: Path | None = None
) -> Bundle:
    """Bundle whose files are all present and unaltered.

    Parameters
    ----------
    name_or_path
        ``"nano"``, or the path of a bundle's folder.
    verify
        ``"auto"`` hashes graphs and files up to 64 MB always, a larger file once for its (device, inode, size,
        modification time); ``"full"`` hashes everything and refuses files that the manifest does not list.
    cache_dir
        Where the list of larger files already hashed lives; None: ``~/.cache/medreasoner``.

    Raises
    ------
    BundleError
        If the bundle is absent, malformed or altered, or a path in it leaves the folder; the message names the key or
        the file.
    """
    root = find_bundle(name_or_path)
    try:
        manifest = _read_manifest(root)
        spec = parse_manifest(manifest)
        paths = {name: _contained(root, name) for name in spec.files}
        if verify == "full":
            _refuse_unlisted(root, spec)
        _check_hashes(spec, paths, verify, cache_dir)
    except BundleError as err:
        raise BundleError(f"bundle {root}: {err}") from err.__cause__
    _show_notice(spec)
    return Bundle(root=root, spec=spec, digest=hashlib.sha256(manifest).hexdigest())


def _read_manifest(root: Path) -> bytes:
    if not (root / MANIFEST).exists():
        raise BundleError(f"no {MANIFEST} is in this folder; 'medreasoner-cli export bundle' makes a bundle")
    try:
        with _contained(root, MANIFEST).open("rb") as file:
            data = file.read(_MANIFEST_MAX_BYTES + 1)
    except OSError as err:
        raise BundleError(f"{MANIFEST}: {err.strerror}") from err
    if len(data) > _MANIFEST_MAX_BYTES:
        raise BundleError(f"{MANIFEST}: larger than {_MANIFEST_MAX_BYTES} bytes")
    return data


def _contained(root: Path, name: str) -> Path:
    """Path of a regular file inside `root`, by its text, by its links and by its kind."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and not name.startswith("/") and ".." not in parts and "/".join(parts) == name
    if not plain or any(sign in name for sign in ("\\", ":", "\0")):
        raise BundleError(f"files: {name!r:.120} is not a plain relative path")
    path = root.joinpath(*parts)
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as err:
        raise BundleError(f"{name}: listed in the manifest but missing") from err
    if not real.is_relative_to(root):
        raise BundleError(f"{name}: leaves the bundle's folder through a link")
    if not stat.S_ISREG(mode):
        raise BundleError(f"{name}: not a regular file")
    return real


def _refuse_unlisted(root: Path, spec: BundleSpec) -> None:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_dir() and name != MANIFEST and name not in spec.files:
            raise BundleError(f"{name}: in the folder but not in the manifest")


def _check_hashes(spec: BundleSpec, paths: dict[str, Path], verify: Verify, cache_dir: Path | None) -> None:
    for name, path in paths.items():  # sizes first: they cost nothing
        found, expected = path.stat().st_size, spec.files[name].size_bytes
        if found != expected:
            raise BundleError(f"{name}: {found} bytes, the manifest says {expected}")
    cache = _VerifiedFiles((cache_dir or Path.home() / ".cache" / "medreasoner") / "verified.json")
    large = {name for name, path in paths.items() if path.stat().st_size > _SMALL_BYTES and path.suffix != ".onnx"}
    known = {name for name in large if verify == "auto" and cache.holds(paths[name], spec.files[name].sha256)}
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        names = [name for name in paths if name not in known]
        for name, digest in zip(names, pool.map(_sha256, [paths[name] for name in names]), strict=True):
            _prove(name, digest, spec)
    cache.add((paths[name], spec.files[name].sha256) for name in large - known)


def _prove(name: str, digest: str, spec: BundleSpec) -> None:
    if digest != spec.files[name].sha256:
        raise BundleError(
            f"{name}: its SHA-256 is not the manifest's; the file was altered or damaged; "
            "copy or export the bundle again"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            chunk = memoryview(bytearray(min(_CHUNK_BYTES, path.stat().st_size)))
            while size := file.readinto(chunk):
                digest.update(chunk[:size])
            return digest.hexdigest()
    except OSError as err:
        raise BundleError(f"{path.name}: {err.strerror}") from err


class _VerifiedFiles:
    """Large files that were hashed before, by (device, inode, size, modification time); losing it costs only time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            entries = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            entries = {}
        self._entries: dict[str, object] = entries if isinstance(entries, dict) else {}

    @staticmethod
    def _key(path: Path) -> str:
        info = path.stat()
        return f"{info.st_dev}:{info.st_ino}:{info.st_size}:{info.st_mtime_ns}"

    def holds(self, path: Path, sha256: str) -> bool:
        return self._entries.get(self._key(path)) == sha256

    def add(self, files: Iterable[tuple[Path, str]]) -> None:
        new = {self._key(path): sha256 for path, sha256 in files}
        if not new:
            return
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(self._entries | new))
            draft.replace(self._path)  # in one step, so that a reader never sees half a file
        except OSError as err:
            logger.info("cannot remember verified files: %s", err.strerror)


def _show_notice(spec: BundleSpec) -> None:
    key = (spec.name, spec.version)
    if spec.licence.notice and key not in _noticed:
        _noticed.add(key)
        logger.warning("%s %s: %s", spec.name, spec.version, " ".join(spec.licence.notice.split()))
