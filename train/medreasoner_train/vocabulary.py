"""The token ids that training and its validation need by name."""

import copy
from itertools import chain

import torch
from tokenizers import Tokenizer
from torch import Tensor

from medreasoner.errors import BundleError
from medreasoner.reasoner.prompt import common_length
from medreasoner_train.decoder import prefix_positions
from medreasoner_train.language import ABSENT, TEMPLATE, between_numbers, fixed_texts, load_phrasings, texts
from medreasoner_train.model import NANO
from medreasoner_train.spatial import template_texts
from medreasoner_train.tokenizer import add_wholes, token_id, train_tokenizer

__all__ = ["Vocabulary", "make_tokenizer", "with_wholes"]

N_WHOLES = len(fixed_texts())  # at most


class Vocabulary:
    """The token ids that training needs by name.

    spans : token ids before the first number of an answer, between the eight numbers, and after the last; bracket and
    null : where it and the answer that there is nothing part.

    Raises
    ------
    BundleError
        If a token is missing, or the two answers part in more than that one.
    """

    def __init__(self, tokenizer: Tokenizer, largest: int) -> None:
        self.tokenizer = tokenizer
        self.image, self.pad = token_id(tokenizer, "<|image_pad|>"), token_id(tokenizer, "<|endoftext|>")
        self.spans = [tokenizer.encode(text).ids for text in between_numbers()]
        present, absent = self.spans[0], tokenizer.encode(ABSENT).ids
        shared = common_length(present, absent)
        if shared != len(present) - 1 or shared == len(absent):
            raise BundleError("the tokenizer does not tell an absent answer from another by the token of its bracket")
        self.bracket, self.null = present[shared], absent[shared]
        self.before_number = torch.tensor(sorted({span[-1] for span in self.spans[:-1]}))
        self.largest = largest
        # The ten digits belong to the byte alphabet, so the integers' ids are not one run.
        self.numbers = torch.tensor([token_id(tokenizer, str(value)) for value in range(largest + 1)])
        self.value = torch.full((tokenizer.get_vocab_size(),), -1)
        self.value[self.numbers] = torch.arange(largest + 1)

    def to(self, device: torch.device) -> "Vocabulary":
        """Bring the tables that :func:`medreasoner_train.sft.sft_loss` looks into to a device."""
        moved = copy.copy(self)
        moved.numbers, moved.value = self.numbers.to(device), self.value.to(device)
        return moved

    def prefix(self, side: int) -> tuple[list[int], Tensor]:
        """Token ids and positions (3, n) of everything before the query, for a side x side image."""
        before, after = TEMPLATE.split("{query}")[0].split("{image}")
        head, tail = self.tokenizer.encode(before).ids, self.tokenizer.encode(after).ids
        return [*head, *[self.image] * side**2, *tail], prefix_positions(len(head), side, len(tail))

    def prompt(self, query: str) -> list[int]:
        """Token ids of the query and what follows it up to the answer."""
        return self.tokenizer.encode(query + TEMPLATE.split("{query}")[1]).ids


def make_tokenizer(vocab_size: int, largest: int = NANO.image_size) -> Tokenizer:
    """Nano's tokenizer, from the training phrasings; the same text gives the same tokenizer."""
    phrasings = load_phrasings("train")
    everything = chain(texts([phrasings[key] for key in sorted(phrasings)]), template_texts())
    return with_wholes(train_tokenizer(everything, vocab_size=vocab_size - N_WHOLES, largest=largest))


def with_wholes(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, which has one token for each text that stands in every prompt or answer.

    An answer of eight numbers has 18 tokens then, not 38.
    """
    add_wholes(tokenizer, fixed_texts())
    return tokenizer
