"""OpenVINO GenAI as a peer of ``large_mask.py``; runs in an environment of its own, see install.py::

    python openvino_mask.py prepare CHECKPOINT MODEL
    python openvino_mask.py serve MODEL QUESTIONS THREADS SDPA|PA [PROPERTY=VALUE...]

optimum-intel exports the checkpoint as anyone would: four bits for the text model, eight for the rest.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from questions import lengths, random_image, read_questions
from serving import run_number, serve, versions

OPTIONS = ("--weight-format", "int4", "--ratio", "1.0")
# The example by which the tower is traced: at its own 420 pixels the trace holds more than 11 GB.
CLI = """
from optimum.exporters.openvino.input_generators import DummyQwen2VLVisionEmbedInputGenerator as Example
Example.__init__.__defaults__ = (*Example.__init__.__defaults__[:2], 112, 112)
from optimum.commands.optimum_cli import main
main()
"""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    "image_token": "<|image_pad|>", "video_token": "<|endoftext|>",
    "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
}  # fmt: skip


def prepare(checkpoint: Path, model: Path) -> None:
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        for path in (*checkpoint.glob("*.safetensors*"), checkpoint / "tokenizer.json"):
            (source / path.name).symlink_to(path.resolve())
        config = json.loads((checkpoint / "config.json").read_text())
        rope = config["text_config"].pop(
            "rope_parameters"
        )  # as transformers 4 has it, the last one that it exports with
        config["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config["text_config"]["rope_theta"] = rope["rope_theta"]
        (source / "config.json").write_text(json.dumps(config))
        (source / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        (source / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
        command = [sys.executable, "-c", CLI, "export", "openvino", "--model", str(source)]
        command += ["--task", "image-text-to-text", *OPTIONS, str(model)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env=os.environ | {"TMPDIR": scratch},
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(" | ".join(done.stdout.strip().splitlines()[-3:]) or "no message")


def start(
    model: Path, questions: Path, threads: int, backend: str, more: Sequence[str]
) -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
    import openvino as ov
    import openvino_genai as genai

    asked = read_questions(questions)
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    properties |= {"ATTENTION_BACKEND": backend} | dict(part.split("=") for part in more)
    extra: dict[str, Any] = {}
    if backend == "PA":
        extra["scheduler_config"] = genai.SchedulerConfig()
        extra["scheduler_config"].enable_prefix_caching = True
        extra["scheduler_config"].cache_size = 1
    pipeline = genai.VLMPipeline(str(model), "CPU", **properties, **extra)
    prompts = [prompt.replace("<|vision_start|>{image}<|vision_end|>", IMAGE) for prompt in asked.prompts]

    def run(line: str) -> Mapping[str, Any]:
        image = ov.Tensor(random_image(asked.side, run_number(line))[None])
        answers = []
        for prompt, n_tokens in zip(prompts, lengths(line), strict=True):
            options = genai.GenerationConfig()
            options.max_new_tokens = options.min_new_tokens = n_tokens
            options.ignore_eos, options.do_sample, options.apply_chat_template = True, False, False
            begin = perf_counter()
            result = pipeline.generate(prompt, images=[image], generation_config=options)
            spent = perf_counter() - begin
            metrics = result.perf_metrics
            assert metrics.get_num_generated_tokens() == n_tokens, metrics.get_num_generated_tokens()
            first = metrics.get_ttft().mean / 1000
            vision = metrics.get_prepare_embeddings_duration().mean / 1000
            stages = {"vision": vision, "prefill": first - vision, "answer": spent - first}
            n_read = metrics.get_num_input_tokens()
            answers.append({"s": spent, "stages_s": stages, "n_prompt": n_read})
        return {"answers": answers}

    said = ", ".join(f"{key} {value}" for key, value in properties.items())
    cached = ", prefix caching" if extra else ""
    return {
        "versions": versions(["openvino", "openvino-genai", "optimum-intel", "nncf"]),
        "settings": f"exported with {' '.join(OPTIONS)}; {said}{cached}; else its defaults for the CPU",
    }, run


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        arguments = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6:]
        serve(lambda: start(*arguments))
