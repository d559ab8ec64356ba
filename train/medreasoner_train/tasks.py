"""What GRPO asks the policy: questions with their truth, drawn step by step from a data set."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from medreasoner_train.augment import NO_CHANGE, Options, augment
from medreasoner_train.examples import Example, draw_question
from medreasoner_train.language import Phrasings
from medreasoner_train.pretrain import ImageTargets
from medreasoner_train.rewards import Truth
from medreasoner_train.rollout import Pixels, Prompt
from medreasoner_train.sft_data import SftData
from medreasoner_train.store import Stored

__all__ = ["ExampleTasks", "GroundingTasks", "Task", "TaskSource"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A prompt and what is right: the truth in the grid of the answer's numbers, the mask (H, W) in that of the pixels.

    mask is None where the data have none, or the target is absent.
    """

    prompt: Prompt
    truth: Truth
    mask: npt.NDArray[np.bool_] | None = None


class TaskSource(Protocol):
    """Where tasks come from."""

    def draw(self, number: int, *, count: int, seed: int, places: Sequence[int] | None = None) -> list[Task]:
        """The `number`-th batch of `count` tasks, or those at `places` of it; each depends on its place alone."""


class GroundingTasks:
    """Tasks of the grounding set, whose images are augmented and whose questions are drawn from the phrasings.

    Parameters
    ----------
    data
        The images and questions, also those for absent targets.
    think
        Share of the prompts that ask for a thought.
    per_image
        How many questions follow each other about one (augmented) image, whose pixels are then one array.
    """

    def __init__(self, data: SftData, *, think: float, per_image: int = 1) -> None:
        self._data, self._think, self._per_image = data, think, per_image

    def draw(self, number: int, *, count: int, seed: int, places: Sequence[int] | None = None) -> list[Task]:
        """See :class:`TaskSource`."""
        rng = np.random.default_rng([seed, number])
        chosen = rng.choice(len(self._data.stored), size=-(-count // self._per_image), p=self._data.weights)
        shown: dict[int, tuple[_Shown, np.random.Generator]] = {}
        tasks = []
        for place in range(count) if places is None else places:
            image, turn = divmod(place, self._per_image)
            if image not in shown:
                own = np.random.default_rng([seed, number, image * self._per_image])
                shown[image] = self._shown(int(chosen[image]), own), own
            what, rng = shown[image]
            if turn:  # the first question goes on with the image's own random numbers
                rng = np.random.default_rng([seed, number, place])
            tasks.append(self._task(what, f"{number}/{place}", rng))
        return tasks

    def _shown(self, drawn: int, rng: np.random.Generator) -> "_Shown":
        index, (image, targets, masks) = self._data.askable(drawn, rng)
        pixels = np.round((image.numpy().transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        return _Shown(self._data.stored[index], pixels, targets, masks)

    def _task(self, shown: "_Shown", key: str, rng: np.random.Generator) -> Task:
        asked = self._data.question(shown.stored, shown.targets, shown.masks, rng)
        prompt = Prompt(key=key, pixels=shown.pixels, query=asked.query, think=bool(rng.random() < self._think))
        return Task(prompt=prompt, truth=self._truth(asked.geometry), mask=asked.mask)

    def _truth(self, geometry: npt.NDArray[np.float64] | None) -> Truth:
        limit = self._data.largest
        if geometry is None:
            return Truth(box=None, points=None, size=(limit, limit))
        x1, y1, x2, y2, ax, ay, bx, by = (float(value) for value in geometry * limit)
        return Truth(box=(x1, y1, x2, y2), points=((ax, ay), (bx, by)), size=(limit, limit))


class _Shown(NamedTuple):
    """An augmented image and what is known of it."""

    stored: Stored
    pixels: npt.NDArray[np.uint8]
    targets: ImageTargets
    masks: dict[str, npt.NDArray[np.bool_]]


class ExampleTasks:
    """Tasks of any data set that :func:`medreasoner_train.examples.load_examples` reads.

    Parameters
    ----------
    examples
        Its rows.
    phrasings
        By key: of these a question is drawn for rows that have none.
    grid_of
        Width and height of an image in the numbers of an answer about it, as the policy has them.
    size
        Side in pixels of the square that images are brought to; None: they stay as they are.
    think
        Share of the prompts that ask for a thought.
    augmented
        Whether contrast and noise are changed at random, of images that are brought to a size; the geometry never is,
        since it may carry meaning.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        phrasings: dict[str, Phrasings],
        *,
        grid_of: Callable[[Pixels], tuple[int, int]],
        size: int | None,
        think: float,
        augmented: bool = True,
    ) -> None:
        self._examples, self._phrasings = list(examples), phrasings
        self._size, self._grid_of, self._think = size, grid_of, think
        self._changes = dataclasses.replace(Options(), crop=0.0) if augmented else NO_CHANGE

    def __len__(self) -> int:
        return len(self._examples)

    def draw(self, number: int, *, count: int, seed: int, places: Sequence[int] | None = None) -> list[Task]:
        """See :class:`TaskSource`."""
        rng = np.random.default_rng([seed, number])
        chosen = rng.integers(len(self._examples), size=count)
        return [
            self.task(int(chosen[place]), f"{number}/{place}", np.random.default_rng([seed, number, place]))
            for place in (range(count) if places is None else places)
        ]

    def task(self, index: int, key: str, rng: np.random.Generator) -> Task:
        """The task of one row."""
        example = self._examples[index]
        pixels, mask = example.pixels(), example.mask()
        height, width = pixels.shape[:2]
        if self._size is not None:
            none = np.zeros((0, height, width), np.bool_)
            changed = augment(
                pixels, none if mask is None else mask[None], np.zeros((0 if mask is None else 1, 2, 2)),
                size=self._size, modality="", source="", rng=rng, options=self._changes,
            )  # fmt: skip
            pixels, mask = changed.pixels, None if mask is None else changed.masks[0]
        query = draw_question(example, self._phrasings, rng)
        prompt = Prompt(key=key, pixels=pixels, query=query, think=bool(rng.random() < self._think))
        grid = self._grid_of(pixels)
        scale = np.array([grid[0] / width, grid[1] / height])
        truth = Truth(box=None, points=None, size=grid)
        if example.box is not None:
            x1, y1, x2, y2 = (float(each) for each in np.array(example.box) * np.tile(scale, 2))
            points = None
            if example.points is not None:
                (ax, ay), (bx, by) = (np.array(example.points) * scale).tolist()
                points = ((ax, ay), (bx, by))
            truth = Truth(box=(x1, y1, x2, y2), points=points, size=grid)
        return Task(prompt=prompt, truth=truth, mask=mask)
