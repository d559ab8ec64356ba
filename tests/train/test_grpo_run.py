"""GRPO on a drawn data set with a toy policy: it runs, resumes exactly, and moves towards what is rewarded."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

import medreasoner_train
from medreasoner.errors import BundleError, MissingExtraError
from medreasoner_cli.main import run as command
from medreasoner_train.config import ConfigError
from medreasoner_train.episodes import Episode
from medreasoner_train.grpo_config import GrpoConfig, read_config
from medreasoner_train.grpo_run import run
from medreasoner_train.hub_policy import load_hub_model
from medreasoner_train.lora import LoraOptions
from medreasoner_train.rewards import Reward

SIZE = 84
RECIPES = Path(medreasoner_train.__file__).parent / "recipes"
TEXT = """
[data]
path = "{data}"
absent = 0.3
think = 0.25
[policy]
checkpoint = "{start}"
[rollouts]
count = 3
max_tokens = 6
[reward]
mode = "hard"
[train]
out = "{out}"
steps = 4
prompts = 4
mini_batch = 2
micro_batch = 1
lr = 1e-3
save_every = 2
pictures_every = 4
"""


@pytest.fixture
def settings(tmp_path: Path, start: Path, grounding_set: Path) -> Path:
    path = tmp_path / "grpo.toml"
    path.write_text(TEXT.format(data=grounding_set, start=start, out=tmp_path / "run"))
    return path


@pytest.fixture
def config(settings: Path) -> GrpoConfig:
    return read_config(settings)


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def changed(config: GrpoConfig, **train: Any) -> GrpoConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def rewarded_by_sign(start: Path, shares: list[float]) -> Callable[..., list[Episode]]:
    """A judge for which an answer is worth the sign of its second token in one direction of the embedding.

    A round's mean worth is added to `shares`.
    """
    sign = load_hub_model(start).model.language_model.embed_tokens.weight[:, 0] > 0

    def by_sign(tasks: Any, answers: Any, *_: object) -> list[Episode]:
        worth = [[float(sign[each.ids[1]]) for each in own] for own in answers]
        shares.append(float(np.mean(worth)))
        return [
            Episode(
                task=task,
                completions=tuple(own),
                rewards=tuple(Reward(segment=each) for each in value),
                totals=tuple(value),
            )
            for task, own, value in zip(tasks, answers, worth, strict=True)
        ]

    return by_sign


def test_the_command_writes_a_checkpoint_metrics_and_pictures(settings: Path, tmp_path: Path, start: Path) -> None:
    assert command(["train", "grpo", str(settings)]) == 0
    out = tmp_path / "run"
    written = rows(out)
    assert [row["step"] for row in written] == [1, 2, 3, 4]
    assert all(np.isfinite(list(row.values())).all() for row in written)
    load_hub_model(out / "checkpoint")
    assert (out / "checkpoint" / "medreasoner.json").read_bytes() == (start / "medreasoner.json").read_bytes()
    with PilImage.open(out / "samples-000004.png") as picture:
        assert picture.size == (4 * 320, 320 + 58)


def test_frozen_parts_stay_as_they_are(config: GrpoConfig, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medreasoner_train.grpo_trainer.judged", rewarded_by_sign(start, []))
    policy = dataclasses.replace(config.policy, frozen_vision=True, frozen_embeddings=True)
    run(changed(dataclasses.replace(config, policy=policy), steps=2, lr=1e-2, pictures_every=0))
    before, after = (load_hub_model(each).state_dict() for each in (start, config.train.out / "checkpoint"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "visual" in name or "embed_tokens" in name or "lm_head" in name]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(config: GrpoConfig, tmp_path: Path) -> None:
    """The loop is stopped between checkpoints: what came after the last one is done again, and comes out the same."""
    run(changed(config, out=tmp_path / "whole"))
    whole = rows(tmp_path / "whole")
    parts = changed(config, out=tmp_path / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medreasoner_train.grpo_run.sheet", _stop)
        with pytest.raises(KeyboardInterrupt):
            run(changed(parts, pictures_every=3))
    assert [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 3]
    run(parts)
    again = rows(tmp_path / "parts")
    assert [row["step"] for row in again] == [1, 2, 3, 3, 4]
    for row, other in ((again[2], whole[2]), (again[3], whole[2]), (again[4], whole[3])):
        for name in row.keys() - {"s_per_step", "eta_min"}:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_policy_learns_what_is_rewarded(config: GrpoConfig, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr("medreasoner_train.grpo_trainer.judged", rewarded_by_sign(start, shares))
    longer = changed(config, steps=50, prompts=8, mini_batch=0, micro_batch=8, lr=3e-2, pictures_every=0)
    run(dataclasses.replace(longer, rollouts=dataclasses.replace(config.rollouts, count=8, max_tokens=2)))
    assert np.mean(shares[:3]) < 0.65
    assert np.mean(shares[-3:]) > 0.85
    kl = [row["kl"] for row in rows(config.train.out)]
    assert kl[0] == pytest.approx(0, abs=1e-6)  # the reference is the start
    assert kl[-1] > 0.01
    before, after = load_hub_model(start), load_hub_model(config.train.out / "checkpoint")
    apart = [float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert max(apart) > 1e-3


def test_groups_that_teach_nothing_are_drawn_again(config: GrpoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    one = dataclasses.replace(config, rollouts=dataclasses.replace(config.rollouts, count=1))
    run(changed(one, steps=2, dynamic=2, save_every=1))  # a single answer never differs from its group
    written = rows(config.train.out)
    assert [row["groups"] for row in written] == [0, 0]
    state = torch.load(config.train.out / "last.pt", weights_only=True)
    assert state["drawn"] == 6  # three rounds a step


def test_groups_whose_answers_are_worth_nearly_the_same_may_teach_nothing_too(config: GrpoConfig) -> None:
    run(changed(config, steps=1, dynamic=1, apart=1e3, save_every=1))  # no answer is worth so much
    assert [row["groups"] for row in rows(config.train.out)] == [0]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps = 4", "steps = 4\nspeed = 3", r"\[train\]: unknown key speed; there are out, steps"),
        ("steps = 4\n", "", r"\[train\]: steps must be given"),
        ("steps = 4", 'steps = "four"', r"\[train\] steps: expected int, got 'four'"),
        ("steps = 4", "steps = 0", r"\[train\]: steps is at least 1"),
        ("mini_batch = 2", "mini_batch = 3", "4 prompts do not divide into parts of 3"),
        ('mode = "hard"', 'mode = "harder"', r"\[reward\] mode: 'harder' is none of base, soft, hard"),
        ("absent = 0.3", "absent = 3", r"\[data\]: absent is a share"),
        ("absent = 0.3", "per_image = 0", r"\[data\]: per_image is at least 1"),
        ("[reward]", "[rewards]", "unknown table rewards; there are data, policy"),
        ("[policy]", "policy = 3\n[other]", "policy"),
        ("[policy]", "[policy", "not TOML"),
    ],
)
def test_settings_that_are_wrong_are_named(settings: Path, old: str, new: str, words: str) -> None:
    settings.write_text(settings.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(settings)
    assert str(settings) in str(caught.value)


def test_settings_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        read_config(tmp_path / "none.toml")


def test_a_folder_without_a_checkpoint_is_named(config: GrpoConfig, start: Path) -> None:
    (start / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(BundleError, match=r"start: not a Qwen2\.5-VL checkpoint"):
        run(config)


def test_an_unknown_source_is_named(config: GrpoConfig) -> None:
    from medreasoner.errors import MedReasonerError

    data = dataclasses.replace(config.data, without=("elsewhere",))
    with pytest.raises(MedReasonerError, match="no samples of the source elsewhere; there are acdc_mri"):
        run(dataclasses.replace(config, data=data))


def test_tensorboards_files_are_written(config: GrpoConfig) -> None:
    pytest.importorskip("tensorboard")
    run(changed(config, steps=1, tensorboard=True))
    assert list((config.train.out / "tensorboard").glob("events.*"))


def test_tensorboard_is_an_extra(config: GrpoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"medreasoner\[tensorboard\]"):
        run(changed(config, tensorboard=True))


def test_a_folder_with_a_csv_is_trained_on(config: GrpoConfig, csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth reaches the rewards in the answer's grid."""
    seen: list[Any] = []
    from medreasoner_train import grpo_trainer

    real = grpo_trainer.judged
    monkeypatch.setattr(grpo_trainer, "judged", lambda tasks, *rest: (seen.extend(tasks), real(tasks, *rest))[1])
    data = dataclasses.replace(config.data, path=csv)
    run(changed(dataclasses.replace(config, data=data), steps=3, eval_every=3, mini_batch=0))
    boxes = {task.truth.box for task in seen}
    assert boxes == {(63.0, 63.0, 189.0, 189.0), (126.0, 126.0, 252.0, 252.0), None}  # of 252 for 80 x 60
    for task in seen:
        assert task.prompt.pixels.shape == (SIZE, SIZE, 3)
        assert (task.mask is not None) == (task.truth.box == (63.0, 63.0, 189.0, 189.0))
        assert (task.truth.points is not None) == (task.mask is not None)
    assert "val_iou" in rows(config.train.out)[-1] or "no_box/absent" in rows(config.train.out)[-1]


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2, alpha=4.0)])
def test_any_checkpoint_is_trained_through_the_runtime(
    config: GrpoConfig, csv: Path, start: Path, lora: LoraOptions | None
) -> None:
    """By transformers' own forward, with answers of the runtime; images keep their own size."""
    policy = dataclasses.replace(config.policy, kind="hub", lora=lora)
    data = dataclasses.replace(config.data, path=csv, think=0.0)
    reward = dataclasses.replace(config.reward, mode="soft", mask=1.0, segmenter="nano")
    rollouts = dataclasses.replace(config.rollouts, max_tokens=64)
    own = dataclasses.replace(config, policy=policy, data=data, reward=reward, rollouts=rollouts)
    run(changed(own, steps=3, eval_every=3, mini_batch=0, micro_batch=2, lr=1e-2, pictures_every=0))
    written = rows(config.train.out)
    assert [row["step"] for row in written] == [0, 1, 2, 3, 3]  # with a look before and after
    assert all(row["segment"] == 1.0 for row in written[1:4])  # the grammar's answers are valid
    assert written[1]["kl"] == pytest.approx(0, abs=1e-5)
    assert written[3]["kl"] > 0
    before, after = load_hub_model(start), load_hub_model(config.train.out / "checkpoint")
    moved = [
        name
        for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if float((a - b).detach().abs().max()) > 0
    ]
    assert moved
    if lora is not None:
        assert all(name.split(".")[-2] in lora.targets for name in moved)
        assert (config.train.out / "adapter" / "adapter_model.safetensors").exists()


def test_a_plan_needs_the_checkpoints_sizes_alone(
    settings: Path, start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (start / "model.safetensors").unlink()
    assert command(["train", "grpo", str(settings), "--plan"]) == 0
    told = capsys.readouterr().out
    assert "memory of one GPU" in told
    assert "adam" in told


def test_vllm_is_an_extra(config: GrpoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtraError, match=r"medreasoner\[vllm\]"):
        run(dataclasses.replace(config, rollouts=dataclasses.replace(config.rollouts, engine="vllm")))


@pytest.mark.parametrize("name", sorted(each.name for each in RECIPES.glob("*.toml")))
def test_recipes_are_sound(name: str) -> None:
    assert read_config(RECIPES / name).train.steps > 0


def test_a_checkpoint_without_settings_of_ours_is_trained(config: GrpoConfig, csv: Path, start: Path) -> None:
    """As others write it: images resized as Qwen2.5-VL does, coordinates in pixels of that."""
    (start / "medreasoner.json").unlink()
    data = dataclasses.replace(config.data, path=csv, think=0.0)
    rollouts = dataclasses.replace(config.rollouts, max_tokens=96)
    run(changed(dataclasses.replace(config, data=data, rollouts=rollouts), steps=1, pictures_every=0))
    (row,) = rows(config.train.out)
    assert np.isfinite(list(row.values())).all()
    assert row["segment"] > 0
    assert not (config.train.out / "checkpoint" / "medreasoner.json").exists()
