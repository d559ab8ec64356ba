"""One question about a number of images: the next is read while this one is answered."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medreasoner_cli.answers import Printer
from medreasoner_cli.failures import ABSENT, FOUND, exit_code
from medreasoner_cli.folders import bundle_path
from medreasoner_cli.inputs import Input
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
    frame: int | None
    unconstrained: bool

    def ask(self, grounder: "Grounder", image: "Image", targets: Sequence[Target]) -> "Grounding":
        """Answer about one image and write the files; what cannot be written is refused before the work."""
        for target in targets:
            target.check(image)
        result = grounder.ground(image, self.query, think=self.think, unconstrained=self.unconstrained)
        for target in targets:
            result.save(target.path, format=target.form)
        return result


def answer_all(question: Question, inputs: Sequence[Input], plan: Sequence[Sequence[Target]], printer: Printer) -> int:
    """Answer, write and print for each image; return the gravest of the exit codes.

    An image that fails is reported, and the others go on.

    Raises
    ------
    BundleError, ProviderError
        If the models cannot be loaded.
    QueryError
        If the query cannot be asked of any image.
    """
    from medreasoner import Grounder, MedReasonerError, QueryError

    worst = FOUND
    with ThreadPoolExecutor(1) as reader:
        images = _read_ahead(reader, inputs, question.frame)
        first = next(images)  # is read while the models are loaded
        with Grounder.load(bundle_path(question.bundle), device=question.device) as grounder:  # type: ignore[arg-type]
            for index, (each, targets) in enumerate(zip(inputs, plan, strict=True)):
                printer.progress(index, each.name)
                try:
                    image = (first if index == 0 else next(images)).result()
                    result = question.ask(grounder, image, targets)
                    printer.result(each.name, result, [target.path for target in targets])
                    worst = max(worst, FOUND if result.found else ABSENT)
                except QueryError:
                    raise
                except MedReasonerError as err:
                    printer.error(each.name, err)
                    worst = max(worst, exit_code(err))
    printer.clear()
    return worst


def _read_ahead(reader: ThreadPoolExecutor, inputs: Sequence[Input], frame: int | None) -> "Iterator[Future[Image]]":
    from medreasoner import read_image

    following = reader.submit(read_image, inputs[0].source, frame=frame)
    for each in inputs[1:]:
        current, following = following, reader.submit(read_image, each.source, frame=frame)
        yield current
    yield following
