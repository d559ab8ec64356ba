"""Answers during training against the whole model, run anew for every token."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medreasoner_train.answering import answer
from medreasoner_train.language import PRESENT
from medreasoner_train.model import NanoConfig
from medreasoner_train.vocabulary import Vocabulary

Reference = Callable[[Any, list[int], Tensor], Tensor]
QUERIES = ["Where is the air-filled tissue?", "Heart?", "Which of the organs here pumps blood around"]
NAMES = ("x1", "y1", "x2", "y2", "p1x", "p1y", "p2x", "p2y")


def brute_force(
    model: Any, vocabulary: Vocabulary, image: Tensor, query: str, logits_of: Reference
) -> tuple[list[int], float]:
    """Eight numbers and P(absent), each from a pass over the whole text so far."""
    encode = vocabulary.tokenizer.encode
    spans = [encode(part).ids for part in PRESENT.format(**dict.fromkeys(NAMES, "#")).split("#")]
    ids = [*vocabulary.prefix(image.shape[-1] // 28)[0], *vocabulary.prompt(query), *spans[0][:-1]]
    pair = logits_of(model, ids, image)[-1][[vocabulary.bracket, vocabulary.null]]
    ids.append(vocabulary.bracket)
    values: list[int] = []
    for k in range(8):
        logits = logits_of(model, ids, image)[-1][vocabulary.numbers]
        allowed = range(252) if k < 2 else range(values[k - 2] + 1, 253) if k < 4 else range(253)
        values.append(max(allowed, key=lambda v: float(logits[v])))
        ids += [int(vocabulary.numbers[values[-1]]), *spans[k + 1]]
    return values, float(pair.softmax(-1)[1])


@pytest.mark.parametrize("size", [84, 168])
def test_answers_equal_those_of_the_whole_model_without_a_cache(
    size: int, toy_reasoner: Any, vocabulary: Vocabulary, reference_logits: Reference
) -> None:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(6))
    numbers, p_absent = answer(toy_reasoner, vocabulary, images, QUERIES)
    for image, query, own, p in zip(images, QUERIES, numbers, p_absent, strict=True):
        values, expected = brute_force(toy_reasoner, vocabulary, image, query, reference_logits)
        assert own.tolist() == values
        assert p == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_every_answer_is_a_valid_box_with_points_in_range(
    seed: int, toy_reasoner: Any, toy_config: NanoConfig, vocabulary: Vocabulary
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # a model that leans to the ends of the range
        table = toy_reasoner.model.language_model.embed_tokens.weight
        ends = vocabulary.numbers[[0, 1, 251, 252]]
        table[ends] += torch.randn(4, table.shape[1], generator=generator)
    images = torch.randn(4, 3, 84, 84, generator=generator)
    numbers, p_absent = answer(toy_reasoner, vocabulary, images, ["Heart?", "Lung", "Where is it?", "Show the polyp"])
    assert numbers.shape == (4, 8)
    assert (numbers == np.round(numbers)).all()
    assert ((numbers >= 0) & (numbers <= 252)).all()
    assert (numbers[:, 2] > numbers[:, 0]).all()
    assert (numbers[:, 3] > numbers[:, 1]).all()
    assert ((p_absent >= 0) & (p_absent <= 1)).all()
