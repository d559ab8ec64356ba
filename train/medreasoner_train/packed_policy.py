"""The policy of small reasoners on square images: a prompt's answers share one pass over its image.

Like :mod:`medreasoner_train.hub_policy`, of which it is the fast form for nano: the image is read once for all answers
of a prompt, in the trainer's pass and in the torch sampler.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLConfig

from medreasoner._text import one_line
from medreasoner.errors import BundleError, QueryError
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_train.checkpoint import read_settings
from medreasoner_train.completions import as_rows
from medreasoner_train.decoder import block_mask, language_pass, pack
from medreasoner_train.hub_policy import bare, replaced
from medreasoner_train.loop import moved
from medreasoner_train.model import to_tensor, tower
from medreasoner_train.rollout import Completion, Pixels, Prompt, Sampling, shown_once, stream_of
from medreasoner_train.tokenizer import token_id
from medreasoner_train.vocabulary import Vocabulary

__all__ = ["PackedPolicy"]

BRANCHES = 8  # answers in a row: attention's mask grows with the square of a row's length


@dataclasses.dataclass(slots=True, kw_only=True)
class _Row:
    """Some answers of one prompt: its number, its question, and of each answer the tokens up to the last chosen one.

    `chosen` tells which of these tokens were.
    """

    prompt: int
    asked: list[int]
    answers: list[tuple[int, ...]]
    chosen: list[list[int]]


class PackedPolicy:
    """Log-probabilities and samples of a reasoner of :func:`medreasoner_train.model.build_reasoner`.

    Parameters
    ----------
    vocabulary
        Its tokens.
    size, token_side
        Sides in pixels of the square that it sees, in which prompts come, and of what becomes one token of it.
    frozen_vision
        Whether the vision tower is left as it is: no gradient goes through it.
    checkpointing
        Whether the decoder's pass is run again for the gradient instead of being kept.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        size: int,
        token_side: int = 28,
        frozen_vision: bool = False,
        checkpointing: bool = False,
    ) -> None:
        tokenizer = vocabulary.tokenizer
        self.vocabulary, self.size, self._token_side = vocabulary, size, token_side
        self.end = token_id(tokenizer, "<|im_end|>")
        self.opening = {True: token_id(tokenizer, "<think>"), False: vocabulary.spans[0][0]}
        self._frozen, self._checkpointing = frozen_vision, checkpointing

    @classmethod
    def of(cls, folder: Path, *, frozen_vision: bool = False, checkpointing: bool = False) -> "PackedPolicy | None":
        """The policy for a checkpoint, or None if it is not of this kind.

        It is, if images are stretched to a square that whole windows fill, each coordinate is one token, and the
        embeddings are the language head too.
        """
        if not (folder / "medreasoner.json").is_file():
            return None
        settings, config = read_settings(folder), _config(folder)
        vision = config.vision_config
        resize, (kind, _, largest) = settings.get("resize", {}), str(settings.get("coordinates", "")).partition("_")
        width = resize.get("width", 0)
        square = resize.get("rule") == "stretch" and width == resize.get("height") and width > 0
        if not square or width % vision.window_size or kind != "relative" or not largest.isdecimal():
            return None
        if not config.get_text_config().tie_word_embeddings:
            return None
        tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
        if any(len(tokenizer.encode(str(value)).ids) != 1 for value in range(int(largest) + 1)):
            return None
        return cls(
            Vocabulary(tokenizer, int(largest)),
            size=width,
            token_side=vision.patch_size * vision.spatial_merge_size,
            frozen_vision=frozen_vision,
            checkpointing=checkpointing,
        )

    def grid_size(self, _: Pixels) -> tuple[int, int]:
        """Width and height of any image in the numbers of an answer about it."""
        return self.vocabulary.largest, self.vocabulary.largest

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
            Whose: of :func:`medreasoner_train.model.build_reasoner`, or what DDP made of it; on any device.
        prompts, completions
            B prompts and the answers to each, N in all.
        temperature
            At which they were drawn.

        Returns
        -------
        log_probs : (N, L) float32, mask : (N, L) bool
            N in the order of the prompts, L tokens of the longest; the mask is False behind an answer's end and where
            a token was not chosen.
        """

        def flat(*_: Any) -> Tensor:
            return self._flat(inner, prompts, completions, temperature)

        inner = bare(model)
        with replaced(inner, flat):  # called as a whole, so that DDP knows of it
            found = model()
        return as_rows(found, [each for own in completions for each in own])

    def _flat(
        self, model: Any, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], temperature: float
    ) -> Tensor:
        """Log-probabilities of all chosen tokens, one completion behind the other."""
        device = model.model.language_model.embed_tokens.weight.device
        rows = self._rows(prompts, completions)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            images, numbers = self._images(prompts)
            embeds = tower(model.model.visual, images.to(device))
        hidden, first = self._hidden(model, embeds, [numbers[row.prompt] for row in rows], rows)
        # Where each token is predicted from: one place before it, the first of an answer at the question's end.
        wanted: list[tuple[int, int, int]] = []
        for b, row in enumerate(rows):
            asked = at = first + len(row.asked)
            for answer, places in zip(row.answers, row.chosen, strict=True):
                wanted += [(b, (at + place if place else asked) - 1, answer[place]) for place in places]
                at += len(answer)
        # By way of NumPy, which reads so many tuples three times as fast.
        row_of, place_of, tokens = torch.from_numpy(np.array(wanted, np.int64).reshape(-1, 3)).to(device).T
        table = model.model.language_model.embed_tokens.weight  # tied: the language head too
        return _chosen(hidden[row_of, place_of], table, tokens, temperature)

    def _rows(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[_Row]:
        """Answers laid out in rows, in their order."""
        rows: list[_Row] = []
        for number, (prompt, own) in enumerate(zip(prompts, completions, strict=True)):
            asked = self.vocabulary.prompt(prompt.query)
            for start in range(0, len(own), BRANCHES):
                part = own[start : start + BRANCHES]
                places = [each.places for each in part]
                answers = [
                    each.ids[: places[-1] + 1 if places else 0] for each, places in zip(part, places, strict=True)
                ]
                rows.append(_Row(prompt=number, asked=asked, answers=answers, chosen=places))
        return rows

    def _images(self, prompts: Sequence[Prompt]) -> tuple[Tensor, list[int]]:
        """The pictures (M, 3, S, S), and which of them each prompt shows."""
        first, numbers = shown_once(prompts)
        return torch.stack([self.shown(prompt) for prompt in first]), numbers

    def _hidden(self, model: Any, embeds: Tensor, images: list[int], rows: list[_Row]) -> tuple[Tensor, int]:
        """Final states (rows, T, D) of rows about these images, and the place of the first token after the prefix."""
        language = model.model.language_model
        prefix, positions = self._prefix()
        device = embeds.device
        answers, asked = [row.answers for row in rows], [row.asked for row in rows]
        packed = moved(
            pack(prefix, positions, self.vocabulary.image, answers, self.vocabulary.pad, trunks=asked), device
        )
        of = torch.tensor(images, device=device)
        inputs = language.embed_tokens(packed.ids)
        inputs = inputs.masked_scatter(packed.image[..., None], embeds[of].to(inputs.dtype))
        seen = block_mask(packed.branch)
        if self._checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(language_pass, language, inputs, packed.positions, seen, use_reentrant=False)
        else:
            hidden = language_pass(language, inputs, packed.positions, seen)
        return hidden, len(prefix)

    def _prefix(self) -> tuple[list[int], Tensor]:
        return self.vocabulary.prefix(self.size // self._token_side)

    def shown(self, prompt: Prompt) -> Tensor:
        """What the model sees of a prompt's picture: (3, S, S) in [-1, 1].

        Raises
        ------
        QueryError
            If the picture is not of the policy's size.
        """
        pixels = prompt.pixels
        if pixels.shape[:2] != (self.size, self.size):
            shape = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise QueryError(f"{prompt.key}: a picture of {shape}; this policy sees {self.size} x {self.size}")
        if pixels.ndim == 2:
            pixels = pixels[..., None].repeat(3, axis=2)
        return to_tensor(pixels)

    @torch.no_grad()
    def sample(self, model: Any, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """Draw answers freely, without a grammar, each from its opening tag to its end.

        The answers of all prompts are written side by side, those of each by random numbers of its own.
        """
        device = model.model.language_model.embed_tokens.weight.device
        writing = _Writing(self, model, prompts, sampling, device, seed)
        while writing.step():
            pass
        encode = self.vocabulary.tokenizer
        answers = []
        for ids in writing.written():
            finished = ids[-1] == self.end
            text = encode.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
            free = (False, *[True] * (len(ids) - 1))  # the opening tag was given
            answers.append(Completion(ids=tuple(ids), text=text, free=free, finished=finished))
        return [answers[start : start + sampling.count] for start in range(0, len(answers), sampling.count)]


def _config(folder: Path) -> Any:
    """Sizes of a checkpoint's model."""
    try:
        return Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
    except Exception as err:  # transformers raises many kinds for one cause
        raise BundleError(f"{folder}: no config.json of a Qwen2.5-VL ({one_line(err)})") from err


def _chosen(states: Tensor, table: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability (M,) of each token after its state (M, D); logits over the vocabulary only a part at a time."""
    parts = []
    for some, own in zip(torch.split(states, 16384), torch.split(tokens, 16384), strict=True):
        logits = (some @ table.T).float() / temperature
        parts.append(logits.gather(1, own[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)


def _shares(seed: int, prompt: Prompt, sampling: Sampling) -> npt.NDArray[np.float32]:
    """(count, max_tokens) numbers in [0, 1), each of which draws a token."""
    rng = np.random.default_rng([seed, stream_of(prompt.key)])
    return rng.random((sampling.count, sampling.max_tokens), dtype=np.float32)


def _drawn(logits: Tensor, shares: Tensor) -> Tensor:
    """(N,) tokens, each the one at a share (N,) of the way through the probabilities of its row (N, V)."""
    sums = logits.softmax(-1).cumsum(-1)
    whole = sums[:, -1]
    wanted = torch.minimum(shares * whole, torch.nextafter(whole, torch.zeros_like(whole)))  # or rounding leads outside
    return torch.searchsorted(sums, wanted[:, None], right=True)[:, 0]


class _Writing:
    """Answers that are being drawn, N rows of one batch; those that have ended leave it from time to time."""

    def __init__(
        self,
        policy: PackedPolicy,
        model: Any,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        device: torch.device,
        seed: int,
    ) -> None:
        self._model, self._sampling, self._end = model.model.language_model, sampling, policy.end
        count = len(prompts) * sampling.count
        vocabulary = policy.vocabulary
        prefix, positions = policy._prefix()
        rows = [[[*vocabulary.prompt(prompt.query)]] for prompt in prompts]
        packed = moved(pack(prefix, positions, vocabulary.image, rows, vocabulary.pad), device)
        images, numbers = policy._images(prompts)
        embeds = tower(model.model.visual, images.to(device))[torch.tensor(numbers, device=device)]
        inputs = self._model.embed_tokens(packed.ids)
        inputs = inputs.masked_scatter(packed.image[..., None], embeds.to(inputs.dtype))
        self._cache: list[tuple[Tensor, Tensor]] = []
        language_pass(self._model, inputs, packed.positions, block_mask(packed.branch), self._cache)
        valid = packed.branch >= 0
        last = valid.sum(1) - 1
        place = packed.positions[0, torch.arange(len(prompts), device=device), last] + 1
        self._keep(torch.arange(len(prompts), device=device).repeat_interleave(sampling.count))
        self._valid = valid.repeat_interleave(sampling.count, 0)
        self._place = place.repeat_interleave(sampling.count, 0)
        opening = torch.tensor([policy.opening[prompt.think] for prompt in prompts], device=device)
        self._pending = opening.repeat_interleave(sampling.count)
        self._ids = torch.full((count, sampling.max_tokens), -1, dtype=torch.int64, device=device)
        self._ids[:, 0] = self._pending
        self._rows = torch.arange(count, device=device)  # the answer that each row of the batch is
        self._done = torch.zeros(count, dtype=torch.bool, device=device)
        shares = [_shares(seed, prompt, sampling) for prompt in prompts]
        self._shares = torch.from_numpy(np.concatenate(shares)).to(device)  # (N, max_tokens)
        self._at = 1

    def _keep(self, rows: Tensor) -> None:
        self._cache = [(keys[rows], values[rows]) for keys, values in self._cache]

    def step(self) -> bool:
        """Write one token of each answer; False when all have ended."""
        if self._at >= self._sampling.max_tokens:
            return False
        own = self._valid.new_ones(len(self._rows), 1)
        seen = torch.cat((self._valid, own), 1)
        hidden = language_pass(
            self._model,
            self._model.embed_tokens(self._pending[:, None]),
            self._place[None, :, None].expand(3, -1, -1),
            seen[:, None, None],
            self._cache,
        )
        logits = (hidden[:, -1] @ self._model.embed_tokens.weight.T).float() / self._sampling.temperature
        token = _drawn(logits, self._shares[self._rows, self._at])
        token = torch.where(self._done, self._end, token)
        self._ids[self._rows, self._at] = torch.where(self._done, -1, token)
        self._done = self._done | (token == self._end)
        self._valid, self._place, self._pending = seen, self._place + 1, token
        self._at += 1
        if self._at % 4:
            return True
        left = (~self._done).nonzero()[:, 0]
        if len(left) == 0:
            return False
        if 4 * len(left) <= 3 * len(self._rows):
            self._keep(left)
            for name in ("_valid", "_place", "_pending", "_rows", "_done"):
                setattr(self, name, getattr(self, name)[left])
        return True

    def written(self) -> list[list[int]]:
        """The answers' tokens."""
        return [[token for token in row if token >= 0] for row in self._ids.tolist()]
