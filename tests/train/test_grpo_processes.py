"""Two real processes, started by the real command, train as one does, and each takes up what the other left."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medreasoner_cli.main import run as command
from medreasoner_train.config import ConfigError
from medreasoner_train.distributed import ProcessesError, ScaleOptions
from medreasoner_train.grpo_config import read_config
from medreasoner_train.grpo_run import run
from medreasoner_train.hub_policy import load_hub_model

LR = 1e-5  # so low that what rounding does to a step changes no draw of the next
TEXT = """
[data]
path = "{data}"
[policy]
checkpoint = "{start}"
[reward]
mode = "hard"
[train]
steps = {steps}
out = "{out}"
prompts = 5
cooldown = 0.0
lr = 1e-5
warmup = 1
save_every = 1
"""
ROLLOUTS = '[rollouts]\nengine = "runtime"\ncount = 3\nmax_tokens = 64\n'  # by the grammar: rewards differ
PACKED = "mini_batch = 5\nmicro_batch = 2\ndynamic = 1\npictures_every = 3\n" + ROLLOUTS
HUB = "micro_batch = 1\neval_every = 3\n" + ROLLOUTS
LORA = "[policy.lora]\nrank = 2\nalpha = 4.0\n"
FSDP = "fsdp = true\nmicro_batch = 2\n"
KINDS = {"packed": (PACKED, ""), "hub": (HUB, FSDP), "lora": (HUB + LORA, FSDP)}


def settings(folder: Path, kind: str, *, steps: int, processes: int, data: Path, start: Path, out: str) -> Path:
    """A settings file of its own for each run."""
    more, scale = KINDS[kind]
    text = TEXT.format(data=data, start=start, steps=steps, out=folder / out) + more
    if kind != "packed":
        text = text.replace("[reward]", 'kind = "hub"\n[reward]\nmask = 1.0')
    path = folder / f"{out}-{steps}-{processes}.toml"
    path.write_text(text + f"[scale]\nprocesses = {processes}\n" + scale)
    return path


def rows(out: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}


def assert_same(one: Path, two: Path, before: dict[str, torch.Tensor]) -> None:
    """The same gradients, to rounding, and the same steps by them, save where a gradient is next to nothing."""
    a, b = (torch.load(each / "last.pt", weights_only=True) for each in (one, two))
    assert (a["step"], a["drawn"]) == (b["step"], b["drawn"])
    weights, others = a["modules"]["model"], b["modules"]["model"]
    assert weights.keys() == others.keys()
    apart = torch.cat([(weights[name] - others[name]).flatten() for name in weights])
    moved = torch.cat([(weights[name] - value).flatten() for name, value in before.items()])
    assert float(moved.abs().max()) > LR
    assert float((apart.abs() < 0.05 * LR).float().mean()) > 0.99
    moments, again = ({k: v["exp_avg"] for k, v in each["optimiser"][0]["state"].items()} for each in (a, b))
    assert moments.keys() == again.keys()
    for name in moments:
        torch.testing.assert_close(moments[name], again[name], rtol=1e-3, atol=1e-4 * float(moments[name].abs().max()))


def check(tmp_path: Path, kind: str, data: Path, start: Path, launch: Any) -> None:
    def written(steps: int, processes: int, out: str) -> Path:
        return settings(tmp_path, kind, steps=steps, processes=processes, data=data, start=start, out=out)

    before = {name: value.detach() for name, value in load_hub_model(start).named_parameters()}
    one, two = tmp_path / "one", tmp_path / "two"
    run(read_config(written(1, 1, "two")))
    shutil.copytree(two, one)
    run(read_config(written(3, 1, "one")))
    launch(written(3, 2, "two"))  # goes on from the checkpoint of a single process
    known = before if kind != "lora" else {}
    if known:
        assert_same(one, two, known)
    alone, both = rows(one), rows(two)
    for step in (2, 3):
        assert alone[step].keys() == both[step].keys()
        for name in alone[step].keys() - {"s_per_step", "eta_min"}:
            assert both[step][name] == pytest.approx(alone[step][name], rel=1e-3, abs=1e-5), (step, name)
    first, second = (load_hub_model(each / "checkpoint").state_dict() for each in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=2**-7, atol=4 * LR)
    for out in (one, two):  # and one goes on from that of two
        run(read_config(written(4, 1, out.name)))
    for name in alone[3].keys() - {"s_per_step", "eta_min"}:
        assert rows(two)[4].get(name, 0) == pytest.approx(rows(one)[4].get(name, 0), rel=1e-3, abs=1e-5), name


def test_two_processes_train_as_one(tmp_path: Path, grounding_set: Path, start: Path) -> None:
    """With DDP, groups dealt out unevenly and drawn again where they teach nothing, several updates a round."""
    check(
        tmp_path,
        "packed",
        grounding_set,
        start,
        lambda path: pytest.fail if command(["train", "grpo", str(path)]) else None,
    )
    assert [each.name for each in (tmp_path / "two").glob("samples-*")] == ["samples-000003.png"]


@pytest.mark.parametrize("kind", ["hub", "lora"])
def test_a_split_model_trains_as_a_whole_one(tmp_path: Path, csv: Path, start: Path, kind: str) -> None:
    """With FSDP, by torchrun; answers of the runtime, masks of nano's segmenter, parts of groups at a time."""

    def torchrun(path: Path) -> None:
        arguments = ["--nproc-per-node", "2", "--standalone", "-m", "medreasoner_cli", "train", "grpo", str(path)]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]

    check(tmp_path, kind, csv, start, torchrun)
