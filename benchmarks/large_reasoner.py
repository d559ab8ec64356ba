"""Does a checkpoint of a published size become a bundle, and answer, within this machine's memory?::

    python benchmarks/large_reasoner.py --size 7b --work /tmp/large

Writes a Qwen2.5-VL of the true shapes with random bfloat16 weights in shards (16 GB for 7b), exports it in four bits,
joins it with a toy segmenter, asks two questions, and verifies the bundle against the checkpoint. Each step runs in a
process of its own and prints its time, its peak of anonymous memory (RssAnon) and its peak of all memory (VmHWM, mapped
files included). The answers mean nothing.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from medreasoner_export import ReasonerOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.toy import make_toy_reasoner, make_toy_segmenter

SHARD_BYTES = 4 * 2**30
VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
# Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct, config.json.
TEXT = {
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip


def shapes(text: dict[str, Any], vision: dict[str, Any] = VISION) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published layout."""
    wide, dim, out = vision["intermediate_size"], vision["hidden_size"], text["hidden_size"]
    yield "visual.patch_embed.proj.weight", (dim, 3, 2, 14, 14)
    for index in range(vision["depth"]):
        block = f"visual.blocks.{index}."
        yield from ((block + name, (dim,)) for name in ("norm1.weight", "norm2.weight"))
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim),
            ("mlp.gate_proj", wide, dim), ("mlp.up_proj", wide, dim), ("mlp.down_proj", dim, wide),
        ):  # fmt: skip
            yield f"{block}{name}.weight", (rows, columns)
            yield f"{block}{name}.bias", (rows,)
    yield "visual.merger.ln_q.weight", (dim,)
    for name, rows in (("visual.merger.mlp.0", 4 * dim), ("visual.merger.mlp.2", out)):
        yield f"{name}.weight", (rows, 4 * dim)
        yield f"{name}.bias", (rows,)
    yield "model.embed_tokens.weight", (text["vocab_size"], out)
    kv = out // text["num_attention_heads"] * text["num_key_value_heads"]
    for index in range(text["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        yield from ((layer + name, (out,)) for name in ("input_layernorm.weight", "post_attention_layernorm.weight"))
        for part, rows in (("q", out), ("k", kv), ("v", kv)):
            yield f"{layer}self_attn.{part}_proj.weight", (rows, out)
            yield f"{layer}self_attn.{part}_proj.bias", (rows,)
        yield layer + "self_attn.o_proj.weight", (out, out)
        for part, size in (("gate", (text["intermediate_size"], out)), ("up", (text["intermediate_size"], out))):
            yield f"{layer}mlp.{part}_proj.weight", size
        yield layer + "mlp.down_proj.weight", (out, text["intermediate_size"])
    yield "model.norm.weight", (out,)
    if not text["tie_word_embeddings"]:
        yield "lm_head.weight", (text["vocab_size"], out)


def write_checkpoint(folder: Path, text: dict[str, Any], vision: dict[str, Any] = VISION) -> None:
    """Random weights, tensor by tensor, with the toy's tokenizer and prompt."""
    make_toy_reasoner(folder, tied=text["tie_word_embeddings"])
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config["text_config"] |= text | {"rope_parameters": rope, "max_position_embeddings": 128000}
    config["vision_config"] |= vision | {"out_hidden_size": text["hidden_size"]}
    config["tie_word_embeddings"] = text["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes(text, vision):
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * math.prod(shape)
    rng, names = np.random.default_rng(0), {}
    noise = rng.standard_normal(2**24, dtype=np.float32)
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        header, start = {}, 0
        for name, shape in shard:
            end = start + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
            names[name], start = file, end
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, shape in shard:
                is_norm = "norm" in name or "ln_q" in name
                scale = 0.1 if is_norm else shape[-1] ** -0.5 if len(shape) > 1 else 0.02
                values = (noise * scale + float(is_norm)).astype(ml_dtypes.bfloat16).view(np.uint16)
                left, first = math.prod(shape), int(rng.integers(2**23))
                while left:  # the same noise from other places: drawing fifteen gigabytes would take minutes
                    part = values[first : first + left]
                    out.write(part.data.cast("B"))
                    left, first = left - len(part), 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def export(work: Path, precision: str) -> None:
    """The checkpoint as four-bit graphs."""
    options = ReasonerOptions(precision=precision, settings={"max_length": 1024})  # type: ignore[arg-type]
    export_reasoner(work / "checkpoint", work / "reasoner", options=options)


def bundle(work: Path) -> None:
    """With a toy segmenter."""
    export_segmenter(make_toy_segmenter(work / "toy"), work / "segmenter")
    build_bundle(work / "reasoner", work / "segmenter", work / "bundle", name="large", force=True)


def ask(work: Path) -> None:
    """One question about a random image, and a second one about it."""
    from medreasoner import Grounder

    image = np.random.default_rng(0).integers(0, 255, (500, 400), np.uint8)
    start = time.perf_counter()
    with Grounder.load(work / "bundle", cache_dir=work / "cache") as grounder:
        loaded = time.perf_counter()
        with grounder.open(image) as study:
            first = study.ground("Where is the heart?")
            second = study.ground("Which organ filters the blood?")
    print(f"    load {loaded - start:.1f} s, warnings {list(first.warnings)}")
    for name, result in (("first question", first), ("next question", second)):
        stages = ", ".join(f"{stage} {spent / 1000:.1f}" for stage, spent in result.timings_ms.items())
        print(f"    {name}, s: {stages}; tokens {dict(result.tokens)}")
        print(f"    {result.answer}")


def verify(work: Path) -> None:
    """Graphs and one whole answer against the checkpoint in float32, which is read matrix by matrix."""
    from medreasoner.image import read_image
    from medreasoner_export import Question, verify_bundle

    start = time.perf_counter()

    def done(stage: str) -> None:
        print(f"    {time.perf_counter() - start:7.1f} s  {stage}", flush=True)

    image = read_image(np.random.default_rng(0).integers(0, 255, (500, 400), np.uint8))
    report = verify_bundle(
        work / "bundle", work / "checkpoint", work / "toy",
        questions=[Question(image=image, query="Where is the heart?")], progress=done,
    )  # fmt: skip
    print(report.to_markdown())


def measured(name: str, call: Callable[..., None], *arguments: Any) -> None:
    """Run a step in a process of its own and print what it took."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=call, args=arguments)
    start = time.perf_counter()
    process.start()
    peak = {"RssAnon": 0, "VmHWM": 0}

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.is_alive():
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key, _, value = line.partition(":")
                if key in peak:
                    peak[key] = max(peak[key], int(value.split()[0]))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.join()
    watcher.join()
    spent = time.perf_counter() - start
    memory = ", ".join(f"{key} {value / 2**20:.2f} GiB" for key, value in peak.items())
    print(f"{name:<12} {spent:7.1f} s   peak {memory}   exit {process.exitcode}", flush=True)
    if process.exitcode:
        raise SystemExit(f"{name} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(TEXT), default="7b")
    parser.add_argument("--layers", type=int, help="of the decoder, for a quick look; default: all")
    parser.add_argument("--precision", choices=("fp32", "int8", "int4"), default="int4")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files, which are removed at the end")
    options = parser.parse_args()
    text = dict(TEXT[options.size])
    text["num_hidden_layers"] = options.layers or text["num_hidden_layers"]
    options.work.mkdir(parents=True, exist_ok=True)
    # The checkpoint, the export and the bundle; in four bits the latter two are a third of it.
    need = sum(2 * math.prod(shape) for _, shape in shapes(text)) * (3 if options.precision == "fp32" else 2)
    if shutil.disk_usage(options.work).free < need:
        raise SystemExit(f"{options.work}: {need / 1e9:.0f} GB of free disk are needed")
    with tempfile.TemporaryDirectory(prefix="large-", dir=options.work) as scratch:
        work = Path(scratch)
        measured("checkpoint", write_checkpoint, work / "checkpoint", text)
        measured("export", export, work, options.precision)
        measured("bundle", bundle, work)
        files = {path.name: path.stat().st_size / 1e9 for path in (work / "bundle" / "reasoner").iterdir()}
        print("    " + ", ".join(f"{name} {size:.2f} GB" for name, size in sorted(files.items()) if size > 0.01))
        measured("ask", ask, work)
        measured("verify", verify, work)


if __name__ == "__main__":
    main()
