"""Input that no export can use, through the real commands: one line that names the file, a code, and nothing left."""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import medreasoner_export as package
from medreasoner.errors import BundleError
from medreasoner.manifest import manifest_sha256
from medreasoner_cli.main import run
from medreasoner_export import tensorrt as engines_module
from medreasoner_export import trt_worker
from medreasoner_export.trt_build import build_engine

Change = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj.weight"
PROJECTION = "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight"


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs ``export`` with arguments that cannot work, and looks at what it says and leaves."""

    def check(code: int, words: str, *arguments: str | Path) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert run(["export", *map(str, arguments)]) == code
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1, said.err
        assert lines[0].startswith("error: ")
        assert words.replace("{}", str(tmp_path)) in lines[0]
        assert not said.out
        assert sorted(tmp_path.rglob("*")) == before

    return check


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def directory(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def entries(name: str, **changed: Any) -> Change:
    """Replace entries of a JSON file; ``a__b`` stands for entry b of object a."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in changed.items():
            *outer, last = key.split("__")
            place = content
            for each in outer:
                place = place[each]
            place[last] = value
        (folder / name).write_text(json.dumps(content))

    return change


def config(**changed: Any) -> Change:
    return entries("config.json", **changed)


def tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS)

    return changed


def nan(part: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        name = min(name for name in content if part in name)
        content[name] = np.full_like(content[name], np.nan)

    return tensors(change)


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def shards(folder: Path) -> None:
    content = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(content)
    places = {name: f"model-0000{1 + (index % 2)}.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: content[name] for name in names if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def in_shards(change: Change) -> Change:
    def changed(folder: Path) -> None:
        shards(folder)
        change(folder)

    return changed


def weight_map(name: str) -> Change:
    return in_shards(entries(INDEX, weight_map={"a": name}))


def twice(folder: Path) -> None:
    first, second = folder / "model-00001.safetensors", folder / "model-00002.safetensors"
    content, name = load_file(second), min(load_file(first))
    save_file({**content, name: load_file(first)[name] + 1}, second)


def huge(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def loop(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


REASONERS: dict[str, tuple[Change, str]] = {
    "no config": (remove("config.json"), "{}/src/config.json is missing"),
    "config empty": (text("config.json", ""), "{}/src/config.json cannot be read as JSON: Expecting value"),
    "config a folder": (directory("config.json"), "{}/src/config.json cannot be read as JSON: it is no file"),
    "config a pipe": (pipe, "{}/src/config.json cannot be read as JSON: it is no file"),
    "config a loop of links": (loop, "{}/src/config.json cannot be read as JSON: Too many levels"),
    "config without keys": (
        text("config.json", "{}"),
        "{}/src/config.json: model_type: expected qwen2_5_vl or qwen2_vl",
    ),
    "another family": (config(model_type="llama"), "{}/src/config.json: model_type: expected qwen2_5_vl or qwen2_vl"),
    "the other family": (config(model_type="qwen2_vl"), "{}/src/config.json: vision_config.hidden_size"),
    "heads": (
        config(text_config__num_attention_heads=3),
        "{}/src/config.json: text_config: 2 and 3 heads do not fit 64",
    ),
    "vision heads": (config(vision_config__num_heads=3), "{}/src/config.json: vision_config: 3 heads of"),
    "patches": (config(vision_config__patch_size=15), "{}/src/config.json: vision_config.window_size"),
    "kinds of layers": (
        config(text_config__layer_types=3),
        "{}/src/config.json: text_config.layer_types: expected a list",
    ),
    "layers": (
        config(text_config__num_hidden_layers=9),
        "{}/src: tensor model.layers.2.input_layernorm.weight is missing",
    ),
    "weights empty": (text(WEIGHTS, ""), f"{{}}/src/{WEIGHTS} is not a safetensors file, or is truncated: 0 bytes"),
    "weights a folder": (directory(WEIGHTS), f"{{}}/src holds neither {WEIGHTS} nor"),
    "weights truncated": (truncated, f"{{}}/src/{WEIGHTS} is truncated: tensor "),
    "weights that overflow": (huge, f"{{}}/src/{WEIGHTS}: tensor a: 4 bytes do not hold F32 of shape"),
    "shard missing": (
        in_shards(remove("model-00002.safetensors")),
        f"{{}}/src/{INDEX}: 'model-00002.safetensors' is not",
    ),
    "shard twice": (in_shards(twice), "{}/src/model-00002.safetensors: tensor "),
    "shard outside": (weight_map("../x.safetensors"), f"{{}}/src/{INDEX}: '../x.safetensors' is not a file beside it"),
    "shard with a zero": (weight_map("x\0y"), f"{{}}/src/{INDEX}: 'x\\x00y' is not a file beside it"),
    "index no JSON": (in_shards(text(INDEX, "x")), f"{{}}/src/{INDEX} cannot be read as JSON"),
    "another shape": (
        tensors(lambda t: t.update({DOWN: np.zeros((3, 5), np.float32)})),
        f"tensor {DOWN}: expected shape",
    ),
    "integers": (
        tensors(lambda t: t.update({DOWN: t[DOWN].astype(np.int8)})),
        f"{{}}/src/{WEIGHTS}: tensor {DOWN}: expected",
    ),
    "NaN in the first graph": (nan("visual"), f"{{}}/src/{WEIGHTS}: tensor visual.blocks.0"),
    "NaN in the last stage": (
        nan("embed_tokens"),
        f"{{}}/src/{WEIGHTS}: tensor model.embed_tokens.weight holds values",
    ),
    "a tensor too many": (
        tensors(lambda t: t.update({"a\x1b[31m\nb": np.ones(1, np.float32)})),
        "not part of this architecture, first a?[31m?b",
    ),
    "no tokenizer": (remove("tokenizer.json"), "{}/src/tokenizer.json is missing"),
    "tokenizer empty": (text("tokenizer.json", ""), "{}/src/tokenizer.json: not a tokenizer.json"),
    "no prompt": (
        entries("medreasoner.json", prompt=3),
        "{}/src: prompt: expected an object, got 3; correct medreasoner.json",
    ),
    "mean of an image": (
        entries("medreasoner.json", image_mean="x"),
        "{}/src: vision.image_mean: expected an array of 3",
    ),
    "length": (
        entries("medreasoner.json", max_length=-5),
        "{}/src: max_length: expected an integer of at least 0, got -5",
    ),
}

SEGMENTERS: dict[str, tuple[Change, str]] = {
    "no config": (remove("config.json"), "{}/src/config.json is missing"),
    "config without keys": (text("config.json", "{}"), "{}/src/config.json: model_type: expected sam or sam2"),
    "a reasoner": (config(model_type="qwen2_5_vl"), "{}/src/config.json: model_type: expected sam or sam2"),
    "called SAM 2": (config(model_type="sam2"), "{}/src/config.json: "),
    "weights empty": (text(WEIGHTS, ""), f"{{}}/src/{WEIGHTS} is not a safetensors file, or is truncated"),
    "weights truncated": (truncated, f"{{}}/src/{WEIGHTS} is truncated"),
    "another shape": (tensors(lambda t: t.update({PROJECTION: np.zeros((3, 5), np.float32)})), f"tensor {PROJECTION}:"),
    "NaN": (nan("mask_decoder"), f"{{}}/src/{WEIGHTS}: tensor mask_decoder"),
    "heads of the encoder": (config(vision_config__num_attention_heads=3), "{}/src/config.json: vision_config: heads"),
    "heads of the decoder": (config(mask_decoder_config__num_attention_heads=3), "mask_decoder_config: 3 heads and"),
    "mean of an image": (text("medreasoner.json", '{"image_mean": [1]}'), "{}/src: image_mean: expected an array of 3"),
}


@pytest.mark.parametrize(("change", "words"), REASONERS.values(), ids=REASONERS.keys())
def test_a_reasoner_that_cannot_be_exported(
    toy: Path, tmp_path: Path, refused: Callable[..., None], change: Change, words: str
) -> None:
    shutil.copytree(toy / "reasoner", tmp_path / "src")
    change(tmp_path / "src")
    refused(4, words, "reasoner", tmp_path / "src", "-o", tmp_path / "deep" / "out")


@pytest.mark.parametrize(("change", "words"), SEGMENTERS.values(), ids=SEGMENTERS.keys())
def test_a_segmenter_that_cannot_be_exported(
    toy: Path, tmp_path: Path, refused: Callable[..., None], change: Change, words: str
) -> None:
    shutil.copytree(toy / "segmenter", tmp_path / "src")
    change(tmp_path / "src")
    refused(4, words, "segmenter", tmp_path / "src", "-o", tmp_path / "deep" / "out")


def test_a_tokenizer_with_more_tokens_than_the_model(toy: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    from tokenizers import Tokenizer

    shutil.copytree(toy / "reasoner", tmp_path / "src")
    path = tmp_path / "src" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["zzz", "yyy"])
    tokenizer.save(str(path))
    words = f"{{}}/src/tokenizer.json: {tokenizer.get_vocab_size()} tokens, and config.json says vocab_size"
    refused(4, words, "reasoner", tmp_path / "src", "-o", tmp_path / "out")


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MARK"],)


FILES: dict[str, tuple[Change, str]] = {
    "code": (lambda path: torch.save({"a": Evil()}, path), "holds objects beside them, which could run code"),
    "code in the old form": (
        lambda path: torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=False),
        "which could run code",
    ),
    "a bare pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), "which could run code"),
    "a whole module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "save the state_dict alone"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as PyTorch weights (it is empty)"),
    "text": (lambda path: path.write_text("hello" * 100), "cannot be read as PyTorch weights (KeyError)"),
    "absent": (lambda path: None, "is missing, or no file"),
    "a folder": (lambda path: path.mkdir(), "/config.json is missing"),
    "another model": (
        lambda path: torch.save({"layer.weight": torch.zeros(3)}, path),
        "architecture is not recognised",
    ),
}


@pytest.mark.parametrize(("write", "words"), FILES.values(), ids=FILES.keys())
def test_a_file_that_holds_no_segmenter(
    tmp_path: Path, refused: Callable[..., None], write: Change, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "code-ran"))
    write(tmp_path / "w.pth")
    refused(4, words, "segmenter", tmp_path / "w.pth", "-o", tmp_path / "out")
    assert not (tmp_path / "code-ran").exists()


ADAPTERS: dict[str, tuple[dict[str, Any], tuple[int, int, int], Any, str]] = {
    "a layer that the base lacks": ({}, (40, 4, 64), np.float32, "layers.40.self_attn.q_proj is no matrix of"),
    "another width": ({}, (0, 4, 4096), np.float32, "(4096, 4) times (4, 4096) does not fit"),
    "another rank": ({"r": 16}, (0, 4, 64), np.float32, "has shape (4, 64), and adapter_config.json says rank 16"),
    "integers": ({}, (0, 4, 64), np.int32, "adapter_model.safetensors: expected weights of one of"),
    "a rank in words": ({"r": "x"}, (0, 4, 64), np.float32, "adapter_config.json: r, lora_alpha"),
    "a factor that is no number": ({"lora_alpha": float("nan")}, (0, 4, 64), np.float32, "not finite"),
    "nothing in it": ({}, (-1, 4, 64), np.float32, "adapter_model.safetensors holds no tensor"),
}


@pytest.mark.parametrize(("changed", "shape", "dtype", "words"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_an_adapter_that_is_not_of_the_base(
    toy: Path, tmp_path: Path, refused: Callable[..., None],
    changed: dict[str, Any], shape: tuple[int, int, int], dtype: Any, words: str,
) -> None:  # fmt: skip
    layer, rank, width = shape
    module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
    pair = {
        f"{module}.lora_A.weight": np.ones((rank, width), dtype),
        f"{module}.lora_B.weight": np.ones((width, rank), dtype),
    }
    (tmp_path / "lora").mkdir()
    save_file(pair if layer >= 0 else {}, tmp_path / "lora" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8} | changed
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    refused(4, words, "reasoner", toy / "reasoner", "--adapter", tmp_path / "lora", "-o", tmp_path / "out")


def outside(name: str, *, stated: bool = False, linked: bool = False, written: bool = False) -> Change:
    """Let the largest weight of a graph lie in another file."""

    def change(folder: Path) -> None:
        path = folder / "vision.onnx"
        model = onnx.load(path)
        proto = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        secret = folder.parent / "secret"
        secret.write_bytes(proto.raw_data)
        for key, value in (("location", name), ("offset", "0"), ("length", str(len(proto.raw_data)))):
            proto.external_data.add(key=key, value=value)
        proto.ClearField("raw_data")
        proto.data_location = onnx.TensorProto.EXTERNAL
        path.write_bytes(model.SerializeToString())
        if linked:
            (folder / name).symlink_to(secret)
        if written:
            shutil.copy(secret, folder / name)
        if stated:
            entries("export.json", data=["decoder.onnx.data", name])(folder)

    return change


def link(folder: Path) -> None:
    (folder / "vision.onnx").unlink()
    (folder / "vision.onnx").symlink_to("/etc/hostname")


BESIDE = "other.data"
PARTS: dict[str, tuple[Change, str]] = {
    "no description": (remove("export.json"), "{}/r/export.json is missing"),
    "description empty": (text("export.json", ""), "{}/r/export.json cannot be read as JSON"),
    "description of nothing": (text("export.json", "{}"), "{}/r/export.json is malformed"),
    "graphs a list": (entries("export.json", section__graphs=["x"]), "{}/r/export.json is malformed"),
    "graph elsewhere": (
        entries("export.json", section__graphs__vision="../s/encoder.onnx"),
        "{}/r: ../s/encoder.onnx is not",
    ),
    "graph a folder": (directory("vision.onnx"), "{}/r: vision.onnx is not a file there"),
    "graph a link": (
        link,
        "{}/r/vision.onnx: it is a link that leaves the folder",
    ),
    "graph empty": (text("decoder.onnx", ""), "{}/r/decoder.onnx holds no graph"),
    "graph truncated": (
        lambda folder: (folder / "decoder.onnx").write_bytes((folder / "decoder.onnx").read_bytes()[:5000]),
        "{}/r/decoder.onnx is no ONNX graph, or is damaged",
    ),
    "matrix truncated": (text("embedding.bin", "abc"), "{}/r/embedding.bin: 3 bytes, and a matrix of"),
    "tokenizer damaged": (text("tokenizer.json", "{}"), "{}/r/tokenizer.json: not a tokenizer.json"),
    "weights in the folder above": (outside("../secret"), "lies in '../secret', which is no file beside it"),
    "weights of the system": (outside("/etc/passwd"), "lies in '/etc/passwd', which is no file beside it"),
    "weights absent": (outside(BESIDE), "{}/r/other.data: it does not hold "),
    "weights not named": (
        outside(BESIDE, written=True),
        "weights lie in other.data, which export.json does not name",
    ),
    "weights behind a link": (
        outside(BESIDE, stated=True, linked=True),
        "{}/r/other.data: it is a link that leaves",
    ),
}


@pytest.mark.parametrize(("change", "words"), PARTS.values(), ids=PARTS.keys())
def test_an_export_that_makes_no_bundle(
    toy: Path, tmp_path: Path, refused: Callable[..., None], change: Change, words: str
) -> None:
    shutil.copytree(toy / "reasoner-onnx", tmp_path / "r")
    change(tmp_path / "r")
    refused(4, words, "bundle", tmp_path / "r", toy / "segmenter-onnx", "-o", tmp_path / "out", "--name", "x")


def test_weights_beside_a_graph_that_are_named_are_taken(toy: Path, tmp_path: Path) -> None:
    """The counterpart of the refusals: the same weight, in a file beside the graph."""
    shutil.copytree(toy / "reasoner-onnx", tmp_path / "r")
    outside(BESIDE, written=True, stated=True)(tmp_path / "r")
    command = ["export", "bundle", tmp_path / "r", toy / "segmenter-onnx", "-o", tmp_path / "out", "--name", "x"]
    assert run([str(each) for each in command]) == 0
    assert (tmp_path / "out" / "reasoner" / BESIDE).is_file()


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("r", remove("config.json"), "{}/r/config.json is missing"),
        ("r", truncated, "{}/r/model.safetensors is truncated"),
        ("r", config(text_config__num_attention_heads=3), "{}/r/config.json: text_config: 2 and 3 heads do not fit"),
        ("s", text(WEIGHTS, ""), "{}/s/model.safetensors is not a safetensors file"),
        ("s", text("config.json", "{}"), "{}/s/config.json: model_type: expected sam or sam2"),
        (
            "s",
            tensors(lambda t: t.update({PROJECTION: np.zeros((3, 5), np.float32)})),
            "{}/s: transformers cannot load it",
        ),
        ("b", text("manifest.json", "x"), "bundle {}/b: manifest.json is not JSON"),
        ("b", text("reasoner/vision.onnx", "x"), "bundle {}/b: reasoner/vision.onnx: 1 bytes, the manifest says"),
    ],
)
def test_checkpoints_that_cannot_be_compared_are_refused_before_the_work_starts(
    toy: Path, tmp_path: Path, refused: Callable[..., None], part: str, change: Change, words: str
) -> None:
    for name, source in (("r", "reasoner"), ("s", "segmenter"), ("b", "bundle")):
        shutil.copytree(toy / source, tmp_path / name)
    change(tmp_path / part)
    command = ("verify", tmp_path / "b", "--reasoner", tmp_path / "r", "--segmenter", tmp_path / "s")
    refused(4, words, *command, "-o", tmp_path / "report.md")


def signed(change: Change) -> Change:
    """A change of a bundle's reasoner, and a manifest that agrees."""

    def changed(bundle: Path) -> None:
        change(bundle / "reasoner")
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest.pop("sha256")
        for name in manifest["files"]:
            content = (bundle / name).read_bytes()
            manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
        (bundle / "manifest.json").write_text(json.dumps({**manifest, "sha256": manifest_sha256(manifest)}))

    return changed


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that must not be reached."""
    monkeypatch.setattr(engines_module, "build_engine", lambda *_: pytest.fail("it was built"))
    monkeypatch.setattr(engines_module, "find_builder", lambda _: "tensorrt-rtx")
    monkeypatch.setattr(package, "find_builder", lambda _: "tensorrt-rtx")
    monkeypatch.setattr(engines_module, "builder_version", lambda _: "a builder 1.0")
    monkeypatch.setattr(engines_module, "check_architectures", lambda architectures, _: architectures)


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (signed(text("vision.onnx", "garbage")), "{}/b/reasoner/vision.onnx is no ONNX graph, or is damaged"),
        (signed(text("decoder.onnx", "")), "{}/b/reasoner/decoder.onnx holds no graph"),
        (signed(outside("../../secret")), "lies in '../../secret', which is no file beside it"),
        (signed(outside("/etc/passwd")), "lies in '/etc/passwd', which is no file beside it"),
        (signed(outside(BESIDE)), "{}/b/reasoner/other.data: it does not hold "),
        (shutil.rmtree, "no bundle '{}/b'"),
    ],
)
def test_a_bundle_of_which_no_engine_is_built(
    toy: Path, tmp_path: Path, refused: Callable[..., None], change: Change, words: str
) -> None:
    shutil.copytree(toy / "bundle", tmp_path / "b")
    change(tmp_path / "b")
    refused(4, words, "tensorrt", tmp_path / "b", "--arch", "sm_86", "-o", tmp_path / "out")


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "no output": (("reasoner", "R"), "Missing option '--output'"),
    "an output without a name": (("reasoner", "R", "-o", ""), "'--output' / '-o': it is no name of a folder"),
    "an output with a zero": (("segmenter", "S", "-o", "a\0b"), "'--output' / '-o': it is no name of a folder"),
    "settings that are absent": (
        ("reasoner", "R", "-o", "O", "--settings", "/none.json"),
        "/none.json: it cannot be read",
    ),
    "a precision": (("reasoner", "R", "-o", "O", "--precision", "int2"), "'int2' is not one of"),
    "no architecture": (("tensorrt", "B", "-o", "O"), "--arch: tensorrt-rtx builds for the GPUs that are named"),
    "a batch of none": (("tensorrt", "B", "--arch", "sm_86", "-o", "O", "--max-batch", "0"), "0 is not in the range"),
    "int8 without images": (("tensorrt", "B", "--arch", "sm_86", "-o", "O", "--precision", "int8"), "go together"),
    "images without int8": (("tensorrt", "B", "--arch", "sm_86", "-o", "O", "--calibrate", "x.png"), "go together"),
    "a report that is a folder": (("verify", "B", "--reasoner", "R", "--segmenter", "S", "-o", "/"), "it is a folder"),
}


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize(("arguments", "words"), USAGE.values(), ids=USAGE.keys())
def test_wrong_usage(
    toy: Path, tmp_path: Path, refused: Callable[..., None], arguments: tuple[str, ...], words: str
) -> None:
    places = {"R": toy / "reasoner", "S": toy / "segmenter", "B": toy / "bundle", "O": tmp_path / "out"}
    refused(2, words, *(places.get(each, each) for each in arguments))


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize(("image", "words"), [("/none.png", "none.png: no such file"), ("R", "it is a folder")])
def test_an_image_to_calibrate_with_that_cannot_be_read(
    toy: Path, tmp_path: Path, refused: Callable[..., None], image: str, words: str
) -> None:
    picture = toy / "reasoner" if image == "R" else image
    command = ("tensorrt", toy / "bundle", "--arch", "sm_86", "-o", tmp_path / "out", "--precision", "int8")
    refused(3, words, *command, "--calibrate", picture)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("src/config.json", "src/config.json: it cannot be written; name a new folder"),
        ("src/config.json/x", "src/config.json/x: it cannot be written (Not a directory); name another folder"),
        ("x" * 300, ": it cannot be written (File name too long); name another folder"),
        ("src", "{}/src is the checkpoint's own folder; name another one"),
    ],
)
def test_an_output_that_cannot_be(
    toy: Path, tmp_path: Path, refused: Callable[..., None], output: str, words: str
) -> None:
    shutil.copytree(toy / "reasoner", tmp_path / "src")
    refused(4, words, "reasoner", tmp_path / "src", "-o", tmp_path / output)


def test_a_disk_that_fills_up_while_a_bundle_is_copied(toy: Path, tmp_path: Path) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    code = "from medreasoner_cli.start import main; main()"
    command = ["export", "bundle", toy / "reasoner-onnx", toy / "segmenter-onnx", "-o", tmp_path / "out", "--name", "x"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, preexec_fn=small_disk
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == f"error: {tmp_path}/out: it cannot be written (File too large)\n"
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_told_before_a_bundle_is_copied(
    toy: Path, tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    command = ("bundle", toy / "reasoner-onnx", toy / "segmenter-onnx", "-o", tmp_path / "out", "--name", "x")
    refused(4, "GB will be written, 0.0 GB are free there", *command)


def test_a_disk_that_fills_up_under_the_builder_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    result = {"failed": "write", "words": "No space left on device", "errno": errno.ENOSPC, "inputs": [], "outputs": []}
    worker.write_text(f"print({json.dumps(result)!r})")
    monkeypatch.setattr(trt_worker, "__file__", str(worker))
    plan: Any = type("Plan", (), {"source": "x", "inputs": (), "outputs": (), "profiles": ()})
    with pytest.raises(OSError, match="No space left on device") as caught:
        build_engine(tmp_path / "x.onnx", plan, "sm_86", tmp_path / "x.engine")
    assert caught.value.errno == errno.ENOSPC
    assert not isinstance(caught.value, BundleError)
