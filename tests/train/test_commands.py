"""The whole road from drawn images to checkpoints that others load, through the command line."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration, SamModel

import medreasoner
from medreasoner_cli.main import run
from medreasoner_train import evaluate, pretrain, segmenter, sft, sft_data
from medreasoner_train.checkpoint import load_weights
from medreasoner_train.data import by_image, load_index, load_mask, load_pixels, split
from medreasoner_train.inferred import load_parts
from medreasoner_train.language import ABSENT, PRESENT, TEMPLATE, load_phrasings
from medreasoner_train.loop import LoopOptions
from medreasoner_train.model import NanoConfig, tower
from medreasoner_train.targets import box_of
from medreasoner_train.tokenizer import train_tokenizer
from medreasoner_train.vocabulary import with_wholes


@pytest.fixture(autouse=True)
def _quiet(toy_config: NanoConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A toy in place of nano, and no logger left behind."""
    monkeypatch.setattr(pretrain, "NANO", toy_config)
    monkeypatch.setattr(sft, "NANO", toy_config)
    monkeypatch.setattr(sft_data, "NANO", toy_config)
    monkeypatch.setattr(sft, "make_tokenizer", lambda *_: tokenizer)
    logger = logging.getLogger("medreasoner_train")
    yield
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def command(*arguments: object) -> None:
    assert run([str(argument) for argument in arguments]) == 0


def last_row(folder: Path) -> dict[str, float]:
    row: dict[str, float] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return row


def test_dense_then_sft_writes_a_checkpoint_that_transformers_and_export_take(
    grounding_set: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dense, out, cache = tmp_path / "dense", tmp_path / "sft", tmp_path / "points.npz"
    command("train", "dense", "--data", grounding_set, "--out", dense, "--steps", 2, "--batch", 3, "--size", 84,
            "--cache", cache)  # fmt: skip
    assert cache.exists()
    assert 0 <= last_row(dense)["val_iou"] <= 1
    command("train", "sft", "--data", grounding_set, "-o", out, "--steps", 2, "--batch", 2, "--branches", 3,
            "--size", 84, "--start", dense / "last.pt", "--cache", cache)  # fmt: skip
    final = last_row(out)
    assert 0 <= final["val_iou"] <= 1
    assert {"said_absent/present", "said_absent/absent (elsewhere)"} <= final.keys()
    assert "val_iou=" in capfd.readouterr().err

    checkpoint = out / "checkpoint"
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    trained = torch.load(out / "last.pt", weights_only=True)["modules"]["model"]
    loaded = model.state_dict()
    assert loaded.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(loaded[name], value.to(torch.bfloat16).float())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert tower(model.model.visual, torch.zeros(1, 3, 84, 84)).shape == (1, 9, 32)
    assert (
        Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab_size() == model.config.text_config.vocab_size
    )

    export = pytest.importorskip("medreasoner_export")
    folder = export.export_reasoner(checkpoint, tmp_path / "exported").folder
    assert {"vision.onnx", "decoder.onnx", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("stage", "name"),
    [(pretrain, "DenseData"), (sft, "SftData"), (segmenter, "SegmenterData")],
    ids=["dense", "sft", "segmenter"],
)
def test_every_stage_trains_on_training_groups_and_looks_at_the_others(
    stage: Any, name: str, grounding_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Spy(getattr(stage, name)):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    calls: dict[str, Any] = {}
    monkeypatch.setattr(stage, name, Spy)
    monkeypatch.setattr(stage, "train", lambda **settings: calls.update(settings))
    monkeypatch.setattr(stage, "save_reasoner", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(stage, "save_segmenter", lambda *_: None, raising=False)
    options = {pretrain: pretrain.DenseOptions, sft: sft.SftRun, segmenter: segmenter.SegmenterOptions}[stage]
    stage.run(options(data=grounding_set, loop=LoopOptions(steps=1, out=tmp_path)))
    trained, held = split(load_index(grounding_set))
    assert [{item.record.group for item in data.stored} for data in made] == [
        {sample.group for sample in part} for part in (trained, held)
    ]
    if stage is sft:
        monkeypatch.setattr(made[0], "_options", dataclasses.replace(made[0]._options, images=4, size=84, think=0.0))
        words = {query.lower().rstrip("?.") for own in load_phrasings("heldout").values() for query in own.queries}
        vocabulary = made[0]._vocabulary
        for step in range(6):
            ids = calls["make_batch"](step).packed.ids
            text = vocabulary.tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=False).lower()
            assert "<answer>" in text
            assert not [query for query in words if f"<|vision_end|>{query}<|im_end|>" in text.replace("?", "")]
            assert not [query for query in words if f"<|im_end|>{query}<|im_end|>" in text.replace("?", "")]


def test_read_outs_that_learn_first_leave_the_model_as_it_was(grounding_set: Path, tmp_path: Path) -> None:
    arguments = ("--data", grounding_set, "--batch", 2, "--branches", 3, "--size", 84, "--rate", 0, "--steps", 1)
    arguments += ("--unanswered", 2)
    begun, out = tmp_path / "begun", tmp_path / "out"
    command("train", "sft", *arguments, "-o", begun)
    goes_on = (*arguments, "--start", begun / "checkpoint", "-o", out)
    command("train", "sft", *goes_on, "--heads-first", 4, "--frozen-vision")
    plain, first, after = (
        torch.load(each / "last.pt", weights_only=True)["modules"] for each in (begun, out / "heads", out)
    )
    assert first.keys() == {"heads", "dense"}
    assert not torch.equal(first["heads"]["category.weight"], plain["heads"]["category.weight"])
    for part in first:  # at a rate of 0 the run itself keeps them
        assert all(torch.equal(first[part][name], value) for name, value in after[part].items())
    for name, value in plain["model"].items():
        assert torch.equal(after["model"][name], value.to(torch.bfloat16).float())
    (out / "heads" / "last.pt").unlink()
    command("train", "sft", *goes_on, "--heads-first", 4, "--frozen-vision")  # it has begun already
    assert not (out / "heads" / "last.pt").exists()


@pytest.mark.parametrize("flag", [[], ["--infer"]])
def test_sft_infers_what_is_unlabelled_if_asked(
    grounding_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: list[str]
) -> None:
    seen: list[bool] = []

    def spy(*given: Any, infer: bool, **others: Any) -> Any:
        seen.append(infer)
        return load_parts(*given, infer=infer, **others)

    monkeypatch.setattr(sft, "load_parts", spy)
    arguments = ("--data", grounding_set, "-o", tmp_path, "--batch", 1, "--branches", 1, "--size", 84, "--steps", 1)
    command("train", "sft", *arguments, *flag)
    assert seen == [bool(flag)]


def test_sft_goes_on_from_its_last_checkpoint(grounding_set: Path, tmp_path: Path) -> None:
    arguments = ("--data", grounding_set, "-o", tmp_path, "--batch", 2, "--branches", 3, "--size", 84)
    command("train", "sft", *arguments, "--steps", 1)
    before = torch.load(tmp_path / "last.pt", weights_only=True)
    command("train", "sft", *arguments, "--steps", 1)  # has nothing left to do
    again = torch.load(tmp_path / "last.pt", weights_only=True)
    assert before["step"] == again["step"] == 1
    name = "lm_head.weight"
    assert torch.equal(before["modules"]["model"][name], again["modules"]["model"][name])


def test_sft_goes_on_with_its_own_tokenizer_whatever_became_of_the_questions(
    grounding_set: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--data", grounding_set, "-o", tmp_path, "--batch", 2, "--branches", 3, "--size", 84)
    command("train", "sft", *arguments, "--steps", 1)

    def forget(*_: object) -> Tokenizer:
        raise AssertionError("a new tokenizer would give the weights' rows to other words")

    monkeypatch.setattr(sft, "make_tokenizer", forget)
    command("train", "sft", *arguments, "--steps", 2)
    kept = Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json"))
    assert kept.get_vocab() == tokenizer.get_vocab()


def test_short_answers_grow_the_tokenizer_of_a_start_and_keep_all_that_it_knows(
    grounding_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    long = train_tokenizer(["Where is the heart?", TEMPLATE, PRESENT, ABSENT] * 3, vocab_size=800, largest=252)
    size = long.get_vocab_size()
    monkeypatch.setattr(sft, "make_tokenizer", lambda *_: long)
    arguments = ("--data", grounding_set, "--batch", 2, "--branches", 3, "--size", 84, "--steps", 1)
    start = tmp_path / "long" / "checkpoint"
    command("train", "sft", *arguments, "-o", start.parent)

    tokenizer = with_wholes(Tokenizer.from_file(str(start / "tokenizer.json")))
    model = sft._model(tokenizer)
    load_weights(start, model, added=sft._added(start, tokenizer))
    rows = model.get_input_embeddings().weight.detach()
    known = load_file(start / "model.safetensors")["model.embed_tokens.weight"].float()
    torch.testing.assert_close(rows[:size], known)
    for token in range(size, tokenizer.get_vocab_size()):
        ids = long.encode(tokenizer.id_to_token(token)).ids
        assert len(ids) > 1
        torch.testing.assert_close(rows[token], known[ids].mean(0))

    command("train", "sft", *arguments, "-o", tmp_path / "short", "--start", start, "--short-answers")
    made = Tokenizer.from_file(str(tmp_path / "short" / "checkpoint" / "tokenizer.json"))
    assert made.get_vocab() == tokenizer.get_vocab() != long.get_vocab()

    other = train_tokenizer(["Which organ pumps blood?", TEMPLATE, PRESENT, ABSENT] * 3, vocab_size=900, largest=252)
    other.save(str(tmp_path / "other.json"))
    refused = [*arguments, "-o", tmp_path / "x", "--start", start, "--tokenizer", tmp_path / "other.json"]
    assert run(["train", "sft", *map(str, refused)]) != 0
    assert "other ids" in capfd.readouterr().err


def test_segmenter_writes_a_checkpoint_that_transformers_and_export_take(grounding_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "segmenter"
    command("train", "segmenter", "--data", grounding_set, "-o", out, "--steps", 1, "--batch", 1, "--per-image", 2)
    assert 0 <= last_row(out)["val_dice"] <= 1
    model = SamModel.from_pretrained(out / "checkpoint")
    assert model.config.vision_config.image_size == 256
    export = pytest.importorskip("medreasoner_export")
    folder = export.export_segmenter(out / "checkpoint", tmp_path / "exported").folder
    assert {"encoder.onnx", "decoder.onnx"} <= {path.name for path in folder.iterdir()}


def test_a_damaged_start_is_one_line_and_exit_code_four(
    grounding_set: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    for stage in ("dense", "sft"):
        code = run(["train", stage, "--data", str(grounding_set), "-o", str(tmp_path / stage), "--steps", "1",
                    "--size", "84", "--start", str(tmp_path / "bad.pt")])  # fmt: skip
        assert code == 4
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert "bad.pt" in line


def test_a_folder_without_an_index_is_unreadable_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "segmenter", "--data", str(tmp_path), "-o", str(tmp_path / "out"), "--steps", "1"]) == 3
    assert "index.jsonl" in capfd.readouterr().err


class Everywhere:
    """A grounder that always answers with the first structure of the first image it is shown."""

    def __init__(self, root: Path) -> None:
        record = by_image(split(load_index(root))[1])[0]
        self._mask = load_mask(record.samples[0].mask)
        self._shape = load_pixels(record.image).shape[:2]

    def load(self, *_: object, **__: object) -> "Everywhere":
        return self

    def __enter__(self) -> "Everywhere":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def open(self, pixels: Any) -> "Everywhere":
        self._shape = pixels.shape[:2]
        return self

    def ground(self, *_: object, think: bool) -> Any:
        mask = np.zeros(self._shape, bool)
        mask[:40, :40] = True
        return SimpleNamespace(
            found=True, box=box_of(mask), points=((3.0, 4.0), (30.0, 30.0)), mask=mask, absent_probability=None,
            reasoning=None, timings_ms={"total": 1.0}, model_name="toy", model_version="1", model_digest="0" * 64,
        )  # fmt: skip

    def segment(self, **_: object) -> tuple[Any, float]:
        return np.ones(self._shape, bool), 1.0


def test_eval_prints_figures_and_writes_rows_figures_and_report(
    grounding_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medreasoner, "Grounder", Everywhere(grounding_set))
    monkeypatch.setattr(evaluate, "frequent_pairs", lambda samples: frozenset(s.key for s in samples))
    arguments = ("eval", "some-bundle", grounding_set, "--no-controls")
    command(*arguments, "--out", tmp_path / "report", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "report" / "figures.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "report" / "rows.jsonl").read_text().splitlines()]
    assert figures["sets"]["all"]["count"] == sum(row["kind"] == "present" for row in rows) > 0
    assert {row["absent_probability"] for row in rows} == {None}
    command(*arguments)
    assert capsys.readouterr().out.strip() == (tmp_path / "report" / "report.md").read_text().strip()
    command("eval", "some-bundle", "--data", grounding_set, "--no-controls")  # another spelling
    assert capsys.readouterr().out.strip() == (tmp_path / "report" / "report.md").read_text().strip()
    assert "<title>Evaluation of toy 1" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("data", [[], ["a", "--data", "b"]], ids=["none", "two"])
def test_eval_wants_one_data_set(data: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "nano", *data]) == 2
    assert "eval BUNDLE DATA" in capfd.readouterr().err


@pytest.mark.parametrize("stage", ["dense", "sft"])
def test_a_size_that_cuts_windows_is_refused(stage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", stage, "--data", str(tmp_path), "-o", str(tmp_path / "out"), "--steps", "1", "--size", "100"]
    assert run(arguments) == 2
    assert "multiple of 84" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pair", ["axon_sem", "axon_sem=", "=", "axon_sem=-1", "axon_sem=nan", "axon_sem=inf"])
def test_an_emphasis_that_is_none_is_refused(pair: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["train", "segmenter", "--data", str(tmp_path), "-o", str(out), "--steps", "1", "--emphasis", pair]
    assert run(arguments) == 2
    assert "--emphasis" in capfd.readouterr().err
    assert not out.exists()
