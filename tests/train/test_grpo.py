"""GRPO's advantages and loss against numbers worked out by hand, and the properties that their estimators promise."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from medreasoner_train.grpo import LossOptions, group_advantages, k3, policy_loss, telling_groups, token_weights

LN2 = math.log(2)


def test_advantages_by_hand_whatever_the_order_of_the_groups() -> None:
    # Group 4: 1, 2, 3 with mean 2 and deviation 1. Group 9: 0, 4 with mean 2 and deviation sqrt(8).
    rewards = torch.tensor([1.0, 0.0, 3.0, 4.0, 2.0])
    groups = torch.tensor([4, 9, 4, 9, 4])
    plain = group_advantages(rewards, groups, scale=False)
    assert plain.tolist() == [-1.0, -2.0, 1.0, 2.0, 0.0]
    scaled = group_advantages(rewards, groups)
    root = math.sqrt(8) + 1e-4
    torch.testing.assert_close(scaled, torch.tensor([-1 / 1.0001, -2 / root, 1 / 1.0001, 2 / root, 0.0]))


def test_a_group_of_one_or_of_equals_teaches_nothing() -> None:
    rewards, groups = torch.tensor([5.0, 0.7, 0.7, 0.7]), torch.tensor([0, 1, 1, 1])
    assert group_advantages(rewards, groups).abs().max() < 1e-6 / 1e-4
    assert telling_groups(rewards, groups).tolist() == [False] * 4


def test_dynamic_sampling_keeps_the_groups_that_differ() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.25])
    groups = torch.tensor([3, 1, 3, 1, 8, 8])
    assert telling_groups(rewards, groups).tolist() == [False, True, False, True, True, True]
    assert telling_groups(rewards, groups, apart=0.5).tolist() == [False, True, False, True, False, False]
    assert telling_groups(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12))
@example([5.389615058898926] * 3)
@settings(max_examples=50, deadline=None)
def test_advantages_sum_to_nothing_and_do_not_see_a_constant(rewards: list[float]) -> None:
    values, groups = torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.int64)
    found = group_advantages(values, groups)
    assert float(found.double().sum().abs()) < 1e-5
    if len(set(rewards)) == 1:
        assert float(found.abs().max()) < 1e-6
    centred = group_advantages(values, groups, scale=False)
    torch.testing.assert_close(group_advantages(values + 10, groups, scale=False), centred, atol=1e-3, rtol=1e-3)


def test_k3_by_hand() -> None:
    # The reference is twice as likely: 2 - 1 - ln 2; half as likely: 1/2 - 1 + ln 2; equally: 0.
    own = torch.tensor([0.0, 0.0, -3.0])
    reference = torch.tensor([LN2, -LN2, -3.0])
    torch.testing.assert_close(k3(own, reference), torch.tensor([1 - LN2, LN2 - 0.5, 0.0]))


@given(st.floats(-20, 0, width=32), st.floats(-20, 0, width=32))
def test_k3_is_never_negative(own: float, reference: float) -> None:
    assert float(k3(torch.tensor(own), torch.tensor(reference))) >= 0


def test_k3_expects_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(20, generator=generator).log_softmax(0)
    reference = (policy + 0.4 * torch.randn(20, generator=generator)).log_softmax(0)
    exact = float((policy.exp() * (policy - reference)).sum())
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    samples = k3(policy[drawn], reference[drawn])
    error = float(samples.std()) / math.sqrt(len(drawn))
    assert float(samples.mean()) == pytest.approx(exact, abs=4 * error)
    plain = policy[drawn] - reference[drawn]
    assert float(samples.var()) < float(plain.var()) / 2  # "low variance"


def loss_at(ratio: float, advantage: float, options: LossOptions) -> tuple[float, float, float]:
    """Loss, gradient by the log-probability, and the clipped share of one token."""
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, parts = policy_loss(log_probs, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.ones(1, 1), options)
    loss.backward()  # type: ignore[no-untyped-call]
    assert log_probs.grad is not None
    return float(loss.detach()), float(log_probs.grad), float(parts["clipped"])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),
        (1.1, 2.0, -2.2, -2.2, 0.0),
        (1.5, 2.0, -2.56, 0.0, 1.0),  # more likely and better: up to 1 + 0.28
        (0.5, 2.0, -1.0, -1.0, 0.0),  # less likely though better: pulled back
        (0.5, -2.0, 1.6, 0.0, 1.0),  # less likely and worse: down to 1 - 0.2
        (1.5, -2.0, 3.0, 3.0, 0.0),  # more likely though worse: pushed down
    ],
)
def test_clipping_on_both_sides(ratio: float, advantage: float, loss: float, gradient: float, clipped: float) -> None:
    found = loss_at(ratio, advantage, LossOptions(clip_low=0.2, clip_high=0.28, kl=0))
    assert found == pytest.approx((loss, gradient, clipped), rel=1e-5)


def test_the_whole_loss_by_hand() -> None:
    """Two answers, of two tokens and one; the third cell of the table is no token and holds nonsense."""
    log_probs = torch.tensor([[math.log(0.5), math.log(0.6)], [math.log(0.9), float("inf")]])
    old = torch.tensor([[math.log(0.5), math.log(0.4)], [math.log(0.9), float("nan")]])
    reference = torch.tensor([[math.log(0.25), math.log(0.6)], [math.log(0.9), float("-inf")]])
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([1.0, -3.0])
    # Ratios 1, 1.5 (bounded to 1.2), 1; divergences of the three: 1/2 - 1 + ln 2, 0, 0.
    divergence = LN2 - 0.5
    tokens = (-1 + 0.1 * divergence, -1.2, 3.0)
    wanted = {
        "sequence": ((tokens[0] + tokens[1]) / 2 + tokens[2]) / 2,
        "token": sum(tokens) / 3,
        "constant": sum(tokens) / (2 * 5),
    }
    shares = {"sequence": (1 / 4, 1 / 4), "token": (1 / 3, 1 / 3), "constant": (1 / 10, 1 / 10)}
    for normalise, value in wanted.items():
        options = LossOptions(kl=0.1, normalise=normalise)  # type: ignore[arg-type]
        weights = token_weights(mask, options.normalise, max_tokens=5)
        loss, parts = policy_loss(log_probs, old, reference, advantages, weights, options)
        assert float(loss) == pytest.approx(value, rel=1e-5)
        assert float(parts["kl"]) == pytest.approx(divergence * shares[normalise][0], rel=1e-4)
        assert float(parts["clipped"]) == pytest.approx(shares[normalise][1], rel=1e-5)


def test_what_does_not_count_has_no_gradient() -> None:
    log_probs = torch.tensor([[-1.0, 80.0]], requires_grad=True)  # the second overflows in exp
    old, reference = torch.tensor([[-1.0, -80.0]]), torch.tensor([[-1.0, 200.0]])
    weights = token_weights(torch.tensor([[True, False]]), "token", max_tokens=2)
    loss, _ = policy_loss(log_probs, old, reference, torch.tensor([1.0]), weights, LossOptions())
    loss.backward()  # type: ignore[no-untyped-call]
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("normalise", ["sequence", "token", "constant"])
def test_micro_batches_add_up(normalise: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(6, 7, generator=generator)

    log_probs, old, reference = draw().requires_grad_(), draw(), draw()
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 0, 5, 2])[:, None]
    advantages = torch.randn(6, generator=generator)
    options = LossOptions(kl=0.3, normalise=normalise)  # type: ignore[arg-type]
    weights = token_weights(mask, options.normalise, max_tokens=9)
    whole, _ = policy_loss(log_probs, old, reference, advantages, weights, options)
    (gradient,) = torch.autograd.grad(whole, log_probs)
    total, summed = torch.tensor(0.0), torch.zeros(6, 7)
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        # As a process that has these rows alone, and is told of the others.
        own = token_weights(mask[part], options.normalise, max_tokens=9, totals=(6, int(mask.sum())))
        torch.testing.assert_close(own, weights[part])
        loss, _ = policy_loss(log_probs[part], old[part], reference[part], advantages[part], own, options)
        total += loss.detach()
        summed += torch.autograd.grad(loss, log_probs)[0]
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(summed, gradient)


def test_an_empty_batch_divides_by_nothing() -> None:
    for normalise in ("sequence", "token"):
        weights = token_weights(torch.zeros(2, 3, dtype=torch.bool), normalise, max_tokens=3)  # type: ignore[arg-type]
        assert weights.eq(0).all()
