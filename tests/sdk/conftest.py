"""Stand-ins that need no bundle: a manifest, small tokenizers, and sessions written in NumPy."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from medreasoner.manifest import parse_manifest
from medreasoner.reasoner import Reasoner
from medreasoner.reasoner.weights import WeightMatrix
from medreasoner.spec import BundleSpec

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
THINK = ("<think>", "</think>", "<answer>", "</answer>")
HIDDEN, HEAD_DIM, N_HEADS, N_KV_HEADS, LENGTH = 24, 12, 2, 1, 320
VOCAB = 700
MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "name": "toy",
    "version": "0.0.1",
    "description": "for tests",
    "reasoner": {
        "architecture": "qwen2_5_vl",
        "graphs": {"vision": "reasoner/vision.onnx", "decoder": "reasoner/decoder.onnx"},
        "embedding": {"file": "reasoner/embedding.bin", "dtype": "float32", "shape": [VOCAB, HIDDEN]},
        "lm_head": {"file": "reasoner/embedding.bin", "dtype": "float32", "shape": [VOCAB, HIDDEN]},
        "tokenizer": "reasoner/tokenizer.json",
        "n_layers": 1,
        "n_heads": N_HEADS,
        "n_kv_heads": N_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_dim": HIDDEN,
        "vocab_size": VOCAB,
        "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2],
        "max_length": LENGTH,
        "vision": {
            "patch_size": 14,
            "merge_size": 2,
            "window_size": 56,
            "head_dim": 16,
            "full_attention_layers": [1],
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.25, 0.25, 0.25],
            "resize": {"rule": "stretch", "width": 84, "height": 84},
        },
        "prompt": {
            "template": "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{query}<|im_end|>\n"
            "<|im_start|>assistant\n",
            "image_token": "<|image_pad|>",
        },
        "answer": {
            "present": '<answer>{"bbox": [{x1}, {y1}, {x2}, {y2}], "points_1": [{p1x}, {p1y}], '
            '"points_2": [{p2x}, {p2y}]}</answer>',
            "absent": '<answer>{"bbox": null, "points_1": null, "points_2": null}</answer>',
            "think_open": "<think>",
            "think_close": "</think>",
            "end": "<|im_end|>",
        },
        "coordinates": "absolute",
        "absent_threshold": None,
        "max_query_tokens": 40,
        "max_think_tokens": 24,
    },
    "segmenter": {
        "architecture": "sam",
        "graphs": {"encoder": "segmenter/encoder.onnx", "decoder": "segmenter/decoder.onnx"},
        "resize": {"rule": "longest_pad", "size": 64},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "mask_size": 16,
        "n_masks": 1,
        "rescale": "fixed",
        "prompts": "joint",
    },
    "precision": "fp32",
    "opset": 20,
    "producers": {"onnx": "1"},
    "source": {"reasoner_sha256": "0"},
    "licence": {"weights": "none", "notice": None, "file": None},
    "training": {},
    "quality": {},
    "files": {},
}
FILES = (
    "reasoner/vision.onnx",
    "reasoner/decoder.onnx",
    "reasoner/embedding.bin",
    "reasoner/tokenizer.json",
    "segmenter/encoder.onnx",
    "segmenter/decoder.onnx",
)
Array = NDArray[Any]


@pytest.fixture
def manifest() -> dict[str, Any]:
    data = copy.deepcopy(MANIFEST)
    data["files"] = {name: {"sha256": "0" * 64, "size_bytes": 0} for name in FILES}
    return data


@pytest.fixture
def spec(manifest: dict[str, Any]) -> BundleSpec:
    return parse_manifest(json.dumps(manifest))


@pytest.fixture
def bundle_folder(tmp_path: Path, manifest: dict[str, Any]) -> Path:
    """A folder whose files are what its manifest says, but no models."""
    root = tmp_path / "bundle"
    for name in FILES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {name}".encode())
        manifest["files"][name] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size_bytes": path.stat().st_size,
        }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def make_tokenizer(*, integers: int = 0, merges: list[tuple[str, str]] | None = None, think: bool = True) -> Tokenizer:
    """Byte-level tokenizer with Qwen's special tokens, and one token for each integer below `integers`."""
    vocab = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in merges or []:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    if think:
        tokenizer.add_tokens([AddedToken(text, special=False) for text in THINK])
    tokenizer.add_tokens([AddedToken(str(i), special=False, normalized=False) for i in range(integers)])
    return tokenizer


@pytest.fixture
def toy_tokenizer() -> Callable[..., Tokenizer]:
    return make_tokenizer


class ArrayBuffer:
    """A buffer that is an array, as if on a device."""

    host = None

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.content = np.zeros(shape, dtype)

    def rows(self, start: int, stop: int) -> "ArrayBuffer":
        part = ArrayBuffer((0,), self.content.dtype)
        part.content = self.content[start:stop]
        return part

    def save(self, n_positions: int) -> Array:
        return self.content[:, :, :n_positions].copy()

    def restore(self, saved: Array) -> None:
        self.content[:, :, : saved.shape[2]] = saved
        self.content[:, :, saved.shape[2] :] = 1e6  # undefined, so that a reader betrays itself


class NumpySession:
    """A session whose graph is a function of named arrays; records the shapes of what it is given."""

    providers = ("CPUExecutionProvider",)

    def __init__(self, graph: Callable[[Mapping[str, Array], Mapping[str, Array]], dict[str, Array]]) -> None:
        self.graph = graph
        self.runs: list[dict[str, tuple[int, ...]]] = []

    max_rows: int | None = None
    cuts_rows = True

    def element_type(self, name: str) -> Any:
        return np.float32

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> ArrayBuffer:
        return ArrayBuffer(shape, dtype)

    def bind(self, inputs: Mapping[str, ArrayBuffer], outputs: Mapping[str, ArrayBuffer]) -> "NumpyBinding":
        assert {name.replace("past", "present") for name in inputs} == set(outputs)
        assert all(outputs[name.replace("past", "present")] is buffer for name, buffer in inputs.items())
        return NumpyBinding(self, inputs)


class NumpyBinding:
    def __init__(self, session: NumpySession, buffers: Mapping[str, ArrayBuffer]) -> None:
        self.session, self.buffers = session, buffers

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.session.runs.append({name: array.shape for name, array in inputs.items()})
        return self.session.graph(inputs, {name: buffer.content for name, buffer in self.buffers.items()})


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of (n, heads, head_dim), halves against each other."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention_layer(inputs: Mapping[str, Array], buffers: Mapping[str, Array]) -> dict[str, Array]:
    """One causal attention layer with grouped queries and no weights: the decoder graph's contract in NumPy."""
    x = inputs["inputs_embeds"][0]
    n, total = len(x), int(inputs["total_sequence_length"])
    assert inputs["seqlens_k"].tolist() == [total - 1]
    cos, sin = (inputs[name][inputs["rotary_ids"][0]] for name in ("rotary_cos", "rotary_sin"))
    heads = x.reshape(n, N_HEADS, HEAD_DIM)
    keys, values = buffers["past_key.0"], buffers["past_value.0"]
    keys[0, 0, total - n : total] = rotate(heads[:, :1], cos, sin)[:, 0]
    values[0, 0, total - n : total] = x[:, 3 : 3 + HEAD_DIM]
    scores = rotate(heads, cos, sin).transpose(1, 0, 2) @ keys[0, 0, :total].T  # (heads, n, total)
    scores[:, np.arange(total)[None] > np.arange(total - n, total)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ values[0, 0, :total]
    hidden = x + mixed.transpose(1, 0, 2).reshape(n, HIDDEN)
    return {"hidden_states": hidden[None].astype(np.float32)}


def vision_tower(inputs: Mapping[str, Array], _: Mapping[str, Array]) -> dict[str, Array]:
    """(batch, n_patches, ...) to (batch, n_tokens, HIDDEN) by fixed random numbers."""
    patches = inputs["patches"]
    weights = np.random.default_rng(5).normal(size=(patches.shape[-1], HIDDEN)).astype(np.float32) / 40
    tokens = patches.reshape(patches.shape[0], -1, 4, patches.shape[-1]).mean(axis=2)
    return {"image_embeds": tokens @ weights}


def matrix(seed: int) -> WeightMatrix:
    """Unit rows, so that each row is its own best match."""
    values = np.random.default_rng(seed).normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    return WeightMatrix(values=values / np.linalg.norm(values, axis=1, keepdims=True), dtype="float32")


class Toy:
    """A reasoner on NumPy sessions, with its parts."""

    def __init__(
        self,
        spec: BundleSpec,
        tokenizer: Tokenizer,
        decoder: Callable[[Mapping[str, Array], Mapping[str, Array]], dict[str, Array]] = attention_layer,
    ) -> None:
        self.spec, self.tokenizer = spec.reasoner, tokenizer
        self.vision, self.decoder = NumpySession(vision_tower), NumpySession(decoder)
        self.embedding, self.lm_head = matrix(1), matrix(2)
        self.reasoner = Reasoner(
            self.spec,
            vision=self.vision,  # type: ignore[arg-type]
            decoder=self.decoder,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            embedding=self.embedding,
            lm_head=self.lm_head,
        )


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bundle`` with random weights, and the checkpoints ``reasoner`` and ``segmenter`` that it was exported from."""
    from medreasoner_export.toy import make_toy_bundle

    folder = tmp_path_factory.mktemp("toy")
    make_toy_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def toy_bundle(toy_folder: Path) -> Path:
    return toy_folder / "bundle"
