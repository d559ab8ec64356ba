"""A sentence-embedding model that teaches the meaning of questions; needed in training only.

A small decoder that learns language from a few thousand questions tells their categories apart by heart and understands
no other author. Asked to say as well what a sentence encoder makes of each question, it learns which words are alike.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from medreasoner.errors import BundleError
from medreasoner_train.files import keep_arrays, kept_arrays
from medreasoner_train.language import Phrasings

__all__ = ["embed_queries", "embed_sentences"]

logger = logging.getLogger(__name__)


def embed_queries(folder: Path, phrasings: Mapping[str, Phrasings], *, cache: Path | None = None) -> dict[str, Tensor]:
    """The embedding (D,) of every question of `phrasings`, by :func:`embed_sentences`, to learn the direction of.

    Rounded to steps of 1/127 of its largest component, and of any length.

    Parameters
    ----------
    folder
        The encoder.
    phrasings
        By key.
    cache
        File (.npz) that keeps them for the next run of the same encoder: 56,000 took three minutes on two cores.

    Raises
    ------
    BundleError
        If the encoder or the cache cannot be read; the message names it.
    """
    queries = sorted({query for own in phrasings.values() for query in (*own.queries, *own.named)})
    encoder = "" if cache is None else _digest(folder)
    known = {} if cache is None else _kept(cache, encoder)
    new = [query for query in queries if query not in known]
    if new:
        values = embed_sentences(folder, new)
        steps = values / values.abs().amax(1, keepdim=True) * 127
        known |= dict(zip(new, steps.round().to(torch.int8).numpy(), strict=True))
        if cache is not None:
            # As one text: an array of texts is as wide as the longest for each.
            texts = np.frombuffer("\0".join(known).encode(), np.uint8)
            keep_arrays(cache, encoder=encoder, queries=texts, values=np.stack(list(known.values())))
    return {query: torch.from_numpy(known[query].astype(np.float32)) for query in queries}


def _kept(cache: Path, encoder: str) -> dict[str, npt.NDArray[np.int8]]:
    """What is in the file, if it is this encoder's."""
    if not cache.exists():
        return {}
    whose, texts, values = kept_arrays(cache, ("encoder", "queries", "values"))
    if str(whose) != encoder:
        logger.info("%s holds another encoder's embeddings; they are replaced", cache)
        return {}
    return dict(zip(texts.tobytes().decode().split("\0"), values, strict=True))


def _digest(folder: Path) -> str:
    """What tells an encoder from another: all that its folder says in files of its own."""
    from medreasoner_export.checkpoint import sha256_of

    kinds = (".json", ".txt", ".model", ".safetensors", ".bin")
    files = [each for each in sorted(folder.glob("*")) if each.suffix in kinds]
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


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
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))  # alike in length: little padding
    parts = []
    for start in range(0, len(order), batch):
        some = [sentences[index] for index in order[start : start + batch]]
        inputs = tokenizer(some, padding=True, truncation=True, return_tensors="pt")
        states = encoder(**inputs).last_hidden_state
        shown = inputs["attention_mask"][..., None]
        parts.append(functional.normalize((states * shown).sum(1) / shown.sum(1), dim=-1))
    return torch.cat(parts)[torch.tensor(order).argsort()]
