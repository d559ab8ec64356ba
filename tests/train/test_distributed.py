"""Two real processes over gloo make the step that one makes."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medreasoner_export.toy import make_toy_reasoner
from medreasoner_train.distributed import Processes, ProcessesError, ScaleOptions
from medreasoner_train.grpo import token_weights
from medreasoner_train.hub_policy import HubPolicy, load_hub_model

WORKER = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_reasoner(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the two processes wrote, with DDP and with FSDP."""
    out = tmp_path_factory.mktemp("out")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), str(out), str(port)],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    both = {kind: [torch.load(out / f"{kind}-{rank}.pt") for rank in range(2)] for kind in ("ddp", "fsdp")}
    return {**both, "bf16": [torch.load(out / "bf16.pt")]}


@pytest.fixture(scope="module")
def worker() -> Any:
    """The module that the processes run."""
    spec = importlib.util.spec_from_file_location("two_processes", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    return worker


@pytest.fixture(scope="module")
def alone(folder: Path, worker: Any) -> dict[str, Any]:
    """One process with the whole batch, in plain PyTorch."""
    model, reference, policy = load_hub_model(folder), load_hub_model(folder), HubPolicy(folder)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    groups = worker.groups()
    mask = worker.mask_of([each for _, answers, _ in groups for each in answers])
    result: dict[str, Any] = {}
    for normalise in worker.NORMALISE:
        optimiser.zero_grad()
        weights = token_weights(mask, normalise, max_tokens=worker.MAX_TOKENS)
        parts = [
            worker.loss_of(policy, model, reference, group, weights[2 * n : 2 * n + 2])
            for n, group in enumerate(groups)
        ]
        loss = torch.stack(parts).sum()
        loss.backward()
        result[f"{normalise} loss"] = float(loss.detach())
        result[normalise] = {name: each.grad.clone() for name, each in model.named_parameters()}
    result["norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    optimiser.step()
    result["weights"] = {name: each.detach().clone() for name, each in model.named_parameters()}
    return result


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("normalise", ["sequence", "token", "constant"])
def test_two_processes_have_the_gradients_of_one(
    found: dict[str, list[dict[str, Any]]], alone: dict[str, Any], kind: str, normalise: str
) -> None:
    for each in found[kind]:
        assert each[f"{normalise} loss"] == pytest.approx(alone[f"{normalise} loss"], rel=1e-4)
        assert each[normalise].keys() == alone[normalise].keys()
        for name, wanted in alone[normalise].items():
            scale = float(wanted.abs().max())
            torch.testing.assert_close(each[normalise][name], wanted, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_clipped_step_is_the_same_and_can_be_resumed(
    found: dict[str, list[dict[str, Any]]], alone: dict[str, Any], kind: str
) -> None:
    first, second = found[kind]
    for each in found[kind]:
        assert each["norm"] == pytest.approx(alone["norm"], rel=1e-4)
        assert each["moved"] > 50
        # Adam's first step is about 1e-3 for any gradient; those near zero may turn either way by rounding.
        close = [torch.isclose(each["restored"][name], value, atol=1e-5) for name, value in alone["weights"].items()]
        assert torch.cat([part.flatten() for part in close]).float().mean() > 0.999
    for name in alone["weights"]:
        assert torch.equal(first["weights"][name], first["restored"][name])
        assert torch.equal(first["restored"][name], second["restored"][name])
    for name, again in first["moments"].items():
        assert torch.equal(again, second["moments"][name])


def test_fsdp_splits_what_ddp_copies(found: dict[str, list[dict[str, Any]]], alone: dict[str, Any]) -> None:
    whole = sum(value.numel() for value in alone["weights"].values())
    assert [each["shares"] for each in found["ddp"]] == [whole, whole]
    assert sum(each["shares"] for each in found["fsdp"]) == whole
    assert max(each["shares"] for each in found["fsdp"]) < 0.55 * whole


def test_fsdp_in_bfloat16_keeps_log_probabilities_whole(
    found: dict[str, list[dict[str, Any]]], folder: Path, worker: Any
) -> None:
    (each,) = found["bf16"]
    prompt, answers, _ = worker.groups()[0]
    model = load_hub_model(folder)
    values, _ = HubPolicy(folder).log_probs(model, [prompt], [answers])
    values.sum().backward()
    torch.testing.assert_close(each["log_probs"], values.detach(), atol=0.1, rtol=2**-7)
    assert each["log_probs"].dtype == torch.float32
    assert not torch.equal(each["log_probs"].bfloat16().float(), each["log_probs"])
    assert each["norm"] == pytest.approx(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)), rel=0.03)


def test_a_wrong_number_of_processes_is_named() -> None:
    with pytest.raises(ProcessesError, match="asks for 64 processes and 1 were started"):
        Processes(ScaleOptions(nodes=8, processes=64))
    with pytest.raises(ValueError, match="do not divide evenly"):
        ScaleOptions(nodes=8, processes=9)
