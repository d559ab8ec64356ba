"""One question about a number of images: the next is read while this one is answered."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medreasoner_cli.answers import Printer
from medreasoner_cli.failures import ABSENT, FOUND, exit_code, is_debugging
from medreasoner_cli.folders import bundle_path
from medreasoner_cli.inputs import Input
from medreasoner_cli.start import without_collecting
from medreasoner_cli.targets import Target

if TYPE_CHECKING:
    from medreasoner import Grounder, Grounding, Image

__all__ = ["Question", "answer_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The question, and how it is to be answered."""

    query: str
    bundle: str
    device: str
    think: bool
    samples: int
    seed: int
    timeout_s: float | None
    frame: int | None
    max_pixels: int
    unconstrained: bool

    def ask(
        self, grounder: "Grounder", image: "Image", targets: Sequence[Target], written: list[Path], printer: Printer
    ) -> "Grounding":
        """Answer about one image and write the files, which join `written` as soon as they exist.

        The thought goes to `printer` while it comes. What cannot be written is refused before the work.
        """
        from medreasoner import Grounding, Thought

        for target in targets:
            target.check(image)
        options: dict[str, Any] = {"think": self.think, "timeout_s": self.timeout_s}
        if self.samples > 1:
            result = grounder.ground(image, self.query, samples=self.samples, seed=self.seed, **options)
        else:
            for event in grounder.stream(image, self.query, unconstrained=self.unconstrained, **options):
                if isinstance(event, Thought):
                    printer.thought(event.text)
                elif isinstance(event, Grounding):
                    result = event
        for target in targets:
            target.write(result)
            written.append(target.path)
        return result


def answer_all(question: Question, inputs: Sequence[Input], plan: Sequence[Sequence[Target]], printer: Printer) -> int:
    """Answer, write and print for each image; return the gravest of the exit codes.

    An image that fails, for whatever reason, is reported, and the others go on.

    Raises
    ------
    BundleError, ProviderError
        If the models cannot be loaded.
    QueryError
        If the query cannot be asked of any image.
    """
    worst = FOUND
    with ExitStack() as closing:
        with without_collecting():
            from medreasoner import Grounder, QueryError

            images = _read_ahead(closing.enter_context(ThreadPoolExecutor(1)), inputs, question)
            first = next(images)  # is read while the models are loaded
            loaded = Grounder.load(bundle_path(question.bundle), device=question.device)  # type: ignore[arg-type]
            grounder = closing.enter_context(loaded)
            wait([first])
        for index, (each, targets) in enumerate(zip(inputs, plan, strict=True)):
            printer.progress(index, each.name)
            written: list[Path] = []
            try:
                image = (first if index == 0 else next(images)).result()
                result = question.ask(grounder, image, targets, written, printer)
                printer.result(each.name, result, written)
                worst = max(worst, FOUND if result.found else ABSENT)
            except QueryError:
                raise
            except Exception as err:  # one image's fault, be it one that nobody foresaw, is not the others'
                if is_debugging():
                    raise
                printer.error(each.name, err, written)
                worst = max(worst, exit_code(err))
    printer.clear()
    return worst


def _reading(source: object, **options: object) -> "Image":
    """Read an image; a package that this lacks is a fault of the input, not of the model."""
    from medreasoner import ImageReadError, MissingExtraError, read_image

    try:
        return read_image(source, **options)  # type: ignore[arg-type]
    except MissingExtraError as err:
        raise ImageReadError(str(err)) from err


def _read_ahead(reader: ThreadPoolExecutor, inputs: Sequence[Input], question: Question) -> "Iterator[Future[Image]]":
    def read(each: Input) -> "Future[Image]":
        return reader.submit(_reading, each.source, frame=question.frame, max_pixels=question.max_pixels)

    following = read(inputs[0])
    for each in inputs[1:]:
        current, following = following, read(each)
        yield current
    yield following
