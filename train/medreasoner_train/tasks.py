"""What GRPO asks the policy: questions with their truth, drawn step by step from a data set."""

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medreasoner_train.rewards import Truth
from medreasoner_train.rollout import Prompt
from medreasoner_train.sft_data import SftData

__all__ = ["GroundingTasks", "Task", "TaskSource"]


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

    def draw(self, number: int, *, count: int, seed: int) -> list[Task]:
        """The `number`-th batch of `count` tasks; depends on its arguments alone."""


class GroundingTasks:
    """Tasks of the grounding set, whose images are augmented and whose questions are drawn from the phrasings.

    Parameters
    ----------
    data
        The images and questions, also those for absent targets.
    think
        Share of the prompts that ask for a thought.
    """

    def __init__(self, data: SftData, *, think: float) -> None:
        self._data, self._think = data, think

    def draw(self, number: int, *, count: int, seed: int) -> list[Task]:
        """See :class:`TaskSource`."""
        rng = np.random.default_rng([seed, number])
        chosen = rng.choice(len(self._data.stored), size=count, p=self._data.weights)
        return [self._task(int(index), f"{number}/{place}", rng) for place, index in enumerate(chosen)]

    def _task(self, drawn: int, key: str, rng: np.random.Generator) -> Task:
        index, (image, targets, masks) = self._data.askable(drawn, rng)
        asked = self._data.question(self._data.stored[index], targets, masks, rng)
        pixels = np.round((image.numpy().transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        prompt = Prompt(key=key, pixels=pixels, query=asked.query, think=bool(rng.random() < self._think))
        return Task(prompt=prompt, truth=self._truth(asked.geometry), mask=asked.mask)

    def _truth(self, geometry: npt.NDArray[np.float64] | None) -> Truth:
        limit = self._data.largest
        if geometry is None:
            return Truth(box=None, points=None, size=(limit, limit))
        x1, y1, x2, y2, ax, ay, bx, by = (float(value) for value in geometry * limit)
        return Truth(box=(x1, y1, x2, y2), points=((ax, ay), (bx, by)), size=(limit, limit))
