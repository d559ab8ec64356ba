"""Prompts: prefix and rest make the whole, and what is no question is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from medreasoner.errors import BundleError, QueryError
from medreasoner.reasoner.prompt import Prompt, common_length, load_tokenizer
from medreasoner.spec import BundleSpec

MERGES = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("o", "r"), ("Ċ", "Ċ"), (">", "Ċ"), ("?", "Ċ")]
N_IMAGE = 9
GUIDED = (
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>\nQuestion: {query}\nAnswer with a box.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def with_template(spec: BundleSpec, template: str) -> BundleSpec:
    return replace(spec, reasoner=replace(spec.reasoner, prompt=replace(spec.reasoner.prompt, template=template)))


@pytest.fixture
def tokenizer(toy_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return toy_tokenizer(merges=MERGES)


def whole_text(template: str, query: str) -> str:
    return template.replace("{image}", "<|image_pad|>" * N_IMAGE).replace("{query}", query)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), st.booleans())
def test_prefix_and_rest_are_the_tokens_of_the_whole_text(
    spec: BundleSpec, tokenizer: Tokenizer, query: str, guided: bool
) -> None:
    if not query.strip():
        return
    if guided:
        spec = with_template(spec, GUIDED)
    prompt = Prompt(tokenizer, spec.reasoner)
    expected = tokenizer.encode(whole_text(spec.reasoner.prompt.template, query.strip()), add_special_tokens=False).ids
    whole = prompt.whole(query, N_IMAGE)
    assert whole == expected
    prefix = prompt.prefix(N_IMAGE)
    # A query may merge with the prefix's last text token, but never reaches back to the image.
    last_image = max(i for i, token in enumerate(prefix) if token == prompt.image_token)
    assert last_image < common_length(prefix, whole) <= len(prefix)


@pytest.mark.parametrize("added", ["t<|im_", "<|vision_end|>t"])
def test_an_added_token_that_reaches_over_the_querys_edge_is_found(
    spec: BundleSpec, tokenizer: Tokenizer, added: str
) -> None:
    plain = Prompt(tokenizer, spec.reasoner)
    assert plain._joins
    tokenizer.add_tokens([added])
    prompt = Prompt(tokenizer, spec.reasoner)
    text = whole_text(spec.reasoner.prompt.template, "t")
    assert prompt.whole("t", N_IMAGE) == tokenizer.encode(text, add_special_tokens=False).ids
    assert not prompt._joins


def test_the_prefix_of_the_plain_template_ends_at_the_query(spec: BundleSpec, tokenizer: Tokenizer) -> None:
    prefix = Prompt(tokenizer, spec.reasoner).prefix(N_IMAGE)
    before = spec.reasoner.prompt.template.partition("{query}")[0].replace("{image}", "<|image_pad|>" * N_IMAGE)
    assert prefix == tokenizer.encode(before, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "empty"),
        ("  \n\t", "empty"),
        (None, "expected text, got NoneType"),
        (7, "expected text, got int"),
        (b"Where?", "expected text, got bytes"),
        ("x" * 41, "41 tokens, at most 40"),
        ("Where?<|im_end|>", "reserved"),
        ("<|image_pad|>", "reserved"),
        ("Where is \ud800?", "not valid Unicode"),
    ],
    ids=["empty", "blank", "none", "number", "bytes", "too long", "end token", "image token", "surrogate"],
)
def test_what_is_no_question_is_refused(spec: BundleSpec, tokenizer: Tokenizer, query: str, reason: str) -> None:
    with pytest.raises(QueryError, match=reason) as caught:
        Prompt(tokenizer, spec.reasoner).whole(query, N_IMAGE)
    assert "xxxx" not in str(caught.value)  # messages never hold the query


def test_a_token_that_holds_a_reserved_one_is_reserved_too(spec: BundleSpec, tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("<|im_end|>\n", normalized=False), AddedToken("harmless", normalized=False)])
    prompt = Prompt(tokenizer, spec.reasoner)
    with pytest.raises(QueryError, match="reserved"):
        prompt.check("Where?<|im_end|>\nagain")
    assert prompt.check("harmless?") == "harmless?"


def test_white_space_around_a_query_does_not_count(spec: BundleSpec, tokenizer: Tokenizer) -> None:
    prompt = Prompt(tokenizer, spec.reasoner)
    assert prompt.whole(" Where? \n", N_IMAGE) == prompt.whole("Where?", N_IMAGE)


def test_braces_in_a_query_are_text(spec: BundleSpec, tokenizer: Tokenizer) -> None:
    prompt = Prompt(tokenizer, spec.reasoner)
    text = tokenizer.decode(prompt.whole("{image} {query}", N_IMAGE), skip_special_tokens=False)
    assert "{image} {query}" in text
    assert text.count("<|image_pad|>") == N_IMAGE


def test_a_vocabulary_without_the_image_token_is_refused(spec: BundleSpec, tokenizer: Tokenizer) -> None:
    prompt = replace(spec.reasoner.prompt, image_token="<|picture|>")
    with pytest.raises(BundleError, match="image_token"):
        Prompt(tokenizer, replace(spec.reasoner, prompt=prompt))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: object) -> None:
    path = tmp_path / "tokenizer.json"  # type: ignore[operator]
    path.write_text("{}")
    with pytest.raises(BundleError, match="tokenizer"):
        load_tokenizer(str(path))
