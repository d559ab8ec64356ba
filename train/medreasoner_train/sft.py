"""Second stage: supervised tuning on implicit questions, short thoughts and answers: ``medreasoner-cli train sft``.

Beside the tokens' cross-entropy, helps that are dropped afterwards: the dense read-outs of the first stage go on, and
from the last token of the prompt the category and the eight numbers are read out directly, so that the decoder learns
early what is asked and where it lies; if a sentence encoder is given, its embedding of the question is read out too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from medreasoner.errors import QueryError
from medreasoner_train.augment import Options
from medreasoner_train.checkpoint import save_reasoner
from medreasoner_train.data import Sample, by_image, load_index, split
from medreasoner_train.decoder import Packed, block_mask, language_pass, pack
from medreasoner_train.dense import DenseHeads, DenseTargets, dense_loss, giou, mean_or_zero
from medreasoner_train.language import Phrasings, answer_text, keys_by_category, load_phrasings, thought_text, vary
from medreasoner_train.loop import LoopOptions, load_checkpoint, train
from medreasoner_train.model import NANO, build_reasoner, tower
from medreasoner_train.pretrain import DenseData, ImageTargets, stack
from medreasoner_train.store import Stored, load_store
from medreasoner_train.teacher import embed_queries
from medreasoner_train.tokenizer import SPECIAL_TOKENS, token_id
from medreasoner_train.validation import validate
from medreasoner_train.vocabulary import Vocabulary, make_tokenizer

__all__ = [
    "Mark",
    "SftBatch",
    "SftData",
    "SftHeads",
    "SftOptions",
    "SftRun",
    "Vocabulary",
    "make_tokenizer",
    "run",
    "save_reasoner",
    "sft_loss",
    "start_embeddings",
]

IGNORED = -100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SftOptions:
    """Mixture and weights of the stage. `spread` is the width, in coordinate units, of a coordinate's soft target."""

    images: int = 12
    branches: int = 4
    size: int = 252
    absent: float = 0.22
    think: float = 0.25
    spread: float = 2.5
    weight_skeleton: float = 0.05
    weight_thought: float = 0.3
    weight_absent: float = 1.0
    weight_l1: float = 4.0
    weight_dense: float = 0.3
    weight_category: float = 0.3
    weight_readout: float = 1.0
    weight_meaning: float = 2.0


@dataclasses.dataclass(slots=True, kw_only=True)
class SftBatch:
    """One step's input: images (B, 3, S, S), packed tokens, and targets.

    label : (B, T) int64, the token that follows each position, or -100; kind : (B, T) int64, 0 skeleton, 1 thought,
    2 absent or present, 3 coordinate; ends : (N, 2) row and place of the last prompt token of each branch; category :
    (N,) int64; geometry : (N, 8) float32 relative; present : (N,) bool; meaning : (N, D) float32, the teacher's
    embedding of each question, None without a teacher.
    """

    images: Tensor
    packed: Packed
    label: Tensor
    kind: Tensor
    ends: Tensor
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

    def make(self, step: int, seed: int) -> SftBatch:
        """The batch of a step; depends on step and seed alone."""
        options = self._options
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(len(self.stored), size=options.images, p=self.weights)
        images, dense, branches, marks = [], [], [], []
        for index in chosen:
            image, targets, masks = self.image(int(index), options.size, rng, Options())
            row = [self.branch(self.stored[index], targets, masks, rng) for _ in range(options.branches)]
            images.append(image)
            dense.append(targets)
            branches.append([ids for ids, _ in row])
            marks.append([mark for _, mark in row])
        prefix, positions = self._vocabulary.prefix(options.size // (NANO.patch_size * NANO.merge_size))
        packed = pack(prefix, positions, self._vocabulary.image, branches, self._vocabulary.pad)
        return self._targets(torch.stack(images), packed, len(prefix), branches, marks, stack(dense))

    def branch(
        self, item: Stored, targets: ImageTargets, masks: dict[str, npt.NDArray[np.bool_]], rng: np.random.Generator
    ) -> tuple[list[int], "Mark"]:
        """Tokens of one question with its answer, and what they mean."""
        category = self._choose(item, masks, rng)
        own_key = f"{item.record.modality}/{category}"
        keys = self._keys[category]
        own = self._phrasings[own_key if own_key in keys else keys[int(rng.integers(len(keys)))]]
        query = own.queries[int(rng.integers(len(own.queries)))]
        mask = masks.get(category)
        geometry = None if mask is None else targets.geometry[self.column(category)].astype(np.float64)
        encode = self._vocabulary.tokenizer.encode
        prompt = self._vocabulary.prompt(vary(query, rng))
        thought = encode(thought_text(own, mask, rng)).ids if rng.random() < self._options.think else []
        numbers = None if geometry is None else self.integers(geometry)
        answer = encode(answer_text(numbers)).ids
        mark = Mark(
            prompt=len(prompt), thought=len(thought), category=self.column(category), geometry=geometry, query=query
        )
        return [*prompt, *thought, *answer, *self._end], mark

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

    def _coordinates(self, answer: Tensor) -> Tensor:
        """Which tokens of an answer are coordinates: integers behind a bracket or a comma, not the 1 of points_1."""
        number = self._vocabulary.value[answer] >= 0
        number[1:] &= torch.isin(answer[:-1], self._vocabulary.before_number)
        return number

    def _targets(
        self,
        images: Tensor,
        packed: Packed,
        prefix: int,
        branches: list[list[list[int]]],
        marks: list[list["Mark"]],
        dense: DenseTargets,
    ) -> SftBatch:
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
        flat = [mark for own in marks for mark in own]
        return SftBatch(
            images=images,
            packed=packed,
            label=label,
            kind=kind,
            ends=torch.tensor(ends),
            category=torch.tensor([mark.category for mark in flat]),
            geometry=torch.tensor(
                np.stack([np.zeros(8) if m.geometry is None else m.geometry for m in flat]), dtype=torch.float32
            ),
            present=torch.tensor([mark.geometry is not None for mark in flat]),
            dense=dense,
            # Of the whole question, though words may be missing from what the model reads.
            meaning=None if self._meanings is None else torch.stack([self._meanings[m.query] for m in flat]),
        )


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


class SftHeads(nn.Module):
    """The read-outs at the end of the prompt; dropped after training."""

    def __init__(self, hidden_dim: int, n_categories: int, meaning_dim: int = 0) -> None:
        super().__init__()
        self.category = nn.Linear(hidden_dim, n_categories)
        self.meaning = nn.Linear(hidden_dim, meaning_dim) if meaning_dim else None
        self.readout = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, 8))


def start_embeddings(model: Any, vocabulary: Vocabulary) -> None:
    """Give neighbouring integers neighbouring embeddings: waves of several lengths over the coordinate range."""
    weight = model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        values = torch.arange(vocabulary.largest + 1) / vocabulary.largest
        lengths = torch.logspace(0, 6, weight.shape[1] // 4, base=2.0)  # one to 64 waves over the range
        angles = values[:, None] * lengths * 2 * torch.pi
        waves = torch.cat((angles.sin(), angles.cos()), dim=1)
        weight[vocabulary.numbers] *= 0.25
        weight[vocabulary.numbers, : waves.shape[1]] = waves * 0.02


def _number_losses(logits: Tensor, logprobs: Tensor, truth: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Of N coordinates: cross-entropy with a target smoothed over neighbours, and the error of the expectation.

    logits, logprobs : (N, largest + 1), over the integers and out of all tokens; truth : (N,). The error is relative.
    """
    largest = logits.shape[1] - 1
    values = torch.arange(largest + 1)
    soft = torch.softmax(-((values - truth[:, None]) ** 2) / (2 * spread**2), dim=-1)
    loss_number = mean_or_zero(-(soft * logprobs).sum(-1))
    expected = (logits.softmax(-1) * values).sum(-1)
    return loss_number, mean_or_zero((expected - truth).abs()) / largest


def _meaning_loss(heads: SftHeads, last: Tensor, meaning: Tensor | None) -> Tensor:
    """One minus the cosine between what the prompt's last token says of the question and what the teacher says."""
    if heads.meaning is None or meaning is None:
        return last.new_zeros(())
    return 1 - functional.cosine_similarity(heads.meaning(last), meaning, dim=-1).mean()


def sft_loss(
    model: Any, heads: SftHeads, dense_heads: DenseHeads, batch: SftBatch, options: SftOptions, vocabulary: Vocabulary,
    forward: Any = tower,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """Weighted sum of the stage's losses, and its parts as numbers."""
    language = model.model.language_model
    image_embeds = forward(model.model.visual, batch.images)
    loss_dense, dense_parts = dense_loss(dense_heads, image_embeds, batch.dense)
    embeds = language.embed_tokens(batch.packed.ids)
    embeds = embeds.masked_scatter(batch.packed.image[..., None], image_embeds)
    hidden = language_pass(language, embeds, batch.packed.positions, block_mask(batch.packed.branch))

    asked = batch.label != IGNORED
    states, label, kind = hidden[asked], batch.label[asked], batch.kind[asked]
    logits = states @ language.embed_tokens.weight.T
    logprobs = logits.log_softmax(-1)
    number = kind == 3
    plain = -logprobs.gather(1, label[:, None])[:, 0]
    weights = torch.tensor([options.weight_skeleton, options.weight_thought, options.weight_absent, 0.0])[kind]
    loss_text = (plain * weights).sum() / batch.present.numel()
    of_numbers, log_of_numbers = (table[number][:, vocabulary.numbers] for table in (logits, logprobs))
    truth = vocabulary.value[label[number]]
    loss_number, loss_l1 = _number_losses(of_numbers, log_of_numbers, truth, options.spread)

    last = hidden[batch.ends[:, 0], batch.ends[:, 1]]
    loss_category = functional.cross_entropy(heads.category(last), batch.category)
    loss_meaning = _meaning_loss(heads, last, batch.meaning)
    read = torch.sigmoid(heads.readout(last[batch.present]))
    geometry = batch.geometry[batch.present]
    overlap, iou = giou(read[:, :4], geometry[:, :4])
    loss_readout = mean_or_zero(1 - overlap) + 2 * mean_or_zero((read - geometry).abs())

    loss = (
        loss_text + loss_number + options.weight_l1 * loss_l1 + options.weight_dense * loss_dense
        + options.weight_category * loss_category + options.weight_readout * loss_readout
        + options.weight_meaning * loss_meaning
    )  # fmt: skip
    absent = (plain[kind == 2] < 0.6931).float().mean()
    return loss, {
        "text": loss_text.item(),
        "number": loss_number.item(),
        "l1_px": loss_l1.item() * vocabulary.largest,
        "category": loss_category.item(),
        "meaning": loss_meaning.item(),
        "read_iou": mean_or_zero(iou).item(),
        "absent_acc": absent.item(),
        "dense_iou": dense_parts["iou"],
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SftRun:
    """One run: where the data are, the dense stage's checkpoint, a sentence encoder, the loop and the mixture."""

    data: Path
    loop: LoopOptions
    options: SftOptions = dataclasses.field(default_factory=SftOptions)
    start: Path | None = None
    teacher: Path | None = None
    cache: Path | None = None
    compiled: bool = False
    vocab_size: int = 6144
    eval_every: int = 300


def run(settings: SftRun) -> None:
    """Train from the last checkpoint (or the dense stage's) to the end, then write ``out/checkpoint``."""
    torch.manual_seed(settings.loop.seed)
    tokenizer = make_tokenizer(settings.vocab_size, NANO.image_size)
    vocabulary = Vocabulary(tokenizer, NANO.image_size)
    samples = load_index(settings.data)
    train_samples, val_samples = split(samples)
    phrasings = load_phrasings("train")
    meanings = None if settings.teacher is None else embed_queries(settings.teacher, phrasings)
    data, val = (
        SftData(
            samples,
            load_store(by_image(part), cache=settings.cache),
            vocabulary=vocabulary,
            phrasings=phrasings,
            options=settings.options,
            meanings=meanings,
        )
        for part in (train_samples, val_samples)
    )
    model = build_reasoner(
        NANO,
        vocab_size=tokenizer.get_vocab_size(),
        tokens={name: token_id(tokenizer, name) for name in SPECIAL_TOKENS},
    )
    start_embeddings(model, vocabulary)
    meaning_dim = 0 if meanings is None else len(next(iter(meanings.values())))
    heads = SftHeads(NANO.hidden_dim, len(data.categories), meaning_dim)
    dense_heads = DenseHeads(NANO.hidden_dim, len(data.categories))
    if settings.start is not None:
        modules = load_checkpoint(settings.start)["modules"]
        model.model.visual.load_state_dict(modules["visual"])
        dense_heads.load_state_dict(modules["heads"])
    forward = torch.compile(tower) if settings.compiled else tower
    train(
        modules={"model": model, "heads": heads, "dense": dense_heads},
        make_batch=lambda step: data.make(step, settings.loop.seed),
        loss_of=lambda batch: sft_loss(model, heads, dense_heads, batch, settings.options, vocabulary, forward),
        options=settings.loop,
        evaluate=lambda _: validate(model, vocabulary, val, size=settings.options.size),
        eval_every=settings.eval_every,
    )
    save_reasoner(model, tokenizer, settings.loop.out / "checkpoint", size=settings.options.size)
