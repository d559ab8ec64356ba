"""OpenVINO GenAI as a peer of ``large_decode.py``; runs in an environment of its own, see install.py::

    python openvino_decode.py prepare CHECKPOINT MODEL
    python openvino_decode.py serve MODEL THREADS PROMPT STEPS SDPA|PA [PROPERTY=VALUE...]

It reads llama.cpp's Q4_0 and keeps the levels and the blocks of 32.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from q4_gguf import bytes_a_token, write_gguf
from random_prompt import random_prompt
from serving import run_number, serve, versions


def prepare(checkpoint: Path, model: Path) -> None:
    # Where the two are one matrix, it converts the embedding's zero points anew for every token, which takes long.
    write_gguf(checkpoint, model, head_twice=True)


def start(
    model: Path, threads: int, n_prompt: int, n_steps: int, backend: str, more: Sequence[str]
) -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
    import openvino as ov
    import openvino_genai as genai

    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    properties |= {"ATTENTION_BACKEND": backend} | dict(part.split("=") for part in more)
    pipeline = genai.LLMPipeline(str(model), "CPU", **properties)
    options = genai.GenerationConfig()
    options.max_new_tokens = options.min_new_tokens = n_steps + 1
    options.ignore_eos, options.do_sample, options.apply_chat_template = True, False, False
    vocab_size = 151000  # of the vocabulary's 151936, those that any of its sizes has
    mask = ov.Tensor(np.ones((1, n_prompt), np.int64))

    def run(line: str) -> Mapping[str, Any]:
        prompt = ov.Tensor(np.array([random_prompt(n_prompt, vocab_size, run_number(line))], np.int64))
        begin = perf_counter()
        result = pipeline.generate(genai.TokenizedInputs(prompt, mask), options)
        spent = perf_counter() - begin
        # Microseconds: of the first token, and from each token to the next.
        raw = result.perf_metrics.raw_metrics
        steps = [value / 1e6 for value in raw.m_durations][-n_steps:]
        first = raw.m_times_to_first_token[0] / 1e6
        assert len(result.tokens[0]) == n_steps + 1, len(result.tokens[0])
        return {"prompt_s": first, "steps_s": steps, "wall_s": spent}

    said = ", ".join(f"{key} {value}" for key, value in properties.items())
    return {
        "versions": versions(["openvino", "openvino-genai"]),
        "settings": f"Q4_0 read from GGUF, head too; {said}; else its defaults for the CPU",
        "weight_bytes": bytes_a_token(model),
    }, run


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        threads, n_prompt, n_steps = map(int, sys.argv[3:6])
        serve(lambda: start(Path(sys.argv[2]), threads, n_prompt, n_steps, sys.argv[6], sys.argv[7:]))
