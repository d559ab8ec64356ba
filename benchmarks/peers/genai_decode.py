"""onnxruntime-genai as a peer of ``large_decode.py``; runs in an environment of its own, see install.py::

python genai_decode.py prepare CHECKPOINT MODEL
python genai_decode.py serve MODEL THREADS PROMPT STEPS
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from random_prompt import random_prompt
from serving import run_number, serve, versions
from text_checkpoint import write_text_checkpoint

# Symmetric levels in blocks of 32 and products of eight-bit activations are the builder's defaults for the CPU.
OPTIONS = ("block_size=32", "accuracy_level=4", "prune_lm_head=true")


def prepare(checkpoint: Path, model: Path) -> None:
    """Let the package's own builder make the four-bit graph."""
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        text = Path(scratch) / "text"
        write_text_checkpoint(checkpoint, text)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(text), "-o", str(model)]
        command += ["-p", "int4", "-e", "cpu", "-c", str(Path(scratch) / "cache"), "--extra_options", *OPTIONS]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit((done.stderr.strip().splitlines() or ["no message"])[-1])


def start(
    model: Path, threads: int, n_prompt: int, n_steps: int
) -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
    import onnxruntime_genai as og

    # Only genai_config.json says how many threads a session gets.
    path = model / "genai_config.json"
    settings = json.loads(path.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(settings))
    loaded = og.Model(str(model))
    vocab_size = settings["model"]["vocab_size"]

    def run(line: str) -> Mapping[str, Any]:
        prompt = random_prompt(n_prompt, vocab_size, run_number(line))
        parameters = og.GeneratorParams(loaded)
        length = n_prompt + n_steps + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(loaded, parameters)
        steps: list[float] = []
        at = perf_counter()
        generator.append_tokens(prompt)
        while len(steps) <= n_steps:
            generator.generate_next_token()
            now = perf_counter()
            steps.append(now - at)
            at = now
        return {"prompt_s": steps[0], "steps_s": steps[1:]}

    return {
        "versions": versions(["onnxruntime-genai", "onnxruntime"]),
        "settings": f"{threads} threads; builder -p int4 -e cpu {' '.join(OPTIONS)}; greedy, shared KV buffers",
        "weight_bytes": (model / "model.onnx.data").stat().st_size,  # the embedding is the head
    }, run


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(lambda: start(Path(sys.argv[2]), *map(int, sys.argv[3:6])))
