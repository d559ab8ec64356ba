"""The folder of an export: made in stages that a stopped build finds again, and there as a whole or not at all.

While it is made, an export lies in a hidden folder beside its output. Each stage is written under a name of its own and
renamed when it is finished, so that a stage is whole wherever the program was stopped. The next call with the same
options and sources takes those; one with others throws them away.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from medreasoner._version import __version__
from medreasoner.errors import BundleError, MedReasonerError
from medreasoner_export.checkpoint import Weights

__all__ = ["DESCRIPTION", "Build", "build_key", "building", "describe", "weights_stage"]

DESCRIPTION = "export.json"
"""Name of the file in an export's folder that says what it is."""

Announce: TypeAlias = Callable[[str], None]
Make: TypeAlias = Callable[[Path], Mapping[str, Any] | None]
"""Writes the files of a stage into a folder, and returns what else is to be known of it, fit for JSON."""

# Files in the hidden folder: what a finished stage holds, what all stages were made from, who is at work.
_NOTE, _KEY, _LOCK = "stage.json", "key", "lock"
_LAST = ".last"
# Of a source file up to this size the content counts; a larger one is known by its size and time.
_SMALL_BYTES = 2**20


class Build:
    """An export in the making.

    Parameters
    ----------
    out
        The folder that it will be.
    description
        Name of the file that says what it is.
    key
        Of options and sources: stages with another one are thrown away.
    fresh
        Throw all away.

    Raises
    ------
    BundleError
        If another process makes the same export.
    """

    def __init__(self, out: Path, description: str, key: str, *, fresh: bool) -> None:
        self.out, self._description = out, description
        self._work = _work_folder(out)
        self._lock = _lock(self._work)
        self._used: dict[str, tuple[str, ...]] = {}
        stated = self._work / _KEY
        if fresh or not stated.is_file() or stated.read_text() != key:
            self._clear()
            stated.write_text(key)
        found = {path.name: note for path in self._work.iterdir() if (note := _finished(path)) is not None}
        for path in self._work.iterdir():
            if path.is_dir() and path.name not in found:  # it was stopped in the middle
                shutil.rmtree(path)
        self._found = dict(sorted(found.items(), key=lambda each: (self._work / each[0] / _NOTE).stat().st_mtime_ns))

    @property
    def found(self) -> tuple[str, ...]:
        """Stages that an earlier call finished, in their order."""
        return tuple(self._found)

    @property
    def found_bytes(self) -> int:
        """Size of their files."""
        return sum(sum(note["files"].values()) for note in self._found.values())

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files of all stages so far."""
        return tuple(name for names in self._used.values() for name in names)

    def path(self, name: str) -> Path:
        """Where a file of a finished stage lies meanwhile."""
        return next(self._work / stage / name for stage, names in self._used.items() if name in names)

    def folder(self, stage: str) -> Path:
        """Where the files of a finished stage lie meanwhile."""
        return self._work / stage

    def stage(self, name: str, make: Make, *, kept: bool = True) -> dict[str, Any]:
        """What `make` returned, now or in the call that was stopped after it.

        Parameters
        ----------
        name
            Of the stage: a file's name.
        make
            Called if the stage is not finished yet. Its files have names that no other stage uses.
        kept
            Whether they belong to the export; else they are only needed on the way.
        """
        if name not in self._found:
            (self.out / self._description).unlink(missing_ok=True)  # should this fail, the old one is not taken for it
            scratch = self._work / f".{name}"
            scratch.mkdir()
            data = make(scratch) or {}
            note = {"files": {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}, "data": data}
            (scratch / _NOTE).write_text(json.dumps(note))
            for path in (*scratch.iterdir(), scratch):
                _to_disk(path)
            scratch.rename(self._work / name)
            self._found[name] = json.loads(json.dumps(note))
        note = self._found[name]
        self._used[name] = tuple(note["files"]) if kept else ()
        return dict(note["data"])

    def drop(self, name: str) -> None:
        """Let go of a stage that nothing needs any more."""
        self._found.pop(name, None)
        self._used.pop(name, None)
        shutil.rmtree(self._work / name, ignore_errors=True)

    def write_description(self, text: str) -> None:
        """Write the file that says what the export is; its last."""
        (self._work / _LAST).mkdir(exist_ok=True)
        (self._work / _LAST / self._description).write_text(text)

    def place(self, stale: Sequence[str]) -> None:
        """Let the export appear, without files of an earlier one that match `stale`."""
        (self.out / self._description).unlink(missing_ok=True)
        last = self._work / _LAST
        last.mkdir(exist_ok=True)
        whole = not self.out.exists()
        if not whole:
            for path in [path for pattern in stale for path in self.out.glob(pattern)]:
                path.unlink()
        for stage, names in self._used.items():
            for name in names:
                (self._work / stage / name).replace((last if whole else self.out) / name)
        if whole:
            last.rename(self.out)
        elif (last / self._description).exists():
            (last / self._description).replace(self.out / self._description)
        self.close(keep=False)

    def close(self, *, keep: bool) -> tuple[str, ...]:
        """Let go of the hidden folder; return the finished stages that were kept in it."""
        kept = self.found if keep else ()
        if kept:
            for path in self._work.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)
        else:
            shutil.rmtree(self._work, ignore_errors=True)
        os.close(self._lock)
        return kept

    def _clear(self) -> None:
        for path in self._work.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()


@contextmanager
def building(
    out_dir: str | Path,
    *,
    key: str = "",
    description: str = DESCRIPTION,
    stale: Sequence[str] = ("*.onnx.data",),
    fresh: bool = False,
    announce: Announce = lambda _: None,
) -> Iterator[Build]:
    """An export in the making, which appears at `out_dir` when the block ends.

    The description of an earlier export goes when the first stage starts: should this one fail, the other is not taken
    for it. Of one that fails nothing stays. One that is interrupted, or ends on a full disk or for want of memory,
    leaves its finished stages in a hidden folder beside `out_dir`.

    Parameters
    ----------
    out_dir
        The folder, made if absent.
    key
        Digest of what the export is made from and how (see `build_key`).
    description
        Name of the file that says what it is.
    stale
        Files of an earlier export that must not stay, as patterns.
    fresh
        Do not use what a stopped build has left.
    announce
        Told which stages are taken from a stopped build, or kept for the next.

    Raises
    ------
    BundleError
        If the folder cannot be written, the message names it; or if another process makes the same export.
    """
    out = Path(out_dir)
    absent: list[Path] = []
    build: Build | None = None
    try:
        absent += [path for path in (out, *out.parents) if not path.exists()]
        if out.exists() and not (out.is_dir() and os.access(out, os.W_OK)):
            raise BundleError(f"{out}: it cannot be written; name a new folder, or one that may be written")
        build = Build(out, description, key, fresh=fresh)
        if build.found:
            announce(f"resumes: {', '.join(build.found)} taken from the stopped build (--fresh starts anew)")
        yield build
        build.place(stale)
    except BaseException as err:
        kept = build.close(keep=_is_interruption(err)) if build is not None else ()
        for path in absent:
            with suppress(OSError):
                path.rmdir()  # only if it is empty
        if kept:
            announce(f"stopped: {', '.join(kept)} kept for the same command, which goes on from there")
        if isinstance(err, OSError) and not isinstance(err, MedReasonerError):  # an unreadable image is both
            raise _told(err, out) from err
        raise


def build_key(options: str, files: Iterable[Path]) -> str:
    """Digest of what an export is made from: `options`, files that matter, and this program.

    Files that do not exist count as absent. Large ones are not read: one that was written anew has another time.
    """
    digest = hashlib.sha256(f"{__version__} {options}".encode())
    program = sorted(Path(__file__).parent.glob("*.py"))
    for path in (*program, *sorted({path.absolute() for path in files})):
        if path.is_file():
            about = path.stat()
            small = about.st_size <= _SMALL_BYTES
            digest.update(f"\n{path} {about.st_size} {'' if small else about.st_mtime_ns} ".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest() if small else b"")
    return digest.hexdigest()


def weights_stage(build: Build, weights: Weights, name: str, make: Make) -> dict[str, Any]:
    """A stage that reads tensors: where it is taken from a stopped build, they count as read."""

    def noted(folder: Path) -> dict[str, Any]:
        before = weights.unread
        data = make(folder) or {}
        return {"read": sorted(before - weights.unread), "data": data}

    done = build.stage(name, noted)
    weights.mark_read(done["read"])
    data: dict[str, Any] = done["data"]
    return data


def describe(build: Build, description: Mapping[str, Any]) -> None:
    """Write the description of an export, with the names of the weights beside its graphs."""
    data = sorted(name for name in build.files if name.endswith(".onnx.data"))
    build.write_description(json.dumps({**description, "data": data}, indent=1) + "\n")


def _work_folder(out: Path) -> Path:
    """The hidden folder: beside the output, or in it where a rename from beside it would not do."""
    place = out.resolve()
    if not place.name or (place.is_dir() and (place.is_mount() or not os.access(place.parent, os.W_OK))):
        return place / ".export"
    return place.with_name(f".{place.name}.export")


def _lock(work: Path) -> int:
    """Make the folder, and be the only one in it until the file descriptor is closed, or the process ends."""
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl
    except ImportError:  # not on Windows
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink == 0:  # whoever held it has just finished, and removed it
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise BundleError(f"{work}: another export to the same folder is running; wait for it") from None
    return lock


def _finished(stage: Path) -> dict[str, Any] | None:
    """The note of a stage that is whole, else None."""
    if not stage.is_dir() or stage.name.startswith("."):
        return None
    try:
        note: dict[str, Any] = json.loads((stage / _NOTE).read_bytes())
        whole = all((stage / name).stat().st_size == size for name, size in note["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return note if whole else None


def _to_disk(path: Path) -> None:
    """Wait until a file or folder is there also after the power has failed: a stage must not be found half empty."""
    with suppress(OSError):  # not every system opens folders
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _is_interruption(err: BaseException) -> bool:
    """Whether the same call may succeed later, without another input."""
    if isinstance(err, MedReasonerError):
        return bool(getattr(err, "resumable", False))
    return isinstance(err, KeyboardInterrupt | SystemExit | MemoryError | OSError)


def _told(err: OSError, out: Path) -> BundleError:
    """A failure to write, or to read a source, in our words."""
    words = err.strerror or type(err).__name__
    named = None if err.filename is None else Path(os.fsdecode(err.filename)).absolute()
    own = named is None or named.is_relative_to(out.absolute())  # asked first: a name may be too long to look for
    if own or named is None or named.is_relative_to(_work_folder(out)) or not named.exists():
        full = err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return BundleError(
            f"{out}: it cannot be written ({words}); {'free some space, or ' if full else ''}name another folder"
        )
    return BundleError(f"{named}: it cannot be read ({words})")
