"""Log-probabilities of any Qwen2.5-VL, beside transformers' forward of each answer by itself."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch

from medreasoner.errors import BundleError, QueryError
from medreasoner_export.toy import make_toy_reasoner
from medreasoner_train.hub_policy import HubPolicy, load_hub_model
from medreasoner_train.rollout import Completion, Prompt

SMART = {"rule": "smart", "min_pixels": 4 * 28 * 28, "max_pixels": 24 * 28 * 28, "factor": 28}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy whose images keep their shape."""
    folder = make_toy_reasoner(tmp_path_factory.mktemp("hub"))
    settings = json.loads((folder / "medreasoner.json").read_text())
    (folder / "medreasoner.json").write_text(json.dumps({**settings, "resize": SMART}))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_hub_model(folder)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    shapes = ((60, 150, 3), (140, 90), (84, 84, 3))
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    queries = ("Where is the heart?", "Which organ lies behind the stomach?", "7?")
    return [
        Prompt(key=f"p{n}", pixels=each, query=query)
        for n, (each, query) in enumerate(zip(images, queries, strict=True))
    ]


def answers(*lengths: int, seed: int = 1) -> list[Completion]:
    rng = np.random.default_rng(seed)
    return [Completion(ids=tuple(rng.integers(10, 300, length).tolist()), text="") for length in lengths]


COMPLETIONS = [answers(5, 1, 9), answers(3, seed=2), answers(12, 4, seed=3)]


def alone(policy: HubPolicy, model: Any, prompt: Prompt, completion: Completion, temperature: float) -> torch.Tensor:
    """The plain way: one answer, one call, all logits, log-softmax in double precision."""
    from medreasoner.reasoner.vision import image_patches
    from medreasoner_export.streamed import prompt_inputs

    placement = policy.placement(prompt.pixels)
    patches = image_patches(policy.spec.vision, prompt.pixels, placement)

    class Grid:
        rows, columns = placement.grid_height // 28, placement.grid_width // 28

    ids = policy._prompt.whole(prompt.query, Grid.rows * Grid.columns)
    inputs = prompt_inputs(model, [*ids, *completion.ids], policy._prompt.image_token, patches, Grid)  # type: ignore[arg-type]
    logits = model(**inputs).logits[0, len(ids) - 1 : -1].double() / temperature
    return logits.log_softmax(-1)[range(len(completion.ids)), list(completion.ids)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_batch_equals_each_answer_by_itself(
    folder: Path, model: Any, prompts: list[Prompt], temperature: float
) -> None:
    policy = HubPolicy(folder)
    with torch.no_grad():
        found, mask = policy.log_probs(model, prompts, COMPLETIONS, temperature=temperature)
        assert found.shape == mask.shape == (6, 12)
        assert found.dtype == torch.float32
        flat = [(prompt, each) for prompt, own in zip(prompts, COMPLETIONS, strict=True) for each in own]
        for row, (prompt, each) in enumerate(flat):
            wanted = alone(policy, model, prompt, each, temperature)
            torch.testing.assert_close(found[row, : len(wanted)].double(), wanted, rtol=1e-5, atol=1e-5)
            assert mask[row].tolist() == [place < len(wanted) for place in range(12)]
            assert found[row, len(wanted) :].eq(0).all()


def test_padding_and_company_change_nothing(folder: Path, model: Any, prompts: list[Prompt]) -> None:
    policy = HubPolicy(folder)
    with torch.no_grad():
        together, _ = policy.log_probs(model, prompts, COMPLETIONS)
        single, _ = policy.log_probs(model, prompts[1:2], COMPLETIONS[1:2])
    torch.testing.assert_close(together[3, :3], single[0], rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_plain_way(folder: Path, model: Any, prompts: list[Prompt]) -> None:
    policy = HubPolicy(folder)

    def gradient(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [p for _, p in sorted(model.named_parameters())]))

    found, mask = policy.log_probs(model, prompts[:2], COMPLETIONS[:2])
    flat = [(prompt, each) for prompt, own in zip(prompts[:2], COMPLETIONS[:2], strict=True) for each in own]
    plain = torch.stack([alone(policy, model, prompt, each, 1.0).sum() for prompt, each in flat])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    ours = gradient(((found * mask).sum(1) * weights).sum())
    wanted = gradient((plain * weights).sum().float())
    for own, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max() + 1e-3))
    visual = dict(sorted(model.named_parameters()))
    assert any("visual" in name and own.abs().max() > 0 for name, own in zip(visual, ours, strict=True))


def test_forced_tokens_do_not_count(folder: Path, model: Any, prompts: list[Prompt]) -> None:
    whole = [Completion(ids=(11, 12, 13), text=""), Completion(ids=(14, 15), text="")]
    some = [replace(whole[0], free=(False, True, False)), replace(whole[1], free=(False, False))]
    policy = HubPolicy(folder)
    with torch.no_grad():
        expected, _ = policy.log_probs(model, prompts[:1], [whole])
        found, mask = policy.log_probs(model, prompts[:1], [some])
    assert mask.tolist() == [[False, True, False], [False] * 3]
    torch.testing.assert_close(found, expected * mask)


def test_checkpointing_and_bfloat16_leave_the_loss(folder: Path, prompts: list[Prompt]) -> None:
    losses, gradients = {}, {}
    for checkpointing in (False, True):
        for bf16 in (False, True):
            model = load_hub_model(folder, gradient_checkpointing=checkpointing)
            calls = []
            model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            policy = HubPolicy(folder, gradient_checkpointing=checkpointing)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found, mask = policy.log_probs(model, prompts, COMPLETIONS)
            loss = (found * mask).sum() / mask.sum()
            loss.backward()
            assert len(calls) == 1 + checkpointing  # again for the gradient
            assert not model.training
            losses[checkpointing, bf16] = float(loss.detach())
            gradients[checkpointing, bf16] = torch.cat([p.grad.flatten() for p in model.parameters()])
    exact = losses[False, False]
    assert losses[True, False] == pytest.approx(exact, abs=1e-6)
    torch.testing.assert_close(gradients[True, False], gradients[False, False], rtol=1e-4, atol=1e-6)
    # bfloat16 has 8 bits: 2**-8 of the loss, and of the gradient's direction.
    assert losses[False, True] == pytest.approx(exact, rel=2**-8)
    assert losses[True, True] == pytest.approx(losses[False, True], rel=1e-3)
    assert losses[False, True] != exact
    for each in ((False, True), (True, True)):
        assert torch.cosine_similarity(gradients[each], gradients[False, False], dim=0) > 0.995


def test_the_grid_is_that_of_the_answers_numbers(folder: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    assert HubPolicy(folder).grid_size(prompts[0].pixels) == (140, 56)  # 150 x 60 to whole tokens of 28
    other: Path = copytree(folder, tmp_path / "c")
    settings = json.loads((other / "medreasoner.json").read_text())
    (other / "medreasoner.json").write_text(json.dumps({**settings, "coordinates": "relative_1000"}))
    assert HubPolicy(other).grid_size(prompts[0].pixels) == (1000, 1000)


def test_faults_are_named(folder: Path, model: Any, prompts: list[Prompt], tmp_path: Path) -> None:
    empty = Prompt(key="row 7", pixels=prompts[0].pixels, query=" ")
    with pytest.raises(QueryError, match="row 7: query: empty"):
        HubPolicy(folder).log_probs(model, [empty], [answers(2)])
    with pytest.raises(BundleError, match=r"config\.json"):
        HubPolicy(tmp_path)
    with pytest.raises(BundleError, match=r"not a Qwen2\.5-VL checkpoint"):
        load_hub_model(tmp_path)
