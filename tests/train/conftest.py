"""A small grounding set that is drawn here, sizes of a toy reasoner, and the tokenizer of nano."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from tokenizers import Tokenizer
from torch import Tensor

from medreasoner_train.checkpoint import save_reasoner
from medreasoner_train.data import by_image, load_index
from medreasoner_train.language import load_phrasings
from medreasoner_train.model import NanoConfig, build_reasoner
from medreasoner_train.sft import start_embeddings
from medreasoner_train.sft_data import SftData, SftOptions
from medreasoner_train.store import Stored, load_store
from medreasoner_train.tokenizer import SPECIAL_TOKENS, token_id
from medreasoner_train.vocabulary import Vocabulary, make_tokenizer

Mask = NDArray[np.bool_]

SOURCES = {
    # source: modality, (height, width), structures
    "kvasir_seg": ("endoscopy", (90, 120), ("polyp",)),
    "acdc_mri": ("MRI", (100, 84), ("left ventricle", "myocardium", "right ventricle")),
    "shenzhen_cxr": ("X-ray", (110, 130), ("left lung", "right lung")),
    "fetal_us": ("ultrasound", (96, 112), ("fetal head", "pubic symphysis")),
}
PATIENTS = {"kvasir_seg": 8}  # two of them for validation; of the other sources four, one for validation
PER_PATIENT = 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """One thread, and none of what the training loop switches on for its process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def ellipse(shape: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]) -> Mask:
    """Mask of an ellipse; centre and radii (x, y) in pixels."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside: Mask = ((columns - centre[0]) / radii[0]) ** 2 + ((rows - centre[1]) / radii[1]) ** 2 <= 1
    return inside


def draw_structures(shape: tuple[int, int], count: int, rng: np.random.Generator) -> list[Mask]:
    """`count` shapes side by side, each an ellipse or a rectangle, none of which touches another."""
    height, width = shape
    masks = []
    for k in range(count):
        centre = ((k + rng.uniform(0.45, 0.55)) * width / count, height * rng.uniform(0.35, 0.65))
        radii = (width / count * rng.uniform(0.25, 0.35), height * rng.uniform(0.15, 0.3))
        mask = ellipse(shape, centre, radii)
        if k % 2:
            mask = np.zeros(shape, bool)
            left, top = int(centre[0] - radii[0]), int(centre[1] - radii[1])
            mask[top : int(centre[1] + radii[1]), left : int(centre[0] + radii[0])] = True
        masks.append(mask)
    return masks


def write_image(root: Path, source: str, patient: int, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Draw one image with its masks; returns its rows of the index."""
    modality, shape, kinds = SOURCES[source]
    if source in {"acdc_mri", "fetal_us"} and number == 1:  # only the first would have labelled what is not labelled
        kinds = kinds[:-1]
    pixels = rng.integers(20, 60, shape).astype(np.uint8)
    masks = draw_structures(shape, len(kinds), rng)
    for k, mask in enumerate(masks):
        pixels[mask] += np.uint8(80 + 30 * k)
    name = f"{source}/p{patient}_{number}"
    (root / source).mkdir(exist_ok=True)
    image = np.stack([pixels, pixels // 2, pixels // 3], axis=-1) if modality == "endoscopy" else pixels
    PilImage.fromarray(image).save(root / f"{name}.png")
    rows = []
    for kind, mask in zip(kinds, masks, strict=True):
        path = f"{name}__{kind.replace(' ', '_')}.png"
        PilImage.fromarray(mask.astype(np.uint8) * 255).save(root / path)
        rows.append(
            {
                "id": f"{name}/{kind}",
                "image": f"{name}.png",
                "mask": path,
                "source": source,
                "modality": modality,
                "super_category": "drawn",
                "category": kind,
                "original_size": [shape[1], shape[0]],
                "patient_or_group_id": f"{source}/p{patient}",
                "licence_class": "open",
            }
        )
    return rows


@pytest.fixture(scope="session")
def grounding_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of four sources, patients with two images each, one to three structures an image."""
    root = tmp_path_factory.mktemp("grounding")
    rng = np.random.default_rng(7)
    rows = [
        row
        for source in SOURCES
        for patient in range(PATIENTS.get(source, 4))
        for number in range(PER_PATIENT)
        for row in write_image(root, source, patient, number, rng)
    ]
    (root / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def stored(grounding_set: Path) -> list[Stored]:
    return load_store(by_image(load_index(grounding_set)))


@pytest.fixture
def asking(grounding_set: Path, stored: list[Stored], vocabulary: Vocabulary) -> Callable[[SftOptions], SftData]:
    """Questions about the grounding set's images, in any mixture."""

    def made(options: SftOptions) -> SftData:
        return SftData(
            load_index(grounding_set),
            stored,
            vocabulary=vocabulary,
            phrasings=load_phrasings("train"),
            options=options,
        )

    return made


@pytest.fixture(scope="session")
def toy_config() -> NanoConfig:
    """A reasoner of nano's form whose passes take milliseconds."""
    return NanoConfig(
        vision_hidden_dim=32,
        vision_mlp_dim=48,
        vision_layers=3,
        vision_heads=2,
        full_attention_layers=(1,),
        hidden_dim=32,
        mlp_dim=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        mrope_section=(1, 1, 2),
    )


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer(4096, 252)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, 252)


@pytest.fixture
def toy_reasoner(toy_config: NanoConfig, vocabulary: Vocabulary) -> Any:
    """A toy reasoner with random weights, the same every time, spread enough that its choices have no ties."""
    torch.manual_seed(0)
    names = {name: token_id(vocabulary.tokenizer, name) for name in SPECIAL_TOKENS}
    model = build_reasoner(toy_config, vocab_size=vocabulary.tokenizer.get_vocab_size(), tokens=names)
    start_embeddings(model, vocabulary)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.mul_(4)
            elif parameter.ndim > 1:  # large enough that every layer, and which tokens it attends to, shows in the end
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def reference_logits() -> Callable[[Any, list[int], Tensor], Tensor]:
    """Logits (T, V) of transformers' own whole model for one image (3, S, S) and token ids, without any cache."""

    def run(model: Any, ids: list[int], image: Tensor) -> Tensor:
        config = model.config.vision_config
        side = image.shape[-1] // config.patch_size
        tokens = torch.tensor([ids])
        with torch.no_grad():
            out = model(
                input_ids=tokens,
                pixel_values=reference_patches(image, config.patch_size, config.spatial_merge_size),
                image_grid_thw=torch.tensor([[1, side, side]]),
                mm_token_type_ids=(tokens == model.config.image_token_id).int(),
                use_cache=False,
            )
        logits: Tensor = out.logits[0]
        return logits

    return run


def reference_patches(image: Tensor, patch: int, merge: int) -> Tensor:
    """Patches (n, 3 * 2 * patch * patch) as transformers' processor lays them out, one patch at a time."""
    side = image.shape[-1] // patch
    rows = []
    for block_row in range(side // merge):
        for block_column in range(side // merge):
            for row in range(merge):
                for column in range(merge):
                    y, x = (block_row * merge + row) * patch, (block_column * merge + column) * patch
                    piece = image[:, y : y + patch, x : x + patch]
                    rows.append(torch.stack([piece, piece], dim=1).flatten())  # (channel, time, y, x)
    return torch.stack(rows)


@pytest.fixture(scope="session")
def cut_patches() -> Callable[[Tensor, int, int], Tensor]:
    return reference_patches


@pytest.fixture
def start(tmp_path: Path, toy_reasoner: Any, vocabulary: Vocabulary) -> Path:
    """The toy reasoner's checkpoint, for images of 84 x 84."""
    save_reasoner(toy_reasoner, vocabulary.tokenizer, tmp_path / "start", size=84)
    return tmp_path / "start"


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Rows with a mask, with a box alone, and absent ones; images of 80 x 60."""
    folder, rng = tmp_path / "csv", np.random.default_rng(0)
    folder.mkdir()
    mask = np.zeros((60, 80), np.uint8)
    mask[15:45, 20:60] = 255
    PilImage.fromarray(mask).save(folder / "mask.png")
    lines = ["image,query,mask,x1,y1,x2,y2,group,category"]
    for k in range(6):
        PilImage.fromarray(rng.integers(0, 255, (60, 80), dtype=np.uint8)).save(folder / f"{k}.png")
        lines.append(f"{k}.png,Where is it?," + ("mask.png,,,,", ",40,30,80,60", ",,,,")[k % 3] + f",g{k},thing")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder
