"""Prompts that a reasoner wrote: which are kept, where they lie, and a step of the segmenter's training on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medreasoner_train.checkpoint import load_weights
from medreasoner_train.language import answer_text
from medreasoner_train.loop import LoopOptions
from medreasoner_train.rewards import Truth
from medreasoner_train.rollout import Completion, Prompt, Sampling
from medreasoner_train.segmenter import SIZE, SegmenterOptions, build_segmenter, run, save_segmenter
from medreasoner_train.tasks import Task
from medreasoner_train.written import WrittenPrompts

NANO = Path(__file__).parents[2] / "models" / "nano" / "reasoner"
RIGHT = (50.0, 60.0, 200.0, 180.0, 100.0, 120.0, 150.0, 120.0)
FAR = (0.0, 0.0, 40.0, 50.0, 20.0, 20.0, 30.0, 30.0)


class Two:
    """Tasks whose mask is the box's rectangle, and one whose target is absent."""

    def draw(self, number: int, *, count: int, seed: int) -> list[Task]:
        mask = np.zeros((252, 252), bool)
        mask[60:180, 50:200] = True
        pixels = np.full((252, 252), 40, np.uint8)
        pixels[mask] = 200
        prompt = Prompt(key=f"{number}", pixels=pixels, query="Which square?")
        there = Truth(box=(50, 60, 200, 180), points=((100, 120), (150, 120)), size=(252, 252))
        absent = Truth(box=None, points=None, size=(252, 252))
        return [Task(prompt=prompt, truth=there, mask=mask), Task(prompt=prompt, truth=absent)][:count]


class Says:
    """Answers from a list, in turn."""

    def __init__(self, *answers: tuple[float, ...] | None) -> None:
        self.answers = answers

    def refresh(self, model: Any) -> None:
        raise AssertionError("the reasoner is not trained here")

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        texts = [answer_text(None if each is None else np.array(each)) for each in self.answers]
        return [[Completion(ids=(), text=text) for text in texts[: sampling.count]] for _ in prompts]

    def close(self) -> None:
        pass


def test_answers_near_the_target_become_prompts_in_the_segmenters_pixels() -> None:
    source = WrittenPrompts(Two(), Says(RIGHT, None, FAR))
    images, given = source.batch(0, count=2, per_image=3, seed=0)
    assert images.shape == (2, 3, SIZE, SIZE)
    assert given is not None
    assert given.image.tolist() == [0]  # neither the far box, nor "absent", nor a box for what is absent
    scale = SIZE / 252
    torch.testing.assert_close(given.boxes[0], torch.tensor(RIGHT[:4]) * scale)
    torch.testing.assert_close(given.points[0].flatten(), torch.tensor(RIGHT[4:]) * scale)
    inside = images[0, 0] > 0  # picture and mask are brought to one grid
    assert (inside == given.masks[0]).float().mean() > 0.99


def test_a_batch_without_a_near_answer_has_no_prompts() -> None:
    assert WrittenPrompts(Two(), Says(FAR)).batch(0, count=2, per_image=1, seed=0)[1] is None


def test_a_step_on_nanos_own_answers(grounding_set: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_segmenter(build_segmenter(), tmp_path / "start")
    start = build_segmenter()
    load_weights(tmp_path / "start", start)
    before = start.state_dict()
    loop = LoopOptions(steps=1, out=tmp_path / "out", warmup=0, log_every=1)
    run(
        SegmenterOptions(
            data=grounding_set, loop=loop, images=4, per_image=2, start=tmp_path / "start", frozen_encoder=True,
            reasoner=NANO, written=0.5, eval_every=0,
        )
    )  # fmt: skip
    (row,) = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert 0 < row["loss"] < 20
    after = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["modules"]["segmenter"]
    far = {name.split(".")[0] for name, value in after.items() if (value - before[name]).abs().max() > 1e-5}
    assert "mask_decoder" in far
    assert "vision_encoder" not in far  # which is frozen
