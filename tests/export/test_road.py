"""Whole answers against the checkpoint, which is read matrix by matrix and gives an answer of its own."""

import dataclasses
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from medreasoner.bundle import Bundle
from medreasoner.engine import load_engine
from medreasoner.errors import BundleError
from medreasoner.providers import RuntimeOptions
from medreasoner.reasoner.prompt import load_tokenizer
from medreasoner_export import build_bundle, export_reasoner, export_segmenter, verify_bundle
from medreasoner_export.parity_road import bundle_answers, own_questions, road_stages
from medreasoner_export.parity_segmenter import mask_of
from medreasoner_export.reference_reasoner import ReferenceReasoner
from medreasoner_export.streamed import streamed_qwen


@pytest.fixture(scope="module")
def finding(bundle: Bundle) -> Bundle:
    """Finds something in every image: no probability of absence is above 1."""
    reasoner = dataclasses.replace(bundle.spec.reasoner, absent_threshold=1.0)
    return dataclasses.replace(bundle, spec=dataclasses.replace(bundle.spec, reasoner=reasoner))


def test_the_streamed_model_is_transformers_own_and_keeps_no_weights(toy: Path, qwen: Any) -> None:
    streamed = streamed_qwen(toy / "reasoner")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(streamed(input_ids=ids).logits, qwen(input_ids=ids).logits)
    assert all(parameter.is_meta for parameter in streamed.parameters())


def test_a_change_reaches_every_weight_by_its_name(toy: Path, qwen: Any) -> None:
    seen: list[str] = []

    def double(name: str, weight: np.ndarray) -> np.ndarray:
        seen.append(name)
        return weight * 2 if name == "model.language_model.norm.weight" else weight

    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        found = streamed_qwen(toy / "reasoner", change=double)(input_ids=ids).logits
        torch.testing.assert_close(found, 2 * qwen(input_ids=ids).logits)
    text = {name for name, _ in qwen.named_parameters() if "visual" not in name}
    assert text <= {*seen, "lm_head.weight"}


def test_a_missing_tensor_is_named(toy: Path, tmp_path: Path) -> None:
    folder: Path = copytree(toy / "reasoner", tmp_path / "c")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = streamed_qwen(folder)
    with pytest.raises(BundleError, match=r"tensor model\.norm\.weight is missing"):
        model(input_ids=torch.tensor([[5, 6]]))


def test_whole_answers_equal_those_of_the_checkpoints(finding: Bundle, toy: Path) -> None:
    answers = bundle_answers(finding, own_questions(1))
    stages = list(road_stages(finding, answers, toy / "reasoner", mask_of(finding, toy / "segmenter")))
    assert [stage.name for stage in stages if not stage.passed] == []
    assert any("box" in stage.name for stage in stages)
    assert any("mask" in stage.name for stage in stages)


@pytest.mark.parametrize("tensor", ["layers.0.self_attn.v_proj.weight", "norm.weight"])
def test_another_checkpoint_is_noticed(finding: Bundle, toy: Path, tmp_path: Path, tensor: str) -> None:
    folder: Path = copytree(toy / "reasoner", tmp_path / "c")
    weights = load_file(folder / "model.safetensors")
    name = f"model.{tensor}"
    weights[name] = np.ascontiguousarray(weights[name][::-1])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    segment = mask_of(finding, toy / "segmenter")
    answers = bundle_answers(finding, own_questions())
    failed = [stage.name for stage in road_stages(finding, answers, folder, segment) if not stage.passed]
    assert any("logits" in name for name in failed)


def test_a_checkpoint_of_another_segmenter_is_noticed(finding: Bundle, toy: Path, tmp_path: Path) -> None:
    folder: Path = copytree(toy / "segmenter", tmp_path / "c")
    weights = load_file(folder / "model.safetensors")
    name = "vision_encoder.neck.conv1.weight"
    weights[name] = np.ascontiguousarray(weights[name][::-1])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    answers = bundle_answers(finding, own_questions())
    stages = list(road_stages(finding, answers, toy / "reasoner", mask_of(finding, folder)))
    assert [stage.name for stage in stages if not stage.passed] == ["whole answers: mask"]


def test_its_own_answer_does_not_depend_on_what_it_read_before(bundle: Bundle, toy: Path) -> None:
    engine, reference = load_engine(bundle, RuntimeOptions(device="cpu")), ReferenceReasoner(bundle, toy / "reasoner")
    question = own_questions()[0]
    placement = engine.reasoner.place(question.image)
    patches = engine.reasoner.preprocess(question.image, placement)
    prefix = engine.reasoner.read_prefix(engine.reasoner.encode(patches[None], placement)[0], placement)
    prompt = engine.reasoner.prompt.whole(question.query, prefix.grid.n_tokens)
    template, tokenizer = (
        bundle.spec.reasoner.answer.present,
        load_tokenizer(str(bundle.path(bundle.spec.reasoner.tokenizer))),
    )
    answers = []
    with torch.inference_mode():
        for numbers in ((0, 0, 1, 1, 0, 0, 0, 0), (3, 9, 12, 17, 5, 11, 8, 13), (1, 2, 30, 40, 9, 9, 20, 30)):
            names = ("x1", "y1", "x2", "y2", "p1x", "p1y", "p2x", "p2y")
            text = template
            for name, number in zip(names, numbers, strict=True):
                text = text.replace("{" + name + "}", str(number))
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            logits = reference.read(prompt, ids, patches, prefix.grid)
            assert logits.shape == (len(ids), bundle.spec.reasoner.vocab_size)
            own = reference.answer(reference.start(placement), ids, logits)
            answers.append(None if own.absent else tuple(own.values))
            walk = reference.walk(reference.start(placement), ids, logits)
            assert len(walk.allowed) == len(ids)
            assert sum(len(rows) > 1 for rows in walk.allowed) >= len(walk.agrees) > 0
    assert len(set(answers)) == 1


def test_four_bits_are_measured_against_the_checkpoint_itself(toy: Path, tmp_path: Path) -> None:
    from medreasoner_export import ReasonerOptions

    export_reasoner(toy / "reasoner", tmp_path / "r", options=ReasonerOptions(precision="int4"))
    export_segmenter(toy / "segmenter", tmp_path / "s")
    folder = build_bundle(tmp_path / "r", tmp_path / "s", tmp_path / "b", name="four")
    report = verify_bundle(folder, toy / "reasoner", toy / "segmenter")
    (largest,) = (s for s in report.stages if s.name == "whole answers: logits" and s.unit == "max abs")
    assert 1e-3 < largest.relative < 0.5  # the rounding shows
