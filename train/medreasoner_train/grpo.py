"""Group-relative policy optimisation: advantages and loss, as functions of tensors alone.

N completions of up to L tokens; the completions of one prompt form a group. Log-probabilities are those of the tokens
that were written, under the policy that is trained, the one that wrote them ("old") and the frozen reference.

References
----------
Z. Shao et al., "DeepSeekMath" (arXiv 2402.03300): GRPO. Z. Liu et al., "Understanding R1-Zero-like training"
(arXiv 2503.20783): Dr. GRPO. Q. Yu et al., "DAPO" (arXiv 2503.14476): clip-higher, token-level loss, dynamic sampling.
J. Schulman, "Approximating KL divergence" (2020): the k3 estimator.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

__all__ = ["LossOptions", "Normalise", "group_advantages", "k3", "policy_loss", "telling_groups", "token_weights"]

Normalise = Literal["sequence", "token", "constant"]
EPSILON = 1e-4  # beside a group's deviation, as TRL has it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What the loss is made of; the defaults are GRPO with the paper's KL coefficient.

    Parameters
    ----------
    clip_low, clip_high
        The ratio of new to old probability counts within [1 - clip_low, 1 + clip_high]. DAPO's clip-higher: 0.2, 0.28.
    kl
        Coefficient of the divergence from the reference; 0 leaves the reference out.
    normalise
        ``"sequence"``: mean over a completion's tokens, then over completions (GRPO); ``"token"``: mean over all tokens
        (DAPO); ``"constant"``: sum over the tokens by `max_tokens`, mean over completions (Dr. GRPO).
    scale_by_deviation
        Whether advantages are divided by their group's standard deviation (GRPO) or not (Dr. GRPO).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.01
    normalise: Normalise = "sequence"
    scale_by_deviation: bool = True


def group_advantages(rewards: Tensor, groups: Tensor, *, scale: bool = True) -> Tensor:
    """Rewards (N,) less their group's mean, over its standard deviation if `scale`; (N,) float32.

    groups : (N,) int64, the group of each completion, in any order. A group of one has no advantage; nor has one whose
    rewards are all the same.

    >>> group_advantages(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([7, 7, 3]), scale=False).tolist()
    [-0.5, 0.5, 0.0]
    """
    rewards = rewards.double()  # or the rounding of a mean, over EPSILON, would be an advantage where all are the same
    _, index = torch.unique(groups, return_inverse=True)
    count = torch.bincount(index).double()
    mean = torch.zeros_like(count).index_add_(0, index, rewards) / count
    centred = rewards - mean[index]
    if not scale:
        return centred.float()
    squares = torch.zeros_like(count).index_add_(0, index, centred**2)
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()  # of a sample, as torch.std
    return (centred / (deviation[index] + EPSILON)).float()


def telling_groups(rewards: Tensor, groups: Tensor, *, apart: float = 1e-6) -> Tensor:
    """(N,) bool: whose group has rewards that differ. The others teach nothing (DAPO's dynamic sampling drops them)."""
    rewards = rewards.float()
    _, index = torch.unique(groups, return_inverse=True)
    size = int(index.max()) + 1 if len(index) else 0
    low = rewards.new_full((size,), torch.inf).scatter_reduce_(0, index, rewards, "amin")
    high = rewards.new_full((size,), -torch.inf).scatter_reduce_(0, index, rewards, "amax")
    return (high - low > apart)[index]


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Low-variance, unbiased and never negative estimate of KL(policy || reference), token by token."""
    apart = reference - log_probs
    return torch.expm1(apart) - apart


def token_weights(
    mask: Tensor, normalise: Normalise, *, max_tokens: int, totals: tuple[int, int] | None = None
) -> Tensor:
    """(N, L) weights whose sum with the tokens' losses is the loss of the whole batch.

    They are worked out over all completions of an optimiser's step, so that losses and gradients of micro-batches (and
    of processes) simply add up to those of the batch.

    Parameters
    ----------
    mask : (N, L) bool
        Tokens that were written by choice and count.
    normalise
        See :class:`LossOptions`.
    max_tokens
        The longest completion that is allowed; of ``"constant"`` only.
    totals
        Completions and counting tokens of the whole batch, where `mask` is a part of it.
    """
    kept = mask.float()
    rows, tokens = totals or (len(mask), int(mask.sum()))
    if normalise == "token":
        return kept / max(1, tokens)
    if normalise == "constant":
        return kept / (rows * max_tokens)
    return kept / kept.sum(1, keepdim=True).clamp(min=1) / rows


def policy_loss(
    log_probs: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    options: LossOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with the KL penalty, summed with the tokens' weights.

    Parameters
    ----------
    log_probs, old : (N, L) float32
        Of the written tokens; only the first has a gradient.
    reference : (N, L) float32 or None
        None where ``options.kl`` is 0.
    advantages : (N,) float32
        Of the completions.
    weights : (N, L) float32
        :func:`token_weights`; 0 where a token does not count.
    options
        Clipping and coefficient.

    Returns
    -------
    loss : () float32
    parts : dict
        Weighted means over the tokens: ``kl``, ``clipped`` (share of the tokens whose ratio left the range on the side
        where that stops the gradient).
    """
    # A token that does not count may hold anything, infinities too, and must have no gradient.
    counts = weights > 0
    log_probs, old = torch.where(counts, log_probs, 0.0), torch.where(counts, old, 0.0)
    ratio = torch.exp(log_probs - old)
    bounded = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    gain = advantages[:, None]
    surrogate = torch.minimum(ratio * gain, bounded * gain)
    losses = -surrogate
    parts: dict[str, Tensor] = {}
    if reference is not None:
        divergence = k3(log_probs, torch.where(counts, reference, 0.0))
        losses = losses + options.kl * divergence
        parts["kl"] = (divergence.detach() * weights).sum()
    stopped = (ratio * gain > bounded * gain).float()
    parts["clipped"] = (stopped * weights).sum()
    return (losses * weights).sum(), parts
