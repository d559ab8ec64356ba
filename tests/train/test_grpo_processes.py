"""Two real processes, started by the real command, train as one does, and each takes up what the other left."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medreasoner_cli.main import run as command
from medreasoner_train.config import ConfigError
from medreasoner_train.distributed import Processes, ProcessesError, ScaleOptions
from medreasoner_train.grpo_config import read_config
from medreasoner_train.grpo_run import run
from medreasoner_train.grpo_setup import make_setup
from medreasoner_train.hub_policy import load_hub_model
from medreasoner_train.launch import launch

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
FSDP = "fsdp = true\nmicro_batch = 2\n"
KINDS = {"packed": (PACKED, ""), "hub": (HUB, FSDP)}


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


def trained_on(tmp_path: Path, kind: str, data: Path, start: Path, launch: Callable[[Path], None]) -> Path:
    """Three steps by one process, and one by one and two by two: they must come to the same. The latter's folder."""

    def written(steps: int, processes: int, out: str) -> Path:
        return settings(tmp_path, kind, steps=steps, processes=processes, data=data, start=start, out=out)

    before = {name: value.detach() for name, value in load_hub_model(start).named_parameters()}
    one, two = tmp_path / "one", tmp_path / "two"
    run(read_config(written(1, 1, "two")))
    shutil.copytree(two, one)
    run(read_config(written(3, 1, "one")))
    launch(written(3, 2, "two"))  # goes on from the checkpoint of a single process
    assert_same(one, two, before)
    assert_same_metrics(one, two, (2, 3))
    first, second = (load_hub_model(each / "checkpoint").state_dict() for each in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=2**-7, atol=4 * LR)
    return two


def assert_same_metrics(one: Path, two: Path, steps: tuple[int, ...]) -> None:
    alone, both = rows(one), rows(two)
    for step in steps:
        assert alone[step].keys() == both[step].keys()
        for name in alone[step].keys() - {"s_per_step", "eta_min"}:
            assert both[step][name] == pytest.approx(alone[step][name], rel=1e-3, abs=1e-5), (step, name)


def test_two_processes_train_as_one(tmp_path: Path, grounding_set: Path, start: Path) -> None:
    """With DDP; groups that are dealt out unevenly and drawn again where they teach nothing, two updates a round."""

    def launch(path: Path) -> None:
        assert command(["train", "grpo", str(path)]) == 0

    two = trained_on(tmp_path, "packed", grounding_set, start, launch)
    for out in ("one", "two"):  # and one goes on from the checkpoint of two
        run(read_config(settings(tmp_path, "packed", steps=4, processes=1, data=grounding_set, start=start, out=out)))
    assert_same_metrics(tmp_path / "one", two, (4,))
    assert (two / "samples-000003.png").exists()
    assert not list(tmp_path.glob("**/*.part*"))


def test_a_split_model_trains_as_a_whole_one(tmp_path: Path, csv: Path, start: Path) -> None:
    """With FSDP, by torchrun; answers of the runtime, masks of nano's segmenter, parts of groups at a time."""

    def torchrun(path: Path) -> None:
        arguments = ["--nproc-per-node", "2", "--standalone", "-m", "medreasoner_cli", "train", "grpo", str(path)]
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]

    trained_on(tmp_path, "hub", csv, start, torchrun)


def test_a_process_that_fails_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the command; this one starts sooner than a training."""
    assert launch(ScaleOptions(processes=2), ["ground", str(tmp_path / "none.png"), "Where?"]) == 3
    said = capfd.readouterr().err
    assert f"error: {tmp_path / 'none.png'}" in said
    assert "Traceback" not in said


def test_several_machines_are_told_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(
        ProcessesError, match=r"torchrun --nnodes 2 --nproc-per-node 4 .* -m medreasoner_cli .* a\.toml"
    ):
        launch(ScaleOptions(nodes=2, processes=8), ["train", "grpo", "a.toml"])


def test_what_many_processes_cannot_do_is_named(tmp_path: Path, grounding_set: Path, start: Path) -> None:
    path = settings(tmp_path, "packed", steps=1, processes=1, data=grounding_set, start=start, out="out")
    config = read_config(path)
    with pytest.raises(ProcessesError, match=r"asks for 2 processes and 1 were started; .* medreasoner-cli train grpo"):
        run(dataclasses.replace(config, scale=ScaleOptions(processes=2)))
    with pytest.raises(ConfigError, match=r"prompts: 5 are too few for 6 processes"):
        run(dataclasses.replace(config, scale=ScaleOptions(processes=6)))
    with pytest.raises(ConfigError, match=r'fsdp splits policies of kind "hub"'):
        make_setup(dataclasses.replace(config, scale=ScaleOptions(processes=2, fsdp=True)), Processes(ScaleOptions()))
