"""One step of GRPO: answers are drawn, judged, compared within their group, and the policy moves towards the better."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medreasoner_train.completions import chosen
from medreasoner_train.grpo import group_advantages, policy_loss, telling_groups, token_weights
from medreasoner_train.grpo_config import GrpoConfig
from medreasoner_train.judge import MaskJudge
from medreasoner_train.loop import Optimiser
from medreasoner_train.reward_geometry import box_iou
from medreasoner_train.rewards import Reward, geometry_of, score
from medreasoner_train.rollout import Completion, Prompt, Rollouts, Sampling
from medreasoner_train.tasks import ExampleTasks, Task

__all__ = ["Episode", "GrpoTrainer", "Policy", "judged", "look_at_tasks"]


class Policy(Protocol):
    """How a model's log-probabilities are worked out."""

    def log_probs(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(N, L) log-probabilities of all completions' tokens, and which of these count."""


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


class GrpoTrainer:
    """The parts of a run, and its step.

    Parameters
    ----------
    model, policy
        What is trained, and how it is read.
    reference
        What it must stay near to, and how that is read; None if the loss has no KL term.
    rollouts, judge
        Who answers, and who makes masks of the answers (None: no reward on masks).
    """

    def __init__(
        self,
        config: GrpoConfig,
        *,
        model: Any,
        reference: tuple[Any, Policy] | None,
        policy: Policy,
        rollouts: Rollouts,
        judge: MaskJudge | None,
        optimiser: Optimiser,
    ) -> None:
        self._config, self._policy, self._rollouts, self._judge = config, policy, rollouts, judge
        self._model, self._reference, self._optimiser = model, reference, optimiser

    def refresh(self) -> None:
        """Give the engine of the rollouts the model's present weights."""
        self._rollouts.refresh(self._model)

    def collect(self, batches: Iterator[list[Task]], *, seed: int) -> tuple[list[Episode], int]:
        """Answered and judged groups, and how many batches of tasks were drawn for them.

        With dynamic sampling, batches are drawn until enough groups have answers of different worth; if there are not
        enough of them, the step is that much smaller.
        """
        options = self._config.train
        kept: list[Episode] = []
        for drawn in range(1, options.dynamic + 2):
            tasks = next(batches)
            prompts = [task.prompt for task in tasks]
            answers = self._rollouts.sample(prompts, self._config.rollouts, seed=seed + drawn)
            episodes = judged(tasks, answers, self._config, self._judge)
            if options.dynamic:
                totals, groups = _totals(episodes)
                telling = set(groups[telling_groups(totals, groups)].tolist())
                episodes = [each for index, each in enumerate(episodes) if index in telling]
            kept += episodes
            if len(kept) >= options.prompts:
                break
        return kept[: options.prompts], drawn

    def update(self, episodes: Sequence[Episode], share: float) -> dict[str, float]:
        """Move the weights, at a `share` of the full learning rate; returns what to log."""
        if not episodes:
            return {"groups": 0.0}
        options = self._config.train
        advantages = self._advantages(episodes)
        size = options.mini_batch or len(episodes)
        parts = [range(start, min(start + size, len(episodes))) for start in range(0, len(episodes), size)]
        # With one update the policy is still the one that answered; with several it moves away from it.
        old = None if len(parts) == 1 else self._read(episodes)
        measured: dict[str, float] = {}
        for part in parts:
            for name, value in self._one_update(episodes, part, advantages, old, share).items():
                measured[name] = measured.get(name, 0.0) + value / len(parts)
        self.refresh()
        return summary(episodes) | measured

    def _advantages(self, episodes: Sequence[Episode]) -> list[Tensor]:
        found = group_advantages(*_totals(episodes), scale=self._config.loss.scale_by_deviation)
        return list(torch.split(found, [len(each.totals) for each in episodes]))

    def _read(self, episodes: Sequence[Episode]) -> list[Tensor]:
        """Log-probabilities (G, L) of each group as the model is now, without gradients; L of its micro-batch."""
        size = self._config.train.micro_batch
        found: list[Tensor] = []
        with torch.no_grad():
            for start in range(0, len(episodes), size):
                some = episodes[start : start + size]
                values, _ = self._log_probs(self._model, self._policy, some)
                found += torch.split(values, [len(each.completions) for each in some])
        return found

    def _log_probs(self, model: Any, policy: Policy, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        bf16 = self._config.train.precision == "bf16"
        device = self._config.train.device.partition(":")[0]
        with torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext():
            return policy.log_probs(
                model,
                [each.task.prompt for each in episodes],
                [each.completions for each in episodes],
                temperature=self._config.rollouts.temperature,
            )

    def _one_update(
        self,
        episodes: Sequence[Episode],
        part: range,
        advantages: list[Tensor],
        old: list[Tensor] | None,
        share: float,
    ) -> dict[str, float]:
        options = self._config.train
        mask = chosen([each for index in part for each in episodes[index].completions])
        weights = token_weights(mask, self._config.loss.normalise, max_tokens=self._config.rollouts.max_tokens)
        sums: dict[str, Tensor] = {}
        at = 0
        for start in range(0, len(part), options.micro_batch):
            own = part[start : start + options.micro_batch]
            some = [episodes[index] for index in own]
            log_probs, counts = self._log_probs(self._model, self._policy, some)
            rows, length = log_probs.shape
            weight = weights[at : at + rows, :length].to(log_probs.device) * counts
            at += rows
            before = log_probs.detach() if old is None else _joined([old[index] for index in own], length)
            reference = None
            if self._config.loss.kl:
                assert self._reference is not None
                with torch.no_grad():
                    reference, _ = self._log_probs(*self._reference, some)
            gain = torch.cat([advantages[index] for index in own]).to(log_probs.device)
            loss, measured = policy_loss(log_probs, before, reference, gain, weight, self._config.loss)
            loss.backward()  # type: ignore[no-untyped-call]
            measured |= {"loss": loss.detach(), "log_prob": (log_probs.detach() * weight).sum()}
            for name, value in measured.items():
                sums[name] = sums[name] + value if name in sums else value
        sums["norm"] = self._optimiser.step(share)
        return {name: float(value) for name, value in sums.items()}


def _totals(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
    """What each answer is worth (N,), and its group (N,)."""
    totals = torch.tensor([value for each in episodes for value in each.totals])
    return totals, torch.tensor([index for index, each in enumerate(episodes) for _ in each.totals])


def _joined(values: Sequence[Tensor], length: int) -> Tensor:
    """Groups' (G, L) tables as one, each cut or filled up to `length`."""
    return torch.cat(
        [torch.nn.functional.pad(each[:, :length], (0, max(0, length - each.shape[1]))) for each in values]
    )


def summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over the answers: rewards and their parts, box IoU of those about something that is there, lengths."""
    flat = [each for episode in episodes for each in episode.rewards]
    totals, groups = _totals(episodes)
    answers = [(each, episode.task) for episode in episodes for each in episode.completions]
    ious = [_iou(each, task) for each, task in answers if task.truth.box is not None]
    found = {
        "reward": float(totals.mean()),
        **{
            name: float(np.mean([getattr(each, name) for each in flat]))
            for name in ("thinking", "segment", "box", "points", "mask")
        },
        "iou": float(np.mean(ious)) if ious else 0.0,
        "telling": float(telling_groups(totals, groups).float().mean()),
        "tokens": float(np.mean([len(each.ids) for each, _ in answers])),
        "finished": float(np.mean([each.finished for each, _ in answers])),
        "groups": float(len(episodes)),
    }
    return found


def look_at_tasks(rollouts: Rollouts, tasks: ExampleTasks) -> dict[str, float]:
    """Mean box IoU of the likeliest answers, and how often nothing was found; over about 500 rows at most."""
    rng = np.random.default_rng(1)
    rows = [tasks.task(index, str(index), rng) for index in range(0, len(tasks), max(1, len(tasks) // 500))]
    sampling = Sampling(count=1, temperature=1e-3, max_tokens=128)
    answers = rollouts.sample([row.prompt for row in rows], sampling, seed=0)
    ious = [_iou(own[0], row) for own, row in zip(answers, rows, strict=True) if row.truth.box is not None]
    said = [(geometry_of(own[0].text) is None, row.truth.box is None) for own, row in zip(answers, rows, strict=True)]
    found = {"val_iou": float(np.mean(ious))} if ious else {}
    for name, absent in (("present", False), ("absent", True)):
        if own := [nothing for nothing, truth in said if truth == absent]:
            found[f"no_box/{name}"] = float(np.mean(own))
    return found


def _iou(completion: Completion, task: Task) -> float:
    geometry = geometry_of(completion.text)
    if geometry is None or task.truth.box is None:
        return 0.0
    return box_iou(geometry[0], task.truth.box)
