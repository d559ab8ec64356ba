"""Rollouts through the ONNX runtime: what they draw, what counts, and that they follow the trainer's weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medreasoner.errors import QueryError
from medreasoner_train.checkpoint import load_reasoner
from medreasoner_train.packed_policy import PackedPolicy
from medreasoner_train.rewards import format_segment
from medreasoner_train.rollout import Completion, Prompt, Sampling
from medreasoner_train.runtime_rollouts import RuntimeRollouts

NANO = Path(__file__).parents[2] / "models" / "nano" / "reasoner"
SAMPLING = Sampling(count=8, max_tokens=48)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_reasoner(NANO).eval()


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


@pytest.fixture(scope="module")
def drawn(model: Any, prompts: list[Prompt]) -> Any:
    """The engine before and after the weights change, with what it drew."""
    engine = RuntimeRollouts(NANO, model)
    first = engine.sample(prompts, SAMPLING, seed=1)
    again, other = engine.sample(prompts, SAMPLING, seed=1), engine.sample(prompts, SAMPLING, seed=2)
    changed = load_reasoner(NANO)
    with torch.no_grad():  # the numbers change their places in the embedding, which is the language head too
        table = changed.model.language_model.embed_tokens.weight
        policy = PackedPolicy.of(NANO, changed)
        assert policy is not None
        numbers = policy.vocabulary.numbers
        table[numbers] = table[numbers.flip(0)]
    engine.refresh(changed)
    after = engine.sample(prompts, SAMPLING, seed=1)
    folder = engine._folder
    left = sorted(each.name for each in folder.iterdir())
    engine.close()
    assert not folder.exists()
    return first, again, other, after, left


def flat(answers: list[list[Completion]]) -> list[Completion]:
    return [each for own in answers for each in own]


def test_draws_depend_on_their_seed_and_the_weights(drawn: Any) -> None:
    first, again, other, after, left = drawn
    assert [len(own) for own in first] == [8, 8]
    assert first == again
    assert first != other
    assert first != after
    assert left == ["1", "s", "segmenter"]  # the bundle of the weights before is gone


def test_answers_are_valid_and_their_tokens_are_the_policys(drawn: Any, model: Any, prompts: list[Prompt]) -> None:
    policy = PackedPolicy.of(NANO, model)
    assert policy is not None
    first = drawn[0]
    for each in flat(first):
        assert format_segment(each.text) == 1.0
        assert policy.vocabulary.tokenizer.decode(each.ids[:-1], skip_special_tokens=False) == each.text
        assert each.ids[-1] == policy.end
        assert each.free is not None
        assert sum(each.free) == (1 if "null" in each.text else 9)
        for token, free in zip(each.ids, each.free, strict=True):
            number = int(policy.vocabulary.value[token]) >= 0
            assert not free or number or token in (policy.vocabulary.bracket, policy.vocabulary.null)
    with torch.no_grad():
        found, mask = policy.log_probs(model, prompts, first)
    # What is forced is nearly certain to a policy that was taught the form; what is drawn is not.
    assert float((found * mask).sum(1).mean()) < -8
    assert -3 < float((found * ~mask).sum(1).mean()) < 0


def test_the_draws_are_the_policys(model: Any, prompts: list[Prompt]) -> None:
    """Shares of the first number against the policy's probabilities of it, as the grammar leaves them."""
    policy = PackedPolicy.of(NANO, model)
    assert policy is not None
    engine = RuntimeRollouts(NANO, model)
    answers = [
        each for each in engine.sample(prompts[:1], replace(SAMPLING, count=400), seed=3)[0] if "null" not in each.text
    ]
    engine.close()
    firsts = [
        next(int(policy.vocabulary.value[t]) for t in each.ids[6:] if int(policy.vocabulary.value[t]) >= 0)
        for each in answers
    ]
    opening = list(answers[0].ids[:6])
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


def test_thoughts_are_refused(model: Any, prompts: list[Prompt]) -> None:
    engine = RuntimeRollouts(NANO, model)
    with pytest.raises(QueryError, match="0: the runtime draws answers without a thought"):
        engine.sample([replace(prompts[0], think=True)], SAMPLING, seed=0)
    engine.close()
