"""Answers that the ONNX runtime draws have the probabilities that the trainer's policy gives them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medreasoner_train.hub_policy import load_hub_model
from medreasoner_train.packed_policy import PackedPolicy
from medreasoner_train.rollout import Completion, Prompt, Sampling
from medreasoner_train.runtime_rollouts import RuntimeRollouts

NANO = Path(__file__).parents[2] / "models" / "nano" / "reasoner"
SAMPLING = Sampling(count=8, max_tokens=48)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_hub_model(NANO).eval()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 90, (2, 252, 252, 3)).astype(np.uint8)
    pictures[0, 60:180, 40:200] += 120
    asked = ("Where is the polyp?", "Which organs fill with air?")
    return [
        Prompt(key=str(k), pixels=each, query=query)
        for k, (each, query) in enumerate(zip(pictures, asked, strict=True))
    ]


def test_the_draws_are_the_policys(model: Any, prompts: list[Prompt]) -> None:
    """Shares of the first number against the policy's probabilities of it, as the grammar leaves them."""
    policy = PackedPolicy.of(NANO)
    assert policy is not None
    engine = RuntimeRollouts(NANO)
    answers = [
        each for each in engine.sample(prompts[:1], replace(SAMPLING, count=400), seed=3)[0] if "null" not in each.text
    ]
    engine.close()
    opening = policy.vocabulary.spans[0]
    assert all(list(each.ids[: len(opening)]) == opening for each in answers)
    firsts = [int(policy.vocabulary.value[each.ids[len(opening)]]) for each in answers]
    every = [Completion(ids=(*opening, int(n)), text="") for n in policy.vocabulary.numbers]
    with torch.no_grad():
        found, _ = policy.log_probs(model, prompts[:1], [every])
    shares = found[:, -1].double().exp()
    shares = shares / shares.sum()
    mean = float((shares * torch.arange(len(shares))).sum())
    deviation = float((shares * (torch.arange(len(shares)) - mean) ** 2).sum().sqrt())
    assert len(firsts) > 100
    assert abs(np.mean(firsts) - mean) < 4.5 * deviation / len(firsts) ** 0.5
    assert np.std(firsts) == pytest.approx(deviation, rel=0.3)
