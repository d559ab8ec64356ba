import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medreasoner import ops

many = settings(deadline=None, max_examples=150)
KEYS = ("bbox", "points_1", "points_2")
FIELDS = ("thought", "bbox", "points_1", "points_2", "absent", "missing", "status")


def parse(*chunks: str) -> dict[str, object]:
    parser = ops.AnswerParser()
    for chunk in chunks:
        parser.feed(chunk)
    result = parser.result()
    return {field: getattr(result, field) for field in FIELDS}


def by_json(text: str) -> dict[str, object]:
    """The same reading with str.find and json, for text without quotes inside strings."""
    thought = text.partition("<think>")[2].partition("</think>")[0] if "<think>" in text else None
    expected: dict[str, object] = dict.fromkeys(KEYS) | {"thought": thought, "absent": False}
    body, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
    found: object = {}
    if "<answer>" not in text:
        status = "no_answer"
    elif not closed:
        status = "incomplete"
    else:
        status = "malformed"
        try:
            found = json.loads(body.replace("'", '"'), parse_constant=lambda _: (_ for _ in ()).throw(ValueError()))
        except ValueError:
            found = {}
    found = found if isinstance(found, dict) else {}
    for key, length in zip(KEYS, (4, 2, 2), strict=True):
        value = found.get(key)
        if isinstance(value, list) and len(value) == length and all(type(x) in (int, float) for x in value):
            numbers = tuple(float(x) for x in value)
            expected[key] = numbers if all(map(math.isfinite, numbers)) else None
    expected["missing"] = [key for key in KEYS if expected[key] is None]
    if all(key in found and found[key] is None for key in KEYS):
        expected |= {"absent": True, "missing": []}
        status = "absent"
    elif not expected["missing"]:
        status = "ok"
    return expected | {"status": status}


NUMBERS = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = (
    st.none()
    | st.lists(NUMBERS, min_size=2, max_size=2)
    | st.lists(NUMBERS, min_size=4, max_size=4)
    | st.recursive(
        NUMBERS | st.booleans() | st.none() | st.text("ab ,[]{}:", max_size=4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
        max_leaves=6,
    )
)
OBJECTS = st.lists(st.tuples(st.sampled_from([*KEYS, "label"]), VALUES), max_size=5)
LAYOUT = st.tuples(st.sampled_from([", ", ",", " ,\n\t"]), st.sampled_from([": ", ":", " :  "]), st.sampled_from("'\""))


def written(pairs: list[tuple[str, object]], layout: tuple[str, str, str]) -> str:
    comma, colon, quote = layout
    members = [f'"{key}"{colon}{json.dumps(value, separators=(comma, colon))}' for key, value in pairs]
    return ("{ " + comma.join(members) + " }").replace('"', quote)


@st.composite
def replies(draw: st.DrawFn) -> str:
    """Answers, thoughts and noise in any order, some of them cut or broken."""
    noise = st.text("<>/anskwerthi {}[]:,'\"0.12é\n", max_size=12)
    tags = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>"])
    answer = st.builds(lambda pairs, layout: f"<answer>{written(pairs, layout)}</answer>", OBJECTS, LAYOUT)
    return "".join(draw(st.lists(noise | tags | answer, max_size=6)))


@many
@given(pairs=OBJECTS, layout=LAYOUT, thought=st.text("abc <>é\n", max_size=20))
def test_a_closed_answer_means_what_json_says(pairs, layout, thought):
    text = f"<think>{thought}</think> <answer> {written(pairs, layout)}\n</answer><|im_end|>"
    assert parse(text) == by_json(text)


@many
@given(text=replies(), data=st.data())
def test_any_chunking_gives_the_same_result(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(*chunks) == parse(text) == parse(*text)


@many
@given(body=st.text('{}[]:,"bp-+.eE012 null', max_size=30))
@example('{"bbox": [1, 2, 3, 04]}')
@example('{"bbox": [1, 2, 3, 4],}')
@example('{"bbox": [1, 2, 3, 1e999]}')
@example('{"bbox": [-0, 2., 3, 4]}')
@example('{"a": {}, "bbox": [1, 2, 3, 4e-2]} ')
def test_fragments_of_json_are_read_or_refused_as_json_does(body):
    text = f"<answer>{body}</answer>"
    assert parse(text) == by_json(text)


@many
@given(
    st.lists(st.text(st.characters(), max_size=20) | st.sampled_from(["<think>", "</think>", "<answer>", "</answer>"]))
)
def test_no_text_at_all_upsets_the_parser(chunks):
    assert parse(*chunks)["status"] in ("ok", "absent", "no_answer", "malformed", "incomplete")


ANSWER = "<answer>{'bbox': [1, 2, 3, 4], 'points_1': [5, 6], 'points_2': [7.5, 8]}</answer>"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        pytest.param(ANSWER, "ok", id="original form"),
        pytest.param(ANSWER.replace("'", '"'), "ok", id="double quotes"),
        pytest.param(ANSWER.replace("[1, 2", "[9, 9"), "ok", id="corners in any order are the caller's to judge"),
        pytest.param("<answer>{}</answer>" + ANSWER, "ok", id="the last answer wins"),
        pytest.param("<answer> I mean " + ANSWER, "ok", id="an answer that starts anew"),
        pytest.param(ANSWER + "<answer>", "incomplete", id="the last answer is open"),
        pytest.param("the box is [1, 2, 3, 4]", "no_answer", id="no tags"),
        pytest.param("", "no_answer", id="nothing"),
        pytest.param("<answer>[1, 2, 3, 4]</answer>", "malformed", id="no object"),
        pytest.param("<answer>{'bbox': [1, 2, 3, 4]}</answer>", "malformed", id="a key is missing"),
        pytest.param(ANSWER.replace("4]", "4, 5]"), "malformed", id="five numbers"),
        pytest.param(ANSWER.replace("4]", "'4']"), "malformed", id="text for a number"),
        pytest.param(ANSWER.replace("4]", "true]"), "malformed", id="true for a number"),
        pytest.param(ANSWER.replace("4]", "NaN]"), "malformed", id="NaN"),
        pytest.param(ANSWER.replace("}", "} yes"), "malformed", id="words after the object"),
        pytest.param("<answer>{'bbox': null, 'points_1': null, 'points_2': null}</answer>", "absent", id="absent"),
        pytest.param("<answer>{'bbox': null, 'points_1': null}</answer>", "malformed", id="absent but for one key"),
        pytest.param("<ANSWER>{}</ANSWER>", "no_answer", id="tags in capitals"),
    ],
)
def test_status_of(text, status):
    assert parse(text)["status"] == status


def test_what_is_missing_is_named_and_the_rest_is_kept():
    found = parse("<answer>{'points_2': [1, 2], 'bbox': [1, 2, 3], 'points_1': null}</answer>")
    assert found["missing"] == ["bbox", "points_1"]
    assert found["points_2"] == (1.0, 2.0)


def test_a_thought_that_is_not_closed_is_given_as_far_as_it_goes():
    assert parse("<think>the left", " lung</th")["thought"] == "the left lung</th"


def test_results_can_be_asked_for_while_text_arrives():
    parser = ops.AnswerParser()
    seen = []
    for character in "<think>a</think>" + ANSWER:
        parser.feed(character)
        seen.append(parser.result().status)
    assert [status for i, status in enumerate(seen) if i == 0 or seen[i - 1] != status] == [
        "no_answer",
        "incomplete",
        "ok",
    ]


def test_lone_surrogates_pass_through_a_thought():
    assert parse("<think>\ud800</think>")["thought"] == "\ud800"


def test_nesting_deeper_than_any_stack_is_malformed():
    assert parse("<answer>" + "[" * 60_000 + "</answer>")["status"] == "malformed"
    assert parse('<answer>{"a":' + '{"a":' * 10_000 + "</answer>")["status"] == "malformed"


def test_memory_stays_bounded_and_a_cut_thought_is_whole_characters():
    parser = ops.AnswerParser()
    parser.feed("<think>x<answer>")
    for _ in range(100):
        parser.feed("é" * 50_000)  # 10 MB of UTF-8 in all
    thought = parser.result().thought
    assert thought is not None
    assert len(thought.encode()) <= 1 << 20
    assert set(thought[9:]) == {"é"}
    parser.feed("</answer></think>")
    assert parser.result().status == "malformed"
    parser.feed(ANSWER)
    assert parser.result().status == "ok"


@pytest.mark.parametrize("bad", [b"<answer>", None, 3])
def test_only_text_is_fed(bad):
    with pytest.raises(TypeError):
        ops.AnswerParser().feed(bad)
