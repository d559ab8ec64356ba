"""Prompts for the segmenter's training that a reasoner really wrote, with the errors that it really makes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medreasoner.errors import BundleError
from medreasoner_train.data import Sample
from medreasoner_train.judge import as_mask, as_picture
from medreasoner_train.language import load_phrasings
from medreasoner_train.packed_policy import PackedPolicy
from medreasoner_train.reward_geometry import box_iou
from medreasoner_train.rewards import geometry_of
from medreasoner_train.rollout import Rollouts, Sampling
from medreasoner_train.runtime_rollouts import RuntimeRollouts
from medreasoner_train.segmenter import BOTH, BOX, POINTS, SIZE, Prompts, prompts
from medreasoner_train.sft_data import SftData, SftOptions
from medreasoner_train.store import Stored
from medreasoner_train.tasks import GroundingTasks, Task, TaskSource

__all__ = ["WrittenPrompts", "written_prompts"]

NEAR = 0.2  # least IoU with the truth: what points at something else teaches to ignore the prompt
FORMS = {BOTH: 0.8, BOX: 0.1, POINTS: 0.1}


class WrittenPrompts:
    """Batches like those of :class:`medreasoner_train.segmenter.SegmenterData`, of a reasoner's own answers.

    Parameters
    ----------
    tasks
        What it is asked about training images.
    rollouts
        The reasoner.
    temperature
        At which it answers. On images that it was trained on it errs less than on others: a little chance makes up
        for that.
    """

    def __init__(self, tasks: TaskSource, rollouts: Rollouts, *, temperature: float = 0.6) -> None:
        self._tasks, self._rollouts, self._temperature = tasks, rollouts, temperature

    def batch(self, step: int, *, count: int, per_image: int, seed: int) -> tuple[Tensor, Prompts | None]:
        """Images (count, 3, S, S) in [-1, 1] and up to count * per_image prompts; None if none is near."""
        tasks = self._tasks.draw(step, count=count, seed=seed)
        sampling = Sampling(count=per_image, temperature=self._temperature)
        answers = self._rollouts.sample([task.prompt for task in tasks], sampling, seed=seed + step)
        rng = np.random.default_rng([seed, step])
        rows = []
        for b, (task, own) in enumerate(zip(tasks, answers, strict=True)):
            for box, points in _near(task, [each.text for each in own]):
                form = int(rng.choice(list(FORMS), p=list(FORMS.values())))
                rows.append((b, box, points, form, as_mask(task.mask).numpy()))
        images = torch.stack([as_picture(task.prompt.pixels) for task in tasks])
        return images, prompts(rows) if rows else None


def written_prompts(reasoner: Path, samples: Sequence[Sample], stored: Sequence[Stored]) -> WrittenPrompts:
    """Those of a finished reasoner of nano's kind about the images of a grounding set, answered by the runtime.

    Raises
    ------
    BundleError
        If the folder holds none.
    """
    policy = PackedPolicy.of(reasoner)
    if policy is None:
        raise BundleError(f"{reasoner}: not a reasoner with square images and one token a coordinate, as nano is")
    asked = SftOptions(absent=0.0, size=policy.size)
    data = SftData(samples, stored, vocabulary=policy.vocabulary, phrasings=load_phrasings("train"), options=asked)
    return WrittenPrompts(GroundingTasks(data, think=0.0), RuntimeRollouts(reasoner))


def _near(task: Task, texts: list[str]) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Boxes (4,) and points (2, 2) in the segmenter's pixels, of the answers that overlap the task's target."""
    if task.mask is None or task.truth.box is None:
        return []
    scale = np.array([SIZE / task.truth.size[0], SIZE / task.truth.size[1]])
    found = []
    for text in texts:
        geometry = geometry_of(text)
        if geometry is not None and box_iou(geometry[0], task.truth.box) >= NEAR:
            found.append((np.array(geometry[0]) * np.tile(scale, 2), np.array(geometry[1]) * scale))
    return found
