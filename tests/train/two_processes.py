"""Two processes that train together; `test_distributed` compares what they write."""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: F401 - imported before the fork

from medreasoner_train.distributed import Processes, ScaleOptions
from medreasoner_train.grpo import LossOptions, Normalise, policy_loss
from medreasoner_train.hub_policy import HubPolicy, load_hub_model
from medreasoner_train.loop import Optimiser, resume, save_checkpoint
from medreasoner_train.loop_options import LoopOptions
from medreasoner_train.policy_state import policy_state
from medreasoner_train.rollout import Completion, Prompt

NORMALISE: tuple[Normalise, ...] = ("sequence", "token", "constant")
MAX_TOKENS = 16
OPTIONS = LoopOptions(steps=2, out=Path(), lr=1e-3, matrix_lr=0.0, weight_decay=0.01, clip=0.1)
Group = tuple[Prompt, list[Completion], Tensor]


def groups() -> list[Group]:
    """Three groups of uneven lengths on images of other shapes: two processes have 18 and 3 tokens."""
    rng = np.random.default_rng(0)
    shapes, lengths = ((60, 90, 3), (84, 56), (56, 140, 3)), ((9, 2), (1, 2), (3, 4))
    found = []
    for n, (shape, own) in enumerate(zip(shapes, lengths, strict=True)):
        prompt = Prompt(key=f"g{n}", pixels=rng.integers(0, 256, shape, dtype=np.uint8), query="Where is the heart?")
        answers = [Completion(ids=tuple(rng.integers(10, 300, length).tolist()), text="") for length in own]
        found.append((prompt, answers, torch.tensor([1.0, -0.5]) * (n + 1)))
    return found


def mask_of(answers: list[Completion]) -> Tensor:
    longest = max((len(each.ids) for each in answers), default=0)
    return torch.tensor([[place < len(each.ids) for place in range(longest)] for each in answers])


def loss_of(policy: HubPolicy, model: Any, reference: Any, group: Group, weights: Tensor) -> Tensor:
    """The clipped surrogate of a group beside a policy that wrote it and was a little off."""
    prompt, answers, advantages = group
    found, _ = policy.log_probs(model, [prompt], [answers])
    with torch.no_grad():
        kept, _ = policy.log_probs(reference, [prompt], [answers])
    old = found.detach() + 0.05 * torch.sin(torch.arange(found.numel()).view_as(found))
    options = LossOptions(kl=0.5)
    return policy_loss(found, old, kept, advantages, weights[:, : found.shape[1]], options)[0]


def step(processes: Processes, policy: HubPolicy, model: Any, reference: Any, normalise: Normalise) -> float:
    own = [groups()[place] for place in processes.own(len(groups()))]
    weights = processes.token_weights(
        mask_of([each for _, answers, _ in own for each in answers]), normalise, max_tokens=MAX_TOKENS
    )
    total, done = 0.0, 0
    batches = list(processes.even(own, spare=groups()[0]))
    for number, (group, counts) in enumerate(batches):
        part = weights[2 * done : 2 * done + 2] if counts else torch.zeros(2, MAX_TOKENS)
        done += counts
        with processes.accumulating(model, last=number == len(batches) - 1):
            loss = loss_of(policy, model, reference, group, part)
            processes.backward(loss)
        total += float(loss.detach())
    return processes.sums({"loss": total})["loss"]


def whole(value: Any) -> Tensor:
    found: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return found.detach().clone()


def run(folder: Path, out: Path, *, fsdp: bool) -> None:
    processes = Processes(ScaleOptions(processes=2, fsdp=fsdp))
    reference = load_hub_model(folder)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    model = processes.prepare(load_hub_model(folder, gradient_checkpointing=True))
    optimiser = Optimiser({"model": model}, OPTIONS)
    reference = processes.frozen(reference)
    policy = HubPolicy(folder, gradient_checkpointing=True)
    found: dict[str, Any] = {}
    inner = processes.inner(model)
    for normalise in NORMALISE:
        model.zero_grad()
        found[f"{normalise} loss"] = step(processes, policy, model, reference, normalise)
        found[normalise] = {name: whole(each.grad) for name, each in inner.named_parameters()}
    found["norm"] = float(optimiser.step(1.0))
    found["weights"] = {name: value.clone() for name, value in policy_state(processes.shared(model)).items()}
    found["shares"] = sum(int(getattr(each, "_local_tensor", each).numel()) for each in model.parameters())
    last, modules = out / f"last-{fsdp}.pt", {"model": inner}
    save_checkpoint(last, step=1, modules=modules, optimiser=optimiser, write=processes.first)
    step(processes, policy, model, reference, "token")
    optimiser.step(1.0)
    moved = {name: whole(each) for name, each in inner.named_parameters()}
    processes.wait()
    resume(last, modules, optimiser)
    found["moved"] = sum(not torch.equal(whole(each), moved[name]) for name, each in inner.named_parameters())
    found["restored"] = {name: whole(each) for name, each in inner.named_parameters()}
    (state,) = optimiser.state_dict()
    found["moments"] = {str(number): whole(each["exp_avg"]) for number, each in state["state"].items()}
    torch.save(found, out / f"{'fsdp' if fsdp else 'ddp'}-{processes.index}.pt")
    processes.wait()


def run_bf16(folder: Path, out: Path) -> None:
    processes = Processes(ScaleOptions(processes=2, fsdp=True), precision="bf16")
    model = processes.prepare(load_hub_model(folder, gradient_checkpointing=True))
    optimiser = Optimiser({"model": model}, OPTIONS)
    prompt, answers, _ = groups()[0]
    found, _ = HubPolicy(folder, gradient_checkpointing=True).log_probs(model, [prompt], [answers])
    processes.backward(found.sum() / 2)
    norm = float(optimiser.step(1.0))
    if processes.first:
        torch.save({"log_probs": found.detach(), "norm": norm}, out / "bf16.pt")
    processes.wait()


def both(rank: int, folder: Path, out: Path, port: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    for fsdp in (False, True):
        run(folder, out, fsdp=fsdp)
        AcceleratorState._reset_state(reset_partial_state=True)
    run_bf16(folder, out)
    torch.distributed.destroy_process_group()


def main(folder: str, out: str, port: str) -> None:
    """Fork both: what takes longest here is to import torch and transformers."""
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=both, args=(rank, Path(folder), Path(out), port)) for rank in range(2)]
    for each in started:
        each.start()
    for each in started:
        each.join()
    sys.exit(any(each.exitcode for each in started))


if __name__ == "__main__":
    main(*sys.argv[1:])
