"""A sentence-embedding model that teaches the meaning of questions; needed in training only.

A small decoder that learns language from a few thousand questions tells their categories apart by heart and understands
no other author. Asked to say as well what a sentence encoder makes of each question, it learns which words are alike.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from medreasoner.errors import BundleError
from medreasoner_train.language import Phrasings

__all__ = ["embed_queries", "embed_sentences"]


def embed_queries(folder: Path, phrasings: Mapping[str, Phrasings]) -> dict[str, Tensor]:
    """The embedding (D,) of every question of `phrasings`, by :func:`embed_sentences`."""
    queries = sorted({query for own in phrasings.values() for query in own.queries})
    return dict(zip(queries, embed_sentences(folder, queries), strict=True))


@torch.no_grad()
def embed_sentences(folder: Path, sentences: Sequence[str], *, batch: int = 64) -> Tensor:
    """Embeddings of sentences by a BERT-like encoder, averaged over its tokens and brought to length 1.

    Parameters
    ----------
    folder
        A checkpoint in the form of transformers or sentence-transformers, such as all-MiniLM-L6-v2.
    sentences
        N texts.
    batch
        How many are worked on at a time.

    Returns
    -------
    embeddings : (N, D) float32

    Raises
    ------
    BundleError
        If the folder does not hold such a model; the message names it.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except Exception as err:  # transformers raises many kinds for a folder that holds no model
        raise BundleError(f"{folder}: not a sentence encoder in transformers' form ({type(err).__name__})") from err
    parts = []
    for start in range(0, len(sentences), batch):
        inputs = tokenizer(list(sentences[start : start + batch]), padding=True, truncation=True, return_tensors="pt")
        states = encoder(**inputs).last_hidden_state
        shown = inputs["attention_mask"][..., None]
        parts.append(functional.normalize((states * shown).sum(1) / shown.sum(1), dim=-1))
    return torch.cat(parts)
