"""The fast policy against transformers' own whole model, one answer at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medreasoner.errors import QueryError
from medreasoner_train import packed_policy
from medreasoner_train.checkpoint import save_reasoner
from medreasoner_train.model import tower
from medreasoner_train.packed_policy import PackedPolicy
from medreasoner_train.rollout import Completion, Prompt, Sampling
from medreasoner_train.torch_rollouts import TorchRollouts
from medreasoner_train.vocabulary import Vocabulary

Reference = Callable[[Any, list[int], Tensor], Tensor]
SIZE = 84
QUERIES = ("Where is the air-filled tissue?", "Heart?")


@pytest.fixture
def policy(vocabulary: Vocabulary) -> PackedPolicy:
    return PackedPolicy(vocabulary, size=SIZE)


@pytest.fixture
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(3)
    pictures = rng.integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    return [
        Prompt(key=str(k), pixels=pixels, query=query, think=bool(k))
        for k, (pixels, query) in enumerate(zip(pictures, QUERIES, strict=True))
    ]


def written(policy: PackedPolicy, lengths: list[int], seed: int) -> list[Completion]:
    rng = np.random.default_rng(seed)
    size = policy.vocabulary.tokenizer.get_vocab_size()
    return [Completion(ids=tuple(int(i) for i in rng.integers(0, size, n)), text="") for n in lengths]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_whole_model(
    temperature: float,
    policy: PackedPolicy,
    prompts: list[Prompt],
    toy_reasoner: Any,
    vocabulary: Vocabulary,
    reference_logits: Reference,
) -> None:
    # More answers than one row holds, of unlike lengths.
    completions = [written(policy, [5, 1, 9, 4, 7, 2, 3, 8, 6, 5, 11], 1), written(policy, [4, 6], 2)]
    found, mask = policy.log_probs(toy_reasoner, prompts, completions, temperature=temperature)
    flat = [(prompt, each) for prompt, own in zip(prompts, completions, strict=True) for each in own]
    assert found.shape == mask.shape == (13, 11)
    for row, counts, (prompt, each) in zip(found, mask, flat, strict=True):
        before = [*vocabulary.prefix(SIZE // 28)[0], *vocabulary.prompt(prompt.query)]
        logits = reference_logits(toy_reasoner, [*before, *each.ids], policy.shown(prompt))
        expected = (logits / temperature).log_softmax(-1)[len(before) - 1 : -1]
        expected = expected[torch.arange(len(each.ids)), torch.tensor(each.ids)]
        torch.testing.assert_close(row[: len(each.ids)], expected, rtol=1e-4, atol=1e-4)
        assert counts.tolist() == [k < len(each.ids) for k in range(11)]


def test_a_picture_that_several_prompts_share_is_read_once(
    policy: PackedPolicy, prompts: list[Prompt], toy_reasoner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = prompts
    shared = [one, two, replace(two, key="2", pixels=one.pixels)]
    apart = [*shared[:2], replace(shared[2], pixels=one.pixels.copy())]
    completions = [written(policy, [4, 6], seed) for seed in range(3)]
    read: list[int] = []

    def counted(visual: Any, images: torch.Tensor) -> torch.Tensor:
        read.append(len(images))
        return tower(visual, images)

    monkeypatch.setattr(packed_policy, "tower", counted)
    found, other = (policy.log_probs(toy_reasoner, each, completions)[0] for each in (shared, apart))
    torch.testing.assert_close(found, other)
    same, alike = (
        policy.sample(toy_reasoner, each, Sampling(count=2, max_tokens=5), seed=1) for each in (shared, apart)
    )
    assert same == alike
    assert read == [2, 3, 2, 3]


def test_forced_tokens_do_not_count(policy: PackedPolicy, prompts: list[Prompt], toy_reasoner: Any) -> None:
    """Nor does leaving them out, with what follows the last chosen one, change the others' log-probabilities."""
    whole = [written(policy, [4, 6, 5, 3], 1), written(policy, [7, 2], 2)]
    free = [
        [(False, True, False, True), (True, *[False] * 5), (False,) * 5, (False, False, True)],
        [(False, False, True, True, False, True, False), (False, False)],
    ]
    some = [
        [replace(each, free=which) for each, which in zip(own, marks, strict=True)]
        for own, marks in zip(whole, free, strict=True)
    ]
    with torch.no_grad():
        expected, _ = policy.log_probs(toy_reasoner, prompts, whole)
        found, mask = policy.log_probs(toy_reasoner, prompts, some)
        nothing, none = policy.log_probs(toy_reasoner, prompts[:1], [[replace(whole[0][0], free=(False,) * 4)]])
    marks = torch.zeros(6, 7, dtype=torch.bool)
    for row, which in zip(marks, [which for own in free for which in own], strict=True):
        row[: len(which)] = torch.tensor(which)
    assert torch.equal(mask, marks)
    torch.testing.assert_close(found, expected * marks, rtol=1e-5, atol=1e-5)
    assert nothing.shape == (1, 4)
    assert not nothing.any()
    assert not none.any()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_reaches_the_tower_unless_it_is_frozen(
    frozen: bool, vocabulary: Vocabulary, prompts: list[Prompt], toy_reasoner: Any
) -> None:
    policy = PackedPolicy(vocabulary, size=SIZE, frozen_vision=frozen)
    found, _ = policy.log_probs(toy_reasoner, prompts, [written(policy, [3], 0), written(policy, [4], 1)])
    found.sum().backward()
    patch = toy_reasoner.model.visual.patch_embed.proj.weight.grad
    assert (patch is None) == frozen
    assert float(toy_reasoner.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().max()) > 0


def test_checkpointing_changes_no_gradient(vocabulary: Vocabulary, prompts: list[Prompt], toy_reasoner: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = PackedPolicy(vocabulary, size=SIZE, checkpointing=checkpointing)
        found, _ = policy.log_probs(toy_reasoner, prompts, [written(policy, [3], 0), written(policy, [4], 1)])
        found.sum().backward()
        gradients.append([p.grad.clone() for p in toy_reasoner.parameters() if p.grad is not None])
        toy_reasoner.zero_grad(set_to_none=True)
    assert len(gradients[0]) == len(gradients[1]) > 10
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def drawn(
    policy: PackedPolicy, model: Any, prompts: list[Prompt], *, seed: int = 0, **changes: Any
) -> list[list[Completion]]:
    sampling = replace(Sampling(count=3, max_tokens=12), **changes)
    return policy.sample(model, prompts, sampling, seed=seed)


def test_draws_depend_on_their_seed_alone(policy: PackedPolicy, prompts: list[Prompt], toy_reasoner: Any) -> None:
    first = drawn(policy, toy_reasoner, prompts)
    assert first == drawn(policy, toy_reasoner, prompts)
    assert first != drawn(policy, toy_reasoner, prompts, seed=1)
    assert [len(own) for own in first] == [3, 3]
    decode = policy.vocabulary.tokenizer.decode
    for prompt, own in zip(prompts, first, strict=True):
        for each in own:
            assert each.ids[0] == policy.opening[prompt.think]
            assert each.free == (False, *[True] * (len(each.ids) - 1))
            ids = each.ids[:-1] if each.finished else each.ids
            assert each.text == decode(ids, skip_special_tokens=False)
            assert each.finished or len(each.ids) == 12


def test_draws_do_not_depend_on_what_else_is_asked(
    policy: PackedPolicy, prompts: list[Prompt], toy_reasoner: Any
) -> None:
    both = drawn(policy, toy_reasoner, prompts)
    assert [drawn(policy, toy_reasoner, [prompt])[0] for prompt in prompts] == both
    assert both[0] != drawn(policy, toy_reasoner, [replace(prompts[0], key="another")])[0]


def test_draws_follow_the_model(policy: PackedPolicy, prompts: list[Prompt], toy_reasoner: Any) -> None:
    """Frequencies of the first free token against its probabilities, and greedy in the limit."""
    draws = drawn(policy, toy_reasoner, prompts[:1], count=3000, max_tokens=2, temperature=0.05)[0]
    opening, token = policy.opening[False], [each.ids[1] for each in draws]
    every = [Completion(ids=(opening, t), text="") for t in sorted(set(token))]
    with torch.no_grad():
        found, _ = policy.log_probs(toy_reasoner, prompts[:1], [every], temperature=0.05)
    shares = found[:, 1].exp()
    likely = shares > 0.01
    assert likely.any()
    counts = torch.tensor([token.count(each.ids[1]) for each in every]) / len(token)
    deviation = (shares * (1 - shares) / len(token)).sqrt()
    assert float(((counts - shares).abs() / deviation)[likely].max()) < 4.5
    greedy = {each.ids for each in drawn(policy, toy_reasoner, prompts[:1], temperature=1e-6, max_tokens=4)[0]}
    assert len(greedy) == 1


def test_an_ended_answer_stays_ended(policy: PackedPolicy, prompts: list[Prompt], toy_reasoner: Any) -> None:
    with torch.no_grad():  # whatever it has read, all tokens are as likely, and most of them are made the end
        toy_reasoner.model.language_model.norm.weight.zero_()
    policy.end = vocabulary_end = 7
    real = torch.searchsorted
    answers = []
    with pytest.MonkeyPatch.context() as patch:  # each draw ends its answer with probability 1/16
        patch.setattr(torch, "searchsorted", lambda *a, **k: real(*a, **k) % 16)
        answers = [each for own in drawn(policy, toy_reasoner, prompts, count=40, max_tokens=40) for each in own]
    assert {each.finished for each in answers} == {True, False}
    assert len({len(each.ids) for each in answers}) > 10
    for each in answers:
        assert vocabulary_end not in each.ids[:-1]
        assert each.finished == (each.ids[-1] == vocabulary_end)
        assert each.finished or len(each.ids) == 40


def test_a_picture_of_another_size_is_refused(policy: PackedPolicy, prompts: list[Prompt]) -> None:
    with pytest.raises(QueryError, match="0: a picture of 84 x 70; this policy sees 84 x 84"):
        policy.shown(replace(prompts[0], pixels=prompts[0].pixels[:70]))


def test_the_checkpoint_says_whether_the_policy_fits(toy_reasoner: Any, vocabulary: Vocabulary, tmp_path: Path) -> None:
    save_reasoner(toy_reasoner, vocabulary.tokenizer, tmp_path, size=SIZE)
    policy = PackedPolicy.of(tmp_path)
    assert policy is not None
    assert (policy.size, policy.grid_size(np.zeros((9, 8, 3), np.uint8))) == (SIZE, (252, 252))
    settings = (tmp_path / "medreasoner.json").read_text()
    for old, new in (('"stretch"', '"smart"'), ("relative_252", "absolute"), ("relative_252", "relative_99999")):
        (tmp_path / "medreasoner.json").write_text(settings.replace(old, new))
        assert PackedPolicy.of(tmp_path) is None, new
    (tmp_path / "medreasoner.json").unlink()  # a checkpoint as others write it
    assert PackedPolicy.of(tmp_path) is None


@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_answers_do_not_depend_on_how_many_are_written_at_once(
    at_once: int, policy: PackedPolicy, prompts: list[Prompt], toy_reasoner: Any
) -> None:
    sampling = Sampling(count=3, max_tokens=6)
    whole, parts = (
        TorchRollouts(policy, toy_reasoner, at_once=number).sample(prompts, sampling, seed=4)
        for number in (4096, at_once)
    )
    assert [len(own) for own in whole] == [3, 3]
    assert [[each.ids for each in own] for own in parts] == [[each.ids for each in own] for own in whole]
