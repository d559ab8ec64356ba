"""Rows of the second stage: tokens are decoded back and compared with what they were made from."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medreasoner.errors import QueryError
from medreasoner_train.anatomy import AbsentRule
from medreasoner_train.augment import NO_CHANGE
from medreasoner_train.data import load_index
from medreasoner_train.dense import DenseHeads
from medreasoner_train.language import ABSENT, TEMPLATE, load_phrasings, place_of
from medreasoner_train.loop import LoopOptions, Optimiser
from medreasoner_train.sft import Passes, SftHeads, in_bfloat16, sft_loss
from medreasoner_train.sft_data import IGNORED, Asked, SftBatch, SftData, SftOptions
from medreasoner_train.store import Stored
from medreasoner_train.targets import box_of
from medreasoner_train.vocabulary import Vocabulary

OPTIONS = SftOptions(images=4, branches=3, size=84, absent=0.3, think=0.5, spatial=0.0, skeleton=1.0)
AFTER = TEMPLATE.split("{query}")[1]
NUMBER = re.compile(r"(?<=[\[ ])\d+(?=[,\]])")


@pytest.fixture
def data(asking: Callable[[SftOptions], SftData]) -> SftData:
    return asking(OPTIONS)


def test_a_category_without_questions_is_named(
    grounding_set: Path, stored: list[Stored], vocabulary: Vocabulary
) -> None:
    samples = load_index(grounding_set)
    gone = samples[0].category
    phrasings = {key: own for key, own in load_phrasings("train").items() if key.partition("/")[2] != gone}
    with pytest.raises(QueryError, match=gone):
        SftData(samples, stored, vocabulary=vocabulary, phrasings=phrasings, options=OPTIONS)


def branches(batch: SftBatch) -> list[tuple[int, torch.Tensor]]:
    """Row and places of every branch, in the batch's order."""
    found = []
    for b, row in enumerate(batch.packed.branch):
        found += [(b, (row == k).nonzero()[:, 0]) for k in range(1, int(row.max()) + 1)]
    return found


def text_of(vocabulary: Vocabulary, ids: torch.Tensor) -> str:
    text: str = vocabulary.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return text


def test_a_row_is_the_prompt_then_what_is_to_be_written(data: SftData, vocabulary: Vocabulary) -> None:
    batch = data.make(0, 0)
    prefix, _ = vocabulary.prefix(3)
    image = TEMPLATE.split("{query}")[0].replace("{image}", "<|image_pad|>" * 9)
    assert text_of(vocabulary, torch.tensor(prefix)) == image
    assert batch.packed.ids[:, : len(prefix)].tolist() == [prefix] * 4
    assert len(branches(batch)) == 12
    for b, where in branches(batch):
        text = text_of(vocabulary, batch.packed.ids[b, where])
        _, found, written = text.partition(AFTER)
        assert found
        answer = r"<answer>\{.*\}</answer>"
        assert re.fullmatch(rf"(<think>This asks for [^<]*</think>)?{answer}<\|im_end\|>", written)


def test_labels_are_the_tokens_that_follow_and_the_prompt_has_none(data: SftData, vocabulary: Vocabulary) -> None:
    batch = data.make(1, 0)
    label = batch.label.clone()
    for (b, where), (row, end) in zip(branches(batch), batch.ends.tolist(), strict=True):
        assert row == b
        assert end in where.tolist()
        prompt = where[where <= end]
        assert text_of(vocabulary, batch.packed.ids[b, prompt]).endswith(AFTER)
        assert batch.label[b, prompt[:-1]].eq(IGNORED).all()
        written = where[where > end]
        # Positions of a branch are consecutive: the one before predicts the next.
        assert batch.label[b, written - 1].tolist() == batch.packed.ids[b, written].tolist()
        assert text_of(vocabulary, batch.packed.ids[b, written[-1:]]) == "<|im_end|>"
        assert batch.label[b, written[-1]] == IGNORED
        label[b, written - 1] = IGNORED
    assert label.eq(IGNORED).all()


def test_kinds_tell_thought_choice_coordinate_and_skeleton_apart(data: SftData, vocabulary: Vocabulary) -> None:
    thoughts = 0
    for step in range(4):
        batch = data.make(step, 0)
        for n, (b, where) in enumerate(branches(batch)):
            asked = where[batch.label[b, where] != IGNORED]
            kind, label = batch.kind[b, asked], batch.label[b, asked]
            thought = text_of(vocabulary, label[kind == 1])
            assert thought == "" or re.fullmatch(r"<think>.*</think>", thought)
            thoughts += bool(thought)
            whole = text_of(vocabulary, label)
            assert whole.startswith(thought)
            (choice,) = label[kind == 2].tolist()
            present = bool(batch.present[n])
            assert choice == (vocabulary.bracket if present else vocabulary.null)
            assert (ABSENT in whole) == (not present)
            numbers = NUMBER.findall(whole.partition("<answer>")[2])
            assert [text_of(vocabulary, token[None]) for token in label[kind == 3]] == numbers
            assert len(numbers) == 8 * present
            skeleton = text_of(vocabulary, label[kind == 0])
            assert not re.search(r"\d", skeleton.replace("points_1", "").replace("points_2", ""))
    assert thoughts > 5


def test_coordinates_are_the_rounded_box_of_the_mask(data: SftData, vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    for index, item in enumerate(data.stored):
        _, targets, masks = data.image(index, OPTIONS.size, rng, NO_CHANGE)
        for _ in range(4):
            ids, mark = data.branch(item, targets, masks, rng, think=rng.random() < 0.5)
            text = text_of(vocabulary, torch.tensor(ids))
            values = [int(v) for v in NUMBER.findall(text.partition("<answer>")[2])]
            if mark.geometry is None:
                assert not values
                continue
            mask = masks[data.categories[mark.category]]
            box = np.array(box_of(mask)) * (252 / OPTIONS.size)
            np.testing.assert_array_equal(values[:4], np.clip(np.round(box), [0, 0, 1, 1], [251, 251, 252, 252]))
            for x, y in np.reshape(values[4:], (2, 2)) * (OPTIONS.size / 252):
                top, left = max(int(y) - 1, 0), max(int(x) - 1, 0)
                assert mask[top : int(y) + 2, left : int(x) + 2].any()
            thought = text.partition("<think>")[2].partition("</think>")[0]
            assert not thought or thought.endswith(f"; {place_of(mask)}.")


@pytest.mark.parametrize(
    "geometry",
    [[1.0] * 8, [0.0] * 8, [0.5] * 8, [0.999, 0.999, 1, 1, 1, 1, 0, 0], [0.5, 0.5, 0.501, 0.501, 0, 0, 0, 0]],
)
def test_integers_are_always_a_valid_answer(data: SftData, geometry: list[float]) -> None:
    values = data.integers(np.array(geometry))
    x1, y1, x2, y2 = values[:4]
    assert 0 <= x1 < x2 <= 252
    assert 0 <= y1 < y2 <= 252
    assert (values == np.round(values)).all()
    assert ((values >= 0) & (values <= 252)).all()


def test_what_is_called_absent_is_absent_by_the_rule(data: SftData, grounding_set: Path) -> None:
    rule = AbsentRule(load_index(grounding_set))
    rng = np.random.default_rng(0)
    counted = {True: 0, False: 0}
    for index in range(len(data.stored)):
        item = data.stored[index]
        _, targets, masks = data.image(index, OPTIONS.size, rng, NO_CHANGE)
        allowed = {*rule.same_region(item.record), *rule.other_region(item.record)}
        for _ in range(12):
            _, mark = data.branch(item, targets, masks, rng, think=False)
            category = data.categories[mark.category]
            assert category in (masks if mark.geometry is not None else allowed)
            counted[mark.geometry is None] += 1
        question = data.absent_query(item, load_phrasings("heldout"), rng)
        assert question is not None
        query, near = question
        assert near == bool(rule.same_region(item.record))
        homes = {key.partition("/")[2] for key, own in load_phrasings("heldout").items() if query in own.queries}
        assert homes & (set(rule.same_region(item.record)) if near else allowed)
    assert counted[True] / sum(counted.values()) == pytest.approx(OPTIONS.absent, abs=0.08)


def test_held_out_questions_never_reach_a_training_batch(data: SftData, vocabulary: Vocabulary) -> None:
    # A varied question may lose a word, so compare as sets of words: none may be a held-out one, whole or short of one.
    held = {
        tuple(query.lower().rstrip("?.").split()) for own in load_phrasings("heldout").values() for query in own.queries
    }
    short = held | {own[:i] + own[i + 1 :] for own in held for i in range(len(own)) if len(own) > 5}
    trained = {
        query.lower().rstrip("?.") for own in load_phrasings("train").values() for query in (*own.queries, *own.named)
    }
    seen = 0
    for step in range(12):
        batch = data.make(step, 3)
        for b, where in branches(batch):
            query = text_of(vocabulary, batch.packed.ids[b, where]).partition(AFTER)[0]
            plain = query.lower().rstrip("?.")
            assert tuple(plain.split()) not in short, query
            seen += plain in trained
    assert seen > 80  # of 144: the rest lost a word


def test_a_question_is_phrased_for_the_modality_of_its_image(data: SftData, vocabulary: Vocabulary) -> None:
    rng = np.random.default_rng(0)
    phrasings = load_phrasings("train")["X-ray/left lung"]
    own = {q.lower().rstrip("?.") for q in (*phrasings.queries, *phrasings.named)}
    index = next(i for i, item in enumerate(data.stored) if item.record.source == "shenzhen_cxr")
    _, targets, masks = data.image(index, OPTIONS.size, rng, NO_CHANGE)
    found = 0
    for _ in range(60):
        ids, mark = data.branch(data.stored[index], targets, masks, rng, think=True)
        if mark.geometry is not None and data.categories[mark.category] == "left lung":
            query = text_of(vocabulary, torch.tensor(ids)).partition(AFTER)[0].lower().rstrip("?.")
            words = query.split()
            found += any(set(words) <= set(q.split()) and len(q.split()) - len(words) <= 1 for q in own)
            assert any(set(words) <= set(q.split()) for q in own), query
    assert found > 5


def test_a_share_of_the_skeleton_is_taught_and_all_of_the_rest(
    data: SftData, grounding_set: Path, vocabulary: Vocabulary
) -> None:
    fewer = SftData(
        load_index(grounding_set),
        data.stored,
        vocabulary=vocabulary,
        phrasings=load_phrasings("train"),
        options=replace(OPTIONS, skeleton=0.25),
    )
    left = whole = 0
    for step in range(6):
        part, full = fewer.make(step, 0), data.make(step, 0)
        assert torch.equal(part.packed.ids, full.packed.ids)
        taught = part.label != IGNORED
        assert torch.equal(part.label[taught], full.label[taught])
        assert taught[(full.label != IGNORED) & (full.kind != 0)].all()
        left += int((taught & (full.kind == 0)).sum())
        whole += int(((full.label != IGNORED) & (full.kind == 0)).sum())
    assert left / whole == pytest.approx(0.25, abs=0.04)


def test_images_have_nearly_as_many_thoughts_as_each_other(data: SftData, vocabulary: Vocabulary) -> None:
    counts = []
    for step in range(8):
        batch = data.make(step, 0)
        for row in range(OPTIONS.images):
            ids = batch.packed.ids[row]
            counts.append(text_of(vocabulary, ids).count("<think>"))
    assert set(counts) == {1, 2}  # half of three
    assert np.mean(counts) == pytest.approx(OPTIONS.think * OPTIONS.branches, abs=0.4)


def test_a_batch_depends_on_step_and_seed_alone(data: SftData) -> None:
    a, b, other = data.make(2, 5), data.make(2, 5), data.make(2, 6)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.packed.ids, b.packed.ids)
    assert torch.equal(a.label, b.label)
    assert a.packed.ids.shape != other.packed.ids.shape or not torch.equal(a.packed.ids, other.packed.ids)


def test_the_loss_falls_on_one_batch(data: SftData, vocabulary: Vocabulary, toy_reasoner: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    heads, dense = SftHeads(32, len(data.categories)), DenseHeads(32, len(data.categories))
    modules = {"model": toy_reasoner, "heads": heads, "dense": dense}
    optimiser = Optimiser(modules, LoopOptions(steps=1000, out=tmp_path, warmup=1, lr=3e-3, matrix_lr=5e-3))
    batch = data.make(0, 0)
    values: list[float] = []
    parts: dict[str, torch.Tensor] = {}
    for _ in range(25):
        loss, parts = sft_loss(toy_reasoner, heads, dense, batch, OPTIONS, vocabulary)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step(1.0)
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]
    assert np.isfinite(list(parts.values())).all()


def test_a_frozen_tower_gets_no_gradient_and_the_decoder_does(
    data: SftData, vocabulary: Vocabulary, toy_reasoner: Any
) -> None:
    heads, dense = SftHeads(32, len(data.categories)), DenseHeads(32, len(data.categories))
    options = dataclasses.replace(OPTIONS, frozen=True)
    loss, _ = sft_loss(toy_reasoner, heads, dense, data.make(0, 0), options, vocabulary)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in toy_reasoner.model.visual.parameters())
    assert all(parameter.grad is not None for parameter in toy_reasoner.model.language_model.layers.parameters())


def test_mixed_precision_changes_the_loss_by_its_rounding_and_trains_in_float32(
    data: SftData, vocabulary: Vocabulary, toy_reasoner: Any
) -> None:
    heads, dense = SftHeads(32, len(data.categories)), DenseHeads(32, len(data.categories))
    batch = data.make(0, 0)
    whole, _ = sft_loss(toy_reasoner, heads, dense, batch, OPTIONS, vocabulary)
    mixed, _ = sft_loss(toy_reasoner, heads, dense, batch, OPTIONS, vocabulary, Passes(*map(in_bfloat16, Passes())))
    assert mixed.item() == pytest.approx(whole.item(), rel=0.02)
    assert mixed.item() != whole.item()
    mixed.backward()  # type: ignore[no-untyped-call]
    assert {each.grad.dtype for each in toy_reasoner.parameters() if each.grad is not None} == {torch.float32}


def test_a_share_of_the_questions_merely_names_its_target(
    grounding_set: Path, stored: list[Stored], vocabulary: Vocabulary
) -> None:
    phrasings = {key: dataclasses.replace(own, plain=("the thing",)) for key, own in load_phrasings("train").items()}
    options = dataclasses.replace(OPTIONS, images=8, branches=6, plain=0.5)
    data = SftData(load_index(grounding_set), stored, vocabulary=vocabulary, phrasings=phrasings, options=options)
    batch = data.make(0, 0)
    written = [text_of(vocabulary, batch.packed.ids[b, where]).lower() for b, where in branches(batch)]
    assert 0.25 < np.mean([text.partition(AFTER)[0] == "the thing" for text in written]) < 0.75


def test_neighbouring_integers_start_as_neighbours(toy_reasoner: Any, vocabulary: Vocabulary) -> None:
    table = toy_reasoner.model.language_model.embed_tokens.weight.detach()[vocabulary.numbers]
    cosine = torch.nn.functional.cosine_similarity
    near = cosine(table[:-1], table[1:]).mean()
    far = cosine(table[:-60], table[60:]).mean()
    assert near > far + 0.1


def test_a_batch_without_any_structure_has_a_finite_loss(
    grounding_set: Path, stored: list[Stored], vocabulary: Vocabulary, toy_reasoner: Any
) -> None:
    options = SftOptions(images=1, branches=2, size=84, absent=1.0)
    data = SftData(
        load_index(grounding_set),
        stored,
        vocabulary=vocabulary,
        phrasings=load_phrasings("train"),
        options=options,
    )
    batch = data.make(0, 0)
    assert not batch.present.any()
    heads, dense = SftHeads(32, len(data.categories)), DenseHeads(32, len(data.categories))
    loss, _ = sft_loss(toy_reasoner, heads, dense, batch, options, vocabulary)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert all(p.grad is None or p.grad.isfinite().all() for p in toy_reasoner.parameters())


def test_a_data_set_of_one_part_of_the_body_asks_for_what_is_there(
    grounding_set: Path, stored: list[Stored], vocabulary: Vocabulary
) -> None:
    own = [sample for sample in load_index(grounding_set) if sample.source == "shenzhen_cxr"]
    data = SftData(
        own,
        [item for item in stored if item.record.source == "shenzhen_cxr"],
        vocabulary=vocabulary,
        phrasings=load_phrasings("train"),
        options=OPTIONS,
    )
    assert data.make(0, 0).present.all()
    assert data.absent_query(data.stored[0], load_phrasings("heldout"), np.random.default_rng(0)) is None


def test_what_an_unanswered_question_reads_out_is_what_an_answered_one_does(
    data: SftData, vocabulary: Vocabulary, toy_reasoner: Any
) -> None:
    """Both see their image and nothing else: the same questions answered give the same losses and gradients."""
    torch.manual_seed(0)
    heads, dense = SftHeads(32, len(data.categories)), DenseHeads(32, len(data.categories))
    batch = data.make(0, 0)
    questions = [
        (b, batch.packed.ids[b, where[where <= end]].tolist())
        for (b, where), (_, end) in zip(branches(batch), batch.ends.tolist(), strict=True)
    ]
    order = sorted(range(len(questions)), key=lambda n: len(questions[n][1]))
    start = int(vocabulary.prefix(3)[1].max()) + 1
    again = torch.tensor([*range(len(order)), *order])
    twice = replace(
        batch,
        unanswered=data._unanswered([questions[n] for n in order], start),
        category=batch.category[again],
        geometry=batch.geometry[again],
        present=batch.present[again],
    )
    once, parts = sft_loss(toy_reasoner, heads, dense, batch, OPTIONS, vocabulary)
    both, parts_of_both = sft_loss(toy_reasoner, heads, dense, twice, OPTIONS, vocabulary)
    for name in parts:
        torch.testing.assert_close(parts_of_both[name], parts[name])
    other = replace(twice, unanswered=tuple(replace(each, image=(each.image + 1) % 4) for each in twice.unanswered))
    assert sft_loss(toy_reasoner, heads, dense, other, OPTIONS, vocabulary)[0].item() != pytest.approx(both.item())
    gradients = []
    for loss in (once, both):
        toy_reasoner.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append([each.grad.clone() for each in toy_reasoner.parameters() if each.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_unanswered_questions_are_whole_and_come_by_length(
    asking: Callable[[SftOptions], SftData], vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medreasoner_train.sft_data.AT_ONCE", 90)
    data = asking(replace(OPTIONS, unanswered=5))
    batch = data.make(0, 0)
    assert len(batch.unanswered) > 1
    assert len(batch.ends) == 12
    assert len(batch.category) == len(batch.geometry) == len(batch.present) == 12 + 20
    lengths: list[int] = []
    images: list[int] = []
    for part in batch.unanswered:
        assert part.ids.numel() < 4 * 90
        for ids, last in zip(part.ids, part.last.tolist(), strict=True):
            assert text_of(vocabulary, ids[: last + 1]).endswith(AFTER)
            assert ids[last + 1 :].eq(vocabulary.pad).all()
            lengths.append(last + 1)
        images += part.image.tolist()
    assert lengths == sorted(lengths)
    assert sorted(images) == [b for b in range(4) for _ in range(5)]
    assert torch.equal(batch.packed.ids[:, : batch.shared], torch.tensor([vocabulary.prefix(3)[0]] * 4))


def test_each_unanswered_question_keeps_its_own_meaning(
    asking: Callable[[SftOptions], SftData], vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = asking(replace(OPTIONS, unanswered=6))
    asked: dict[str, tuple[int, object]] = {}
    draw = data.question

    def question(*given: Any) -> Asked:
        drawn = draw(*given)
        what = (data.column(drawn.category), None if drawn.geometry is None else drawn.geometry.tolist())
        assert asked.setdefault(drawn.query, what) == what  # no two images of this batch are asked alike
        return drawn

    monkeypatch.setattr(data, "question", question)
    batch = data.make(3, 0)
    texts = [
        text_of(vocabulary, ids[: last + 1]).partition(AFTER)[0]
        for part in batch.unanswered
        for ids, last in zip(part.ids, part.last.tolist(), strict=True)
    ]
    assert len(texts) == 24
    for text, row in zip(texts, range(len(batch.ends), len(batch.category)), strict=True):
        category, geometry = asked[text]
        assert batch.category[row] == category
        assert bool(batch.present[row]) == (geometry is not None)
        np.testing.assert_allclose(batch.geometry[row], np.zeros(8) if geometry is None else geometry, atol=1e-6)


def test_shares_of_names_are_what_the_options_say(asking: Callable[[SftOptions], SftData]) -> None:
    options = replace(OPTIONS, absent=0.0, plain=0.3, named=0.5)
    rng = np.random.default_rng(0)
    for given, least, most in ((options, 0.42, 0.6), (replace(options, named=1.0), 1.0, 1.0)):
        data = asking(given)
        _, targets, masks = data.image(0, OPTIONS.size, rng, NO_CHANGE)
        drawn = [data.question(data.stored[0], targets, masks, rng) for _ in range(300)]
        by_name = [each for each in drawn if each.written in each.own.named]
        assert least <= len(by_name) / len(drawn) <= most
        for each in by_name:  # no word is missing
            assert each.query.lower().rstrip("?.") == each.written.lower().rstrip("?.")
