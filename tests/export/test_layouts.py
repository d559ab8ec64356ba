"""One model, written in different ways: the graphs must be the same, or the fault named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from medreasoner.errors import BundleError
from medreasoner_export import ReasonerOptions, export_reasoner, export_segmenter, graph
from medreasoner_export import settings as settings_module
from medreasoner_export.toy import make_toy_reasoner, make_toy_segmenter

FILES = ("vision.onnx", "decoder.onnx", "embedding.bin")


@pytest.fixture
def reasoner(toy: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(toy / "reasoner", tmp_path / "reasoner"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def initializers(folder: Path) -> dict[str, bytes]:
    return {
        f"{name}:{tensor.name}": numpy_helper.to_array(tensor).tobytes()
        for name in ("vision.onnx", "decoder.onnx")
        for tensor in onnx.load(folder / name).graph.initializer
    }


def test_both_layouts_of_tensor_names_give_the_same_graphs(reasoner: Path, tmp_path: Path) -> None:
    export_reasoner(reasoner, tmp_path / "published")

    def nested(name: str) -> str:
        return "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)

    change_weights(reasoner, lambda weights: {nested(name): value for name, value in weights.items()})
    export_reasoner(reasoner, tmp_path / "nested")
    assert initializers(tmp_path / "published") == initializers(tmp_path / "nested")


def test_the_flat_configuration_of_published_files_is_read(reasoner: Path, tmp_path: Path) -> None:
    nested = export_reasoner(reasoner, tmp_path / "nested").section

    def flatten(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        tied = config["tie_word_embeddings"]
        config |= text | {"model_type": "qwen2_5_vl", "tie_word_embeddings": tied, "rope_theta": rope["rope_theta"]}
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}

    change_config(reasoner, flatten)
    assert export_reasoner(reasoner, tmp_path / "flat").section == nested


def test_untied_weights_give_a_head_of_their_own(tmp_path: Path) -> None:
    section = export_reasoner(make_toy_reasoner(tmp_path / "untied", tied=False), tmp_path / "out").section
    assert section["lm_head"]["file"] == "lm_head.bin"
    expected = load_file(tmp_path / "untied/model.safetensors")["lm_head.weight"]
    found = np.fromfile(tmp_path / "out/lm_head.bin", np.float32).reshape(expected.shape)
    np.testing.assert_array_equal(found, expected)


def test_weights_keep_the_type_of_their_source(reasoner: Path, tmp_path: Path) -> None:
    change_weights(reasoner, lambda weights: {n: w.astype(ml_dtypes.bfloat16) for n, w in weights.items()})
    export = export_reasoner(reasoner, tmp_path / "out")
    assert export.storage == "bfloat16"
    source = load_file(reasoner / "model.safetensors")
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "out/decoder.onnx").graph.initializer
    }
    weight = stored["layers.1.mlp.down_proj.weight.bfloat16"]
    np.testing.assert_array_equal(weight, source["model.layers.1.mlp.down_proj.weight"].T)


def test_the_two_frames_of_the_patch_embedding_add_up_without_rounding(reasoner: Path, tmp_path: Path) -> None:
    change_weights(reasoner, lambda weights: {n: w.astype(ml_dtypes.bfloat16) for n, w in weights.items()})
    export_reasoner(reasoner, tmp_path / "out")
    kernel = load_file(reasoner / "model.safetensors")["visual.patch_embed.proj.weight"].astype(np.float32)
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "out/vision.onnx").graph.initializer
    }
    np.testing.assert_array_equal(stored["patch_embed.weight"], (kernel[:, :, 0] + kernel[:, :, 1]).reshape(32, -1).T)


def test_a_weight_beyond_float16_is_refused_with_the_way_out(reasoner: Path, tmp_path: Path) -> None:
    def enlarge(weights: dict[str, Any]) -> dict[str, Any]:
        weights["model.layers.0.mlp.down_proj.weight"][0, 0] = 7e4
        return weights

    change_weights(reasoner, enlarge)
    with pytest.raises(BundleError, match=r"down_proj.*7e\+04 does not fit float16.*bfloat16"):
        export_reasoner(reasoner, tmp_path / "out", options=ReasonerOptions(weights="float16"))


def test_graphs_say_where_they_come_from(reasoner: Path, tmp_path: Path) -> None:
    export = export_reasoner(reasoner, tmp_path / "out")
    for name in ("vision.onnx", "decoder.onnx"):
        model = onnx.load(tmp_path / "out" / name)
        properties = {item.key: item.value for item in model.metadata_props}
        assert properties["source_sha256"] == export.sha256
        assert properties["opset"] == str(model.opset_import[0].version) == "20"
        assert properties["exporter"].startswith("medreasoner ")


def test_an_export_is_the_same_bytes_every_time(reasoner: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        export_reasoner(reasoner, tmp_path / out)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    "name",
    [
        "visual.patch_embed.proj.weight",
        "visual.blocks.1.attn.qkv.bias",
        "visual.merger.ln_q.weight",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.norm.weight",
    ],
)
def test_a_reasoner_without_a_tensor_is_refused_by_name(reasoner: Path, tmp_path: Path, name: str) -> None:
    change_weights(reasoner, without(name))
    with pytest.raises(BundleError, match=name.partition(".")[2]):
        export_reasoner(reasoner, tmp_path / "out")


def test_a_tensor_that_the_graphs_would_drop_is_refused(reasoner: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)}
    change_weights(reasoner, lambda weights: weights | extra)
    with pytest.raises(BundleError, match=r"o_proj\.bias"):
        export_reasoner(reasoner, tmp_path / "out")


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another architecture": (lambda c: c.update(model_type="llama"), "model_type"),
    "no vision": (lambda c: c.pop("vision_config"), "vision_config"),
    "no size": (lambda c: c["text_config"].pop("hidden_size"), r"text_config\.hidden_size"),
    "a size as text": (lambda c: c["text_config"].update(vocab_size="601"), "vocab_size"),
    "heads that do not divide": (lambda c: c["text_config"].update(num_attention_heads=5), "do not fit"),
    "sliding windows": (lambda c: c["text_config"].update(use_sliding_window=True), "sliding"),
    "scaled positions": (lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn"), "rope_type"),
    "sections of another size": (
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[16, 24, 24]),
        "mrope_section",
    ),
    "another activation": (lambda c: c["vision_config"].update(hidden_act="gelu"), "hidden_act"),
    "another output size": (lambda c: c["vision_config"].update(out_hidden_size=32), "out_hidden_size"),
    "partial blocks in a window": (lambda c: c["vision_config"].update(window_size=100), "window_size"),
    "another vision base": (
        lambda c: c["vision_config"].update(rope_parameters={"rope_theta": 5e5}),
        "rope_theta",
    ),
    "another vocabulary": (lambda c: c["text_config"].update(vocab_size=600), "embed_tokens"),
}


@pytest.mark.parametrize(("change", "key"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_configuration_that_the_graphs_cannot_follow_is_refused_by_key(
    reasoner: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], key: str
) -> None:
    change_config(reasoner, change)
    with pytest.raises(BundleError, match=key):
        export_reasoner(reasoner, tmp_path / "out")


def test_a_checkpoint_without_a_tokenizer_is_refused(reasoner: Path, tmp_path: Path) -> None:
    (reasoner / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        export_reasoner(reasoner, tmp_path / "out")


def test_without_settings_the_answer_is_that_of_medreasoner(reasoner: Path, tmp_path: Path) -> None:
    (reasoner / "medreasoner.json").unlink()
    (reasoner / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 705_600}))
    section = export_reasoner(reasoner, tmp_path / "out").section
    assert section["answer"]["present"].startswith("<answer>{'bbox': [{x1}, ")
    assert section["answer"]["absent"] is section["absent_threshold"] is None
    # The model has 512 positions; half of them are left to the image.
    resize = {"rule": "smart", "min_pixels": 3136, "max_pixels": 256 * 28**2, "factor": 28}
    assert section["vision"]["resize"] == resize
    assert section["max_length"] == 512  # of the model's own positions


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_image_limits_are_read_as_transformers_writes_them_now(reasoner: Path, tmp_path: Path, name: str) -> None:
    (reasoner / "medreasoner.json").unlink()
    images = {"size": {"shortest_edge": 6272, "longest_edge": 23520}, "image_mean": [0.5, 0.5, 0.5], "min_pixels": None}
    content = {"image_processor": images} if name.startswith("processor") else images
    (reasoner / name).write_text(json.dumps(content))
    options = ReasonerOptions(settings={"max_think_tokens": 100, "max_query_tokens": 100})
    vision = export_reasoner(reasoner, tmp_path / "out", options=options).section["vision"]
    assert vision["resize"] == {"rule": "smart", "min_pixels": 6272, "max_pixels": 23520, "factor": 28}
    assert vision["image_mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(("think", "tokens"), [(1024, 256), (40, 512 - 40 - 100 - 100)])
def test_an_image_leaves_room_for_query_thought_and_answer(
    reasoner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, think: int, tokens: int
) -> None:
    monkeypatch.setattr(settings_module, "ANSWER_TOKENS", 100)
    (reasoner / "medreasoner.json").unlink()
    (reasoner / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 12_845_056}))
    options = ReasonerOptions(settings={"max_think_tokens": think, "max_query_tokens": 100})
    resize = export_reasoner(reasoner, tmp_path / "out", options=options).section["vision"]["resize"]
    assert resize["max_pixels"] == tokens * 28**2  # at least half of the 512 positions


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_second_matrix_is_the_head_exactly_where_it_differs(
    reasoner: Path, tmp_path: Path, tied: bool, same: bool
) -> None:
    change_config(reasoner, lambda config: config.update(tie_word_embeddings=tied))

    def head(weights: dict[str, Any]) -> dict[str, Any]:
        embedding = weights["model.embed_tokens.weight"]
        return weights | {"lm_head.weight": embedding.copy() if same else embedding[::-1].copy()}

    change_weights(reasoner, head)
    section = export_reasoner(reasoner, tmp_path / "out").section
    assert (section["lm_head"]["file"] == section["embedding"]["file"]) == same
    if not same:
        embedding, own = ((tmp_path / "out" / section[key]["file"]).read_bytes() for key in ("embedding", "lm_head"))
        width = len(own) // section["lm_head"]["shape"][0]
        assert own[:width] == embedding[-width:]


def test_an_export_that_failed_is_not_taken_for_the_one_before(reasoner: Path, tmp_path: Path) -> None:
    export_reasoner(reasoner, tmp_path / "out")
    (reasoner / "tokenizer.json").unlink()
    with pytest.raises(BundleError):
        export_reasoner(reasoner, tmp_path / "out")
    assert not (tmp_path / "out" / "export.json").exists()


def test_more_weights_than_one_file_holds_are_refused_while_they_are_read(
    reasoner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "MAX_GRAPH_BYTES", 10_000)
    with pytest.raises(BundleError, match="do not fit one ONNX file"):
        export_reasoner(reasoner, tmp_path / "out", options=ReasonerOptions(precision="int8"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"limit": 3}, "limit"), ({"max_length": 513}, "exceeds"), ({"max_length": "512"}, "expected an integer")],
)
def test_settings_that_do_not_fit_are_refused(
    reasoner: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        export_reasoner(reasoner, tmp_path / "out", options=ReasonerOptions(settings=settings))


def test_a_segmenter_without_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_toy_segmenter(tmp_path / "sam")
    change_weights(folder, without("vision_encoder.layers.1.attn.rel_pos_w"))
    with pytest.raises(BundleError, match=r"layers\.1\.attn\.rel_pos_w is missing"):
        export_segmenter(folder, tmp_path / "out")


SAM_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another architecture": (lambda c: c.update(model_type="sam_hq"), "model_type"),
    "image sizes that differ": (lambda c: c["prompt_encoder_config"].update(image_size=128), "image_size"),
    "heads that do not divide": (lambda c: c["vision_config"].update(num_attention_heads=3), "do not divide"),
    "another activation": (lambda c: c["mask_decoder_config"].update(hidden_act="gelu"), "hidden_act"),
}


@pytest.mark.parametrize(("change", "key"), SAM_CONFIGS.values(), ids=SAM_CONFIGS.keys())
def test_a_segmenter_that_the_graphs_cannot_follow_is_refused_by_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], key: str
) -> None:
    folder = make_toy_segmenter(tmp_path / "sam")
    change_config(folder, change)
    with pytest.raises(BundleError, match=key):
        export_segmenter(folder, tmp_path / "out")
