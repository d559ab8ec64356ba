"""The reasoner on sessions written in NumPy: prefix, scheduling, answers, thoughts, and what it must refuse."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from medreasoner.errors import GenerationError, QueryError
from medreasoner.image import Image
from medreasoner.reasoner import Decoded, Prefix, Ticket
from medreasoner.reasoner.generate import Sampler
from medreasoner.reasoner.grammar import GrammarBook, answer_text
from medreasoner.reasoner.rotary import prompt_positions, rotary_tables
from medreasoner.result import Answer, Thought
from medreasoner.spec import BundleSpec

Array = NDArray[Any]
QUERY = "Which part is dark?"
VALUES = [10, 20, 60, 84, 11, 21, 59, 83]


@pytest.fixture
def image() -> Image:
    return Image(pixels=np.random.default_rng(0).integers(0, 256, (42, 168), np.uint8), source="array")


@pytest.fixture(params=[253, 0], ids=["integer tokens", "digits"])
def tokenizer(request: pytest.FixtureRequest, toy_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return toy_tokenizer(integers=request.param)


def read(toy: Any, image: Image) -> Prefix:
    reasoner = toy.reasoner
    placement = reasoner.place(image)
    embeds = reasoner.encode(reasoner.preprocess(image, placement)[None], placement)
    return reasoner.read_prefix(embeds[0], placement)  # type: ignore[no-any-return]


def finish(ticket: Ticket[Decoded]) -> tuple[list[Thought | Answer], Decoded]:
    seen, events = [], ticket.run()
    try:
        while True:
            seen.append(next(events))
    except StopIteration as stop:
        return seen, stop.value


def reference_tokens(toy: Any, image: Image, query: str) -> list[int]:
    """Answer by running the whole sequence anew for every token, without cache, prefix or forced spans."""
    reasoner, spec = toy.reasoner, toy.spec
    placement = reasoner.place(image)
    embeds = reasoner.encode(reasoner.preprocess(image, placement)[None], placement)[0]
    text = spec.prompt.template.replace("{image}", "<|image_pad|>" * 9).replace("{query}", query)
    ids = toy.tokenizer.encode(text, add_special_tokens=False).ids
    pad = toy.tokenizer.token_to_id("<|image_pad|>")
    state = GrammarBook(toy.tokenizer, spec.answer).grammar(84).start(84, 84)
    written: list[int] = []
    while not state.done:
        sequence = ids + written
        inputs = toy.embedding.values[sequence].copy()
        inputs[np.array(sequence) == pad] = embeds
        positions, _ = prompt_positions(sequence, pad, 3, 3)
        cos, sin = rotary_tables(positions, head_dim=spec.head_dim, theta=spec.rope_theta, sections=spec.mrope_section)
        n = len(sequence)
        outputs = toy.decoder.graph(
            {
                "inputs_embeds": inputs[None],
                "rotary_cos": cos,
                "rotary_sin": sin,
                "rotary_ids": np.arange(n)[None],
                "seqlens_k": np.array([n - 1]),
                "total_sequence_length": np.array(n),
            },
            {name: np.zeros((1, 1, n, 12), np.float32) for name in ("past_key.0", "past_value.0")},
        )
        allowed = state.allowed()
        token = int(allowed[np.argmax(toy.lm_head.values[allowed] @ outputs["hidden_states"][0, -1])])
        state.accept(token)
        written.append(token)
    return written


@pytest.mark.parametrize("query", [QUERY, "Where?", "Is there (any) fluid?"])
def test_prefix_and_forced_spans_change_nothing(
    spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image, query: str
) -> None:
    model = toy(spec, tokenizer)
    _, decoded = finish(model.reasoner.answer(read(model, image), query, think=False))
    assert tokenizer.encode(decoded.text, add_special_tokens=False).ids == reference_tokens(model, image, query)


def test_a_second_query_runs_only_its_own_tokens(
    spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image
) -> None:
    model = toy(spec, tokenizer)
    prefix = read(model, image)
    first = finish(model.reasoner.answer(prefix, QUERY, think=False))[1]
    finish(model.reasoner.answer(prefix, "Something else entirely?", think=True))
    before = len(model.decoder.runs)
    again = finish(model.reasoner.answer(prefix, QUERY, think=False))[1]
    assert again.text == first.text
    fed = sum(run["inputs_embeds"][1] for run in model.decoder.runs[before:])
    assert fed <= len(tokenizer.encode(QUERY).ids) + 30 + again.tokens["answer"]
    assert len(model.decoder.runs) - before == again.tokens["decoder_runs"]


def script(toy_class: Any, spec: BundleSpec, tokenizer: Tokenizer, text: str) -> Any:
    """Reasoner that wants to write exactly `text` after the prompt of `QUERY` and then to end."""
    wanted = [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id("<|im_end|>")]
    prompt = spec.reasoner.prompt.template.replace("{image}", "<|image_pad|>" * 9).replace("{query}", QUERY)
    start = len(tokenizer.encode(prompt, add_special_tokens=False).ids)

    def graph(inputs: Mapping[str, Array], _: Mapping[str, Array]) -> dict[str, Array]:
        hidden = np.zeros_like(inputs["inputs_embeds"])
        n = hidden.shape[1]
        for place, at in enumerate(range(int(inputs["total_sequence_length"]) - start - n + 1, len(wanted))):
            if at >= 0 and place < n:
                hidden[0, place] = 9 * model.lm_head.values[wanted[at]]
        return {"hidden_states": hidden}

    model = toy_class(spec, tokenizer, graph)
    return model


def present(spec: BundleSpec) -> str:
    return answer_text(spec.reasoner.answer.present, VALUES)


@pytest.mark.parametrize("think", [False, True])
def test_constrained_and_plain_decoding_agree_where_the_plain_answer_is_valid(
    spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image, think: bool
) -> None:
    thought = "<think>It is dark.</think>" if think else ""
    model = script(toy, spec, tokenizer, thought + present(spec))
    prefix = read(model, image)
    events, decoded = finish(model.reasoner.answer(prefix, QUERY, think=think))
    _, plain = finish(model.reasoner.answer(prefix, QUERY, think=think, unconstrained=True))
    # 42 x 168 pixels lie in 84 x 84: x doubles, y halves.
    assert decoded.corners is not None
    assert decoded.corners.tolist() == [[20, 10], [120, 42]]
    assert decoded.points is not None
    assert decoded.points.tolist() == [[22, 10.5], [118, 41.5]]
    np.testing.assert_array_equal(plain.corners, decoded.corners)
    np.testing.assert_array_equal(plain.points, decoded.points)
    assert decoded.text == present(spec)
    assert plain.text == thought + present(spec)
    assert decoded.thought == plain.thought == ("It is dark." if think else None)
    assert events[-1] == Answer(decoded.text)
    assert "".join(event.text for event in events[:-1]) == (decoded.thought or "")


def test_with_integer_tokens_an_answer_takes_eight_runs(
    spec: BundleSpec, toy: Any, toy_tokenizer: Callable[..., Tokenizer], image: Image
) -> None:
    model = script(toy, spec, toy_tokenizer(integers=253), present(spec))
    _, decoded = finish(model.reasoner.answer(read(model, image), QUERY, think=False))
    assert decoded.tokens["decoder_runs"] == 8  # numbers; the fork to "absent" rides along with the first


def test_an_absent_answer_has_no_coordinates(spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image) -> None:
    absent = spec.reasoner.answer.absent
    assert absent is not None
    model = script(toy, spec, tokenizer, absent)
    prefix = read(model, image)
    for unconstrained in (False, True):
        _, decoded = finish(model.reasoner.answer(prefix, QUERY, think=False, unconstrained=unconstrained))
        assert decoded.corners is None
        assert decoded.points is None
        assert decoded.text == absent


THOUGHTS = {
    "plain": ("<think>Dark.</think>", "Dark.", False),
    "blank": ("<think> </think>", " ", False),
    "ends without the tag": ("<think>Dark.<|im_end|>", "Dark.", False),
    "too long": ("<think>" + "dark " * 9, "dark dark dark dark dark ", True),
    "like a tag": ("<think>a </thin b</think>", "a </thin b", False),
    "not ASCII": ("<think>größer: 肺</think>", "größer: 肺", False),
}


@pytest.mark.parametrize(("text", "thought", "is_cut"), THOUGHTS.values(), ids=THOUGHTS.keys())
@pytest.mark.parametrize("tags", [True, False], ids=["tags are tokens", "tags are text"])
def test_a_thought_ends_in_an_answer(
    spec: BundleSpec,
    toy: Any,
    toy_tokenizer: Callable[..., Tokenizer],
    image: Image,
    text: str,
    thought: str,
    is_cut: bool,
    tags: bool,
) -> None:
    limit = 25 if is_cut else 40
    spec = replace(spec, reasoner=replace(spec.reasoner, max_think_tokens=limit))
    tokenizer = toy_tokenizer(integers=253, think=tags, merges=[(">", "<")])
    model = script(toy, spec, tokenizer, text + present(spec))
    events, decoded = finish(model.reasoner.answer(read(model, image), QUERY, think=True))
    assert decoded.thought == thought
    assert "".join(event.text for event in events[:-1]) == thought
    assert decoded.text.startswith("<answer>{")
    assert decoded.text.endswith("}</answer>")
    assert thought in tokenizer.decode(list(decoded.ids), skip_special_tokens=False)
    assert bool(decoded.warnings) == is_cut
    if not is_cut and "im_end" not in text:
        assert decoded.text == present(spec)


def test_a_model_that_cannot_think_answers_with_a_warning(
    spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image
) -> None:
    spec = replace(spec, reasoner=replace(spec.reasoner, max_think_tokens=0))
    model = script(toy, spec, tokenizer, present(spec))
    _, decoded = finish(model.reasoner.answer(read(model, image), QUERY, think=True))
    assert decoded.text == present(spec)
    assert decoded.thought is None
    assert "not trained to reason" in decoded.warnings[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<answer>no idea</answer>", "malformed"),
        ('<answer>{"bbox": [5, 5, 5, 9], "points_1": [1, 1], "points_2": [2, 2]}</answer>', "no area"),
        ('<answer>{"bbox": [90, 5, 99, 9], "points_1": [1, 1], "points_2": [2, 2]}</answer>', "no area"),
        ('<answer>{"bbox": [1, 2, 3, 4], "points_1": [1, 1]}</answer>', "points_2"),
        ("<answer>" + "x" * 200, "no usable answer"),
    ],
    ids=["not JSON", "flat", "outside", "a point missing", "endless"],
)
def test_plain_text_without_a_usable_answer_is_an_error(
    spec: BundleSpec,
    toy: Any,
    toy_tokenizer: Callable[..., Tokenizer],
    image: Image,
    text: str,
    reason: str,
) -> None:
    model = script(toy, spec, toy_tokenizer(integers=253), text)
    with pytest.raises(GenerationError, match=reason):
        finish(model.reasoner.answer(read(model, image), QUERY, think=False, unconstrained=True))


def test_a_sequence_that_outgrows_the_cache_is_an_error_and_gives_the_cache_back(
    spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image
) -> None:
    short = replace(spec, reasoner=replace(spec.reasoner, max_length=60))
    model = toy(short, tokenizer)
    prefix = read(model, image)
    with pytest.raises(GenerationError, match="do not fit the model's 60"):
        finish(model.reasoner.answer(prefix, QUERY + " or not" * 2, think=True))
    with pytest.raises(QueryError):
        finish(model.reasoner.answer(prefix, "", think=False))


def test_an_image_of_too_many_tokens_is_an_error(
    spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image
) -> None:
    model = toy(replace(spec, reasoner=replace(spec.reasoner, max_length=16)), tokenizer)
    with pytest.raises(GenerationError, match="17 tokens do not fit the model's 16"):
        read(model, image)


def test_a_stream_that_is_dropped_gives_its_cache_back(
    spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image
) -> None:
    model = toy(spec, tokenizer)
    prefix = read(model, image)
    for _ in range(2 * model.reasoner.n_slots):
        events = model.reasoner.answer(prefix, QUERY, think=True).run()
        next(events)
        events.close()
    assert finish(model.reasoner.answer(prefix, QUERY, think=False))[1].text


def test_more_images_than_a_session_takes_at_once_go_in_several_runs(
    spec: BundleSpec, toy: Any, tokenizer: Tokenizer, image: Image
) -> None:
    model = toy(spec, tokenizer)
    reasoner, session = model.reasoner, model.vision
    placement = reasoner.place(image)
    patches = np.stack([reasoner.preprocess(image, placement) + index for index in range(5)])
    together = reasoner.encode(patches, placement)
    session.max_rows, before = 2, len(session.runs)
    np.testing.assert_array_equal(reasoner.encode(patches, placement), together)
    assert [run["patches"][0] for run in session.runs[before:]] == [2, 2, 1]


@pytest.mark.parametrize("think", [False, True])
def test_a_question_that_was_read_before_draws_the_same_answers_and_their_tokens_are_told(
    spec: BundleSpec, toy: Any, toy_tokenizer: Callable[..., Tokenizer], image: Image, think: bool
) -> None:
    own = toy(spec, toy_tokenizer(integers=253))
    reasoner, prefix = own.reasoner, read(own, image)
    question = reasoner.read_question(prefix, QUERY).result()
    assert question.ids == reasoner.prompt.whole(QUERY, prefix.grid.n_tokens)[:-1]
    for index in range(6):
        drawn = [
            reasoner.answer(start, QUERY, think=think, sampler=Sampler(1.5, 0, index, draws_absent=True)).result()
            for start in (prefix, question)
        ]
        assert drawn[0].ids == drawn[1].ids
        text = own.tokenizer.decode(list(drawn[0].ids), skip_special_tokens=False)
        assert text.endswith(drawn[0].text)
        assert text.startswith("<think>") == think
        assert len(drawn[0].free) == len(drawn[0].ids)
        assert drawn[0].free[-1] is False  # nothing else could have ended it
        assert drawn[0].tokens["forced"] == sum(not each for each in drawn[0].free[-drawn[0].tokens["answer"] :])
