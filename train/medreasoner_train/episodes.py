"""Answered groups: what their answers are worth, and what is told of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medreasoner_train.distributed import Processes
from medreasoner_train.grpo import telling_groups
from medreasoner_train.grpo_config import GrpoConfig
from medreasoner_train.judge import MaskJudge
from medreasoner_train.reward_geometry import box_iou
from medreasoner_train.rewards import Reward, geometry_of, score
from medreasoner_train.rollout import Completion, Rollouts, Sampling
from medreasoner_train.tasks import ExampleTasks, Task

__all__ = ["Episode", "Told", "is_telling", "judged", "look_at_tasks", "summary", "told", "totals_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A group: a task, the answers to it and what each is worth."""

    task: Task
    completions: tuple[Completion, ...]
    rewards: tuple[Reward, ...]
    totals: tuple[float, ...]


def judged(
    tasks: Sequence[Task], answers: Sequence[Sequence[Completion]], config: GrpoConfig, judge: MaskJudge | None
) -> list[Episode]:
    """The groups with their rewards."""
    options = config.reward
    dices: Sequence[Sequence[float | None]] = [[None] * len(own) for own in answers]
    if judge is not None:
        dices = judge.dice(tasks, [[geometry_of(each.text) for each in own] for own in answers])
    episodes = []
    for task, own, dice in zip(tasks, answers, dices, strict=True):
        known = task.mask is not None or task.truth.box is None
        rewards = tuple(
            score(
                each.text,
                task.truth,
                mode=options.mode,
                think=task.prompt.think,
                compat=options.compat,
                mask_dice=value if known else None,
            )
            for each, value in zip(own, dice, strict=True)
        )
        totals = tuple(each.total + (options.mask - 1) * each.mask for each in rewards)
        episodes.append(Episode(task=task, completions=tuple(own), rewards=rewards, totals=totals))
    return episodes


def is_telling(episode: Episode, *, apart: float = 1e-6) -> bool:
    """Whether the group's answers are of different worth, by more than `apart`."""
    return bool(telling_groups(*totals_of([episode.totals]), apart=apart).any())


def totals_of(groups: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """What each answer is worth (N,), and its group (N,)."""
    totals = torch.tensor([value for each in groups for value in each])
    return totals, torch.tensor([index for index, each in enumerate(groups) for _ in each])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What metrics need of a group, without its picture; `ious` is empty where the target is absent."""

    place: int
    totals: tuple[float, ...]
    rewards: tuple[Reward, ...]
    ious: tuple[float, ...]
    tokens: tuple[int, ...]
    finished: tuple[bool, ...]


def told(episode: Episode, place: int) -> Told:
    """What metrics need of the group at a place of the whole batch."""
    present = episode.task.truth.box is not None
    return Told(
        place=place,
        totals=episode.totals,
        rewards=episode.rewards,
        ious=tuple(_iou(each, episode.task) for each in episode.completions) if present else (),
        tokens=tuple(len(each.ids) for each in episode.completions),
        finished=tuple(each.finished for each in episode.completions),
    )


def summary(groups: Sequence[Told]) -> dict[str, float]:
    """Means over the answers: rewards and their parts, box IoU of those about something that is there, lengths."""
    rewards = [each for group in groups for each in group.rewards]
    totals, index = totals_of([each.totals for each in groups])
    ious = [value for each in groups for value in each.ious]
    return {
        "reward": float(totals.mean()),
        **{
            name: float(np.mean([getattr(each, name) for each in rewards]))
            for name in ("thinking", "segment", "box", "points", "mask")
        },
        "iou": float(np.mean(ious)) if ious else 0.0,
        "telling": float(telling_groups(totals, index).float().mean()),
        "tokens": float(np.mean([value for each in groups for value in each.tokens])),
        "finished": float(np.mean([value for each in groups for value in each.finished])),
        "groups": float(len(groups)),
    }


def look_at_tasks(rollouts: Rollouts, tasks: ExampleTasks, processes: Processes) -> dict[str, float]:
    """Mean box IoU of the likeliest answers, and how often nothing was found; over about 500 rows, dealt out."""
    asked = range(0, len(tasks), max(1, len(tasks) // 500))
    own = [asked[place] for place in processes.own(len(asked))]
    rows = [tasks.task(index, str(index), np.random.default_rng([1, index])) for index in own]
    sampling = Sampling(count=1, temperature=1e-3, max_tokens=128)
    answers = rollouts.sample([row.prompt for row in rows], sampling, seed=0)
    everyone = processes.everywhere(
        [
            (row.truth.box is None, geometry_of(each.text) is None, _iou(each, row))
            for (each,), row in zip(answers, rows, strict=True)
        ]
    )
    said = [each for one in everyone for each in one]
    ious = [iou for absent, _, iou in said if not absent]
    found = {"val_iou": float(np.mean(ious))} if ious else {}
    for name, absent in (("present", False), ("absent", True)):
        if nothing := [none for truth, none, _ in said if truth == absent]:
            found[f"no_box/{name}"] = float(np.mean(nothing))
    return found


def _iou(completion: Completion, task: Task) -> float:
    geometry = geometry_of(completion.text)
    if geometry is None or task.truth.box is None:
        return 0.0
    return box_iou(geometry[0], task.truth.box)
