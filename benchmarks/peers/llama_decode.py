"""llama.cpp as a peer of ``large_decode.py``; runs in an environment of its own, see install.py::

python llama_decode.py prepare CHECKPOINT MODEL
python llama_decode.py serve MODEL THREADS PROMPT STEPS
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from q4_gguf import bytes_a_token, write_gguf
from random_prompt import random_prompt
from serving import run_number, serve, versions


def prepare(checkpoint: Path, model: Path) -> None:
    write_gguf(checkpoint, model)


def start(
    model: Path, threads: int, n_prompt: int, n_steps: int
) -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
    import llama_cpp as llama

    llama.llama_backend_init()
    loaded = llama.llama_model_load_from_file(str(model).encode(), llama.llama_model_default_params())
    if not loaded:
        raise ValueError(f"{model}: llama.cpp does not load it")
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = -(-(n_prompt + n_steps + 1) // 256) * 256
    options.n_threads = options.n_threads_batch = threads
    context = llama.llama_init_from_model(loaded, options)
    vocabulary = llama.llama_model_get_vocab(loaded)
    vocab_size = llama.llama_vocab_n_tokens(vocabulary)
    sampler = llama.llama_sampler_init_greedy()

    def feed(tokens: list[int]) -> int:
        array = (llama.llama_token * len(tokens))(*tokens)
        code = llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return int(llama.llama_sampler_sample(sampler, context, -1))

    def run(line: str) -> Mapping[str, Any]:
        prompt = random_prompt(n_prompt, vocab_size, run_number(line))
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        steps: list[float] = []
        at, pending = perf_counter(), prompt
        while len(steps) <= n_steps:
            pending = [feed(pending)]
            now = perf_counter()
            steps.append(now - at)
            at = now
        return {"prompt_s": steps[0], "steps_s": steps[1:]}

    features = llama.llama_print_system_info().decode()
    return {
        "versions": versions(["llama-cpp-python"]),
        "settings": f"{threads} threads; Q4_0, head too; flash attention {options.flash_attn_type} (-1: it chooses), "
        f"mapped file; built here for this processor: {features}",
        "weight_bytes": bytes_a_token(model),
    }, run


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(lambda: start(Path(sys.argv[2]), *map(int, sys.argv[3:6])))
