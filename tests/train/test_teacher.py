"""The sentence encoder that teaches the meaning of questions: a tiny BERT made on the spot."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from medreasoner.errors import BundleError
from medreasoner_train import teacher
from medreasoner_train.data import load_index
from medreasoner_train.dense import DenseHeads
from medreasoner_train.language import Phrasings, load_phrasings
from medreasoner_train.sft import SftHeads, sft_loss
from medreasoner_train.sft_data import SftData, SftOptions
from medreasoner_train.store import Stored
from medreasoner_train.teacher import embed_queries, embed_sentences
from medreasoner_train.vocabulary import Vocabulary

SENTENCES = ["the heart pumps", "lungs", "which organ filters the blood here"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in SENTENCES for word in text.split()})]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_an_embedding_is_the_mean_of_the_sentence_s_own_tokens_at_length_one(encoder: Path) -> None:
    whole = embed_sentences(encoder, SENTENCES, batch=2)
    assert whole.shape == (3, 16)
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(3))
    for sentence, own in zip(SENTENCES, whole, strict=True):  # neither batch nor padding matters
        torch.testing.assert_close(embed_sentences(encoder, [sentence])[0], own, atol=1e-5, rtol=0)


def test_a_folder_without_an_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=tmp_path.name):
        embed_sentences(tmp_path, SENTENCES)


def test_embeddings_are_kept_for_the_next_run_of_the_same_encoder(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def counted(folder: Path, sentences: Sequence[str]) -> Tensor:
        asked.append(list(sentences))
        return embed_sentences(folder, sentences)

    monkeypatch.setattr(teacher, "embed_sentences", counted)
    own = Phrasings(queries=tuple(SENTENCES[:1]), named=tuple(SENTENCES[1:2]))
    cache = tmp_path / "points.teacher.npz"
    first = embed_queries(encoder, {"MRI/heart": own}, cache=cache)
    more = embed_queries(encoder, {"MRI/heart": dataclasses.replace(own, queries=tuple(SENTENCES))}, cache=cache)
    assert asked == [sorted(SENTENCES[:2]), SENTENCES[2:]]
    for sentence, true in zip(SENTENCES, embed_sentences(encoder, SENTENCES), strict=True):
        assert functional.cosine_similarity(more[sentence], true, dim=0) > 0.9995  # eight bits
    assert all(torch.equal(first[sentence], more[sentence]) for sentence in first)

    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "layer_norm_eps": 0.5}))
    assert not torch.equal(embed_queries(other, {"MRI/heart": own}, cache=cache)[SENTENCES[0]], first[SENTENCES[0]])


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "an array"])
def test_a_damaged_file_of_embeddings_is_named(encoder: Path, tmp_path: Path, damage: str) -> None:
    asked, cache = {"MRI/heart": Phrasings(queries=tuple(SENTENCES))}, tmp_path / "points.teacher.npz"
    embed_queries(encoder, asked, cache=cache)
    whole = cache.read_bytes()
    middle = whole.rindex(b"values.npy", 0, whole.index(b"PK\x01\x02")) + 60  # in the last member's packed bytes
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    array = BytesIO()
    np.save(array, np.zeros(3))
    cache.write_bytes({"empty": b"", "cut": whole[:100], "flipped": flipped, "an array": array.getvalue()}[damage])
    with pytest.raises(BundleError, match=cache.name):
        embed_queries(encoder, asked, cache=cache)


def test_the_teacher_s_embedding_of_the_whole_question_is_learnt(
    encoder: Path, grounding_set: Path, stored: list[Stored], vocabulary: Vocabulary, toy_reasoner: torch.nn.Module
) -> None:
    phrasings = load_phrasings("train")
    queries = sorted({query for own in phrasings.values() for query in (*own.queries, *own.named)})
    rng = np.random.default_rng(0)
    meanings = {query: torch.tensor(rng.standard_normal(16), dtype=torch.float32) for query in queries}
    options = SftOptions(images=2, branches=2, size=84)
    data = SftData(
        load_index(grounding_set),
        stored,
        vocabulary=vocabulary,
        phrasings=phrasings,
        options=options,
        meanings=meanings,
    )
    batch = data.make(0, 0)
    assert batch.meaning is not None
    assert batch.meaning.shape == (4, 16)
    assert all(any(torch.equal(row, own) for own in meanings.values()) for row in batch.meaning)
    torch.manual_seed(0)
    heads, dense = SftHeads(32, len(data.categories), 16), DenseHeads(32, len(data.categories))
    optimiser = torch.optim.Adam(heads.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        loss, parts = sft_loss(toy_reasoner, heads, dense, batch, options, vocabulary)
        losses.append(parts["meaning"])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert losses[-1] < losses[0] - 0.05
