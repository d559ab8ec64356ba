"""SAM 2's graphs against the ``sam2`` package itself, made from its own configurations, wherever that is installed."""

import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from medreasoner_export import SegmenterOptions, export_segmenter

TOLERANCE = 1e-5
SIDE = 128
STUBS = ("iopath", "iopath.common", "iopath.common.file_io")


@pytest.fixture
def package() -> Iterator[Path]:
    """Folder of the package, imported without its own beginning, which asks for hydra, and without iopath."""
    found = importlib.util.find_spec("sam2")
    if found is None or found.origin is None:
        pytest.skip("sam2 is not installed")
    module = types.ModuleType("sam2")
    module.__path__ = list(found.submodule_search_locations or [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sam2", module)
        for name in STUBS:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules[STUBS[-1]], "g_pathmgr", None, raising=False)
        yield Path(found.origin).parent


def made(entry: Any) -> Any:
    """What an entry of the package's configurations describes, as hydra makes it."""
    if isinstance(entry, list):
        return [made(each) for each in entry]
    if isinstance(entry, str) and re.fullmatch(r"\d+e-\d+", entry):  # YAML 1.1 takes it for text
        return float(entry)
    if not isinstance(entry, dict):
        return entry
    values = {key: made(value) for key, value in entry.items() if key != "_target_"}
    if "_target_" not in entry:
        return values
    module, _, name = entry["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**values)


def build(package: Path, size: str) -> Any:
    """The package's model of a size with random weights: see `scatter_weights` in conftest."""
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((package / f"configs/sam2.1/sam2.1_hiera_{size}.yaml").read_text())["model"]
    # As `build_sam2` has it.
    config |= {"image_size": SIDE, "sam_mask_decoder_extra_args": {"dynamic_multimask_via_stability": True}}
    torch.manual_seed(0)
    model = made(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.any():
            inputs = parameter.shape[-1] if parameter.shape[0] == 1 else parameter[0].numel()
            torch.nn.init.normal_(parameter, std=max(inputs, 16) ** -0.5)
    return model


def predicted(
    model: Any, pixels: np.ndarray, points: np.ndarray, labels: list[int], *, multimask: bool
) -> list[np.ndarray]:
    """Embedding, mask logits and scores, by the steps of ``SAM2ImagePredictor``."""
    with torch.inference_mode():
        _, features, _, _ = model._prepare_backbone_features(model.forward_image(torch.from_numpy(pixels)))
        features[-1] = features[-1] + model.no_mem_embed
        sides = [SIDE // stride for stride in (4, 8, 16)]
        planes = [part.permute(1, 2, 0).reshape(1, -1, side, side) for part, side in zip(features, sides, strict=True)]
        given = torch.from_numpy(points), torch.tensor([labels])
        sparse, dense = model.sam_prompt_encoder(points=given, boxes=None, masks=None)
        masks, iou, _, _ = model.sam_mask_decoder(
            image_embeddings=planes[-1],
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
            repeat_image=False,
            high_res_features=planes[:-1],
        )
    return [planes[-1].numpy(), masks.numpy(), iou.numpy()]


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("size", ["t", "s", "b+", pytest.param("l", marks=pytest.mark.slow)])
def test_graphs_equal_the_package(package: Path, tmp_path: Path, size: str, multimask: bool) -> None:
    model = build(package, size)
    torch.save({"model": model.state_dict()}, tmp_path / "sam2.pt")
    resize = {"rule": "stretch", "width": SIDE, "height": SIDE}
    options = SegmenterOptions(settings={"resize": resize, "multimask": multimask})
    export_segmenter(tmp_path / "sam2.pt", tmp_path / "out", options=options)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((1, 3, SIDE, SIDE), dtype=np.float32)
    points = rng.uniform(0, SIDE, (1, 4, 2)).astype(np.float32)
    expected = predicted(model, pixels, points, [2, 3, 1, 1], multimask=multimask)
    encoder, decoder = (
        ort.InferenceSession(tmp_path / "out" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "decoder")
    )
    names = [output.name for output in encoder.get_outputs()]
    features = dict(zip(names, encoder.run(None, {"pixel_values": pixels}), strict=True))
    prompts = {"points": np.pad(points, ((0, 0), (0, 1), (0, 0))), "labels": np.array([[2, 3, 1, 1, -1]])}
    masks, iou = decoder.run(["mask_logits", "predicted_iou"], features | prompts)
    for found, theirs in zip((features["image_embedding"], masks, iou), expected, strict=True):
        assert found.shape == theirs.shape
        assert np.abs(found - theirs).max() < TOLERANCE * np.abs(theirs).max()
