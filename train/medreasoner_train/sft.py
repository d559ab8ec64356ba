"""Second stage: supervised tuning on implicit questions, short thoughts and answers: ``medreasoner-cli train sft``.

Beside the tokens' cross-entropy, helps that are dropped afterwards: the dense read-outs of the first stage go on, and
from the last token of the prompt the category and the eight numbers are read out directly, so that the decoder learns
early what is asked and where it lies; if a sentence encoder is given, its embedding of the question is read out too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from medreasoner.errors import BundleError
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_train.checkpoint import load_weights, save_reasoner
from medreasoner_train.data import leave_out, load_index
from medreasoner_train.decoder import block_mask, language_pass
from medreasoner_train.dense import DenseHeads, dense_loss, giou, mean_or_zero
from medreasoner_train.files import appearing
from medreasoner_train.inferred import load_parts
from medreasoner_train.language import load_phrasings
from medreasoner_train.loop import LoopOptions, load_modules, train
from medreasoner_train.model import NANO, build_reasoner, tower
from medreasoner_train.sft_data import IGNORED, SftBatch, SftData, SftOptions, Unanswered
from medreasoner_train.teacher import embed_queries
from medreasoner_train.tokenizer import SPECIAL_TOKENS, ids_behind, token_id
from medreasoner_train.validation import validate
from medreasoner_train.vocabulary import Vocabulary, make_tokenizer, with_wholes

__all__ = [
    "LoopOptions",
    "Passes",
    "SftHeads",
    "SftOptions",
    "SftRun",
    "_model",
    "run",
    "sft_loss",
    "start_embeddings",
]


READ_OUT_RATE = 1e-3  # of read-outs that learn alone, whatever the run's own


class Passes(NamedTuple):
    """The two forward passes, so that they can be compiled ones."""

    vision: Callable[..., Tensor] = tower
    language: Callable[..., Tensor] = language_pass


def in_bfloat16(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pass whose products are of bfloat16; what it takes, gives and trains stays float32.

    Losses stay outside: logits of eight bits would round the numbers of an answer.
    """

    def mixed(module: nn.Module, values: Tensor, *others: Tensor) -> Tensor:
        with torch.autocast(values.device.type, torch.bfloat16):
            return run(module, values, *others).float()

    return mixed


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


def _number_losses(logits: Tensor, normaliser: Tensor, truth: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Of N coordinates: cross-entropy with a target smoothed over neighbours, and the error of the expectation.

    logits : (N, largest + 1), of the integers; normaliser : (N,), log of the summed exponentials of all tokens' logits;
    truth : (N,). The error is relative.
    """
    largest = logits.shape[1] - 1
    values = torch.arange(largest + 1, device=logits.device)
    soft = torch.softmax(-((values - truth[:, None]) ** 2) / (2 * spread**2), dim=-1)
    loss_number = mean_or_zero(normaliser - (soft * logits).sum(-1))
    expected = (logits.softmax(-1) * values).sum(-1)
    return loss_number, mean_or_zero((expected - truth).abs()) / largest


def _meaning_loss(heads: SftHeads, last: Tensor, meaning: Tensor | None) -> Tensor:
    """One minus the cosine between what the prompt's last token says of the question and what the teacher says."""
    if heads.meaning is None or meaning is None:
        return last.new_zeros(())
    known = meaning.any(-1)  # the teacher was not shown the others
    away = 1 - functional.cosine_similarity(heads.meaning(last), meaning, dim=-1)
    return (away * known).sum() / known.sum().clamp(min=1)


def _token_losses(
    table: Tensor, hidden: Tensor, batch: SftBatch, options: SftOptions, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of what is to be written: the text's loss, the coordinates' loss and error, and how often "absent" was right.

    table : (vocab_size, D), the embeddings, which are the language head too; hidden : (B, T, D).
    """
    asked = batch.label != IGNORED
    states, label, kind = hidden[asked], batch.label[asked], batch.kind[asked]
    # The chosen logits are worked out apart: picked from all, their gradient would be a table of zeros as large.
    normaliser = (states @ table.T).logsumexp(-1)
    plain = normaliser - (states * table[label]).sum(-1)
    by_kind = [options.weight_skeleton, options.weight_thought, options.weight_absent, 0.0]
    weights = torch.tensor(by_kind, device=kind.device)[kind]
    loss_text = (plain * weights).sum() / len(batch.ends)
    number = kind == 3
    loss_number, loss_l1 = _number_losses(
        states[number] @ table[vocabulary.numbers].T,
        normaliser[number],
        vocabulary.value[label[number]],
        options.spread,
    )
    return loss_text, loss_number, loss_l1, (plain[kind == 2] < 0.6931).float().mean()


def _last_of(language: Any, part: Unanswered, shared: list[tuple[Tensor, Tensor]], passes: Passes) -> Tensor:
    """Hidden states (N, D) at the ends of questions that are only read, behind their images' keys and values."""
    count, length = part.ids.shape
    places = part.start + torch.arange(length, device=part.ids.device).expand(3, count, -1)
    own = torch.ones(length, length, dtype=torch.bool, device=places.device).tril()
    before = own.new_ones(length, shared[0][0].shape[2])
    mask = torch.cat((before, own), 1).expand(count, 1, -1, -1)
    cache = [(keys[part.image], values[part.image]) for keys, values in shared]
    hidden = passes.language(language, language.embed_tokens(part.ids), places, mask, cache)
    return hidden[torch.arange(count, device=places.device), part.last]


def sft_loss(
    model: Any,
    heads: SftHeads,
    dense_heads: DenseHeads,
    batch: SftBatch,
    options: SftOptions,
    vocabulary: Vocabulary,
    passes: Passes = Passes(),  # noqa: B008 (immutable)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the stage's losses, and its parts."""
    language = model.model.language_model
    with torch.set_grad_enabled(torch.is_grad_enabled() and not options.frozen):
        image_embeds = passes.vision(model.model.visual, batch.images)
    loss_dense, dense_parts = dense_loss(dense_heads, image_embeds, batch.dense)
    embeds = language.embed_tokens(batch.packed.ids)
    embeds = embeds.masked_scatter(batch.packed.image[..., None], image_embeds)
    cache: list[tuple[Tensor, Tensor]] = []
    hidden = passes.language(language, embeds, batch.packed.positions, block_mask(batch.packed.branch), cache)
    shared = [(keys[:, :, : batch.shared], values[:, :, : batch.shared]) for keys, values in cache]
    table = language.embed_tokens.weight
    loss_text, loss_number, loss_l1, absent = _token_losses(table, hidden, batch, options, vocabulary)

    ends = [hidden[batch.ends[:, 0], batch.ends[:, 1]]]
    last = torch.cat(ends + [_last_of(language, part, shared, passes) for part in batch.unanswered])
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
    return loss, {
        "text": loss_text.detach(),
        "number": loss_number.detach(),
        "l1_px": loss_l1.detach() * vocabulary.largest,
        "category": loss_category.detach(),
        "meaning": loss_meaning.detach(),
        "read_iou": mean_or_zero(iou).detach(),
        "absent_acc": absent.detach(),
        "dense_iou": dense_parts["iou"],
    }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SftRun:
    """One run: where the data are, the loop, the mixture, and what it starts from.

    `start` is the dense stage's checkpoint, or the folder of a finished reasoner, whose tokenizer is then used too;
    `tokenizer` a file to use instead of one made from the questions, so that a checkpoint outlives a change of theirs;
    `teacher` the folder of a sentence encoder; `without` the sources that it does not see. With a `precision` of
    ``"bf16"`` the passes are in mixed precision, twice as fast on a CPU with AMX or AVX512_BF16. Read-outs are not kept
    in a finished reasoner: for `heads_first` steps they alone learn, so that what starts at random disturbs nothing.
    With `infer` it is asked for organs too that an image's source leaves unlabelled (see
    :mod:`medreasoner_train.inferred`). With `short_answers` a tokenizer of before gets one token for each text that
    every prompt and answer has, as new ones have.
    """

    data: Path
    loop: LoopOptions
    options: SftOptions = dataclasses.field(default_factory=SftOptions)
    start: Path | None = None
    tokenizer: Path | None = None
    teacher: Path | None = None
    without: tuple[str, ...] = ()
    cache: Path | None = None
    compiled: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    vocab_size: int = 6144
    eval_every: int = 300
    heads_first: int = 0
    short_answers: bool = False
    infer: bool = False


def run(settings: SftRun) -> None:
    """Train from the last checkpoint (or the dense stage's) to the end, then write ``out/checkpoint``."""
    torch.manual_seed(settings.loop.seed)
    tokenizer = _tokenizer(settings)
    vocabulary = Vocabulary(tokenizer, NANO.image_size)
    data, val, meaning_dim = _data(settings, vocabulary)
    model = _model(tokenizer)
    start_embeddings(model, vocabulary)
    heads = SftHeads(NANO.hidden_dim, len(data.categories), meaning_dim)
    dense_heads = DenseHeads(NANO.hidden_dim, len(data.categories))
    if settings.start is not None and settings.start.is_dir():
        load_weights(settings.start, model, added=_added(settings.start, tokenizer))
    elif settings.start is not None:
        load_modules(settings.start, {"visual": model.model.visual, "heads": dense_heads})
    passes = Passes()
    if settings.compiled:  # rows differ in length from step to step
        passes = Passes(vision=torch.compile(tower), language=torch.compile(language_pass, dynamic=True))
    if settings.precision == "bf16":
        passes = Passes(*map(in_bfloat16, passes))
    model.model.visual.requires_grad_(not settings.options.frozen)
    near = vocabulary.to(torch.device(settings.loop.device))
    read_outs: dict[str, nn.Module] = {"heads": heads, "dense": dense_heads}

    def loss_of(batch: SftBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return sft_loss(model, heads, dense_heads, batch, settings.options, near, passes)

    if settings.heads_first and not (settings.loop.out / "last.pt").exists():
        _teach_read_outs(model, read_outs, data, loss_of, settings)
    train(
        modules={"model": model, **read_outs},
        make_batch=lambda step: data.make(step, settings.loop.seed),
        loss_of=loss_of,
        options=settings.loop,
        evaluate=lambda _: validate(model, vocabulary, val, size=settings.options.size),
        eval_every=settings.eval_every,
    )
    save_reasoner(model, tokenizer, settings.loop.out / "checkpoint", size=settings.options.size)


def _teach_read_outs(
    model: nn.Module,
    read_outs: Mapping[str, nn.Module],
    data: SftData,
    loss_of: Callable[[SftBatch], tuple[Tensor, dict[str, Tensor]]],
    settings: SftRun,
) -> None:
    """Let the read-outs learn from a model that stays as it is, at the full rate of a first stage."""
    steps, loop = settings.heads_first, settings.loop
    learns = {name: each.requires_grad for name, each in model.named_parameters()}
    model.requires_grad_(False).to(loop.device)
    options = dataclasses.replace(
        loop, out=loop.out / "heads", steps=steps, minutes=float("inf"), lr=READ_OUT_RATE, warmup=steps // 10, show=None
    )
    train(modules=read_outs, make_batch=lambda step: data.make(step, loop.seed + 1), loss_of=loss_of, options=options)
    for name, each in model.named_parameters():
        each.requires_grad_(learns[name])


def _tokenizer(settings: SftRun) -> Tokenizer:
    """The tokenizer that was asked for, or that of the run so far, or one made from the questions; kept in ``out``.

    A run that goes on after the questions changed would otherwise read its weights under other token ids.
    """
    kept = settings.loop.out / "tokenizer.json"
    begun = settings.start / "tokenizer.json" if settings.start is not None and settings.start.is_dir() else None
    # What an earlier, failed start left there is not that of a finished reasoner.
    goes_on = kept.exists() and (begun is None or (settings.loop.out / "last.pt").exists())
    source = settings.tokenizer or (kept if goes_on else begun)
    tokenizer = make_tokenizer(settings.vocab_size, NANO.image_size) if source is None else load_tokenizer(str(source))
    if settings.short_answers:
        with_wholes(tokenizer)
    with appearing(kept) as beside:
        tokenizer.save(str(beside))
    return tokenizer


def _added(start: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """What the tokens that a tokenizer has beyond that of a finished reasoner were written with before.

    Raises
    ------
    BundleError
        If it gives the reasoner's own tokens other ids.
    """
    old = load_tokenizer(str(start / "tokenizer.json"))
    new = ids_behind(old, tokenizer)
    if new is None:
        raise BundleError(
            f"{start}: its tokens have other ids in the tokenizer that was asked for; leave --tokenizer out"
        )
    texts = (tokenizer.decode([token], skip_special_tokens=False) for token in new)
    return [old.encode(text, add_special_tokens=False).ids for text in texts]


def _data(settings: SftRun, vocabulary: Vocabulary) -> tuple[SftData, SftData, int]:
    """Batches to train on, images to validate on, and the size of the teacher's embeddings (0: none)."""
    samples = leave_out(load_index(settings.data), settings.without)
    phrasings = load_phrasings("train")
    meanings = None
    if settings.teacher is not None:
        kept = None if settings.cache is None else settings.cache.with_suffix(".teacher.npz")
        meanings = embed_queries(settings.teacher, phrasings, cache=kept)
    data, val = (
        SftData(
            samples,
            stored,
            vocabulary=vocabulary,
            phrasings=phrasings,
            options=settings.options,
            meanings=meanings,
        )
        for stored in load_parts(samples, cache=settings.cache, infer=settings.infer)
    )
    return data, val, 0 if meanings is None else len(next(iter(meanings.values())))


def _model(tokenizer: Tokenizer) -> Any:
    """An untrained nano reasoner with this vocabulary."""
    tokens = {name: token_id(tokenizer, name) for name in SPECIAL_TOKENS}
    return build_reasoner(NANO, vocab_size=tokenizer.get_vocab_size(), tokens=tokens)
