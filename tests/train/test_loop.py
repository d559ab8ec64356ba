"""A killed run goes on as if nothing had happened, and a checkpoint is whole or absent."""

import dataclasses
import gc
import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medreasoner.errors import BundleError, QueryError
from medreasoner_train import loop
from medreasoner_train.loop import (
    LoopOptions,
    Optimiser,
    batches,
    load_checkpoint,
    load_modules,
    moved,
    save_checkpoint,
    train,
)


class Net(nn.Module):
    """One matrix inside a layer (for Muon), and an embedding and biases (for AdamW)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.layers[0](self.embed(ids)))
        return out


@dataclasses.dataclass(slots=True, kw_only=True)
class Nested:
    one: Tensor
    rest: tuple[Tensor, str]
    none: Tensor | None


parent = os.getpid()


def options(out: Path, **changes: Any) -> LoopOptions:
    settings: dict[str, Any] = {"steps": 12, "out": out, "warmup": 3, "save_every": 4, "log_every": 1}
    return LoopOptions(**(settings | changes))


def make_batch(step: int) -> Tensor:
    return torch.randint(7, (5,), generator=torch.Generator().manual_seed(step))


def run(out: Path, make: Callable[[int], Tensor] = make_batch, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    train(
        modules={"net": net},
        make_batch=make,
        loss_of=lambda ids: ((net(ids) - 0.5).pow(2).mean(), {}),
        options=options(out, **changes),
    )
    return net


def losses(out: Path) -> dict[int, float]:
    """Loss by step; of a step that was done twice, the last."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_run_that_was_killed_gives_the_very_losses_of_one_that_was_not(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")

    def killed(step: int) -> Tensor:
        if step == 6:
            raise KeyboardInterrupt
        return make_batch(step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", killed)
    resumed = run(tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 13))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    net = run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved["step"] == 12
    assert torch.equal(saved["modules"]["net"]["embed.weight"], net.state_dict()["embed.weight"])


def test_a_run_is_prolonged_from_its_last_checkpoint(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, steps=16)
    assert sorted(losses(tmp_path)) == list(range(1, 17))


def test_the_first_row_after_a_resume_is_a_mean_of_the_steps_since(tmp_path: Path) -> None:
    for steps in (8, 16):
        net = Net()
        train(
            modules={"net": net},
            make_batch=make_batch,
            loss_of=lambda ids, net=net: ((net(ids)).pow(2).mean(), {"one": torch.ones(())}),  # type: ignore[misc]
            options=options(tmp_path, steps=steps, save_every=8, log_every=5),
        )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["one"]) for row in rows] == [(5, 1.0), (10, 1.0), (15, 1.0)]


def test_a_checkpoint_of_other_modules_or_sizes_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    for modules in ({"other": Net()}, {"net": nn.Linear(3, 3)}):
        with pytest.raises(BundleError, match=r"last\.pt: a checkpoint of another stage"):
            train(
                modules=modules,
                make_batch=make_batch,
                loss_of=lambda _: (torch.zeros(()), {}),
                options=options(tmp_path, steps=20),
            )
    with pytest.raises(BundleError, match=r"none\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_start_from_a_checkpoint_without_the_module_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    assert load_modules(tmp_path / "last.pt", {"net": Net()})["step"] == 12
    with pytest.raises(BundleError, match=r"last\.pt: a checkpoint of another stage"):
        load_modules(tmp_path / "last.pt", {"visual": Net()})


def test_a_resumed_run_decays_weights_as_it_says(tmp_path: Path) -> None:
    net = Net()
    first = Optimiser({"net": net}, options(tmp_path, weight_decay=0.05))
    second = Optimiser({"net": net}, options(tmp_path, weight_decay=0.9))
    second.load_state_dict(first.state_dict())
    assert {group["weight_decay"] for state in second.state_dict() for group in state["param_groups"]} == {0.9}


def test_a_checkpoint_before_the_cooldown_is_kept(tmp_path: Path) -> None:
    run(tmp_path, cooldown=0.3)  # 12 * 0.7 = 8.4: the first step with a smaller rate is the tenth
    assert load_checkpoint(tmp_path / "stable.pt")["step"] == 9


def test_half_a_checkpoint_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    optimiser = Optimiser({"net": net}, options(tmp_path))
    path = tmp_path / "last.pt"
    save_checkpoint(path, step=3, modules={"net": net}, optimiser=optimiser)

    def full_disk(state: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, step=4, modules={"net": net}, optimiser=optimiser)
    assert load_checkpoint(path)["step"] == 3


class Bomb:
    """What a hostile checkpoint might hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a checkpoint ran code",))


def hostile() -> dict[str, bytes]:
    whole = pickle.dumps(Bomb())
    return {"empty": b"", "text": b"not a checkpoint", "pickle": whole, "zip": b"PK\x03\x04" + bytes(60)}


@pytest.mark.parametrize("kind", hostile())
def test_a_damaged_checkpoint_is_refused_by_name_and_runs_no_code(tmp_path: Path, kind: str) -> None:
    (tmp_path / "last.pt").write_bytes(hostile()[kind])
    with pytest.raises(BundleError, match=r"last\.pt"):
        load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(BundleError, match=r"last\.pt"):
        run(tmp_path)


def test_a_truncated_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BundleError, match=r"last\.pt"):
        run(tmp_path)


def test_the_rate_warms_up_stays_and_falls_to_zero(tmp_path: Path) -> None:
    own = LoopOptions(steps=100, out=tmp_path, warmup=10, cooldown=0.2)
    assert own.rate(0) == pytest.approx(0.1)
    assert own.rate(9) == own.rate(50) == 1.0
    assert own.rate(80) == pytest.approx(1.0)
    assert own.rate(90) == pytest.approx(0.5)
    assert own.rate(99) == pytest.approx(0.05)
    assert own.rate(100) == 0.0


def test_the_rate_falls_in_time_where_that_ends_first(tmp_path: Path) -> None:
    own = LoopOptions(steps=1000, out=tmp_path, warmup=10, cooldown=0.2, minutes=5)
    assert own.rate(100, 200.0) == 1.0
    assert own.rate(100, 270.0) == pytest.approx(0.5)
    assert own.rate(100, 300.0) == own.rate(100, 301.0) == 0.0
    assert own.rate(900, 10.0) == pytest.approx(0.5)  # the steps end it


def test_a_run_ends_after_its_minutes_whole(tmp_path: Path) -> None:
    def slow(step: int) -> Tensor:
        time.sleep(0.02)
        return make_batch(step)

    run(tmp_path, slow, steps=10_000, minutes=0.01, save_every=10_000)
    saved = load_checkpoint(tmp_path / "last.pt")
    assert 0 < saved["step"] < 100
    assert load_checkpoint(tmp_path / "stable.pt")["step"] < saved["step"]


def test_matrices_of_the_layers_go_to_muon_and_shared_weights_count_once(tmp_path: Path) -> None:
    net = Net()
    head = nn.Linear(6, 7)
    head.weight = net.embed.weight
    optimiser = Optimiser({"net": net, "head": head}, options(tmp_path))
    adam, muon = optimiser.state_dict()
    assert [len(state["param_groups"][0]["params"]) for state in (adam, muon)] == [3, 1]  # embedding and two biases


def test_gradients_are_clipped_and_cleared(tmp_path: Path) -> None:
    net = Net()
    optimiser = Optimiser({"net": net}, options(tmp_path, clip=1.0))
    (net(torch.arange(7)).sum() * 100).backward()
    assert optimiser.step(1.0) > 1.0
    assert all(parameter.grad is None for parameter in net.parameters())


def test_batches_come_in_order_and_depend_on_their_step_alone() -> None:
    assert list(batches(lambda step: step * step, 3, 9)) == [9, 16, 25, 36, 49, 64]
    assert list(batches(lambda step: step, 5, 5)) == []


def test_processes_prepare_the_same_batches_in_order() -> None:
    assert list(batches(lambda step: (step * step, os.getpid() == parent), 3, 9, workers=2)) == [
        (step * step, False) for step in range(3, 9)
    ]


def test_an_error_in_a_process_arrives_at_once_and_as_it_was() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise QueryError("no structure is left")
        if step == 3:
            time.sleep(60)
        return step

    stream = batches(make, 0, 5, workers=2)
    assert [next(stream), next(stream)] == [0, 1]
    began = time.monotonic()
    with pytest.raises(QueryError, match=r"^no structure is left$"):
        next(stream)
    del stream
    gc.collect()
    assert time.monotonic() - began < 4  # a worker that is at work was given five seconds


def test_an_error_that_cannot_be_sent_arrives_in_words() -> None:
    class Own(Exception):  # noqa: N818
        """No other process can find it."""

    def make(step: int) -> int:
        raise Own("no structure is left")

    with pytest.raises(RuntimeError, match="Own: no structure is left"):
        next(batches(make, 0, 5, workers=1))


def test_a_batch_moves_as_a_whole() -> None:
    meta = torch.device("meta")
    batch = Nested(one=torch.ones(2), rest=(torch.ones(3), "name"), none=None)
    there = moved(batch, meta)
    assert there.one.device == there.rest[0].device == meta
    assert there.rest[1] == "name"
    assert there.none is None
    assert batch.one.device.type == "cpu"


def test_an_error_in_a_batch_arrives_where_it_would_have_been_used() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ZeroDivisionError
        return step

    stream = batches(make, 0, 5)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_the_preparing_thread_ends_when_its_user_stops() -> None:
    before = threading.active_count()
    stream = batches(lambda step: step, 0, 10_000)
    next(stream)
    del stream  # closes the generator
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_evaluation_runs_at_its_pace_and_at_the_end(tmp_path: Path) -> None:
    net, seen = Net(), []

    def evaluate(step: int) -> dict[str, float]:
        seen.append(step)
        return {"val": 1.0}

    train(
        modules={"net": net},
        make_batch=make_batch,
        loss_of=lambda ids: (net(ids).mean(), {}),
        options=options(tmp_path, steps=7),
        evaluate=evaluate,
        eval_every=3,
    )
    assert seen == [3, 6, 7]


def test_settings_are_written_as_json(tmp_path: Path) -> None:
    loop.write_settings(tmp_path, {"coordinates": "relative_252"})
    assert json.loads((tmp_path / "medreasoner.json").read_text()) == {"coordinates": "relative_252"}
