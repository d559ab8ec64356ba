"""The policy of any Qwen2.5-VL checkpoint: log-probabilities by transformers' own whole forward.

Whatever is built around the model (FSDP, DDP, LoRA, gradient checkpointing) sees an ordinary call of it. For the time
of that call two of its modules do a little less than usual: the vision tower reads an image once for all answers about
it, and the language head gives log-probabilities of the written tokens, some positions at a time, so that the logits
(N, L, vocab) never exist.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medreasoner._text import one_line
from medreasoner.errors import BundleError, ImageReadError, QueryError
from medreasoner.geometry import Placement, place
from medreasoner.reasoner.prompt import Prompt as PromptBuilder
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner.reasoner.vision import image_patches
from medreasoner_train.completions import as_rows
from medreasoner_train.rollout import Completion, Pixels, Prompt

__all__ = ["HubPolicy", "bare", "freeze", "load_hub_model", "replaced"]

POSITIONS = 512  # whose logits exist at a time: 0.3 GB in float32 at a vocabulary of 152k


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Inputs of the model, N rows of T tokens; images once each.

    `image_of` has the image of each row, `grids` (images, 3) their patches, `keep` (N, T) the positions that predict a
    chosen token of an answer, `targets` these tokens, row by row.
    """

    inputs: dict[str, Tensor]
    grids: Tensor
    image_of: list[int]
    keep: Tensor
    targets: Tensor


class HubPolicy:
    """Log-probabilities under any ``Qwen2_5_VLForConditionalGeneration``.

    Parameters
    ----------
    folder
        Of the checkpoint: ``config.json``, ``tokenizer.json`` and, if there are, ``preprocessor_config.json`` and
        ``medreasoner.json`` say how images are resized and what a prompt is.
    gradient_checkpointing
        Keep only the layers' inputs for the backward pass, and run the layers again then.

    Raises
    ------
    BundleError
        If the folder holds no such checkpoint.
    """

    def __init__(self, folder: Path, *, gradient_checkpointing: bool = False) -> None:
        from medreasoner_export.checkpoint_spec import checkpoint_spec

        self.spec = checkpoint_spec(folder)
        self._prompt = PromptBuilder(load_tokenizer(str(folder / self.spec.tokenizer)), self.spec)
        self._checkpointing = gradient_checkpointing

    def placement(self, pixels: Pixels) -> Placement:
        """How an image lies in the grid that the vision tower sees.

        Raises
        ------
        ImageReadError
            If the image is too elongated.
        """
        return place(self.spec.vision.resize, height=pixels.shape[0], width=pixels.shape[1])

    def grid_size(self, pixels: Pixels) -> tuple[int, int]:
        """Width and height of the image (H, W) or (H, W, 3) in the numbers of an answer about it."""
        return self.placement(pixels).answer_limits(self.spec.coordinates)

    def log_probs(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completions' tokens.

        Parameters
        ----------
        model
            Whose: transformers' model, or what peft, DDP or FSDP made of it; on any device.
        prompts, completions
            B prompts and the answers to each, N in all.
        temperature
            At which they were drawn.

        Returns
        -------
        log_probs : (N, L) float32, mask : (N, L) bool
            N in the order of the prompts, L tokens of the longest; the mask is False behind an answer's end and where
            a token was not chosen.

        Raises
        ------
        QueryError, ImageReadError
            If a prompt cannot be read; the message names its key.
        """
        qwen = bare(model)
        batch = self._batch(qwen.config, prompts, completions, next(qwen.parameters()).device)
        wanted = torch.is_grad_enabled() and self._checkpointing
        with contextlib.ExitStack() as stack:
            stack.enter_context(_training(qwen, wanted=wanted))
            stack.enter_context(replaced(qwen.model.visual, partial(_seen_once, batch.grids, batch.image_of)))
            stack.enter_context(replaced(qwen.lm_head, partial(_chosen, batch.keep, batch.targets, temperature)))
            flat = model(**batch.inputs, use_cache=False).logits
        return as_rows(flat, [each for own in completions for each in own])

    def _batch(
        self, config: Any, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], device: torch.device
    ) -> _Batch:
        seen = [self._read(prompt) for prompt in prompts]
        rows = [
            (ids, image, each)
            for image, ((ids, _, _), own) in enumerate(zip(seen, completions, strict=True))
            for each in own
        ]
        length = max(len(ids) + len(answer.ids) for ids, _, answer in rows)
        tokens = torch.zeros((len(rows), length), dtype=torch.int64)
        valid, keep = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for row, (ids, _, answer) in enumerate(rows):
            end = len(ids) + len(answer.ids)
            tokens[row, :end] = torch.tensor([*ids, *answer.ids])
            valid[row, :end] = 1
            keep[row, [len(ids) + place - 1 for place in answer.places]] = True
        image_of = [image for _, image, _ in rows]
        grids = torch.tensor([grid for _, grid, _ in seen])
        inputs = {
            "input_ids": tokens,
            "attention_mask": valid,
            "mm_token_type_ids": (tokens == self._prompt.image_token).long() * valid,
            "pixel_values": torch.cat([_two_frames(config, patches) for _, _, patches in seen]),
            "image_grid_thw": grids[image_of],
        }
        targets = torch.tensor([each.ids[place] for _, _, each in rows for place in each.places], dtype=torch.int64)
        return _Batch(
            inputs={name: value.to(device) for name, value in inputs.items()},
            grids=grids.to(device),
            image_of=image_of,
            keep=keep.to(device),
            targets=targets.to(device),
        )

    def _read(self, prompt: Prompt) -> tuple[list[int], tuple[int, int, int], Tensor]:
        """A prompt's tokens, its image's patches as (frames, rows, columns), and the patches (n, 3 * patch**2)."""
        vision = self.spec.vision
        try:
            placement = self.placement(prompt.pixels)
            rows, columns = placement.grid_height // vision.patch_size, placement.grid_width // vision.patch_size
            ids = self._prompt.whole(prompt.query, rows * columns // vision.merge_size**2)
        except (QueryError, ImageReadError) as err:
            raise type(err)(f"{prompt.key}: {err}") from err
        patches = image_patches(vision, np.ascontiguousarray(prompt.pixels), placement)
        return ids, (1, rows, columns), torch.from_numpy(patches)


def freeze(model: Any, *, vision: bool, embeddings: bool) -> None:
    """Say what of a ``Qwen2_5_VLForConditionalGeneration`` is left as it is: the vision tower, the tokens' embeddings.

    With the embeddings goes the language head, where that is the same table.
    """
    model.model.visual.requires_grad_(not vision)
    model.get_input_embeddings().requires_grad_(not embeddings)


def load_hub_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    frozen_vision: bool = False,
    frozen_embeddings: bool = False,
    gradient_checkpointing: bool = False,
) -> Any:
    """The ``Qwen2_5_VLForConditionalGeneration`` of a checkpoint folder, to be trained with :class:`HubPolicy`.

    Parameters
    ----------
    folder
        Of the checkpoint.
    dtype
        Of the weights. Those that are trained need float32 beside mixed precision: a step of 1e-6 is lost in bfloat16.
    frozen_vision, frozen_embeddings
        Whether the vision tower, and the tokens' embeddings (with the language head, where that is the same table), are
        left as they are.
    gradient_checkpointing
        As the policy's.

    Raises
    ------
    BundleError
        If the folder holds no whole checkpoint of this architecture.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    try:
        model, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as err:  # transformers and safetensors raise many kinds for one cause
        raise BundleError(f"{folder}: not a Qwen2.5-VL checkpoint that transformers reads ({one_line(err)})") from err
    if missing := sorted(found["missing_keys"]):
        raise BundleError(f"{folder}: {len(missing)} weights are missing, first {missing[0]}")
    freeze(model, vision=frozen_vision, embeddings=frozen_embeddings)
    if gradient_checkpointing:
        newer = getattr(model, "activation_checkpointing_enable", None)  # the same under its newer name
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.eval()


def bare(model: Any) -> Any:
    """Transformers' model inside of what DDP and peft put around it; FSDP puts nothing around it."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _training(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Transformers checkpoints gradients in training mode alone, and generates with a cache only out of it."""
    before = model.training
    model.train(wanted)
    try:
        yield
    finally:
        model.train(before)


@contextlib.contextmanager
def replaced(module: nn.Module, instead: Callable[..., Any]) -> Iterator[None]:
    """``instead(forward, ...)`` takes the place of a module's forward; its hooks, such as FSDP's, run as always."""
    own = module.forward
    kept = module.__dict__.get("forward")  # another's replacement
    module.forward = partial(instead, own)
    try:
        yield
    finally:
        del module.forward
        if kept is not None:
            module.forward = kept


def _seen_once(
    grids: Tensor, image_of: list[int], forward: Callable[..., Any], pixels: Tensor, grid_thw: Tensor, **options: Any
) -> Any:
    """The vision tower on each image once; its tokens are repeated for the rows, of which `grid_thw` tells."""
    found = forward(pixels, grid_thw=grids, **options)
    merged = len(pixels) // len(found.pooler_output)  # patches of a token
    parts = found.pooler_output.split([int(count) // merged for count in grids.prod(1)])
    found.pooler_output = torch.cat([parts[image] for image in image_of])
    return found


def _chosen(
    keep: Tensor, targets: Tensor, temperature: float, forward: Callable[[Tensor], Tensor], states: Tensor
) -> Tensor:
    """Log-probability (M,) float32 of each target after its state; `keep` (N, T) picks M of the states (N, T, D)."""
    found = []
    for some, tokens in zip(torch.split(states[keep], POSITIONS), torch.split(targets, POSITIONS), strict=True):
        if torch.is_grad_enabled():
            found.append(checkpoint(_log_prob, forward, some, tokens, temperature, use_reentrant=False))
        else:
            found.append(_log_prob(forward, some, tokens, temperature))
    return torch.cat(found)


def _log_prob(forward: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    logits = forward(states).float() / temperature
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _two_frames(config: Any, patches: Tensor) -> Tensor:
    """Patches (n, 3 * patch**2) as (n, 3 * frames * patch**2): an image is its own second frame."""
    vision = config.vision_config
    planes = patches.view(len(patches), 3, 1, vision.patch_size**2)
    return planes.expand(-1, -1, vision.temporal_patch_size, -1).reshape(len(patches), -1)
