"""vLLM as an engine of rollouts, for large policies on GPUs."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medreasoner._extras import require
from medreasoner.errors import GenerationError
from medreasoner_train.policy_state import policy_state
from medreasoner_train.prompt_maker import MadePrompt, PromptMaker, check_draws
from medreasoner_train.rollout import Completion, Prompt, Sampling, stream_of

__all__ = ["VllmRollouts"]

ALL = ("weights", "kv_cache")  # what vLLM's memory is made of, by its own tags


class VllmRollouts:
    """Draws with ``vllm.LLM``, without a grammar; see :class:`medreasoner_train.rollout.Rollouts`.

    Written from the sources of vLLM 0.33.0. **It was never run on vLLM itself**, which needs a GPU and a torch of its
    own (2.14.0, with transformers below 5.21): only what is sent to it and what is made of its answers is tested,
    beside a stand-in of its names. Untested are above all its own reading of the picture, the loading of nano, the
    memory that `refresh` takes, and several GPUs.

    The picture is sent in the size of the vision tower's grid, a multiple of its blocks, with limits by which vLLM
    keeps it so; its mean and deviation are those of the folder's ``preprocessor_config.json``, which must be there.
    Weights go through a file of safetensors that vLLM reads again (``reload_weights``), in the types of the policy.

    Parameters
    ----------
    checkpoint
        Folder that ``save_pretrained`` wrote, with the processor's files, ``tokenizer.json`` and ``medreasoner.json``.
    colocated
        Whether the trainer uses the same GPU: then vLLM gives its memory back between two calls (``sleep``).
    opens
        Whether answers are begun with their opening tag; else ``free`` of a completion is None: all was chosen.
    scratch
        Where weights are written, such as ``/dev/shm``; None: the system's folder for temporary files.
    **engine
        Further arguments of ``vllm.LLM``, such as ``tensor_parallel_size`` or ``gpu_memory_utilization``.

    Raises
    ------
    MissingExtraError
        If vLLM is not installed.
    BundleError
        If a file of the checkpoint is missing or malformed.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        colocated: bool = False,
        opens: bool = True,
        scratch: str | Path | None = None,
        **engine: Any,
    ) -> None:
        self._vllm = require("vllm", extra="vllm", feature="Rollouts by vLLM")
        self._maker = PromptMaker(Path(checkpoint), opens=opens)
        self._scratch, self._colocated = scratch, colocated
        self._asleep: set[str] = set()
        self._llm: Any = self._vllm.LLM(
            model=str(checkpoint),
            **{
                "max_model_len": self._maker.spec.max_length,
                "limit_mm_per_prompt": {"image": 1},
                "enable_prefix_caching": True,  # the answers of a prompt share it
                "enable_sleep_mode": colocated,
                **engine,
            },
        )

    def refresh(self, model: Any) -> None:
        """Take over a model's weights, or a state dict's.

        Nothing may be drawn meanwhile; what vLLM keeps of prompts that the old weights read is thrown away.
        """
        from safetensors.torch import save_file

        llm = self._open()
        self._wake("weights")
        folder = Path(tempfile.mkdtemp(prefix="medreasoner-rollouts-", dir=self._scratch))
        try:
            state = {name: tensor.contiguous().clone() for name, tensor in policy_state(model).items()}
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        llm.reset_mm_cache()
        llm.reset_prefix_cache()

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """See :class:`medreasoner_train.rollout.Rollouts`.

        Raises
        ------
        QueryError, ImageReadError
            If the model does not accept a prompt; the message counts them from 1.
        GenerationError
            If a number of `sampling` is out of range, the engine is closed, or vLLM gave an answer up.
        """
        check_draws(sampling, seed)
        llm, made = self._open(), self._maker.read(prompts)
        if any(len(each.opening) >= sampling.max_tokens for each in made):
            raise GenerationError(f"rollouts: max_tokens: {sampling.max_tokens} leave no room behind the opening tag")
        self._wake(*ALL)
        outputs = llm.generate(
            [self.request(each) for each in made],
            [
                self._params(each, sampling, seed, stream_of(prompt.key))
                for each, prompt in zip(made, prompts, strict=True)
            ],
            use_tqdm=False,
        )
        answers = [self._answers(each, output, sampling) for each, output in zip(made, outputs, strict=True)]
        if self._colocated:
            llm.sleep(level=1)
            self._asleep = set(ALL)
        return answers

    def request(self, made: MadePrompt) -> dict[str, Any]:
        """A prompt in vLLM's form: the image's token stands once, vLLM repeats it; its picture is beside it."""
        image, ids = self._maker.image_token, made.ids
        at = ids.index(image)
        pixels = made.placement.grid_height * made.placement.grid_width
        return {
            "prompt_token_ids": [*ids[: at + 1], *ids[at + ids.count(image) :], *made.opening],
            "multi_modal_data": {"image": self._maker.picture(made)},
            "mm_processor_kwargs": {"min_pixels": pixels, "max_pixels": pixels},
        }

    def _params(self, made: MadePrompt, sampling: Sampling, seed: int, stream: int) -> Any:
        return self._vllm.SamplingParams(
            n=sampling.count,
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=sampling.max_tokens - len(made.opening),
            # vLLM counts on from it for each of the prompt's answers; it takes 64 bits with a sign.
            seed=(seed * 1_000_003 + stream * sampling.count) % 2**62,
            stop_token_ids=[self._maker.end],
            detokenize=False,
        )

    def _answers(self, made: MadePrompt, output: Any, sampling: Sampling) -> list[Completion]:
        """The completions of a ``RequestOutput``."""
        found = sorted(output.outputs, key=lambda each: int(each.index))
        if len(found) != sampling.count or any(each.finish_reason not in ("stop", "length") for each in found):
            reasons = ", ".join(sorted({str(each.finish_reason) for each in found}))
            raise GenerationError(
                f"vLLM gave {len(found)} of {sampling.count} answers to a prompt, which ended by {reasons}; see its log"
            )
        return [self._maker.completion(made, list(each.token_ids), max_tokens=sampling.max_tokens) for each in found]

    def _wake(self, *tags: str) -> None:
        asleep = [tag for tag in tags if tag in self._asleep]
        if asleep:
            self._llm.wake_up(tags=asleep)
            self._asleep.difference_update(asleep)

    def _open(self) -> Any:
        if self._llm is None:
            raise GenerationError("these rollouts are closed")
        return self._llm

    def close(self) -> None:
        """Let go of the engine; vLLM frees its GPUs when nothing holds it any more."""
        self._llm = None
