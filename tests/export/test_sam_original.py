"""SAM as ``segment-anything`` stores it, against that package."""

import importlib.util
import pickle
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
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
from medreasoner_export.sam_family import open_sam

TOLERANCE = 1e-5
BuildSam = Callable[..., Any]


@pytest.fixture(scope="module")
def build_sam() -> BuildSam:
    """Make a random SAM of the ``segment_anything`` package.

    The package itself asks for torchvision, its models do not: they are imported below a package that is empty.
    """
    found = importlib.util.find_spec("segment_anything")
    if found is None:
        pytest.skip("segment-anything is not installed")
    package = types.ModuleType("segment_anything")
    package.__path__ = list(found.submodule_search_locations or [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "segment_anything", package)
        modeling = importlib.import_module("segment_anything.modeling")

    def build(
        *, size: int = 64, patch: int = 8, dim: int = 48, depth: int = 3, heads: int = 3,
        window: int = 3, global_layers: tuple[int, ...] = (1,), channels: int = 32, mlp_dim: int = 64,
    ) -> Any:  # fmt: skip
        torch.manual_seed(0)
        grid = size // patch
        sam = modeling.Sam(
            image_encoder=modeling.ImageEncoderViT(
                depth=depth, embed_dim=dim, img_size=size, num_heads=heads, patch_size=patch, mlp_ratio=4,
                norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), qkv_bias=True, use_rel_pos=True,
                global_attn_indexes=global_layers, window_size=window, out_chans=channels,
            ),
            prompt_encoder=modeling.PromptEncoder(
                embed_dim=channels, image_embedding_size=(grid, grid), input_image_size=(size, size), mask_in_chans=16
            ),
            mask_decoder=modeling.MaskDecoder(
                num_multimask_outputs=3, transformer_dim=channels, iou_head_depth=3, iou_head_hidden_dim=channels,
                transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=mlp_dim, num_heads=8),
            ),
        ).eval()  # fmt: skip
        # Its zeros would hide positions, its small numbers the order of attention; larger ones than these would make
        # each softmax a choice of one, and rounding errors grow from layer to layer.
        for parameter in sam.parameters():
            if parameter.ndim > 1 or not parameter.any():
                inputs = parameter.shape[-1] if parameter.shape[0] == 1 else parameter[0].numel()
                torch.nn.init.normal_(parameter, std=max(inputs, 30) ** -0.5)
        return sam

    return build


@pytest.fixture(scope="module")
def sam(build_sam: BuildSam) -> Any:
    return build_sam()


@pytest.fixture(scope="module")
def file(sam: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "sam.pth"
    torch.save(sam.state_dict(), path)
    return path


FORMS = ("joint", "box", "points")


def _compare(
    sam: Any,
    folder: Path,
    *,
    multimask: bool,
    count: int = 2,
    forms: Sequence[str] = ("joint",),
    disturbed: str | None = None,
) -> dict[str, float]:
    """Largest differences of the graphs in `folder` from the package, by stage, relative to the largest value.

    The graphs are given another input of the name `disturbed`.
    """
    size = sam.image_encoder.img_size
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((count, 3, size, size), dtype=np.float32)
    points = rng.uniform(0, size, (count, 2, 2)).astype(np.float32)
    box = np.sort(rng.uniform(0, size, (count, 2, 2)), axis=1).astype(np.float32)
    with torch.inference_mode():
        embedding = sam.image_encoder(torch.from_numpy(pixels))
    encoder, decoder = (
        ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        for name in ("encoder.onnx", "decoder.onnx")
    )
    seen = pixels[:, ::-1].copy() if disturbed == "pixels" else pixels
    found = encoder.run(None, {"pixel_values": seen})[0]
    pairs = {"embedding": (found, embedding.numpy())}
    for form in forms:
        masks, scores = _package(sam, embedding, points, box, form, multimask=multimask)
        prompts = _for_graph(points, box, form)
        if disturbed == "prompts":
            prompts["points"] = prompts["points"] + 0.5  # half a pixel
        if disturbed == "labels":
            prompts["labels"] = np.roll(prompts["labels"], 1, axis=1) if form == "joint" else prompts["labels"] ^ 1
        inputs = {"image_embedding": found, **prompts}
        logits, iou = decoder.run(["mask_logits", "predicted_iou"], inputs)
        pairs |= {f"logits, {form}": (logits, masks), f"score, {form}": (iou, scores)}
    return {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, (a, b) in pairs.items()}


@torch.inference_mode()
def _package(
    sam: Any, embedding: torch.Tensor, points: np.ndarray, box: np.ndarray, form: str, *, multimask: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and scores that the package makes of a prompt for each image."""
    masks, scores = [], []
    for row in range(len(points)):
        sparse, dense = sam.prompt_encoder(
            points=None if form == "box" else (torch.from_numpy(points[row : row + 1]), torch.ones(1, 2)),
            boxes=None if form == "points" else torch.from_numpy(box[row].reshape(1, 4)),
            masks=None,
        )
        low, iou = sam.mask_decoder(
            image_embeddings=embedding[row : row + 1],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        masks.append(low.numpy())
        scores.append(iou.numpy())
    return np.concatenate(masks), np.concatenate(scores)


def _for_graph(points: np.ndarray, box: np.ndarray, form: str) -> dict[str, np.ndarray]:
    """The same prompts as the graph takes them: without a box there is a padding point."""
    count = len(points)
    padding = np.zeros((count, 1, 2), np.float32)
    parts = {"joint": [points, box], "box": [box], "points": [points, padding]}[form]
    kinds = {"joint": [1, 1, 2, 3], "box": [2, 3], "points": [1, 1, -1]}[form]
    return {"points": np.concatenate(parts, axis=1), "labels": np.tile(kinds, (count, 1))}


@pytest.mark.parametrize("multimask", [False, True])
def test_graphs_equal_the_package(sam: Any, file: Path, tmp_path: Path, multimask: bool) -> None:
    options = SegmenterOptions(settings={"multimask": multimask})
    export = export_segmenter(file, tmp_path, options=options)
    assert export.section["n_masks"] == (3 if multimask else 1)
    assert export.recognised == "SAM as segment-anything stores it, 3 layers of 48, images of 64 px"
    differences = _compare(sam, tmp_path, multimask=multimask, forms=FORMS)
    assert len(differences) == 7
    assert max(differences.values()) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("disturbed", ["pixels", "prompts", "labels"])
def test_parity_breaks_when_an_input_is_disturbed(
    sam: Any, file: Path, tmp_path: Path, disturbed: str, form: str
) -> None:
    export_segmenter(file, tmp_path)
    differences = _compare(sam, tmp_path, multimask=False, forms=[form], disturbed=disturbed)
    assert differences[f"logits, {form}"] > 10 * TOLERANCE
    assert (differences["embedding"] > 10 * TOLERANCE) == (disturbed == "pixels")


@pytest.mark.slow
def test_graphs_of_the_true_vit_b_equal_the_package(build_sam: BuildSam, tmp_path: Path) -> None:
    sam = build_sam(
        size=1024, patch=16, dim=768, depth=12, heads=12, window=14, global_layers=(2, 5, 8, 11), channels=256,
        mlp_dim=2048,
    )  # fmt: skip
    torch.save(sam.state_dict(), tmp_path / "sam_vit_b.pth")
    export = export_segmenter(tmp_path / "sam_vit_b.pth", tmp_path / "out")
    assert export.recognised.endswith("12 layers of 768, images of 1024 px")
    assert max(_compare(sam, tmp_path / "out", multimask=False, count=1, forms=FORMS).values()) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "image_encoder.pos_embed",
        "image_encoder.blocks.1.attn.rel_pos_w",
        "image_encoder.blocks.2.norm2.weight",
        "image_encoder.neck.3.bias",
        "prompt_encoder.point_embeddings.2.weight",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "mask_decoder.transformer.layers.1.norm3.bias",
        "mask_decoder.transformer.norm_final_attn.weight",
        "mask_decoder.output_upscaling.1.weight",
        "mask_decoder.output_hypernetworks_mlps.0.layers.1.weight",
        "mask_decoder.iou_prediction_head.layers.1.bias",
    ],
)
def test_parity_breaks_when_a_weight_is_disturbed(sam: Any, tmp_path: Path, name: str) -> None:
    state = {key: value.clone() for key, value in sam.state_dict().items()}
    state[name] += 0.1 * torch.randn_like(state[name])
    torch.save(state, tmp_path / "sam.pth")
    export_segmenter(tmp_path / "sam.pth", tmp_path / "out")
    assert max(_compare(sam, tmp_path / "out", multimask=False).values()) > 10 * TOLERANCE


@pytest.mark.parametrize("form", ["nested", "parallel", "old"])
def test_other_forms_of_the_file_hold_the_same(sam: Any, file: Path, tmp_path: Path, form: str) -> None:
    state: Any = sam.state_dict()
    if form == "nested":
        state = {"model": state, "epoch": 3}
    elif form == "parallel":
        state = {f"module.{name}": value for name, value in state.items()}
    torch.save(state, tmp_path / "sam.pth", _use_new_zipfile_serialization=form != "old")
    expected, found = open_sam(file), open_sam(tmp_path / "sam.pth")
    assert found.shapes == expected.shapes
    for name, shape in found.shapes.items():
        np.testing.assert_array_equal(found.tensor(name, shape), expected.tensor(name, shape))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_short_weights_stay_as_they_are(sam: Any, tmp_path: Path, kind: str) -> None:
    short = {name: value.to(getattr(torch, kind)) for name, value in sam.state_dict().items()}
    torch.save(short, tmp_path / "sam.pth")
    assert export_segmenter(tmp_path / "sam.pth", tmp_path / "out").storage == kind


def test_a_bundle_of_it_is_verified_and_medsam_wants_other_images(
    sam: Any, file: Path, toy: Path, tmp_path: Path
) -> None:
    export = export_segmenter(file, tmp_path / "segmenter", options=SegmenterOptions(arch="medsam"))
    assert export.section["resize"] == {"rule": "stretch", "width": 64, "height": 64}
    assert (export.section["image_mean"], export.section["image_std"]) == ([0.0] * 3, [1.0] * 3)
    assert export.section["prompts"] == "box"
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="original")
    stages = list(segmenter_stages(load_bundle(folder), file, tolerance=1e-4, seed=0))
    assert len(stages) == 4
    assert [stage.name for stage in stages if not stage.passed] == []


class Adapter(torch.nn.Module):
    """SAM-Med2D's, arXiv 2308.16184 figure 3, beside the MLP that it wraps."""

    def __init__(self, mlp: torch.nn.Module, dim: int) -> None:
        super().__init__()
        nn = torch.nn
        self.mlp = mlp
        self.norm = nn.LayerNorm(dim)
        self.channel = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.ReLU(), nn.Linear(dim // 4, dim, bias=False), nn.Sigmoid()
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(dim, dim, 3, 2, 1, bias=False), nn.ReLU(),
            nn.ConvTranspose2d(dim, dim, 4, 2, 1, bias=False), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        planes = x.movedim(-1, 1)
        gated = planes * self.channel(planes.mean((2, 3)))[..., None, None]
        return self.mlp(x) + self.norm((planes + self.spatial(gated)).movedim(1, -1))  # type: ignore[no-any-return]


def test_adapters_of_sam_med2d_are_recognised(build_sam: BuildSam, toy: Path, tmp_path: Path, dialect_of: Any) -> None:
    sam = build_sam()
    for block in sam.image_encoder.blocks:
        block.mlp = Adapter(block.mlp, 48)
        for parameter in block.mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    stored = {
        name.replace(".mlp.mlp.", ".mlp.") if ".mlp.mlp." in name else name.replace(".mlp.", ".Adapter.")
        if "image_encoder.blocks" in name else name: value
        for name, value in sam.state_dict().items()
    }  # fmt: skip
    torch.save({"model": stored, "optimizer": {"state": {}}}, tmp_path / "sam-med2d_b.pth")
    export = export_segmenter(tmp_path / "sam-med2d_b.pth", tmp_path / "segmenter")
    assert export.recognised.startswith("SAM-Med2D as segment-anything stores it")
    assert export.section["resize"]["rule"] == "stretch"
    assert export.section["n_masks"] == 3
    assert max(_compare(sam, tmp_path / "segmenter", multimask=True).values()) < TOLERANCE
    export_reasoner(toy / "reasoner", tmp_path / "reasoner")
    folder = build_bundle(tmp_path / "reasoner", tmp_path / "segmenter", tmp_path / "bundle", name="med2d")
    bundle = load_bundle(folder)
    stages = list(segmenter_stages(bundle, tmp_path / "sam-med2d_b.pth", tolerance=1e-4, seed=0))
    assert [stage.name for stage in stages if not stage.passed] == []
    pixels = np.random.default_rng(1).standard_normal((2, 3, 64, 64), dtype=np.float32)
    own = ort.InferenceSession(folder / "segmenter" / "encoder.onnx", providers=["CPUExecutionProvider"])
    found, expected = (each.run(None, {"pixel_values": pixels})[0] for each in (dialect_of(bundle, "encoder"), own))
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()
    for name in ("norm.bias", "channel.2.weight", "spatial.0.weight"):
        changed = stored | {
            f"image_encoder.blocks.1.Adapter.{name}": torch.zeros_like(stored[f"image_encoder.blocks.1.Adapter.{name}"])
        }
        torch.save(changed, tmp_path / "changed.pth")
        export_segmenter(tmp_path / "changed.pth", tmp_path / "changed")
        assert max(_compare(sam, tmp_path / "changed", multimask=True).values()) > 10 * TOLERANCE


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_files_that_hold_no_sam_are_refused_by_name(
    sam: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sam.pth"
    state = sam.state_dict()

    def refused(words: str) -> None:
        with pytest.raises(BundleError, match=words) as failure:
            export_segmenter(path, tmp_path / "out")
        assert str(path) in str(failure.value)
        assert not (tmp_path / "out").exists()

    refused("is missing")
    path.write_bytes(pickle.dumps({"model": _Code()}))
    refused("could run code")
    torch.save({"model": state, "args": _Code()}, path)
    refused("could run code")
    assert "this ran" not in capfd.readouterr().out
    path.write_bytes(b"")
    refused("cannot be read as PyTorch weights")
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-5000])
    refused("cannot be read as PyTorch weights")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused("it is damaged")
    for odd in (
        torch.zeros(2, 2).to_sparse(), torch.zeros(1).expand(10**9), torch.zeros(2, device="meta"),
    ):  # fmt: skip
        torch.save(state | {"image_encoder.pos_embed": odd}, path)
        refused("is not stored element by element|cannot be read as PyTorch weights")
    torch.save(state | {f"module.{name}": value for name, value in state.items()}, path)
    refused("is there with and without")
    torch.save([1, 2], path)
    refused("expected named weights, got list")
    torch.save({"encoder.weight": torch.zeros(2)}, path)
    refused("not recognised: .*mask_decoder.iou_token.weight, this file encoder.weight")
    torch.save({name: value for name, value in state.items() if "blocks.1.attn.rel_pos_h" not in name}, path)
    refused("rel_pos_h")
    torch.save({name: value for name, value in state.items() if "blocks.1." not in name}, path)
    refused("blocks.: expected parts numbered from 0 on, found 0, 2")
    torch.save({name: value for name, value in state.items() if ".blocks." not in name}, path)
    refused("blocks.: there are none")
    torch.save(state | {"image_encoder.blocks.0.Adapter.channel.0.weight": torch.tensor(1.0)}, path)
    refused("Adapter.channel.0.weight: expected 2 dimensions")
    torch.save(state | {"image_encoder.blocks.0.attn.lora_a": torch.zeros(2, 2)}, path)
    refused("not part of this architecture, first .*lora_a")
    torch.save(state | {"image_encoder.\x1b]0;": torch.zeros(2)}, path)
    refused(r"first vision_encoder.\?\]0;")
    path.unlink()
    path.mkdir()
    refused("config.json is missing")
