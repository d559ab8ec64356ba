"""The optimiser's step against an exact decomposition and against torch's own."""

import pytest
import torch
from torch import nn

from medreasoner_train.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator)
    if shape[0] == shape[1]:  # a random square matrix has values near zero: lift them into the iteration's reach
        u, s, v = torch.linalg.svd(matrices)
        matrices = u @ torch.diag_embed(s.clamp(min=0.05 * float(s.max()))) @ v
    out = orthogonalise(matrices)
    values = torch.linalg.svdvals(out)
    assert float(values.min()) >= 0.6
    assert float(values.max()) <= 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    polar = u @ v
    cosine = nn.functional.cosine_similarity(out.flatten(1), polar.flatten(1))
    assert float(cosine.min()) > 0.95


def test_a_batch_of_matrices_is_each_alone() -> None:
    matrices = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(1))
    for own, batched in zip(matrices, orthogonalise(matrices), strict=True):
        torch.testing.assert_close(orthogonalise(own[None])[0], batched)


def test_the_direction_agrees_with_torch_over_several_steps() -> None:
    start = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Muon([ours], lr=0.01)
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradient = torch.randn(20, 30, generator=torch.Generator().manual_seed(10 + step))
        before = ours.detach().clone(), theirs.detach().clone()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        own.step()
        other.step()  # type: ignore[no-untyped-call]
        mine, real = ours.detach() - before[0], theirs.detach() - before[1]
        assert float(nn.functional.cosine_similarity(mine.flatten(), real.flatten(), dim=0)) > 0.99
        assert float(mine.norm() / real.norm()) == pytest.approx(1.0, rel=0.05)


def test_decay_shrinks_and_a_parameter_without_gradient_stays() -> None:
    decayed, still = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    decayed.grad = torch.zeros(4, 4)
    Muon([decayed, still], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(decayed.detach(), torch.full((4, 4), 0.95))
    torch.testing.assert_close(still.detach(), torch.ones(4, 4))
