"""Adapters: what is trained, what the reference is, and what the export makes of what is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medreasoner_export.checkpoint import Checkpoint
from medreasoner_export.lora import with_adapter
from medreasoner_export.toy import make_toy_reasoner
from medreasoner_train.hub_policy import HubPolicy, load_hub_model
from medreasoner_train.lora import AdapterReference, LoraOptions, add_adapter, merged_weights, save_adapter
from medreasoner_train.rollout import Completion, Prompt

OPTIONS = LoraOptions(rank=4, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"), vision=True)
PROMPTS = [Prompt(key="a", pixels=np.full((60, 90), 100, np.uint8), query="Where is the heart?")]
COMPLETIONS = [[Completion(ids=(11, 40, 72), text=""), Completion(ids=(50, 9), text="")]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_reasoner(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def trained(folder: Path) -> Any:
    """After some steps, so that the adapters are no longer zero."""
    torch.manual_seed(0)
    model = add_adapter(load_hub_model(folder), OPTIONS)
    policy = HubPolicy(folder)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        values, mask = policy.log_probs(model, PROMPTS, COMPLETIONS)
        (-(values * mask).mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def test_only_the_adapters_are_trained_and_they_begin_at_nothing(folder: Path) -> None:
    plain, policy = load_hub_model(folder), HubPolicy(folder)
    model = add_adapter(load_hub_model(folder), OPTIONS)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in names)
    # Two decoder layers with three matrices; two blocks of the tower with qkv, proj and down_proj; A and B.
    assert len(names) == 2 * (2 * 3 + 2 * 3)
    with torch.no_grad():
        before, _ = policy.log_probs(plain, PROMPTS, COMPLETIONS)
        after, _ = policy.log_probs(model, PROMPTS, COMPLETIONS)
    assert torch.equal(before, after)


def test_without_the_adapters_the_model_is_the_reference(folder: Path, trained: Any) -> None:
    policy = HubPolicy(folder)
    with torch.no_grad():
        original, _ = policy.log_probs(load_hub_model(folder), PROMPTS, COMPLETIONS)
        moved, _ = policy.log_probs(trained, PROMPTS, COMPLETIONS)
    reference, _ = AdapterReference(policy).log_probs(trained, PROMPTS, COMPLETIONS)
    assert torch.equal(reference, original)
    assert (moved - original).mean() > 0.05  # it learned to write these answers
    again, _ = policy.log_probs(trained, PROMPTS, COMPLETIONS)
    assert torch.equal(again.detach(), moved)  # and they are on again
    assert again.requires_grad


def test_checkpointing_passes_the_adapters_gradient(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_adapter(load_hub_model(folder, gradient_checkpointing=checkpointing), OPTIONS)
        values, mask = HubPolicy(folder, gradient_checkpointing=checkpointing).log_probs(model, PROMPTS, COMPLETIONS)
        (values * mask).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    assert gradients[0].abs().max() > 0


def test_the_export_reads_what_is_saved_and_agrees_with_the_merged_weights(
    folder: Path, trained: Any, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    merged = merged_weights(trained)
    save_adapter(trained, tmp_path / "adapter")
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)
    plain, adapted = Checkpoint(folder), with_adapter(Checkpoint(folder), tmp_path / "adapter")
    changed = 0
    for name in plain.entries:
        own = "model." + (name if name.startswith("visual.") else name.replace("model.", "language_model.", 1))
        shape = plain.entries[name].shape
        np.testing.assert_allclose(adapted.tensor(name, shape), merged[own].numpy(), atol=1e-6)
        changed += not np.array_equal(adapted.tensor(name, shape), plain.tensor(name, shape))
    assert changed == 2 * 3 + 2 * 3
    whole = load_hub_model(folder)
    whole.load_state_dict(merged)
    policy = HubPolicy(folder)
    with torch.no_grad():
        found, _ = policy.log_probs(whole, PROMPTS, COMPLETIONS)
        wanted, _ = policy.log_probs(trained, PROMPTS, COMPLETIONS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"targets": ()}, "targets"), ({"dropout": 1.0}, "dropout")],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraOptions(**options)
