"""Transformers' own ``generate`` as an engine of rollouts: slow, for any Qwen2.5-VL or Qwen2-VL, on any device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medreasoner._text import one_line
from medreasoner.errors import BundleError, GenerationError
from medreasoner_train.policy_state import policy_state
from medreasoner_train.prompt_maker import MadePrompt, PromptMaker, check_draws
from medreasoner_train.rollout import Completion, Prompt, Sampling, stream_of

__all__ = ["TransformersRollouts"]


class TransformersRollouts:
    """Draws with ``model.generate``, without a grammar; see :class:`medreasoner_train.rollout.Rollouts`.

    Parameters
    ----------
    checkpoint
        Folder that ``save_pretrained`` wrote, with ``tokenizer.json`` and ``medreasoner.json``.
    device, dtype
        Of the model.
    at_once
        Prompts whose answers are written side by side.
    opens
        Whether answers are begun with their opening tag; else ``free`` of a completion is None: all was chosen.

    Raises
    ------
    BundleError
        If the folder holds no such checkpoint.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        at_once: int = 16,
        opens: bool = True,
    ) -> None:
        from transformers import AutoModelForImageTextToText

        self._maker = PromptMaker(Path(checkpoint), opens=opens)
        self._device, self._at_once = torch.device(device), at_once
        try:
            model = AutoModelForImageTextToText.from_pretrained(checkpoint, local_files_only=True, dtype=dtype)
        except Exception as err:  # transformers and safetensors raise many kinds for one cause
            raise BundleError(f"{checkpoint}: transformers cannot load it ({one_line(err)})") from err
        self._model: Any = model.to(self._device).eval()

    def refresh(self, model: Any) -> None:
        """Take over a model's weights, or a state dict's.

        Raises
        ------
        BundleError
            If they are not of this architecture; the message names the first tensor.
        """
        own, state = self._open().state_dict(), policy_state(model)
        tied = {"lm_head.weight"} if own["lm_head.weight"].data_ptr() in _pointers(own, "lm_head.weight") else set()
        wrong = sorted(own.keys() - tied ^ state.keys() - tied)
        wrong += sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        if wrong:
            raise BundleError(f"rollouts: {len(wrong)} weights are missing, unknown or misshapen, first {wrong[0]}")
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)

    def _open(self) -> Any:
        if self._model is None:
            raise GenerationError("these rollouts are closed")
        return self._model

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """See :class:`medreasoner_train.rollout.Rollouts`.

        Raises
        ------
        QueryError, ImageReadError
            If the model does not accept a prompt; the message counts them from 1.
        GenerationError
            If a number of `sampling` is out of range, or the engine is closed.
        """
        check_draws(sampling, seed)
        self._open()
        made = self._maker.read(prompts)
        answers: list[list[Completion]] = []
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []), torch.inference_mode():
            for start in range(0, len(made), self._at_once):
                torch.manual_seed((seed + stream_of(prompts[start].key)) % 2**63)
                answers += self._draw(made[start : start + self._at_once], sampling)
        return answers

    def _draw(self, made: Sequence[MadePrompt], sampling: Sampling) -> list[list[Completion]]:
        left = sampling.max_tokens - min(len(each.opening) for each in made)
        inputs = self._inputs(made)
        length = inputs["input_ids"].shape[1]
        left = min(left, self._maker.spec.max_length - length)
        if left > 0:
            tokens = self._model.generate(**inputs, generation_config=self._config(sampling, left))
            written = tokens[:, length:].tolist()
        else:
            written = [[]] * (len(made) * sampling.count)
        return [
            [
                self._maker.completion(each, row, max_tokens=sampling.max_tokens)
                for row in written[number * sampling.count : (number + 1) * sampling.count]
            ]
            for number, each in enumerate(made)
        ]

    def _config(self, sampling: Sampling, max_new_tokens: int) -> Any:
        """Plain sampling, whatever the checkpoint's own ``generation_config.json`` would do."""
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            num_return_sequences=sampling.count,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._maker.end,
            pad_token_id=self._maker.end,
        )

    def _inputs(self, made: Sequence[MadePrompt]) -> dict[str, Tensor]:
        """The prompts side by side, shorter ones behind padding (B, T), and all patches one behind the other."""
        from medreasoner_export.streamed import prompt_inputs

        each = [
            prompt_inputs(
                self._model, (*one.ids, *one.opening), self._maker.image_token, self._maker.patches(one), one.grid
            )
            for one in made
        ]
        length = max(one["input_ids"].shape[1] for one in each)

        def padded(name: str, value: int) -> Tensor:
            rows = [one[name][0] for one in each]
            return torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=value) for row in rows])

        ids = padded("input_ids", self._maker.end)
        lengths = torch.tensor([one["input_ids"].shape[1] for one in each])
        inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(length) >= length - lengths[:, None]).long(),
            "mm_token_type_ids": padded("mm_token_type_ids", 0),
            "pixel_values": torch.cat([one["pixel_values"] for one in each]),
            "image_grid_thw": torch.cat([one["image_grid_thw"] for one in each]),
        }
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


def _pointers(state: dict[str, Tensor], but: str) -> set[int]:
    return {tensor.data_ptr() for name, tensor in state.items() if name != but}
