"""Every engine of rollouts keeps one contract; and what each has of its own."""

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from medreasoner.errors import BundleError, GenerationError, MissingExtraError, QueryError
from medreasoner.geometry import place
from medreasoner.reasoner.grammar import GrammarBook
from medreasoner_export.streamed import prompt_inputs
from medreasoner_export.toy import make_toy_reasoner
from medreasoner_train.hub_rollouts import TransformersRollouts
from medreasoner_train.policy_state import policy_state
from medreasoner_train.prompt_maker import PromptMaker
from medreasoner_train.ray_rollouts import RayRollouts
from medreasoner_train.rollout import Completion, Prompt, Rollouts, Sampling
from medreasoner_train.rollout_engines import make_rollouts
from medreasoner_train.runtime_rollouts import RuntimeRollouts
from medreasoner_train.vllm_rollouts import VllmRollouts

HAS_RAY = importlib.util.find_spec("ray") is not None
ENGINES = (
    "runtime",
    "runtime, free",
    "transformers",
    "vllm",
    pytest.param(
        "ray:runtime",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not HAS_RAY, reason="ray is not installed"),
        ],
    ),
)
SURE = 1e-4  # a temperature at which the likeliest token is drawn
QUERIES = ("Where is the heart in this image?", "Which organ lies behind the stomach, on the left?", "Where?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_reasoner(tmp_path_factory.mktemp("policy") / "toy")


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's, as transformers names them."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    return policy_state(model)


@pytest.fixture(scope="module")
def other_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    changed = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in weights.items()}
    return changed | {"lm_head.weight": changed["model.language_model.embed_tokens.weight"]}


@pytest.fixture(scope="module")
def maker(checkpoint: Path) -> PromptMaker:
    return PromptMaker(checkpoint)


def vllm_standin() -> Any:
    spec = importlib.util.spec_from_file_location("vllm", Path(__file__).with_name("vllm_standin.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = vllm_standin()
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Rollouts]:
    name, _, mode = request.param.partition(", ")
    with pytest.MonkeyPatch.context() as patch:
        if name == "vllm":
            patch.setitem(sys.modules, "vllm", vllm_standin())
        made = make_rollouts(name, checkpoint, **({"constrained": False} if mode else {}))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _own_weights(request: pytest.FixtureRequest) -> None:
    """A test begins with the checkpoint's weights, whatever the one before has loaded."""
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").refresh(request.getfixturevalue("weights"))


def prompts(think: bool = False) -> list[Prompt]:
    """Three questions about two images of different sizes; two of them about the same one."""
    rng = np.random.default_rng(3)
    grey, colour = rng.integers(0, 256, (70, 90), np.uint8), rng.integers(0, 256, (80, 60, 3), np.uint8)
    return [
        Prompt(key=query, pixels=pixels, query=query, think=think)
        for query, pixels in zip(QUERIES, (grey, colour, grey), strict=True)
    ]


def ids(answers: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[each.ids for each in group] for group in answers]


def sure(engine: Rollouts, asked: list[Prompt], **options: Any) -> list[tuple[int, ...]]:
    """The likeliest answer to each prompt."""
    drawn = engine.sample(asked, Sampling(count=1, temperature=SURE, max_tokens=24, **options), seed=0)
    return [group[0].ids for group in drawn]


def test_each_prompt_has_as_many_completions_as_asked_for_and_in_its_order(engine: Rollouts) -> None:
    drawn = engine.sample(prompts(), Sampling(count=4, max_tokens=16), seed=1)
    assert [len(group) for group in drawn] == [4, 4, 4]
    forward = sure(engine, prompts())
    assert sure(engine, prompts()[::-1]) == forward[::-1]
    assert [sure(engine, [each])[0] for each in prompts()] == forward  # alone as in company
    assert engine.sample([], Sampling(), seed=0) == []


def test_the_seed_decides_what_is_drawn(engine: Rollouts) -> None:
    sampling = Sampling(count=3, max_tokens=40)
    first, again, other = (engine.sample(prompts(), sampling, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert ids(first) != ids(other)
    assert len({each.ids for group in first for each in group}) > 3  # not one stream for all


@pytest.mark.parametrize("think", [False, True])
def test_a_completion_says_what_it_is(engine: Rollouts, maker: PromptMaker, think: bool) -> None:
    for group in engine.sample(prompts(think), Sampling(count=4, temperature=1.3, max_tokens=200), seed=2):
        for each in group:
            own = each.ids[:-1] if each.finished else each.ids
            assert each.text == maker.tokenizer.decode(list(own), skip_special_tokens=False)
            assert each.text.startswith("<think>" if think else "<answer>")
            assert each.finished == (each.ids[-1] == maker.end)
            assert each.finished or len(each.ids) == 200
            assert maker.end not in own
            assert each.free is not None
            assert len(each.free) == len(each.ids)
            assert not each.free[0]  # the tag was given
            assert any(each.free)


def test_no_completion_is_longer_than_allowed(engine: Rollouts, maker: PromptMaker) -> None:
    for most in (3, 9):
        drawn = engine.sample(prompts(), Sampling(count=2, max_tokens=most), seed=3)
        for each in (each for group in drawn for each in group):
            assert len(each.ids) <= most
            assert each.finished == (each.ids[-1] == maker.end)
            assert each.free is not None
            assert len(each.free) == len(each.ids)
    assert any(not each.finished for group in drawn for each in group)


def test_answers_follow_the_weights(
    engine: Rollouts, weights: dict[str, torch.Tensor], other_weights: dict[str, torch.Tensor]
) -> None:
    before, drawn = sure(engine, prompts()), ids(engine.sample(prompts(), Sampling(count=4, max_tokens=40), seed=1))
    engine.refresh(other_weights)
    changed = ids(engine.sample(prompts(), Sampling(count=4, max_tokens=40), seed=1))
    assert all(one != other for one, other in zip(drawn, changed, strict=True))
    engine.refresh(weights)
    assert sure(engine, prompts()) == before


def test_a_prompt_that_does_not_fit_is_counted_and_nothing_of_it_is_told(engine: Rollouts) -> None:
    long = dataclasses.replace(prompts()[1], query="Smith " * 200)
    with pytest.raises(QueryError, match="tokens, at most 96 are accepted") as caught:
        engine.sample([prompts()[0], long], Sampling(count=1), seed=0)
    assert "Smith" not in str(caught.value)
    assert "prompt " in str(caught.value)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"temperature": 0.0}, {"max_tokens": 0}])
def test_what_cannot_be_drawn_is_refused(engine: Rollouts, wrong: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match=next(iter(wrong))):
        engine.sample(prompts(), Sampling(**wrong), seed=0)
    with pytest.raises(GenerationError, match="seed"):
        engine.sample(prompts(), Sampling(), seed=-1)


@pytest.mark.parametrize("engine", ["runtime", "transformers"], indirect=True)
@pytest.mark.parametrize("fault", ["missing", "misshapen", "unknown"])
def test_weights_of_another_model_are_refused_and_change_nothing(
    engine: Rollouts, weights: dict[str, torch.Tensor], fault: str
) -> None:
    name, before = "model.language_model.layers.0.mlp.up_proj.weight", sure(engine, prompts())
    broken = dict(weights)
    if fault == "missing":
        del broken[name]
    else:
        broken |= {"misshapen": {name: torch.zeros(3, 4)}, "unknown": {"mlp.up_proj.weight": torch.zeros(2)}}[fault]
    with pytest.raises(BundleError, match=r"mlp\.up_proj\.weight"):
        engine.refresh(broken)
    assert sure(engine, prompts()) == before


def test_the_runtime_and_transformers_write_the_same(checkpoint: Path, other_weights: dict[str, torch.Tensor]) -> None:
    ours, theirs = RuntimeRollouts(checkpoint, other_weights, constrained=False), TransformersRollouts(checkpoint)
    theirs.refresh(other_weights)
    for think in (False, True):
        assert sure(ours, prompts(think)) == sure(theirs, prompts(think))


def test_the_runtime_marks_what_the_grammar_left_open(checkpoint: Path, maker: PromptMaker) -> None:
    rollouts, spec = RuntimeRollouts(checkpoint), maker.spec
    grammar = GrammarBook(maker.tokenizer, spec.answer)
    (first, second, _), asked = rollouts.sample(prompts(), Sampling(count=6, max_tokens=200), seed=4), prompts()
    for group, prompt in ((first, asked[0]), (second, asked[1])):
        height, width = prompt.pixels.shape[:2]
        limits = place(spec.vision.resize, height=height, width=width).answer_limits(spec.coordinates)
        for each in group:
            state, free = grammar.grammar(max(limits)).start(*limits), list[bool]()
            free += [False] * len(state.forced())
            while not state.done:
                assert each.ids[len(free)] in state.allowed()
                state.accept(each.ids[len(free)])
                free += [True] + [False] * len(state.forced())
            assert each.free == (*free, False)
            assert each.ids[-1] == maker.end


def test_the_runtime_draws_whether_the_target_is_there(checkpoint: Path, maker: PromptMaker) -> None:
    temperature, count, prompt = 1.7, 600, prompts()[0]
    drawn = RuntimeRollouts(checkpoint).sample([prompt], Sampling(count=count, temperature=temperature), seed=5)[0]
    absent = np.mean(["null" in each.text for each in drawn])
    state = GrammarBook(maker.tokenizer, maker.spec.answer).grammar(252).start(252, 252)
    opening, made = state.forced(), maker.read([prompt])[0]
    assert state.at_absent_choice
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    inputs = prompt_inputs(model, [*made.ids, *opening], maker.image_token, maker.patches(made), made.grid)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    rows = [int(row) for row in state.allowed()]
    shares = (logits[rows] / temperature).softmax(-1)
    null = [
        i
        for i, row in enumerate(rows)
        if "n" in maker.tokenizer.decode([row])  # of null, not [
    ]
    expected = float(shares[null].sum())
    assert 0.02 < expected < 0.98
    assert abs(absent - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_the_runtime_leaves_nothing_on_the_disk(
    checkpoint: Path, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rollouts = RuntimeRollouts(checkpoint)
    with pytest.raises(BundleError, match="not finite"):
        rollouts.refresh({name: tensor * float("nan") for name, tensor in weights.items()})
    assert list(tmp_path.iterdir()) == []
    assert len(sure(rollouts, prompts())) == 3
    rollouts.close()
    with pytest.raises(GenerationError, match="closed"):
        rollouts.sample(prompts(), Sampling(), seed=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_lora_layers_are_merged_and_stay_as_they_are(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(1)
    options = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, options)
    adapters = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = policy_state(model)
    assert all(torch.equal(tensor, adapters[name]) for name, tensor in model.state_dict().items())
    merged = model.merge_and_unload().state_dict()
    assert state.keys() == merged.keys()
    assert all(torch.allclose(state[name], merged[name], atol=1e-6) for name in merged)


def test_vllm_is_sent_the_prompt_and_the_picture_in_its_form(
    standin: Any, checkpoint: Path, maker: PromptMaker
) -> None:
    rollouts = VllmRollouts(checkpoint, gpu_memory_utilization=0.4)
    llm = rollouts._llm
    assert llm.arguments["model"] == str(checkpoint)
    assert llm.arguments["gpu_memory_utilization"] == 0.4
    assert llm.arguments["max_model_len"] == maker.spec.max_length
    rollouts.sample(prompts(), Sampling(count=3, temperature=0.7, max_tokens=20), seed=6)
    template = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    for query, request in zip(QUERIES, llm.requests, strict=True):
        text = template.format(query) + "<answer>"
        assert maker.tokenizer.decode(request["prompt_token_ids"], skip_special_tokens=False) == text
        picture = request["multi_modal_data"]["image"]
        assert (picture.size, picture.mode) == ((252, 252), "RGB")
        assert request["mm_processor_kwargs"] == {"min_pixels": 252 * 252, "max_pixels": 252 * 252}
    opening = len(maker.tokenizer.encode("<answer>", add_special_tokens=False).ids)
    for params in llm.params:
        assert (params.n, params.temperature, params.max_tokens) == (3, 0.7, 20 - opening)
        assert params.stop_token_ids == [maker.end]
    seeds = {params.seed + index for params in llm.params for index in range(3)}
    assert len(seeds) == 9  # vLLM adds an answer's index


def test_vllm_reads_the_weights_again_and_forgets_what_the_old_ones_read(
    standin: Any, checkpoint: Path, other_weights: dict[str, torch.Tensor], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rollouts = VllmRollouts(checkpoint, scratch=tmp_path, colocated=True)
    llm, seen = rollouts._llm, dict[str, torch.Tensor]()
    assert llm.arguments["enable_sleep_mode"]
    monkeypatch.setattr(
        llm, "_digest", lambda folder: seen.update(load_file(folder / "model.safetensors")) or b"", raising=False
    )
    rollouts.sample(prompts(), Sampling(count=1), seed=0)
    rollouts.refresh(other_weights)
    rollouts.sample(prompts(), Sampling(count=1), seed=0)
    assert llm.calls == [
        "generate", "sleep 1", "wake weights", "reload_weights", "reset_mm_cache", "reset_prefix_cache",
        "wake kv_cache", "generate", "sleep 1",
    ]  # fmt: skip
    assert seen.keys() == other_weights.keys()
    assert all(torch.equal(seen[name], other_weights[name]) for name in seen)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_vllm_gave_up_is_an_error(
    standin: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standin.LLM, "finish_reason", "abort")
    with pytest.raises(GenerationError, match="ended by abort"):
        VllmRollouts(checkpoint).sample(prompts(), Sampling(count=2), seed=0)


@pytest.mark.parametrize(("name", "module"), [("vllm", "vllm"), ("ray:runtime", "ray")])
def test_a_missing_package_is_told_with_its_extra(
    name: str, module: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'medreasoner\[{module}\]'"):
        make_rollouts(name, checkpoint)


def test_an_unknown_engine_is_named_with_those_there_are(checkpoint: Path) -> None:
    for name in ("sglang", "ray:torch", "torch"):
        with pytest.raises(GenerationError, match=f"no engine '{name}'; known here: runtime, transformers"):
            make_rollouts(name, checkpoint)
    own = RuntimeRollouts(checkpoint)
    assert make_rollouts("torch", checkpoint, torch_engine=lambda: own) is own


@pytest.mark.parametrize("engine", [ENGINES[-1]], indirect=True)
def test_prompts_of_a_worker_that_dies_are_answered_by_another(engine: Any, checkpoint: Path) -> None:
    import ray

    with pytest.raises(GenerationError, match=r"0 of 1 rollout workers came up within 0\.5 s"):
        RayRollouts(
            partial(make_rollouts, "runtime", checkpoint), resources={"num_cpus": 9999}, workers=1, start_timeout_s=0.5
        )
    sampling = Sampling(count=2, max_tokens=60)
    whole = engine.sample(prompts(), sampling, seed=9)
    ray.kill(engine._workers[0])
    assert engine.sample(prompts(), sampling, seed=9) == whole
    assert len(engine._workers) == 1
    ray.kill(engine._workers[0])
    with pytest.raises(GenerationError, match="all 2 rollout workers have died"):
        engine.sample(prompts(), sampling, seed=9)
