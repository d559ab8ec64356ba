"""The images that a command line names: files, folders, patterns, samples and the standard input."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Input", "find_inputs"]

# Only these are cut from a name: the last part of "1.2.840.113619" is no ending.
_ENDINGS = (".nii.gz", ".nii", ".dicom", ".dcm", ".ima", ".png", ".jpeg", ".jpg", ".tiff", ".tif", ".bmp", ".gif")
_PATTERN = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Input:
    """One image: what people call it, and what it is read from."""

    name: str
    source: str | bytes

    @property
    def stem(self) -> str:
        """Name without folder and ending, for the files that are written about it.

        >>> Input("a/scan.nii.gz", "").stem, Input("1.2.840.7", "").stem, Input("sample:chest", "").stem
        ('scan', '1.2.840.7', 'chest')
        """
        name = Path(self.name.removeprefix("sample:")).name
        ending = next((each for each in _ENDINGS if name.lower().endswith(each)), "")
        return name[: len(name) - len(ending)] or name

    def is_file(self, path: Path) -> bool:
        """Whether this image is read from the file at `path`."""
        return (
            isinstance(self.source, str) and path.exists() and Path(self.source).exists() and path.samefile(self.source)
        )


def find_inputs(arguments: Sequence[str]) -> list[Input]:
    """Images that the arguments stand for, in their order; in a folder and for a pattern, in the order of the names.

    A folder stands for all files below it that are not hidden; ``-`` for the standard input.

    Raises
    ------
    ImageReadError
        If a folder holds no file, or a pattern matches none.
    typer.BadParameter
        If an argument looks like a word of the question.
    """
    import typer

    for argument in arguments if len(arguments) > 1 else ():
        if argument.isalpha() and not Path(argument).exists():
            raise typer.BadParameter(f"{argument}: no such file; put the question in quotes")
    return [found for argument in arguments for found in _expand(argument)]


def _expand(argument: str) -> list[Input]:
    from medreasoner.errors import ImageReadError

    if argument == "-":
        if sys.stdin is None:
            raise ImageReadError("stdin: it is closed")
        return [Input("stdin", sys.stdin.buffer.read())]
    path = Path(argument)
    try:
        path.exists()
    except (OSError, ValueError) as err:  # a name that is too long, or holds a zero
        raise ImageReadError(f"{argument[:80]}: {getattr(err, 'strerror', None) or err}") from err
    if path.is_dir():
        found = sorted(str(file) for file in _files(path))
        if not found:
            raise ImageReadError(f"{argument}: the folder holds no files")
        return [Input(name, name) for name in found]
    if not path.exists() and not argument.startswith("sample:") and _PATTERN & set(argument):
        import glob

        # Path.glob takes no pattern with a root, and shows hidden files.
        found = sorted(name for name in glob.glob(argument, recursive=True) if Path(name).is_file())  # noqa: PTH207
        if not found:
            hint = "; the question stands behind the images" if " " in argument else ""
            raise ImageReadError(f"{argument}: no file matches{hint}")
        return [Input(name, name) for name in found]
    return [Input(argument, argument)]


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # DICOMDIR is the index of a medium, in DICOM's own form but without a picture.
        yield from (Path(root, name) for name in names if not name.startswith(".") and name.upper() != "DICOMDIR")
