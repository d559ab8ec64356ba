"""llama.cpp as a peer of ``large_mask.py``; runs in an environment of its own, see install.py::

    python llama_mask.py prepare CHECKPOINT MODEL
    python llama_mask.py serve MODEL QUESTIONS THREADS F16|Q8_0|Q4_0

The tower runs in its library for images (mtmd). Token ids are given, not text: they are those of our side. For the next
question everything behind the image is removed from the cache, as its server does.
"""

import ctypes
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from mmproj_gguf import write_mmproj
from q4_gguf import write_gguf
from questions import lengths, random_image, read_questions
from serving import run_number, serve, versions

TOWERS = ("F16", "Q8_0", "Q4_0")


def prepare(checkpoint: Path, model: Path) -> None:
    model.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    sections = config["text_config"]["rope_parameters"]["mrope_section"]
    write_gguf(checkpoint, model / "text.gguf", sections=sections)
    for kind in TOWERS:
        write_mmproj(checkpoint, model / f"tower-{kind}.gguf", kind)


class Model:
    """Text model and tower, and one sequence in the cache."""

    def __init__(self, folder: Path, threads: int, tower: str, n_context: int) -> None:
        import llama_cpp as llama
        from llama_cpp import mtmd_cpp as mtmd

        self.llama, self.mtmd = llama, mtmd
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(
            str(folder / "text.gguf").encode(), llama.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"{folder}: llama.cpp does not load it")
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = n_context
        options.n_threads = options.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, options)
        self.memory = llama.llama_get_memory(self.context)
        self.sampler = llama.llama_sampler_init_greedy()
        settings = mtmd.mtmd_context_params_default()
        settings.use_gpu = settings.print_timings = settings.warmup = False
        settings.n_threads, settings.flash_attn_type = threads, 1  # its warm-up would find that it works
        self.tower = mtmd.mtmd_init_from_file(str(folder / f"tower-{tower}.gguf").encode(), self.model, settings)
        if not self.tower:
            raise ValueError(f"{folder}: mtmd does not load the tower")
        self.n_batch, self.place = n_context, 0

    def feed(self, tokens: list[int]) -> None:
        """Run tokens; with an image before them their places are no longer their count."""
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, self.place + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index == len(tokens) - 1
        code = self.llama.llama_decode(self.context, batch)
        self.llama.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self.place += len(tokens)

    def feed_image(self, image: Any) -> tuple[float, int]:
        """Run an image (height, width, 3) uint8; the seconds of its tower, and its number of tokens."""
        mtmd, begin = self.mtmd, perf_counter()
        pixels = (ctypes.c_uint8 * image.size).from_buffer_copy(image)
        bitmap = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels)
        chunks = mtmd.mtmd_input_chunks_init()
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        self._check(mtmd.mtmd_tokenize(self.tower, chunks, ctypes.byref(text), bitmaps, 1))
        found = [mtmd.mtmd_input_chunks_get(chunks, at) for at in range(mtmd.mtmd_input_chunks_size(chunks))]
        kinds = [mtmd.mtmd_input_chunk_get_type(chunk) for chunk in found]
        chunk = found[kinds.index(mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)]
        self._check(mtmd.mtmd_encode_chunk(self.tower, chunk))
        spent, place = perf_counter() - begin, self.llama.llama_pos(self.place)
        embedded = mtmd.mtmd_get_output_embd(self.tower)
        self._check(
            mtmd.mtmd_helper_decode_image_chunk(
                self.tower, self.context, chunk, embedded, self.place, 0, self.n_batch, ctypes.byref(place),
                mtmd.mtmd_helper_post_decode_callback(), None,
            )
        )  # fmt: skip
        n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        self.place = place.value
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return spent, n_tokens

    def write(self, n_tokens: int) -> None:
        """Write greedily what follows; the last token is chosen, but not run."""
        for number in range(n_tokens):
            token = int(self.llama.llama_sampler_sample(self.sampler, self.context, -1))
            if number < n_tokens - 1:
                self.feed([token])

    def forget(self, place: int) -> None:
        """Remove everything from a place on."""
        self.llama.llama_memory_seq_rm(self.memory, 0, place, -1)
        self.place = place

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise RuntimeError(f"mtmd returned {code}")


def start(
    folder: Path, questions: Path, threads: int, tower: str
) -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
    asked = read_questions(questions)
    model = Model(folder, threads, tower, -(-(asked.n_image + 512) // 256) * 256)

    def run(line: str) -> Mapping[str, Any]:
        image, answers, shared = random_image(asked.side, run_number(line)), [], 0
        model.forget(0)
        for after, n_tokens in zip(asked.after, lengths(line), strict=True):
            begin, stages = perf_counter(), {}
            if not answers:
                model.feed(asked.before)
                stages["vision"], n_image = model.feed_image(image)
                assert n_image == asked.n_image, n_image
                shared = model.place
            else:
                model.forget(shared)
            model.feed(after)
            read = perf_counter()
            model.write(n_tokens)
            end = perf_counter()
            stages |= {"prefill": read - begin - stages.get("vision", 0.0), "answer": end - read}
            answers.append({"s": end - begin, "stages_s": stages})
        return {"answers": answers}

    features = model.llama.llama_print_system_info().decode()
    return {
        "versions": versions(["llama-cpp-python"]),
        "settings": f"{threads} threads; Q4_0, head too, tower {tower}; flash attention; next question: what is behind "
        f"the image is removed from the cache; built here for this processor: {features}",
    }, run


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(lambda: start(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]))
