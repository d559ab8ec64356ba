"""Batches of the second stage: images with several questions each, as packed tokens and targets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medreasoner.errors import QueryError
from medreasoner_train.augment import Options
from medreasoner_train.data import Sample
from medreasoner_train.decoder import Packed, pack
from medreasoner_train.dense import DenseTargets
from medreasoner_train.language import Phrasings, answer_text, keys_by_category, thought_text, vary
from medreasoner_train.model import NANO
from medreasoner_train.pretrain import DenseData, ImageTargets, stack
from medreasoner_train.spatial import Relation, ask, choose, relations
from medreasoner_train.store import DRAWS, Stored, redraws
from medreasoner_train.targets import box_of, inscribed_points
from medreasoner_train.vocabulary import Vocabulary

__all__ = ["IGNORED", "Asked", "Mark", "SftBatch", "SftData", "SftOptions", "Unanswered"]

IGNORED = -100
AT_ONCE = 2400  # tokens of unanswered questions in a pass


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SftOptions:
    """Mixture and weights of the stage.

    Of an image `branches` questions are answered; `unanswered` more are only read, which takes a fraction of the time:
    what is asked and where it lies is read out at their ends as at those of the others. `spread` is the width, in
    coordinate units, of a coordinate's soft target. `skeleton` is the share of the answer's fixed tokens that are
    taught in a step: they are the same every time, and logits over the vocabulary are costly. `plain` is the share of
    the questions that are some name of their target, `named` that of its usual names, mostly in ordinary sentences;
    `spatial` that of spatial and
    comparative ones, on images whose masks make such questions true. If `frozen`, the vision tower stays as it is and
    only the decoder learns, in half the time.
    """

    images: int = 12
    branches: int = 4
    unanswered: int = 0
    size: int = 252
    absent: float = 0.22
    think: float = 0.25
    plain: float = 0.1
    named: float = 0.15
    spatial: float = 0.05
    frozen: bool = False
    spread: float = 2.5
    skeleton: float = 0.25
    weight_skeleton: float = 0.2
    weight_thought: float = 0.3
    weight_absent: float = 1.0
    weight_l1: float = 4.0
    weight_dense: float = 0.3
    weight_category: float = 0.3
    weight_readout: float = 1.0
    weight_meaning: float = 2.0


@dataclasses.dataclass(slots=True, kw_only=True)
class Unanswered:
    """Questions that are only read, of about one length, padded on the right.

    ids : (N, L) int64; image : (N,) int64, whose; last : (N,) int64, place of the last token; start : position of the
    first.
    """

    ids: Tensor
    image: Tensor
    last: Tensor
    start: int


@dataclasses.dataclass(slots=True, kw_only=True)
class SftBatch:
    """One step's input: images (B, 3, S, S), packed tokens, and targets.

    label : (B, T) int64, the token that follows each position, or -100 where it is not taught; kind : (B, T) int64, 0
    skeleton, 1 thought, 2 absent or present, 3 coordinate; ends : (K, 2) row and place of the last prompt token of each
    branch; shared : tokens in front of a row's branches. Of the N questions, the K branches' and then the unanswered
    ones': category : (N,) int64; geometry : (N, 8) float32 relative; present : (N,) bool; meaning : (N, D) float32,
    the teacher's embedding of each question, zeros for those that it was not shown, None without a teacher.
    """

    images: Tensor
    packed: Packed
    label: Tensor
    kind: Tensor
    ends: Tensor
    unanswered: tuple[Unanswered, ...]
    shared: int
    category: Tensor
    geometry: Tensor
    present: Tensor
    dense: DenseTargets
    meaning: Tensor | None


class SftData(DenseData):
    """Makes batches of images with several questions each."""

    def __init__(
        self,
        samples: Sequence[Sample],
        stored: Sequence[Stored],
        *,
        vocabulary: Vocabulary,
        phrasings: dict[str, Phrasings],
        options: SftOptions,
        meanings: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(samples, stored, patch=NANO.patch_size)
        self._keys = keys_by_category(phrasings)
        if missing := sorted(set(self.categories) - self._keys.keys()):
            raise QueryError(f"no questions are written for {', '.join(missing)}: add them to queries/train.json")
        self._meanings = meanings
        self._vocabulary = vocabulary
        self._phrasings = phrasings
        self._options = options
        self._end = vocabulary.tokenizer.encode("<|im_end|>").ids

    @property
    def largest(self) -> int:
        """The largest coordinate that an answer may name."""
        return self._vocabulary.largest

    def make(self, step: int, seed: int) -> SftBatch:
        """The batch of a step; depends on step and seed alone."""
        options = self._options
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(len(self.stored), size=options.images, p=self.weights)
        images, dense, branches, marks = [], [], [], []
        heard: list[tuple[int, list[int], Mark]] = []
        for b, drawn in enumerate(chosen):
            index, (image, targets, masks) = self.askable(int(drawn), rng)
            item = self.stored[index]
            row = [self.branch(item, targets, masks, rng, think=think) for think in self._thinking(rng)]
            images.append(image)
            dense.append(targets)
            branches.append([ids for ids, _ in row])
            marks.append([mark for _, mark in row])
            asked = [self.question(item, targets, masks, rng) for _ in range(options.unanswered)]
            heard += [(b, *self._read(each)) for each in asked]
        prefix, positions = self._vocabulary.prefix(options.size // (NANO.patch_size * NANO.merge_size))
        packed = pack(prefix, positions, self._vocabulary.image, branches, self._vocabulary.pad)
        heard.sort(key=lambda each: len(each[1]))  # alike in length: little padding
        flat = [mark for own in marks for mark in own]
        batch = SftBatch(
            images=torch.stack(images),
            packed=packed,
            **self._labels(packed, len(prefix), branches, marks),
            unanswered=self._unanswered([(b, ids) for b, ids, _ in heard], int(positions.max()) + 1),
            shared=len(prefix),
            dense=stack(dense),
            **self._read_out([*flat, *(mark for *_, mark in heard)]),
        )
        left_out = torch.from_numpy(rng.random(batch.label.shape) >= options.skeleton)
        batch.label[left_out & (batch.kind == 0)] = IGNORED
        return batch

    def askable(
        self, index: int, rng: np.random.Generator
    ) -> tuple[int, tuple[Tensor, ImageTargets, dict[str, npt.NDArray[np.bool_]]]]:
        """An image about which something can be asked: the one drawn, unless its structures vanish at this size."""
        for chosen in redraws(index, self.weights, rng):
            made = self.image(chosen, self._options.size, rng, Options())
            record = self.stored[chosen].record
            if made[2] or self._rule.same_region(record) or self._rule.other_region(record):
                return chosen, made
        raise QueryError(f"no structure is left in {DRAWS} images drawn at {self._options.size} px")

    def _thinking(self, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Which of an image's questions are thought about; their number hardly varies, so that rows are as long."""
        count = int(self._options.think * self._options.branches + rng.random())
        return rng.permutation(self._options.branches) < count

    def branch(
        self,
        item: Stored,
        targets: ImageTargets,
        masks: dict[str, npt.NDArray[np.bool_]],
        rng: np.random.Generator,
        *,
        think: bool,
    ) -> tuple[list[int], "Mark"]:
        """Tokens of one question with its answer, and what they mean."""
        asked = self.question(item, targets, masks, rng)
        encode = self._vocabulary.tokenizer.encode
        prompt, mark = self._read(asked)
        tells = think and (asked.mask is not None or asked.geometry is None)  # a thought says how large the target is
        thought = encode(thought_text(asked.own, asked.mask, rng)).ids if tells else []
        numbers = None if asked.geometry is None else self.integers(asked.geometry)
        answer = encode(answer_text(numbers)).ids
        return [*prompt, *thought, *answer, *self._end], dataclasses.replace(mark, thought=len(thought))

    def _read(self, asked: "Asked") -> tuple[list[int], "Mark"]:
        """Tokens of a question, and what it means."""
        prompt = self._vocabulary.prompt(asked.query)
        column = self.column(asked.category)
        return prompt, Mark(
            prompt=len(prompt), thought=0, category=column, geometry=asked.geometry, query=asked.written
        )

    def _unanswered(self, questions: Sequence[tuple[int, list[int]]], start: int) -> tuple[Unanswered, ...]:
        """Questions (image, tokens), sorted by length, in parts of about as many tokens."""
        count = -(-sum(len(ids) for _, ids in questions) // AT_ONCE)
        parts = []
        for part in np.array_split(np.arange(len(questions)), count) if count else []:
            own = [questions[index] for index in part]
            ids = torch.full((len(own), len(own[-1][1])), self._vocabulary.pad)
            for row, (_, tokens) in zip(ids, own, strict=True):
                row[: len(tokens)] = torch.tensor(tokens)
            last = torch.tensor([len(tokens) - 1 for _, tokens in own])
            parts.append(Unanswered(ids=ids, image=torch.tensor([b for b, _ in own]), last=last, start=start))
        return tuple(parts)

    def question(
        self, item: Stored, targets: ImageTargets, masks: dict[str, npt.NDArray[np.bool_]], rng: np.random.Generator
    ) -> "Asked":
        """A question about something in the image, or absent from it, as someone might type it."""
        shapes = {name: mask for name, mask in masks.items() if name not in item.guessed}
        if self._options.spatial and rng.random() < self._options.spatial and (true := relations(shapes)):
            return self._spatial(item, choose(true, rng), rng)
        category = self._choose(item, masks, rng)
        own = self._own_phrasings(item, category, rng)
        share = rng.random()
        by_name = bool(own.named) and share < self._options.named
        is_plain = bool(own.plain) and self._options.named <= share < self._options.named + self._options.plain
        pool = own.named if by_name else own.plain if is_plain else own.queries
        written = pool[int(rng.integers(len(pool)))]
        is_there = category in masks
        geometry = targets.geometry[self.column(category)].astype(np.float64) if is_there else None
        return Asked(
            category=category,
            own=own,
            written=written,
            query=vary(written, rng, whole=by_name),
            mask=shapes.get(category),
            geometry=geometry,
        )

    def _spatial(self, item: Stored, relation: Relation, rng: np.random.Generator) -> "Asked":
        """A spatial or comparative question; none of its words is left out, for most of them decide."""
        written = ask(relation, "train", rng)
        height, width = relation.mask.shape
        sides = np.array([width, height] * 4)
        geometry = np.concatenate([box_of(relation.mask), inscribed_points(relation.mask).ravel()]) / sides
        return Asked(
            category=relation.category,
            own=self._own_phrasings(item, relation.category, rng),
            written=written,
            query=written,
            mask=relation.mask,
            geometry=geometry,
        )

    def _own_phrasings(self, item: Stored, category: str, rng: np.random.Generator) -> Phrasings:
        """Those of the image's modality, else of any other."""
        own_key = f"{item.record.modality}/{category}"
        keys = self._keys[category]
        return self._phrasings[own_key if own_key in keys else keys[int(rng.integers(len(keys)))]]

    def integers(self, geometry: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Relative box and points as integer coordinates, kept a valid answer (x2 > x1, y2 > y1)."""
        limit = self._vocabulary.largest
        values = np.clip(np.round(geometry * limit), 0, limit)
        values[:2] = np.minimum(values[:2], limit - 1)
        values[2:4] = np.maximum(values[2:4], values[:2] + 1)
        return values

    def absent_query(
        self, item: Stored, phrasings: dict[str, Phrasings], rng: np.random.Generator
    ) -> tuple[str, bool] | None:
        """A question for something that is not in the image, and whether it belongs to the same part of the body.

        None if the data set knows of nothing that is absent from the image.
        """
        near, far = self._rule.same_region(item.record), self._rule.other_region(item.record)
        pool = near or far
        if not pool:
            return None
        keys = self._keys[pool[int(rng.integers(len(pool)))]]
        queries = phrasings[keys[int(rng.integers(len(keys)))]].queries
        return queries[int(rng.integers(len(queries)))], bool(near)

    def _choose(self, item: Stored, masks: dict[str, Any], rng: np.random.Generator) -> str:
        if rng.random() < self._options.absent or not masks:
            near, far = self._rule.same_region(item.record), self._rule.other_region(item.record)
            pool = near if near and rng.random() < 0.7 else far or near
            if pool:  # a data set of one part of the body knows of nothing that is absent
                return pool[int(rng.integers(len(pool)))]
        names = sorted(masks)
        return names[int(rng.integers(len(names)))]

    def _meaning(self, query: str) -> Tensor:
        assert self._meanings is not None
        known = self._meanings.get(query)
        return torch.zeros_like(next(iter(self._meanings.values()))) if known is None else known

    def _coordinates(self, answer: Tensor) -> Tensor:
        """Which tokens of an answer are coordinates: integers behind a bracket or a comma, not the 1 of points_1."""
        number = self._vocabulary.value[answer] >= 0
        number[1:] &= torch.isin(answer[:-1], self._vocabulary.before_number)
        return number

    def _labels(
        self, packed: Packed, prefix: int, branches: list[list[list[int]]], marks: list[list["Mark"]]
    ) -> dict[str, Tensor]:
        """What is to be written where: `label`, `kind` and `ends` of a batch."""
        label = torch.full_like(packed.ids, IGNORED)
        kind = torch.zeros_like(packed.ids)
        ends: list[tuple[int, int]] = []
        for b, (row, own) in enumerate(zip(branches, marks, strict=True)):
            at = prefix
            for ids, mark in zip(row, own, strict=True):
                first = at + mark.prompt - 1  # the position that predicts the first token after the prompt
                ends.append((b, first))
                following = torch.tensor(ids[mark.prompt :])
                label[b, first : first + len(following)] = following
                kind[b, first : first + mark.thought] = 1
                answer = following[mark.thought :]
                place = first + mark.thought
                kind[b, place : place + len(answer)][self._coordinates(answer)] = 3
                choice = ((answer == self._vocabulary.null) | (answer == self._vocabulary.bracket)).nonzero()[0]
                kind[b, place + int(choice)] = 2
                at += len(ids)
        return {"label": label, "kind": kind, "ends": torch.tensor(ends)}

    def _read_out(self, marks: Sequence["Mark"]) -> dict[str, Any]:
        """What is to be read out at the questions' ends: `category`, `geometry`, `present` and `meaning` of a batch."""
        geometry = np.stack([np.zeros(8) if m.geometry is None else m.geometry for m in marks])
        return {
            "category": torch.tensor([mark.category for mark in marks]),
            "geometry": torch.tensor(geometry, dtype=torch.float32),
            "present": torch.tensor([mark.geometry is not None for mark in marks]),
            # Of the whole question, though words may be missing from what the model reads.
            "meaning": None if self._meanings is None else torch.stack([self._meaning(m.query) for m in marks]),
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Of one branch: number of prompt and thought tokens, the category's column, relative geometry (8,) or None, and
    the question as it was written.
    """

    prompt: int
    thought: int
    category: int
    geometry: npt.NDArray[np.float64] | None
    query: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question: as it was written and as it is typed, what is asked for, its mask (S, S) and relative geometry (8,)
    in the picture shown; None if absent, the mask also if no more than geometry is known.
    """

    category: str
    own: Phrasings
    written: str
    query: str
    mask: npt.NDArray[np.bool_] | None
    geometry: npt.NDArray[np.float64] | None
