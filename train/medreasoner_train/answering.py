"""Greedy constrained answers in torch, for the validation during training; the runtime has its own decoder.

The rules are the runtime's: absent if its probability among the two choices passes a threshold, then eight coordinates,
each the likeliest that leaves a valid answer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medreasoner_train.decoder import block_mask, language_pass, pack
from medreasoner_train.loop import moved
from medreasoner_train.model import tower
from medreasoner_train.vocabulary import Vocabulary

__all__ = ["answer"]


@torch.no_grad()
def answer(
    model: Any, vocabulary: Vocabulary, images: Tensor, queries: Sequence[str]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Answer one query an image.

    Parameters
    ----------
    model
        A reasoner of :func:`medreasoner_train.model.build_reasoner`.
    vocabulary
        Its tokens by name.
    images : (B, 3, S, S) float32
        In [-1, 1].
    queries
        B questions.

    Returns
    -------
    numbers : (B, 8) float64
        Box and points in coordinate units, as if present.
    p_absent : (B,) float64
        Probability of the absent answer against the present one.
    """
    language = model.model.language_model
    side = images.shape[-1] // (model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size)
    prefix, positions = vocabulary.prefix(side)
    spans = vocabulary.spans
    opening = spans[0][:-1]  # up to the choice between "[" and "null"
    rows = [[[*vocabulary.prompt(query), *opening]] for query in queries]
    table = language.embed_tokens.weight
    device = table.device
    vocabulary, images = vocabulary.to(device), images.to(device)
    packed = moved(pack(prefix, positions, vocabulary.image, rows, vocabulary.pad), device)
    embeds = language.embed_tokens(packed.ids)
    embeds = embeds.masked_scatter(packed.image[..., None], tower(model.model.visual, images))
    cache: list[tuple[Tensor, Tensor]] = []
    hidden = language_pass(language, embeds, packed.positions, block_mask(packed.branch), cache)
    valid = packed.branch >= 0
    last = valid.sum(1) - 1
    batch = torch.arange(len(queries), device=device)
    pair = hidden[batch, last] @ table[[vocabulary.bracket, vocabulary.null]].T
    p_absent = pair.softmax(-1)[:, 1]
    place = packed.positions[0, batch, last] + 1  # (B,)
    values: list[Tensor] = []
    pending = torch.full((len(queries), 1), vocabulary.bracket, device=device)
    for index in range(8):
        count = pending.shape[1]
        steps = place[:, None] + torch.arange(count, device=device)
        past = valid[:, None, :].expand(-1, count, -1)
        own = valid.new_ones(count, count).tril().expand(len(queries), -1, -1)
        hidden = language_pass(
            language, language.embed_tokens(pending), steps.expand(3, -1, -1), torch.cat((past, own), 2)[:, None], cache
        )
        valid = torch.cat((valid, valid.new_ones(len(queries), count)), 1)
        place = place + count
        logits = hidden[:, -1] @ table[vocabulary.numbers].T  # (B, largest + 1)
        values.append(_choose(logits, values, vocabulary.largest))
        span = torch.tensor(spans[index + 1], device=device).expand(len(queries), -1)
        pending = torch.cat((vocabulary.numbers[values[-1]][:, None], span), dim=1)
    return torch.stack(values, 1).cpu().double().numpy(), p_absent.cpu().double().numpy()


def _choose(logits: Tensor, before: Sequence[Tensor], largest: int) -> Tensor:
    numbers = torch.arange(largest + 1, device=logits.device)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if len(before) in (0, 1):
        allowed &= numbers < largest
    elif len(before) in (2, 3):
        allowed &= numbers > before[len(before) - 2][:, None]
    return logits.masked_fill(~allowed, -torch.inf).argmax(-1)
