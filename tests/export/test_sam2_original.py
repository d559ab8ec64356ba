"""SAM 2 and MedSAM2 as facebookresearch/sam2 stores them, and what is refused."""

import json
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from medreasoner.bundle import load_bundle
from medreasoner.errors import BundleError
from medreasoner_export import SegmenterOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.parity_segmenter import segmenter_stages
from medreasoner_export.sam_family import open_sam, recognise

TOLERANCE = 1e-5
SMALL = {"resize": {"rule": "stretch", "width": 128, "height": 128}}
State = dict[str, torch.Tensor]


def to_original(state: State) -> State:
    """The names of the original, written from its modules."""
    heads = {"proj_in": "layers.0", "layers.0": "layers.1", "proj_out": "layers.2"}  # MLP of three layers
    pairs = {"proj_in": "layers.0", "proj_out": "layers.1"}  # MLP of two
    sequences = {
        "mask_embed.conv1": "mask_downscaling.0", "mask_embed.layer_norm1": "mask_downscaling.1",
        "mask_embed.conv2": "mask_downscaling.3", "mask_embed.layer_norm2": "mask_downscaling.4",
        "mask_embed.conv3": "mask_downscaling.6", "upscale_conv1": "output_upscaling.0",
        "upscale_layer_norm": "output_upscaling.1", "upscale_conv2": "output_upscaling.3",
    }  # fmt: skip
    found: State = {}
    for name, value in state.items():
        module, _, part = name.rpartition(".")
        if name == "prompt_encoder.point_embed.weight":
            for index in range(4):
                found[f"sam_prompt_encoder.point_embeddings.{index}.weight"] = value[index : index + 1].clone()
            continue
        if name == "no_memory_embedding":
            module, part = "", "no_mem_embed"
        elif name == "shared_image_embedding.positional_embedding":
            continue
        elif name == "prompt_encoder.shared_embedding.positional_embedding":
            module, part = "sam_prompt_encoder.pe_layer", "positional_encoding_gaussian_matrix"
        elif module.startswith("vision_encoder.neck"):
            module = f"image_encoder.neck.convs.{module.split('.')[3]}.conv"
        elif module.startswith("vision_encoder.backbone"):
            module = module.replace("vision_encoder.backbone", "image_encoder.trunk")
            module = module.replace("projection", "proj").replace("layer_norm", "norm")
            module = re.sub(r"mlp\.(\w+)", lambda match: f"mlp.{pairs[match[1]]}", module)
        else:
            module = "sam_" + module
            for old, new in sequences.items():
                module = module.replace(old, new)
            module = module.replace("o_proj", "out_proj").replace("layer_norm", "norm")
            module = re.sub(r"mlp\.(\w+)", lambda match: f"mlp.{pairs[match[1]]}", module)
            module = re.sub(
                r"(mlps\.\d|_head)\.(proj_in|layers\.0|proj_out)", lambda m: f"{m[1]}.{heads[m[2]]}", module
            )
        found[f"{module}.{part}".lstrip(".")] = value
    return found


# Of what serves videos, one of each kind.
VIDEO = {
    "maskmem_tpos_enc": (7, 1, 1, 64), "no_mem_pos_enc": (1, 1, 256), "no_obj_ptr": (1, 256),
    "no_obj_embed_spatial": (1, 64), "mask_downsample.weight": (1, 1, 4, 4), "obj_ptr_proj.layers.0.weight": (256, 256),
    "obj_ptr_tpos_proj.weight": (64, 256), "memory_attention.layers.0.norm1.weight": (256,),
    "memory_encoder.fuser.layers.0.gamma": (256,),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(build_sam2: Any) -> Any:
    return build_sam2(128)


@pytest.fixture(scope="module")
def state(tiny: Any) -> State:
    video = {name: torch.zeros(shape) for name, shape in VIDEO.items()}
    return to_original(tiny.state_dict()) | video


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": state}, path)
    return path


def test_the_names_are_those_of_published_files(state: State) -> None:
    for name, shape in {
        "image_encoder.trunk.pos_embed_window": (1, 96, 8, 8),
        "image_encoder.trunk.patch_embed.proj.weight": (96, 3, 7, 7),
        "image_encoder.trunk.blocks.0.mlp.layers.0.weight": (384, 96),
        "image_encoder.trunk.blocks.10.attn.qkv.bias": (2304,),
        "image_encoder.trunk.blocks.11.norm2.weight": (768,),
        "image_encoder.neck.convs.3.conv.weight": (256, 96, 1, 1),
        "no_mem_embed": (1, 1, 256),
        "sam_mask_decoder.conv_s0.weight": (32, 256, 1, 1),
        "sam_mask_decoder.iou_prediction_head.layers.2.weight": (4, 256),
        "sam_mask_decoder.pred_obj_score_head.layers.1.weight": (256, 256),
        "sam_mask_decoder.output_hypernetworks_mlps.3.layers.2.bias": (32,),
        "sam_mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight": (256, 128),
        "sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight": (2048, 256),
        "sam_mask_decoder.transformer.norm_final_attn.bias": (256,),
        "sam_mask_decoder.output_upscaling.3.weight": (64, 32, 2, 2),
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "sam_prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "sam_prompt_encoder.not_a_point_embed.weight": (1, 256),
    }.items():
        assert tuple(state[name].shape) == shape


def test_a_file_gives_the_same_graphs_as_the_folder(tiny: Any, file: Path, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "folder")
    first = export_segmenter(file, tmp_path / "first", options=SegmenterOptions(settings=SMALL))
    second = export_segmenter(tmp_path / "folder", tmp_path / "second")
    assert first.recognised == (
        "SAM 2 as facebookresearch/sam2 stores it, Hiera-tiny with 12 layers of 96 and more, images of 128 px"
    )
    assert first.section == second.section
    pixels = np.random.default_rng(0).standard_normal((1, 3, 128, 128), dtype=np.float32)
    found = [
        ort.InferenceSession(tmp_path / name / "encoder.onnx", providers=["CPUExecutionProvider"]).run(
            None, {"pixel_values": pixels}
        )
        for name in ("first", "second")
    ]
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_bundle_of_a_file_is_verified(file: Path, toy: Path, tmp_path: Path) -> None:
    export_segmenter(file, tmp_path / "segmenter", options=SegmenterOptions(arch="medsam2", settings=SMALL))
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="medsam2")
    stages = list(segmenter_stages(load_bundle(folder), file, tolerance=TOLERANCE, seed=0))
    assert len(stages) == 6
    assert [stage.name for stage in stages if not stage.passed] == []


@pytest.mark.parametrize(("arch", "side", "name"), [("sam2", 1024, "SAM 2"), ("medsam2", 512, "MedSAM2")])
def test_the_name_decides_on_the_size_of_the_images(file: Path, arch: Any, side: int, name: str) -> None:
    family = recognise(open_sam(file), arch, {})
    assert (family.name, family.config.image_size, family.config.mask_size) == (name, side, side // 4)


def test_a_file_that_may_be_of_either_is_asked_about(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the same tensors; say --arch sam2 .* 1024 px, --arch medsam2 .*resize"):
        export_segmenter(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "asked", "expected"),
    [
        ({"prompt_encoder_config": {"image_size": 512}}, "auto", "image_size says 512, .*image_size says 128"),
        ({"prompt_encoder_config": {"image_size": 512}}, "medsam2", 512),
        ({"prompt_encoder_config": {"image_size": 512}}, "sam2", 1024),
        ({}, "auto", 128),
        ({}, "sam2", 128),
        ({"model_type": "sam2_video"}, "auto", 128),
        ({"preprocessor": {"size": {"height": 256, "width": 256}}}, "auto", "image processor says 256; say --arch"),
        ({"preprocessor": {"size": {"height": 128, "width": 128}}}, "auto", 128),
        ({"medreasoner": {"resize": {"rule": "stretch", "size": 256}}}, "medsam2", 256),
    ],
    ids=str,
)
def test_a_folder_tells_the_size_unless_it_contradicts_itself(
    tiny: Any, tmp_path: Path, changes: dict[str, Any], asked: Any, expected: int | str
) -> None:
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"preprocessor": "preprocessor_config.json", "medreasoner": "medreasoner.json"}
    for key, value in changes.items():
        if key in names:
            (tmp_path / names[key]).write_text(json.dumps(value))
        elif isinstance(value, dict):
            config[key] |= value
        else:
            config[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    if isinstance(expected, int):
        assert recognise(open_sam(tmp_path), asked, {}).config.image_size == expected
        return
    with pytest.raises(BundleError, match=expected):
        recognise(open_sam(tmp_path), asked, {})


def refuse(state: State, tmp_path: Path, words: str, **options: Any) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"model": state}, path)
    with pytest.raises(BundleError, match=words) as failure:
        export_segmenter(path, tmp_path / "out", options=SegmenterOptions(settings=SMALL, **options))
    assert str(path) in str(failure.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("image_encoder.trunk.blocks.3.attn.qkv.weight", r"blocks\.3\.attn\.qkv\.weight is missing"),
        ("image_encoder.trunk.pos_embed", "pos_embed: expected 4 dimensions, got None"),
        ("image_encoder.trunk.blocks.10.proj.weight", "is none of tiny"),
        ("no_mem_embed", "no_memory_embedding is missing"),
        ("sam_mask_decoder.conv_s1.bias", r"conv_s1\.bias is missing"),
        ("sam_mask_decoder.obj_score_token.weight", "obj_score_token.weight is missing"),
        ("sam_prompt_encoder.point_embeddings.2.weight", r"point_embeddings\.2\.weight: expected 2 dimensions"),
        ("sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "positional_embedding is missing"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_refused_by_name(state: State, tmp_path: Path, name: str, words: str) -> None:
    refuse({key: value for key, value in state.items() if key != name}, tmp_path, words)
    if "expected" not in words and "none of" not in words:
        # An odd last size: no name of a size can be fitted to it.
        wrong = torch.zeros(*state[name].shape[:-1], 7)
        refuse(state | {name: wrong}, tmp_path, "expected shape .*got .*7")


def test_other_files_and_settings_are_refused(state: State, file: Path, toy: Path, tmp_path: Path) -> None:
    refuse(state | {"image_encoder.trunk.blocks.0.attn.lora_a": torch.zeros(2, 2)}, tmp_path, "not part of this .*lora")
    extra = {"sam_prompt_encoder.point_embeddings.4.weight": torch.zeros(1, 256)}
    refuse(state | extra, tmp_path, "not part of this architecture, first .*point_embed.4")
    row = {"sam_prompt_encoder.point_embeddings.1.weight": torch.zeros(1, 128)}
    refuse(state | row, tmp_path, r"point_embeddings\.1\.weight: expected shape \(1, 256\), got \(1, 128\)")
    fewer = {name: value for name, value in state.items() if not name.startswith("image_encoder.trunk.blocks.11.")}
    refuse(fewer, tmp_path, r"96 channels with stages of \(1, 2, 7, 1\) blocks is none of tiny .*Sam2Model")
    refuse(state | {"no_mem_embed": torch.full((1, 1, 256), float("nan"))}, tmp_path, "not finite")
    refuse(state, tmp_path, "it was called medsam, but the weights are those of SAM 2", arch="medsam")
    with pytest.raises(BundleError, match=r"it was called medsam2, but the weights are those of SAM$"):
        export_segmenter(toy / "segmenter", tmp_path / "out", options=SegmenterOptions(arch="medsam2"))
    for resize, words in (
        ({"rule": "stretch", "width": 128, "height": 96}, "a SAM 2 wants squares, such as"),
        ({"rule": "stretch", "width": 100, "height": 100}, "images of 100 px: .* multiple of 32"),
        ("small", "a SAM 2 wants squares"),
    ):
        with pytest.raises(BundleError, match=words):
            export_segmenter(file, tmp_path / "out", options=SegmenterOptions(settings={"resize": resize}))
    with pytest.raises(BundleError, match="segmenter: resize: its image encoder takes squares of 64 px"):
        export_segmenter(toy / "segmenter", tmp_path / "out", options=SegmenterOptions(settings=SMALL))


def hiera(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["vision_config"]["backbone_config"].update(changes)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another image encoder": (hiera(model_type="repvit"), "model_type"),
    "three stages": (hiera(blocks_per_stage=[1, 2, 7]), "four stages"),
    "heads that do not divide": (hiera(num_attention_heads_per_stage=[5, 2, 4, 8]), "do not divide"),
    "a window that cannot be halved": (hiera(window_size_per_stage=[8, 3, 14, 7]), "cannot be halved"),
    "another stride": (hiera(patch_stride=[2, 2]), "patch_stride"),
    "other levels": (lambda c: c["vision_config"].update(fpn_top_down_levels=[3]), "fpn_top_down_levels"),
    "a deeper decoder": (lambda c: c["mask_decoder_config"].update(num_hidden_layers=3), "num_hidden_layers"),
    "another depth": (lambda c: c["prompt_encoder_config"].update(hidden_size=128), "hidden_size"),
    "images that are no square": (
        lambda c: c["vision_config"].update(backbone_feature_sizes=[[32, 16], [16, 8], [8, 4]]),
        "backbone_feature_sizes",
    ),
}


@pytest.mark.parametrize(("change", "key"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_configuration_that_the_graphs_cannot_follow_is_refused_by_key(
    tiny: Any, tmp_path: Path, change: Callable[[dict[str, Any]], Any], key: str
) -> None:
    config = json.loads(tiny.config.to_json_string(use_diff=False))
    change(config)
    weights = types.SimpleNamespace(path=tmp_path, config=config)
    with pytest.raises(BundleError, match=key):
        recognise(weights, "auto", {})  # type: ignore[arg-type]


def test_a_video_model_holds_an_image_model(tiny: Any, toy: Path, tmp_path: Path) -> None:
    import transformers

    sections = {key: getattr(tiny.config, key).to_dict() for key in ("vision_config", "prompt_encoder_config")}
    sections["prompt_encoder_config"].pop("model_type")
    torch.manual_seed(0)
    video = transformers.Sam2VideoModel(transformers.Sam2VideoConfig(**sections, image_size=128))
    missing = video.load_state_dict(tiny.state_dict(), strict=False)
    assert not missing.unexpected_keys
    video.save_pretrained(tmp_path / "video")
    export_segmenter(tmp_path / "video", tmp_path / "segmenter")
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="video")
    stages = list(segmenter_stages(load_bundle(folder), tmp_path / "video", tolerance=TOLERANCE, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []
    shutil.rmtree(tmp_path / "video")
