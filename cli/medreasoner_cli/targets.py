"""The files that a command line asks for."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medreasoner_cli.inputs import Input

if TYPE_CHECKING:
    from medreasoner import Grounding, Image

__all__ = ["Target", "plan_targets"]

_ENDINGS = {
    "overlay": ".png",
    "mask": ".mask.png",
    "rle": ".rle.json",
    "json": ".json",
    "nifti": ".nii.gz",
    "seg": ".seg.dcm",
}


@dataclass(frozen=True, slots=True)
class Target:
    """One file to write, and its form if the ending does not tell."""

    path: Path
    form: str | None

    def check(self, image: "Image | None" = None) -> None:
        """Raise OutputError if it cannot be written, as far as can be known."""
        from medreasoner import MissingExtraError, OutputError
        from medreasoner.outputs import check_output

        try:
            check_output(self.path, format=self.form, image=image)
        except MissingExtraError as err:  # a fault of what was asked for, not of the model
            raise OutputError(str(err)) from err

    def write(self, result: "Grounding") -> None:
        """Write the answer; errors are those of `Grounding.save`."""
        result.save(self.path, format=self.form)


def plan_targets(outputs: Sequence[str], inputs: Sequence[Input], form: str | None) -> list[list[Target]]:
    """For each input the files that are written about it.

    Parameters
    ----------
    outputs
        A file; a folder, that is, one that exists or a name that ends in a slash, which is made if need be; or a name
        with ``{stem}`` or ``{index}`` in it. For several inputs one of the last two.
    inputs
        The images.
    form
        Form of all outputs; None: by their endings, in folders the overlay.

    Raises
    ------
    OutputError
        If a file could not be written, would be written twice, or is one of the inputs.
    """
    from medreasoner.errors import OutputError

    plan = [
        [_target(output, each, index, len(inputs), form) for output in outputs] for index, each in enumerate(inputs)
    ]
    seen: set[Path] = set()
    for target in (target for targets in plan for target in targets):
        target.check()
        real = target.path.resolve()
        if real in seen:
            several = target.path.with_name(f"{{index}}{_ENDINGS[target.form] if target.form else target.path.suffix}")
            advice = "it is named twice" if len(inputs) == 1 else f"name the files by number, as in '{several}'"
            raise OutputError(f"{target.path}: several results would be written there; {advice}")
        if any(each.is_file(target.path) for each in inputs):
            raise OutputError(f"{target.path}: this is an image to read; it is not written over")
        seen.add(real)
    return plan


def _target(output: str, image: Input, index: int, count: int, form: str | None) -> Target:
    from medreasoner.errors import OutputError
    from medreasoner.outputs import form_of

    if not output:
        raise OutputError("the name of an output is empty; name a file or a folder")
    if output.endswith("/"):
        try:
            Path(output).mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise OutputError(f"{output}: the folder cannot be made ({err.strerror})") from err
    if os.path.isdir(output):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        chosen = form_of("", format=form or "overlay")
        return Target(Path(output) / f"{image.stem}{_ENDINGS[chosen]}", chosen)
    filled = output.replace("{stem}", image.stem).replace("{index}", f"{index:04d}")
    if count > 1 and filled == output:
        raise OutputError(f"{output}: one file for {count} images; give a folder, or a name with {{stem}} in it")
    return Target(Path(filled), form)
