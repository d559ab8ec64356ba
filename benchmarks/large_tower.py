"""What reads images in a published size without its graph, beside its graphs in ONNX Runtime, in turns::

    python benchmarks/large_tower.py --work /tmp/tower --side 504
    python benchmarks/large_tower.py --work /tmp/sam --model sam

Random weights of the true shape: the vision tower of Qwen2.5-VL (0.67 billion, the same at 3B and 7B but for the width
of a token), or the image encoder of SAM ViT-B (90 million, 1024 x 1024 pixels). The graph in float32, the one that
multiplies integers, and our kernel in bfloat16 and in eight bits, with as many threads as there are cores. Prints the
median of each and of the rounds' ratios with their quartiles, the error beside float32, and each one's peak of memory.
Every road has a process of its own; needs 9 GB of disk, or 1 for SAM. With tiles (AMX) there is nothing in eight bits.
"""

import argparse
import functools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from large_mask import write_sam
from large_reasoner import TEXT, VISION, shapes

from medreasoner import ops
from medreasoner.image_tower import load_image_tower
from medreasoner.kernel_spec import TowerSpec
from medreasoner.manifest import read_record
from medreasoner.ort_session import OrtSession
from medreasoner.providers import RuntimeOptions, usable_cores
from medreasoner.reasoner.tower import load_tower
from medreasoner.reasoner.vision import vision_grid
from medreasoner.spec import SegmenterSpec, StretchResize, VisionSpec
from medreasoner_export.checkpoint import Entry, Weights
from medreasoner_export.graph import Precision, save_graph, weights_file
from medreasoner_export.qwen_config import QwenConfig
from medreasoner_export.qwen_vision import tower_section, vision_graph
from medreasoner_export.segmenter import SegmenterOptions, export_segmenter

PATCH, MERGE = 14, 2
GRAPHS = ("float32", "integers")
KERNELS = {"bfloat16": "bfloat16", "eight bits": "int8"}
ROADS = (*GRAPHS, *KERNELS)
SAM_SIDE = 1024

Run = Callable[[], dict[str, np.ndarray]]


def random_weights(config: dict[str, Any]) -> Weights:
    """The tower's tensors, drawn when they are read: each the same every time."""

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        def read() -> np.ndarray:
            rng = np.random.default_rng(list(name.encode()))
            noise = rng.standard_normal(shape, dtype=np.float32)
            if "norm" in name or "ln_q" in name:
                return 1 + 0.1 * noise
            return noise / np.float32(np.sqrt(np.prod(shape[1:]))) if len(shape) > 1 else 0.1 * noise

        return Entry(file=Path("random"), dtype="F32", shape=shape, read=read)

    visual = {name: shape for name, shape in shapes(TEXT["3b"]) if name.startswith("visual.")}
    return Weights(Path("random"), config, {name: entry(name, shape) for name, shape in visual.items()}, [])


def write(work: Path, config: QwenConfig, json: dict[str, Any]) -> TowerSpec:
    """Both graphs, the float32 one's weights in bfloat16 where the kernel finds them."""
    section = tower_section(config, "bfloat16", "fp32")
    assert section is not None
    precisions: dict[str, Precision] = {"float32": "fp32", "integers": "int8"}
    for road, precision in precisions.items():
        path = work / road / "vision.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        with weights_file(path, wanted=True, every=road == "float32") as outside:
            graph = vision_graph(
                random_weights(json), config, storage="bfloat16", metadata={}, precision=precision, outside=outside
            )
        save_graph(graph, path)
    return TowerSpec(**section, products="bfloat16")


def open_vision(road: str, work: Path, tower: TowerSpec, vision: VisionSpec, out_dim: int, side: int) -> Run:
    """Reads an image of noise."""
    grid = vision_grid(height=side, width=side, patch=PATCH, merge=MERGE, window=112, head_dim=vision.head_dim)
    patches = np.random.default_rng(0).standard_normal((1, grid.n_tokens * MERGE**2, 588)).astype(np.float32)
    if road in GRAPHS:
        session: Any = OrtSession(work / road / "vision.onnx", RuntimeOptions(device="cpu"))
    else:
        own = replace(tower, products=KERNELS[road])
        session = load_tower(work / "float32" / own.file, own, vision, out_dim=out_dim, n_threads=usable_cores())
    return lambda: session.bind({}, {}).run({"patches": patches, **grid.inputs()})


def open_sam(road: str, work: Path, spec: SegmenterSpec) -> Run:
    """Reads an image of noise."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, SAM_SIDE, SAM_SIDE)).astype(np.float32)
    if road in GRAPHS:
        session: Any = OrtSession(work / road / spec.graphs.encoder, RuntimeOptions(device="cpu"))
    else:
        assert spec.tower is not None
        own = replace(spec.tower, products=KERNELS[road])
        session = load_image_tower(work / "float32" / own.file, spec, own, n_threads=usable_cores())
    return lambda: session.bind({}, {}).run({"pixel_values": pixels})


def serve(opened: Callable[[], Run], pipe: Any) -> None:
    """Answers "run" with the seconds of a run, and at the end gives what came out, and the memory."""
    run = opened()
    (embeds,) = run().values()
    pipe.send("ready")
    while pipe.recv() == "run":
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)
    pipe.send((embeds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def rounds(pipes: dict[str, Any], count: int) -> Iterator[dict[str, float]]:
    for _ in range(count):
        seconds = {}
        for road, pipe in pipes.items():
            pipe.send("run")
            seconds[road] = pipe.recv()
        yield seconds


def vision_of(work: Path, side: int) -> Callable[[str], Run]:
    """Writes the graphs of a vision tower."""
    json = {
        "model_type": "qwen2_5_vl", "text_config": {**TEXT["3b"], "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [16, 24, 24]}, "max_position_embeddings": 32768},
        "vision_config": {**VISION, "out_hidden_size": TEXT["3b"]["hidden_size"]},
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    }  # fmt: skip
    config = QwenConfig.from_json(json)
    vision = VisionSpec(
        patch_size=PATCH, merge_size=MERGE, window_size=112, head_dim=config.vision.head_dim,
        full_attention_layers=tuple(config.vision.full_attention_layers), image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5), resize=StretchResize(width=side, height=side),
    )  # fmt: skip
    return functools.partial(
        open_vision,
        work=work,
        tower=write(work, config, json),
        vision=vision,
        out_dim=config.text.hidden_dim,
        side=side,
    )


def sam_of(work: Path) -> Callable[[str], Run]:
    """Writes the graphs of a SAM."""
    write_sam(work / "checkpoint")
    for road, precision in (("integers", "int8"), ("float32", "fp32")):
        options = SegmenterOptions(precision=precision, weights="bfloat16")
        section = export_segmenter(work / "checkpoint", work / road, options=options).section
    return functools.partial(open_sam, work=work, spec=read_record(SegmenterSpec, dict(section), "segmenter"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=("vision", "sam"), default="vision")
    parser.add_argument("--side", type=int, default=504, help="of the vision tower's image, a multiple of 28 pixels")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    if not ops.has_tiles():
        raise SystemExit("this processor has no AVX-512 with VNNI")
    chosen.work.mkdir(parents=True, exist_ok=True)
    roads = [road for road in ROADS if road != "eight bits" or ops.tile_road() != "amx-bf16"]
    open_road = sam_of(chosen.work) if chosen.model == "sam" else vision_of(chosen.work, chosen.side)
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for road in roads:
        ours, theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(functools.partial(open_road, road), theirs), daemon=True).start()
        ours.recv()
        pipes[road] = ours
    seconds = list(rounds(pipes, chosen.rounds))
    ends = {}
    for road, pipe in pipes.items():
        pipe.send("end")
        ends[road] = pipe.recv()
    exact = ends["float32"][0]
    print(f"products of bfloat16 by {ops.tile_road()}")
    for road in roads:
        embeds, peak = ends[road]
        ratios = statistics.quantiles([each[road] / each["bfloat16"] for each in seconds], n=4)
        print(
            f"{road}: {statistics.median(each[road] for each in seconds):.2f} s, "
            f"{ratios[1]:.2f} ({ratios[0]:.2f} - {ratios[2]:.2f}) times as long as the kernel in bfloat16, "
            f"error {np.linalg.norm(embeds - exact) / np.linalg.norm(exact):.4f}, peak {peak / 2**20:.1f} GB"
        )


if __name__ == "__main__":
    main()
