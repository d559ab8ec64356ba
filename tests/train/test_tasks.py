"""What GRPO asks of a grounding set: by step, seed and place alone."""

from collections.abc import Callable

import numpy as np
import pytest

from medreasoner_train.sft_data import SftData, SftOptions
from medreasoner_train.targets import box_of
from medreasoner_train.tasks import GroundingTasks, Task


@pytest.fixture
def data(asking: Callable[[SftOptions], SftData]) -> SftData:
    return asking(SftOptions(size=84, absent=0.2))


def told(task: Task) -> tuple[str, str, bool, bytes, object]:
    return task.prompt.key, task.prompt.query, task.prompt.think, task.prompt.pixels.tobytes(), task.truth


@pytest.mark.parametrize("per_image", [1, 3])
def test_a_task_depends_on_its_place_alone(data: SftData, per_image: int) -> None:
    tasks = GroundingTasks(data, think=0.3, per_image=per_image)
    whole = [told(each) for each in tasks.draw(5, count=8, seed=2)]
    assert len({key for key, *_ in whole}) == 8
    for places in ([1, 2, 7], [6, 4, 3, 0]):
        assert [told(each) for each in tasks.draw(5, count=8, seed=2, places=places)] == [whole[i] for i in places]
    assert [told(each) for each in tasks.draw(6, count=8, seed=2)] != whole


def test_questions_about_an_image_share_its_pixels(data: SftData) -> None:
    tasks = GroundingTasks(data, think=0.0, per_image=3).draw(0, count=7, seed=4)
    arrays = [task.prompt.pixels for task in tasks]
    assert [arrays[i] is arrays[i - 1] for i in range(1, 7)] == [True, True, False, True, True, False]
    assert len({task.prompt.query for task in tasks}) > 3
    for task in tasks:
        if task.mask is None:
            assert task.truth.box is None
            continue
        assert task.truth.box is not None
        scale = np.array(task.truth.size * 2) / np.array(task.mask.shape[::-1] * 2)
        np.testing.assert_allclose(np.array(task.truth.box), np.array(box_of(task.mask)) * scale, atol=1e-6)


def test_one_question_an_image_draws_as_before(data: SftData) -> None:
    """A run that goes on from its last checkpoint is asked what it would have been asked."""
    (first, *_) = GroundingTasks(data, think=0.0).draw(3, count=4, seed=1)
    (same, *_) = GroundingTasks(data, think=0.0, per_image=2).draw(3, count=8, seed=1)
    assert (first.prompt.query, first.truth) == (same.prompt.query, same.truth)
