"""GRPO on images of a kind that nano never saw: what reward alone teaches it, on pictures that it was not shown::

    python benchmarks/learn_phantom.py --work runs/phantom --minutes 30

Draws radiographs of a made-up test phantom (a disc, a plate and a rod of lead on uneven ground), asks for each part in
several words, and for a part that is not there; groups of images are held out. `medreasoner-cli train grpo` then goes
on from nano by the paper's soft rewards and the mask's Dice; no true answer is ever shown to it. Prints box IoU on the
held-out groups before, while and after, greedily answered, and keeps sheets of samples in the folder.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

QUERIES = {
    "disc": ("Which part is round?", "Where is the coin of lead?", "Mark the circular insert", "Find the disc"),
    "plate": (
        "Which part has four equal sides?",
        "Show the square plate",
        "Where is the flat block?",
        "Find the plate",
    ),
    "rod": ("Which part is long and thin?", "Where does the rod lie?", "Mark the bar of lead", "Find the rod"),
}
NOT_THERE = ("Where is the pacemaker?", "Show the kidney stone", "Is there a fracture line?", "Find the catheter tip")
CONFIG = """
[data]
path = "{work}/data"
[policy]
checkpoint = "{checkpoint}"
frozen_vision = true
[rollouts]
engine = "runtime"
count = 16
max_tokens = 44
temperature = 1.0
[reward]
mode = "soft"
mask = 1.0
[loss]
kl = 0.0
normalise = "constant"
scale_by_deviation = false
[train]
out = "{work}/run"
steps = {steps}
minutes = {minutes}
prompts = 16
micro_batch = 8
lr = {lr}
cooldown = 0.5
precision = "bf16"
save_every = 10
eval_every = {every}
pictures_every = {every}
"""


def phantom(rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], dict[str, npt.NDArray[np.bool_]]]:
    """A picture (H, W) and the masks of its parts, which do not overlap: each has a third of it, in any order."""
    height, width = (int(side) for side in rng.integers(160, 300, 2))
    down, across = np.mgrid[:height, :width] + 0.5
    ground = 60 + 30 * np.sin(across / width * rng.uniform(1, 4)) + rng.normal(0, 8, (height, width))
    masks = {}
    for third, part in enumerate(rng.permutation(list(QUERIES))):
        x, y = width * (third + rng.uniform(0.4, 0.6)) / 3, height * rng.uniform(0.25, 0.75)
        size = width / 3 * rng.uniform(0.2, 0.4)
        if part == "disc":
            mask = (across - x) ** 2 + (down - y) ** 2 <= size**2
        elif part == "plate":
            mask = np.maximum(abs(across - x), abs(down - y)) <= size * 0.9
        else:
            mask = (abs(across - x) <= size * 0.2) & (abs(down - y) <= height * rng.uniform(0.12, 0.22))
        ground[mask] = rng.uniform(150, 220) + rng.normal(0, 6, int(mask.sum()))
        masks[str(part)] = mask
    return np.clip(ground, 0, 255).astype(np.uint8), masks


def write_set(folder: Path, *, groups: int, per_group: int, seed: int = 0) -> None:
    """A folder with a CSV, as docs/data.md has it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(groups * per_group):
        pixels, masks = phantom(rng)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        about = {"image": f"{number}.png", "group": f"phantom-{number // per_group}", "modality": "X-ray"}
        for part, mask in masks.items():
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{number}-{part}.png")
            rows.append(about | {"mask": f"{number}-{part}.png", "category": part, "query": rng.choice(QUERIES[part])})
        if number % 3 == 0:
            rows.append(about | {"mask": "", "category": "not there", "query": rng.choice(NOT_THERE)})
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask", "category", "query", "group", "modality"])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to write")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parents[1] / "models" / "nano" / "reasoner")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=400, help="at most")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--every", type=int, default=25, help="steps between two looks at the held-out groups")
    options = parser.parse_args()
    if not (options.work / "data").exists():
        write_set(options.work / "data", groups=40, per_group=6)
    config = options.work / "phantom.toml"
    config.write_text(CONFIG.format(**vars(options)), encoding="utf-8")
    command = Path(sys.executable).with_name("medreasoner-cli")
    subprocess.run([command, "train", "grpo", config], check=True)
    for line in (options.work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "val_iou" in row:
            print(f"step {row['step']:4d}: box IoU {row['val_iou']:.3f} on the held-out groups")


if __name__ == "__main__":
    main()
