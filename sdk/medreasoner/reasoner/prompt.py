"""Prompts as token ids: the template once, the image's tokens by count, the query by text."""

from typing import TYPE_CHECKING

from medreasoner.errors import BundleError, QueryError
from medreasoner.spec import ReasonerSpec

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

__all__ = ["Prompt", "load_tokenizer"]

_PROBES = ("a", "Where?", "7", "(b")  # queries that begin in different ways


def load_tokenizer(path: str) -> "Tokenizer":
    """Tokenizer of a ``tokenizer.json``.

    Raises
    ------
    BundleError
        If the file is not one; the message names it.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as err:  # tokenizers raises the bare class
        raise BundleError(f"{path}: not a tokenizer.json ({err!s:.200})") from err
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Prompt:
    """Builds the token ids of a prompt.

    Parameters
    ----------
    tokenizer
        Of the bundle.
    spec
        Template, image token and limits.

    Raises
    ------
    BundleError
        If the image token is not one token of the vocabulary.
    """

    def __init__(self, tokenizer: "Tokenizer", spec: ReasonerSpec) -> None:
        self._tokenizer = tokenizer
        self._limit = spec.max_query_tokens
        image_token = tokenizer.token_to_id(spec.prompt.image_token)
        if image_token is None:
            raise BundleError(f"reasoner.prompt.image_token: {spec.prompt.image_token!r} is not in the vocabulary")
        self.image_token: int = image_token
        self._before, self._after = spec.prompt.template.replace("{image}", spec.prompt.image_token).split("{query}")
        added = tokenizer.get_added_tokens_decoder()
        special = [each.content for each in added.values() if each.special]
        # Those too that hold a special one's text: a whole end of a prompt may be one token.
        self._reserved = {token for token, each in added.items() if any(text in each.content for text in special)}
        wholes = [self._ids(self._before + probe + self._after) for probe in _PROBES]
        if any(whole.count(image_token) != 1 for whole in wholes):
            raise BundleError("reasoner.prompt.template: expected the image token once")
        # With guidelines after the query this ends before the query all the same: what follows depends on it.
        length = min(common_length(wholes[0], whole) for whole in wholes)
        self._prefix = wholes[0][:length]
        if image_token not in self._prefix:
            raise BundleError("reasoner.prompt.template: the image's place depends on the query")
        self._around = self._ids(self._before), self._ids(self._after)
        self._joins = _stands_alone(self._before, self._after, list(added.values())) and all(
            self._joined(self._ids(probe)) == whole for probe, whole in zip(_PROBES, wholes, strict=True)
        )
        self._expanded: tuple[int, list[int]] = (-1, [])  # how the last prompt began, by its number of image tokens

    def prefix(self, n_image_tokens: int) -> list[int]:
        """Token ids that the prompts of all queries share, with the image's tokens."""
        return self._expand(self._prefix, n_image_tokens)

    def whole(self, query: str, n_image_tokens: int) -> list[int]:
        """Token ids of the prompt up to the answer.

        Raises
        ------
        QueryError
            If the query is not text, empty, holds a reserved token, or is longer than the model accepts.
        """
        text, ids = self._checked(query)
        if not self._joins:
            return self._expand(self._ids(self._before + text + self._after), n_image_tokens)
        known = self._expanded
        if known[0] != n_image_tokens:
            self._expanded = known = (n_image_tokens, self._expand(self._around[0], n_image_tokens))
        return [*known[1], *ids, *self._around[1]]

    def check(self, query: str) -> str:
        """Query without white space around it.

        Raises
        ------
        QueryError
            If the query is not text, empty, holds a reserved token, or is longer than the model accepts.
        """
        return self._checked(query)[0]

    def _checked(self, query: str) -> tuple[str, list[int]]:
        """The same, with its tokens."""
        if not isinstance(query, str):
            raise QueryError(f"query: expected text, got {type(query).__name__}")
        text = query.strip()
        if not text:
            raise QueryError("query: empty; ask a question")
        try:
            ids = self._ids(text)
        except (UnicodeError, TypeError) as err:  # a lone surrogate is no text
            raise QueryError("query: not valid Unicode text") from err
        if not self._reserved.isdisjoint(ids):
            raise QueryError("query: holds a token that is reserved for the prompt's structure")
        if len(ids) > self._limit:
            raise QueryError(f"query: {len(ids)} tokens, at most {self._limit} are accepted; shorten it")
        return text, ids

    def _joined(self, ids: list[int]) -> list[int]:
        """A prompt whose query has these tokens."""
        before, after = self._around
        return [*before, *ids, *after]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _expand(self, ids: list[int], n_image_tokens: int) -> list[int]:
        # The image token is an added token, at which every tokenizer splits first: repeating its id is the same as
        # repeating its text.
        at = ids.index(self.image_token)
        return [*ids[:at], *[self.image_token] * n_image_tokens, *ids[at + 1 :]]


def _stands_alone(before: str, after: str, added: "list[AddedToken]") -> bool:
    """Whether special tokens stand on both sides of the query, so that its tokens are what they are without the rest.

    A tokenizer splits at these before it does anything else, unless another added token reaches over one's edge.
    """
    plain = [each.content for each in added if each.special and not each.normalized and not each.single_word]
    left = max((each for each in plain if before.endswith(each)), key=len, default="")
    right = max((each for each in plain if after.startswith(each)), key=len, default="")
    if not left or not right:
        return False
    others = [each.content for each in added]
    is_longer = any(each != left and left in each for each in others)
    reaches_over = any(each[-n:] == right[:n] for each in others for n in range(1, len(right)))
    return not is_longer and not reaches_over


def common_length(a: list[int], b: list[int]) -> int:
    """How many leading items two lists share."""
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
