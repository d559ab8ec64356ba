"""nano's own tokenizer: byte-level BPE with Qwen's special tokens and one token for each integer coordinate."""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from medreasoner.errors import BundleError

__all__ = ["BY_TOKEN", "SPECIAL_TOKENS", "add_wholes", "ids_behind", "token_id", "train_tokenizer"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)

BY_TOKEN = {"model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "lm_head.weight"}
"""Tensors with a row for each token, as files and models name them."""

# Words with their leading space, and punctuation with its trailing space, so that "], " is one piece.
PIECES = r"\d| ?[A-Za-z]+|[^\sA-Za-z\d]+ ?|\s+"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, largest: int) -> Tokenizer:
    """Train on `texts`; integers 0..`largest` are single tokens wherever they stand.

    Parameters
    ----------
    texts
        What the byte pairs are counted on.
    vocab_size
        At most this many tokens in all, the special ones and the integers included.
    largest
        The largest integer that is one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - largest - 1,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(str(value), normalized=False) for value in range(largest + 1)])
    return tokenizer


def add_wholes(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Give texts that are always written alike a token each, behind all others; returns those that had none.

    What has one token already, in whatever way, stays as it is.
    """
    new = [text for text in texts if len(tokenizer.encode(text).ids) > 1]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in new])
    return new


def ids_behind(old: Tokenizer, new: Tokenizer) -> range | None:
    """Ids of the tokens that a vocabulary has behind those of an older one; None if it gives one of those another id.

    None too where the older one has gaps: nothing is behind it then.
    """
    known, every = old.get_vocab(), new.get_vocab()
    if not known.items() <= every.items() or max(known.values()) >= len(known):
        return None
    return range(len(known), len(every))


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """Id of a token by its name.

    Raises
    ------
    BundleError
        If there is none, as when the vocabulary is too small for a word of the answer.
    """
    found = tokenizer.token_to_id(name)
    if found is None:
        raise BundleError(f"the tokenizer has no token {name!r}; make its vocabulary larger")
    return int(found)
