"""The decoder's pass over packed branches must give each branch what transformers gives it alone."""

from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import strategies
from torch import Tensor

from medreasoner_train.decoder import block_mask, language_pass, pack
from medreasoner_train.model import tower
from medreasoner_train.vocabulary import Vocabulary

Reference = Callable[[Any, list[int], Tensor], Tensor]

QUERIES = (
    ("Where is the air-filled tissue?", "Which organ pumps blood"),
    ("Show the growth on the bowel wall", "A longer question about the left side of this picture?", "Heart?"),
)


def packed_hidden(model: Any, vocabulary: Vocabulary, images: Tensor) -> tuple[Any, Tensor, list[list[list[int]]]]:
    language = model.model.language_model
    prefix, positions = vocabulary.prefix(images.shape[-1] // 28)
    branches = [[vocabulary.prompt(query) for query in row] for row in QUERIES]
    packed = pack(prefix, positions, vocabulary.image, branches, vocabulary.pad)
    embeds = language.embed_tokens(packed.ids)
    embeds = embeds.masked_scatter(packed.image[..., None], tower(model.model.visual, images))
    return packed, embeds, branches


def test_each_packed_branch_has_the_logits_of_the_whole_model_alone(
    toy_reasoner: Any, vocabulary: Vocabulary, reference_logits: Reference
) -> None:
    images = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(3))
    prefix, _ = vocabulary.prefix(3)
    with torch.no_grad():
        packed, embeds, branches = packed_hidden(toy_reasoner, vocabulary, images)
        language = toy_reasoner.model.language_model
        hidden = language_pass(language, embeds, packed.positions, block_mask(packed.branch))
        logits = hidden @ toy_reasoner.lm_head.weight.T
    for b, row in enumerate(branches):
        for k, branch in enumerate(row, start=1):
            expected = reference_logits(toy_reasoner, [*prefix, *branch], images[b])
            own = torch.cat([logits[b, packed.branch[b] == part] for part in (0, k)])
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_stepwise_decoding_with_a_cache_equals_one_pass(
    toy_reasoner: Any, vocabulary: Vocabulary, reference_logits: Reference
) -> None:
    language = toy_reasoner.model.language_model
    image = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(4))
    prefix, positions = vocabulary.prefix(3)
    branch = vocabulary.prompt("Which organ pumps blood?")
    packed = pack(prefix, positions, vocabulary.image, [[branch]], vocabulary.pad)
    cache: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        embeds = language.embed_tokens(packed.ids)
        embeds = embeds.masked_scatter(packed.image[..., None], tower(toy_reasoner.model.visual, image))
        n = len(prefix)
        first = language_pass(
            language, embeds[:, :n], packed.positions[:, :, :n], block_mask(packed.branch[:, :n]), cache
        )
        steps = [first]
        for at in range(n, n + len(branch)):
            seen = torch.ones(1, 1, 1, at + 1, dtype=torch.bool)
            where = packed.positions[:, :, at : at + 1]
            steps.append(language_pass(language, embeds[:, at : at + 1], where, seen, cache))
        logits = torch.cat(steps, 1)[0] @ toy_reasoner.lm_head.weight.T
    assert cache[0][0].shape == (1, 2, n + len(branch), 8)  # two key heads of 8
    expected = reference_logits(toy_reasoner, [*prefix, *branch], image[0])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@hypothesis.given(
    strategies.integers(1, 4), strategies.lists(strategies.integers(1, 4), max_size=3), strategies.integers(0, 3)
)
def test_a_position_sees_the_prefix_and_its_own_past_only(prefix: int, lengths: list[int], padding: int) -> None:
    branch = [0] * prefix + [k for k, n in enumerate(lengths, start=1) for _ in range(n)] + [-1] * padding
    seen = block_mask(torch.tensor([branch]))[0, 0]
    for query, own in enumerate(branch):
        for key, other in enumerate(branch):
            if own != -1:
                assert bool(seen[query, key]) == (key <= query and other in (0, own))
        assert seen[query].any()  # padding reaches no loss, but what sees nothing becomes NaN
        assert not seen[query, query + 1 :].any()


def test_packing_pads_on_the_right_and_starts_every_branch_at_one_position(vocabulary: Vocabulary) -> None:
    prefix, positions = vocabulary.prefix(3)
    packed = pack(prefix, positions, vocabulary.image, [[[7, 8], [9]], [[5]]], vocabulary.pad)
    n = len(prefix)
    assert packed.ids[0, n:].tolist() == [7, 8, 9]
    assert packed.ids[1, n:].tolist() == [5, vocabulary.pad, vocabulary.pad]
    assert packed.branch[1, n:].tolist() == [1, -1, -1]
    first = int(positions.max()) + 1
    assert packed.positions[:, 0, n:].tolist() == [[first, first + 1, first]] * 3
    assert int(packed.image.sum()) == 2 * 9


def test_a_trunk_reads_as_if_each_branch_began_with_it(toy_reasoner: Any, vocabulary: Vocabulary) -> None:
    """Also where its text has the token that stands for a part of an image."""
    language = toy_reasoner.model.language_model
    prefix, positions = vocabulary.prefix(3)
    trunks = [[*vocabulary.prompt("Which organ pumps blood?"), vocabulary.image], []]
    answers = [[[7, 8, 9], [10]], [[5, vocabulary.image], [6, 7]]]
    whole = [[[*trunk, *answer] for answer in row] for trunk, row in zip(trunks, answers, strict=True)]
    images = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(5))
    hidden = []
    with torch.no_grad():
        parts = tower(toy_reasoner.model.visual, images)
        for packed in (
            pack(prefix, positions, vocabulary.image, answers, vocabulary.pad, trunks=trunks),
            pack(prefix, positions, vocabulary.image, whole, vocabulary.pad),
        ):
            assert int(packed.image.sum()) == 2 * 9
            embeds = language.embed_tokens(packed.ids).masked_scatter(packed.image[..., None], parts)
            states = language_pass(language, embeds, packed.positions, block_mask(packed.branch))
            # Of each answer, which ends its branch in both.
            hidden.append(
                [
                    states[b, packed.branch[b] == k][-len(answer) :]
                    for b, row in enumerate(answers)
                    for k, answer in enumerate(row, start=1)
                ]
            )
    for own, expected in zip(*hidden, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_positions_of_the_prefix_count_the_image_as_its_side(vocabulary: Vocabulary) -> None:
    prefix, positions = vocabulary.prefix(9)
    image = np.array(prefix) == vocabulary.image
    before, after = int(image.argmax()), len(prefix) - int(image.argmax()) - 81
    assert positions[:, :before].tolist() == [list(range(before))] * 3
    rows, columns = np.divmod(np.arange(81), 9)
    assert positions[0, image].tolist() == [before] * 81
    assert positions[1, image].tolist() == (rows + before).tolist()
    assert positions[2, image].tolist() == (columns + before).tolist()
    assert positions[:, -after:].tolist() == [list(range(before + 9, before + 9 + after))] * 3
