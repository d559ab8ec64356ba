"""What is printed about an image."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medreasoner._text import printable
from medreasoner_cli.failures import one_line

if TYPE_CHECKING:
    from medreasoner import Grounding

__all__ = ["Printer", "show_warnings"]


def show_warnings() -> None:
    """Send what the package logs as a warning, such as the licence of the weights, to the standard error."""
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("medreasoner")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING)


class Printer:
    """Prints results to the standard output, and errors and progress to the standard error.

    Parameters
    ----------
    n_images
        How many will come: one is described at length, several take a line each.
    as_json
        Whether to print one JSON object a line instead.
    """

    def __init__(self, n_images: int, *, as_json: bool) -> None:
        self._n_images, self._as_json = n_images, as_json
        self._shows_progress = n_images > 1 and sys.stderr.isatty()
        self._in_thought = self._after_blank = False

    def progress(self, done: int, name: str) -> None:
        """Tell on a terminal how far it is and what comes next."""
        if self._shows_progress:
            filled = 24 * done // self._n_images
            bar = "#" * filled + "." * (24 - filled)
            print(f"\r\x1b[K[{bar}] {done}/{self._n_images} {name:.40}", end="", file=sys.stderr, flush=True)

    def thought(self, piece: str) -> None:
        """Print the next piece of the thought about a single image; several show theirs behind the answer."""
        if self._n_images > 1 or self._as_json:
            return
        shown = printable(re.sub(r"\s+", " ", piece))
        if not self._in_thought:
            print("  thought  ", end="")
            self._in_thought = self._after_blank = True
        if self._after_blank:
            shown = shown.lstrip()
        if shown:
            self._after_blank = shown.endswith(" ")
        print(shown, end="", flush=True)

    def clear(self) -> None:
        """Take the progress away and end the thought, before anything else is printed."""
        if self._in_thought:
            print(flush=True)
            self._in_thought = False
        if self._shows_progress:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def error(self, name: str, error: Exception, written: Sequence[Path] = ()) -> None:
        """Print that an image failed, and which files had been written by then."""
        self.clear()
        text = one_line(error)
        for own in (f"{printable(Path(name).name)}: ", "bytes: "):  # by which the message calls the image
            text = text.removeprefix(own)
        text = f"{printable(name)}: {text}"
        print(f"error: {text}", file=sys.stderr)
        files = [str(path) for path in written]
        if files:
            print(f"note: written before that: {printable(', '.join(files))}", file=sys.stderr)
        if self._as_json:
            _print_json({"image": name, "error": text, "written": files})

    def result(self, name: str, result: "Grounding", written: Sequence[Path]) -> None:
        """Print an answer."""
        self.clear()
        shown = printable(name)
        for warning in result.warnings:
            print(f"note: {shown}: {warning}" if self._n_images > 1 else f"note: {warning}", file=sys.stderr)
        if self._as_json:
            _print_json({"image": name, **result.to_dict(), "written": [str(path) for path in written]})
        elif self._n_images > 1:
            print("  ".join([shown, *_short(result)]), flush=True)
            if result.reasoning is not None:
                print(f"  thought  {printable(' '.join(result.reasoning.split()))}", flush=True)
        else:
            for line in _long(shown, result, written):
                print(line)


def _print_json(value: dict[str, object]) -> None:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:  # the terminal's encoding lacks a letter, or a file's name is no text
        text = json.dumps(value)
    print(text, flush=True)


def _short(result: "Grounding") -> list[str]:
    time = f"{result.timings_ms['total']:.0f} ms"
    if not result.found or result.box is None:
        return ["absent", time]
    return ["found", "box " + " ".join(f"{edge:.0f}" for edge in result.box), f"score {result.score:.2f}", time]


def _long(name: str, result: "Grounding", written: Sequence[Path]) -> list[str]:
    lines = [f"{name}: {'found' if result.found else 'the answer is that it is not in this image'}"]
    if result.box is not None and result.points is not None:
        lines.append(f"  box      {' '.join(f'{edge:.0f}' for edge in result.box)}   (x1 y1 x2 y2, pixels)")
        lines.append(f"  points   {'   '.join(f'{x:.0f} {y:.0f}' for x, y in result.points)}")
        if result.area_mm2 is not None:
            lines.append(f"  area     {result.area_mm2:,.0f} mm2")
        lines.append(f"  score    {result.score:.2f}   (predicted IoU of the mask, not a probability)")
    if result.concord is not None:
        sure = "" if result.confidence is None else f"; such masks have a Dice of {result.confidence:.2f} on average"
        lines.append(f"  samples  {result.n_samples} agree by {result.concord:.2f}{sure}")
    lines.append(f"  time     {result.timings_ms['total']:.0f} ms   ({result.model_name} {result.model_version})")
    return [*lines, *(f"  wrote    {printable(str(path))}" for path in written)]
