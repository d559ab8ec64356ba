"""vLLM's names as far as rollouts use them. Its answers are random tokens that depend on prompt, seed and weights."""

import hashlib
import types
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


class SamplingParams:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class LLM:
    """Records what it is told; `end_chance` is how often a token ends an answer."""

    end_chance = 0.05
    finish_reason: str | None = None  # of all answers, if set

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.calls, self.requests, self.params = arguments, [], [], []
        self._weights = self._digest(Path(arguments["model"]))

    @staticmethod
    def _digest(folder: Path) -> bytes:
        state = load_file(folder / "model.safetensors")
        return hashlib.sha256(b"".join(state[name].tobytes() for name in sorted(state))).digest()

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        assert method == "reload_weights"
        self._weights = self._digest(Path(kwargs["weights_path"]))

    def reset_mm_cache(self) -> None:
        self.calls.append("reset_mm_cache")

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append("wake " + " ".join(tags))

    def generate(self, prompts: list[dict[str, Any]], params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        self.calls.append("generate")
        self.requests, self.params = prompts, params
        return [self._output(prompt, each) for prompt, each in zip(prompts, params, strict=True)]

    def _output(self, prompt: dict[str, Any], params: Any) -> Any:
        outputs = [self._one(prompt, params, index) for index in range(params.n)]
        return types.SimpleNamespace(outputs=outputs[::-1])  # an order is not promised

    def _one(self, prompt: dict[str, Any], params: Any, index: int) -> Any:
        seed = params.seed + index if params.temperature > 0.01 else 0
        source = repr((seed, prompt["prompt_token_ids"])).encode() + self._weights
        rng = np.random.default_rng(list(hashlib.sha256(source).digest()))
        ids: list[int] = []
        while len(ids) < params.max_tokens and (not ids or ids[-1] not in params.stop_token_ids):
            ends = rng.random() < self.end_chance
            ids.append(params.stop_token_ids[0] if ends else int(rng.integers(10, 200)))
        reason = self.finish_reason or ("stop" if ids[-1] in params.stop_token_ids else "length")
        return types.SimpleNamespace(index=index, token_ids=ids, finish_reason=reason)
