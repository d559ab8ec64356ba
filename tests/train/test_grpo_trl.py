"""Our loss and gradient beside TRL's GRPOTrainer on the same tensors; skipped where TRL is not installed."""

import collections
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medreasoner_train.grpo import LossOptions, Normalise, group_advantages, policy_loss, token_weights

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16,<2'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what TRL imports
    from trl import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

PROMPTS, EACH, LENGTH = 3, 4, 9
ROWS = PROMPTS * EACH


class _Alone:
    """Accelerator of one process."""

    num_processes, sync_gradients = 1, True

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value

    def gather(self, value: Tensor) -> Tensor:
        return value


def trl_loss(log_probs: Tensor, inputs: dict[str, Any], arguments: Any) -> tuple[Tensor, dict[str, Any]]:
    """``GRPOTrainer._compute_loss`` itself, with the log-probabilities given to it in place of a model's."""
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.args = arguments
    for name in ("beta", "loss_type", "importance_sampling_level", "top_entropy_quantile", "use_vllm"):
        setattr(trainer, name, getattr(arguments, name))
    trainer.epsilon_low, trainer.epsilon_high = arguments.epsilon, arguments.epsilon_high
    trainer.max_completion_length = arguments.max_completion_length
    trainer.off_policy_mask_threshold = None
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = False
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator = _Alone()
    trainer.model = types.SimpleNamespace(training=True)
    trainer._metrics = {"train": collections.defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None)
    return trainer._compute_loss(None, inputs), trainer._metrics["train"]


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities new, old and of the reference, a ragged mask, and rewards."""
    generator = torch.Generator().manual_seed(seed)
    new = -3 * torch.rand(ROWS, LENGTH, generator=generator)
    old = new + 0.4 * torch.randn(ROWS, LENGTH, generator=generator)
    reference = new + 0.6 * torch.randn(ROWS, LENGTH, generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    return new, old, reference, torch.arange(LENGTH) < lengths, torch.rand(ROWS, generator=generator)


def config(out: Path, kind: str, *, kl: float, clip_high: float) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL calls what transformers is about to drop
        return GRPOConfig(
            output_dir=str(out),
            beta=kl,
            epsilon=0.2,
            epsilon_high=clip_high,
            loss_type=kind,
            max_completion_length=12,
            per_device_train_batch_size=ROWS,
            num_generations=EACH,
            steps_per_generation=1,
            use_cpu=True,
            bf16=False,
            use_bias_correction_kl=False,  # DeepSeek V3.2 weighs the divergence with the ratio; the paper does not
            report_to=[],
        )


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize(
    ("kind", "normalise"), [("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")]
)
def test_loss_and_gradient_are_trls(
    tmp_path: Path, kind: str, normalise: Normalise, kl: float, clip_high: float
) -> None:
    new, old, reference, mask, rewards = draw(seed=len(kind))
    options = LossOptions(clip_high=clip_high, kl=kl, normalise=normalise)
    advantages = group_advantages(rewards, torch.arange(PROMPTS).repeat_interleave(EACH))
    ours = new.clone().requires_grad_()
    weights = token_weights(mask, normalise, max_tokens=12)
    loss, parts = policy_loss(ours, old, reference if kl else None, advantages, weights, options)
    loss.backward()  # type: ignore[no-untyped-call]
    arguments = config(tmp_path, kind, kl=kl, clip_high=clip_high)
    theirs = new.clone().requires_grad_()
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 2, dtype=torch.int64),
        "prompt_mask": torch.ones(ROWS, 2, dtype=torch.int64),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.int64),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    wanted, metrics = trl_loss(theirs, inputs, arguments)
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    if normalise == "token":
        assert float(parts["clipped"]) == pytest.approx(metrics["clip_ratio/region_mean"][0], abs=1e-6)
        assert float(parts["clipped"]) > 0.05  # there is something to compare
        if kl:
            assert float(parts["kl"]) == pytest.approx(metrics["kl"][0], rel=1e-5)
