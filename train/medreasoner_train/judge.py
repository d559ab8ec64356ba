"""What the frozen segmenter makes of an answer: the Dice of its mask, as a reward."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from medreasoner import read_image
from medreasoner.bundle import load_bundle
from medreasoner.engine import load_segmenter
from medreasoner.errors import MedReasonerError
from medreasoner.providers import Device, RuntimeOptions
from medreasoner.segmenter import Embedded, Segmenter
from medreasoner_train.metrics import dice
from medreasoner_train.rollout import Pixels, shown_once
from medreasoner_train.segmenter import BOTH, SIZE, Prompts, segment
from medreasoner_train.tasks import Task

__all__ = ["Geometry", "MaskJudge", "RuntimeJudge", "TorchJudge", "as_mask", "as_picture"]

Geometry = tuple[tuple[float, float, float, float], tuple[tuple[float, float], tuple[float, float]]]
"""Box and points of an answer, in the grid of ``task.truth.size``."""


class MaskJudge(Protocol):
    """Whatever turns answers into masks."""

    def dice(self, tasks: Sequence[Task], answers: Sequence[Sequence[Geometry | None]]) -> list[list[float]]:
        """Dice of each answer's mask with its task's, in [0, 1]; 0 where there is no geometry or no true mask."""

    def close(self) -> None:
        """Give back what it holds."""


class RuntimeJudge:
    """Masks by a bundle's segmenter in the runtime, as users get them: of any architecture, on the CPU or a GPU."""

    def __init__(self, bundle: str, *, device: Device = "cpu") -> None:
        self._segmenter: Segmenter | None = load_segmenter(load_bundle(bundle), RuntimeOptions(device=device))

    def dice(self, tasks: Sequence[Task], answers: Sequence[Sequence[Geometry | None]]) -> list[list[float]]:
        """See :class:`MaskJudge`.

        Raises
        ------
        MedReasonerError
            If closed.
        """
        if self._segmenter is None:
            raise MedReasonerError("this judge is closed")
        found: list[list[float]] = []
        image: tuple[Pixels, Embedded] | None = None  # the last one: tasks about a picture follow each other
        for task, own in zip(tasks, answers, strict=True):
            pixels = task.prompt.pixels
            if task.mask is None or not any(own):
                found.append([0.0] * len(own))
                continue
            if image is None or image[0] is not pixels:
                image = pixels, self._segmenter.encode(read_image(pixels))
            found.append(_one(self._segmenter, image[1], task, own))
        return found

    def close(self) -> None:
        """Let go of the segmenter."""
        self._segmenter = None


def _one(segmenter: Segmenter, image: Embedded, task: Task, answers: Sequence[Geometry | None]) -> list[float]:
    """Dice of the answers' masks, of which there is one at least, with the task's."""
    assert task.mask is not None
    unlike = list({answer: None for answer in answers if answer is not None})  # the same one is often drawn again
    height, width = task.mask.shape
    scale = np.array([width / task.truth.size[0], height / task.truth.size[1]])
    logits, _ = segmenter.decode_batch(
        image,
        corners=np.array([box for box, _ in unlike]).reshape(-1, 2, 2) * scale,
        points=np.array([points for _, points in unlike]) * scale,
    )
    found = {
        answer: dice(segmenter.mask(own, image), task.mask) for answer, own in zip(unlike, logits, strict=True)
    }  # fmt: skip
    return [0.0 if answer is None else found[answer] for answer in answers]


class TorchJudge:
    """Masks by nano's segmenter in torch, all answers of a step at once: for training on a GPU."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model.to(device).eval(), device

    @torch.no_grad()
    def dice(self, tasks: Sequence[Task], answers: Sequence[Sequence[Geometry | None]]) -> list[list[float]]:
        """See :class:`MaskJudge`."""
        result = [[0.0] * len(own) for own in answers]
        places = [
            (b, k, answer)
            for b, (task, own) in enumerate(zip(tasks, answers, strict=True))
            if task.mask is not None
            for k, answer in enumerate(own)
            if answer is not None
        ]
        for start in range(0, len(places), 512):
            part = places[start : start + 512]
            for (b, k, _), value in zip(part, self._dice(tasks, part), strict=True):
                result[b][k] = value
        return result

    def _dice(self, tasks: Sequence[Task], places: Sequence[tuple[int, int, Geometry]]) -> list[float]:
        shown = sorted({b for b, _, _ in places})
        number = {b: index for index, b in enumerate(shown)}
        first, numbers = shown_once([tasks[b].prompt for b in shown])
        images = torch.stack([as_picture(prompt.pixels) for prompt in first]).to(self._device)
        picture = torch.tensor(numbers, device=self._device)
        truth = torch.stack([as_mask(tasks[b].mask) for b in shown]).to(self._device)
        scale = np.array([[SIZE / tasks[b].truth.size[0], SIZE / tasks[b].truth.size[1]] for b, _, _ in places])
        boxes = np.array([answer[0] for _, _, answer in places]) * np.tile(scale, 2)
        points = np.array([answer[1] for _, _, answer in places]) * scale[:, None]
        of = torch.tensor([number[b] for b, _, _ in places], device=self._device)
        given = Prompts(
            image=picture[of],
            boxes=torch.tensor(boxes, dtype=torch.float32, device=self._device),
            points=torch.tensor(points, dtype=torch.float32, device=self._device),
            form=torch.full_like(of, BOTH),
            masks=truth[of],
        )
        logits, _, order = segment(self._model, images, given)
        mine = functional.interpolate(logits[:, None], size=truth.shape[1:], mode="bilinear")[:, 0] > 0
        real = truth[of[order]]
        shared, total = (mine & real).sum((1, 2)), mine.sum((1, 2)) + real.sum((1, 2))
        values = torch.empty(len(places), device=self._device)
        values[order] = 2 * shared / total.clamp(min=1)
        return [float(value) for value in values.tolist()]

    def close(self) -> None:
        """Nothing to give back."""


def as_mask(mask: npt.NDArray[np.bool_] | None) -> Tensor:
    """As the segmenter's training has it: (256, 256) bool."""
    values = torch.from_numpy(np.asarray(mask, np.float32))[None, None]
    resized: Tensor = functional.interpolate(values, size=(SIZE, SIZE), mode="nearest-exact")[0, 0] > 0.5
    return resized


def as_picture(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """As nano's segmenter sees it: (3, 256, 256) in [-1, 1]."""
    colour = pixels[..., None].repeat(3, axis=2) if pixels.ndim == 2 else pixels
    image = torch.from_numpy(colour.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)
    resized: Tensor = functional.interpolate(image[None], size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]
    return resized
