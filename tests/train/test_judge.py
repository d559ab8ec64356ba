"""Masks of answers as rewards: by the runtime, by torch, and of tasks that have none."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from medreasoner.errors import MedReasonerError
from medreasoner_train.checkpoint import load_weights
from medreasoner_train.judge import Geometry, RuntimeJudge, TorchJudge
from medreasoner_train.metrics import dice
from medreasoner_train.rewards import Truth
from medreasoner_train.rollout import Prompt
from medreasoner_train.segmenter import build_segmenter
from medreasoner_train.tasks import Task

NANO = Path(__file__).parents[2] / "models" / "nano" / "segmenter"
BOX = (60.0, 50.0, 180.0, 200.0)
RIGHT: Geometry = (BOX, ((120.0, 100.0), (120.0, 150.0)))
WRONG: Geometry = ((5.0, 5.0, 40.0, 30.0), ((20.0, 15.0), (30.0, 20.0)))


@pytest.fixture
def task() -> Task:
    """A bright ellipse on dark ground, 252 x 252, as nano's segmenter knows nuclei."""
    rows, columns = np.mgrid[:252, :252] + 0.5
    mask = ((columns - 120) / 60) ** 2 + ((rows - 125) / 75) ** 2 <= 1
    pixels = np.random.default_rng(0).integers(20, 40, (252, 252, 3)).astype(np.uint8)
    pixels[mask] += 150
    truth = Truth(box=BOX, points=RIGHT[1], size=(252, 252))
    return Task(prompt=Prompt(key="a", pixels=pixels, query="Which cell?"), truth=truth, mask=mask)


def test_both_judges_see_the_right_answer(task: Task) -> None:
    segmenter = build_segmenter()
    load_weights(NANO, segmenter)
    absent = dataclasses.replace(task, truth=Truth(box=None, points=None, size=(252, 252)), mask=None)
    assert task.mask is not None
    smaller = dataclasses.replace(  # every other row and column: an image of another size beside it
        task, prompt=dataclasses.replace(task.prompt, pixels=task.prompt.pixels[::2, ::2]), mask=task.mask[::2, ::2]
    )
    answers: list[list[Geometry | None]] = [[RIGHT, WRONG, None, RIGHT], [RIGHT, None, None, WRONG], [RIGHT, WRONG]]
    torch_judge, runtime = TorchJudge(segmenter, torch.device("cpu")), RuntimeJudge("nano")
    by_torch, by_runtime = (judge.dice([task, absent, smaller], answers) for judge in (torch_judge, runtime))
    for judge in (torch_judge, runtime):
        judge.close()
    for (right, wrong, none, again), there_is_none, (less, less_wrong) in (by_torch, by_runtime):
        assert less > 0.8
        assert less_wrong < 0.5
        assert right > 0.8
        assert wrong < 0.5
        assert none == 0
        assert again == right
        assert there_is_none == [0, 0, 0, 0]
    # The runtime's towers are in eight bits, and it draws the mask in the image's own grid.
    np.testing.assert_allclose(by_torch[0], by_runtime[0], atol=0.05)


def test_tasks_about_one_picture_are_judged_as_if_alone(task: Task) -> None:
    assert task.mask is not None
    other = dataclasses.replace(task, mask=~task.mask)
    answers: list[list[Geometry | None]] = [[RIGHT, WRONG], [None, None], [RIGHT, None]]
    segmenter = build_segmenter()
    load_weights(NANO, segmenter)
    for judge in (TorchJudge(segmenter, torch.device("cpu")), RuntimeJudge("nano")):
        first, none, last = judge.dice([task, task, other], answers)
        alone = [judge.dice([each], [own])[0] for each, own in ((task, answers[0]), (other, answers[2]))]
        judge.close()
        np.testing.assert_allclose([first, last], alone, atol=1e-6)
        assert none == [0, 0]
        assert first[0] > 0.8 > 0.5 > last[0]


def test_the_answers_grid_is_brought_to_that_of_the_pixels(task: Task) -> None:
    """The same task with numbers from 0 to 1000 instead."""
    factor = 1000 / 252

    def larger(geometry: Geometry) -> Geometry:
        box, points = (np.array(each) * factor for each in geometry)
        return tuple(box.tolist()), tuple(map(tuple, points.tolist()))  # type: ignore[return-value]

    truth = Truth(box=larger(RIGHT)[0], points=larger(RIGHT)[1], size=(1000, 1000))
    judge = RuntimeJudge("nano")
    ((one,),), ((other,),) = (
        judge.dice([dataclasses.replace(task, truth=each)], [[answer]])
        for each, answer in ((task.truth, RIGHT), (truth, larger(RIGHT)))
    )
    judge.close()
    assert other == pytest.approx(one, abs=1e-3)
    assert task.mask is not None
    assert one > dice(np.ones_like(task.mask), task.mask)


def test_a_closed_judge_says_so(task: Task) -> None:
    judge = RuntimeJudge("nano")
    judge.close()
    with pytest.raises(MedReasonerError, match="closed"):
        judge.dice([task], [[RIGHT]])
