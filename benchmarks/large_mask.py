"""From image and question to mask with a 3B in four bits, answer only, beside peers::

    python benchmarks/peers/install.py --into /tmp/peers
    python benchmarks/large_mask.py --peers /tmp/peers --work /tmp/large [--shape tiny]

A Qwen2.5-VL of the 3B's true shape, text and vision, and a SAM ViT-B, both with random weights. Each side makes its own
four-bit model of the checkpoint and loads it in a process of its own, one at a time; they take turns. Every run asks
two questions about an image that nobody has seen: the first one, and the next one about the same image.

What is compared, plainly: ours is `Grounder.ground`, whose answer follows the grammar, so that what can be only one
token costs no run of its own. Random weights write no valid answer by themselves: A PEER IS MADE TO WRITE EXACTLY AS
MANY TOKENS AS OUR WHOLE ANSWER HAS, greedily, one by one, and what they say is ignored. Then THE SAME SAM (our bundle's
graphs in ONNX Runtime, alone on the cores, once a round) draws a mask, and its time is added to every peer's: only the
reasoner differs. The tokenizer splits as Qwen's does, each digit is a token; prompts have the same tokens on every
side, except where a peer wants text. A peer that does not install, convert or load is listed with its error.
"""

import argparse
import itertools
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from large_decode import PEERS, Side, SideError, processor, spread
from large_reasoner import TEXT, VISION, measured, shapes, write_checkpoint
from peers.install import find_python
from peers.questions import Questions
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from medreasoner import MedReasonerError
from medreasoner.bundle import load_bundle
from medreasoner.providers import usable_cores
from medreasoner.reasoner.prompt import Prompt, load_tokenizer
from medreasoner_cli.busy import LIMIT, CoreWatch, busy_sentence, check_quiet
from medreasoner_export import ReasonerOptions, build_bundle, export_reasoner, export_segmenter
from medreasoner_export.settings import MEDREASONER_7B

OURS = "ours"
ASKED = ("first question", "next question")
TEXTS = ("Which organ lies behind the stomach in this image?", "Where is the part that pumps blood?")
# Heads as wide as the 3B's, so that every road is the same.
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip
TINY_VISION = VISION | {
    "depth": 2, "hidden_size": 160, "intermediate_size": 200, "num_heads": 2, "fullatt_block_indexes": [1],
}  # fmt: skip
SHAPES = {"3b": (TEXT["3b"], VISION), "tiny": (TINY, TINY_VISION)}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<think>", "</think>")  # fmt: skip
# Where Qwen's tokenizer splits text: words with what stands before them, single digits, signs, white space.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKEN_SIDE = 28  # pixels of the image that become one token
_WARM_UP, _AGAIN = 1_000_000, 1000  # numbers of images that no run asks about
_WARM = "4 4"  # tokens that a peer writes to warm up
_SETTLE_S = 0.2  # threads of the last side may spin for a while after their work


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A side that lives in an environment of its own, and with the same `model` may be there in several ways."""

    lock: str
    script: str
    model: str
    extra: tuple[str, ...] = ()


PEER_SIDES = {
    "llama.cpp, tower F16": Peer(lock="llama-cpp-python", script="llama_mask.py", model="llama", extra=("F16",)),
    "llama.cpp, tower Q8_0": Peer(lock="llama-cpp-python", script="llama_mask.py", model="llama", extra=("Q8_0",)),
    "llama.cpp, tower Q4_0": Peer(lock="llama-cpp-python", script="llama_mask.py", model="llama", extra=("Q4_0",)),
    "OpenVINO GenAI, SDPA": Peer(lock="optimum-intel", script="openvino_mask.py", model="openvino", extra=("SDPA",)),
    "OpenVINO GenAI, PA": Peer(lock="optimum-intel", script="openvino_mask.py", model="openvino", extra=("PA",)),
}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that splits as Qwen's does, with the few words that are needed, and the checkpoint's names for it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=list(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    words = (MEDREASONER_7B["prompt"]["template"], MEDREASONER_7B["answer"]["present"], *TEXTS)
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "dtype": "bfloat16",
    }  # fmt: skip
    config["text_config"] |= {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "medreasoner.json").write_text(json.dumps({"max_length": 2048}))


def write_reasoner(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Random weights, and what is read beside them."""
    write_checkpoint(folder, text, vision)
    write_tokenizer(folder)


def write_sam(folder: Path) -> None:
    """SAM ViT-B, random weights."""
    from transformers import SamConfig, SamModel, SamVisionConfig

    # The default range of 1e-10 would give denormals.
    SamModel(SamConfig(vision_config=SamVisionConfig(initializer_range=0.02))).save_pretrained(folder)


def export_ours(scratch: Path) -> None:
    """Our bundle: the decoder in four bits, both towers in bfloat16, or where there is no AMX in eight bits."""
    for precision in ("int4", "int8"):
        options = ReasonerOptions(precision=precision)
        export_reasoner(scratch / "checkpoint", scratch / f"reasoner-{precision}", options=options)
    export_segmenter(scratch / "sam", scratch / "segmenter")
    build_bundle(
        scratch / "reasoner-int4", scratch / "segmenter", scratch / "ours", name="large", force=True,
        cpu_reasoner=scratch / "reasoner-int8", cpu_graphs=("vision",), bfloat16=True, integer_images=True,
    )  # fmt: skip


def prepare(work: Path, shape: str, peers: Mapping[str, Path]) -> dict[str, str]:
    """Every side's model under `work`, where it is not there yet; errors by the model's name."""
    text, vision = SHAPES[shape]
    found = {PEER_SIDES[name].model: (PEER_SIDES[name].script, python) for name, python in peers.items()}
    missing = {model: how for model, how in found.items() if not (work / model).exists()}
    if not missing and (work / "ours").exists():
        return {}
    need = 2 * sum(2 * math.prod(shape) for _, shape in shapes(text, vision))
    if shutil.disk_usage(work).free < need:
        raise SystemExit(f"{work}: {need / 1e9:.0f} GB of free disk are needed")
    errors = {}
    with tempfile.TemporaryDirectory(prefix="making-", dir=work) as folder:
        scratch = Path(folder)
        measured("checkpoint", write_reasoner, scratch / "checkpoint", text, vision)
        if not (work / "ours").exists():
            measured("SAM", write_sam, scratch / "sam")
            measured("our bundle", export_ours, scratch)
            (scratch / "ours").rename(work / "ours")
        for model, (script, python) in missing.items():
            try:
                _convert(scratch, model, script, python)
                (scratch / model).rename(work / model)
            except SideError as err:
                errors[model] = str(err)
                print(f"{model}: {err}", flush=True)
    return errors


def _convert(scratch: Path, model: str, script: str, python: Path) -> None:
    command = [str(python), str(PEERS / script), "prepare", str(scratch / "checkpoint"), str(scratch / model)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{model:<12} {time.perf_counter() - start:7.1f} s   exit {done.returncode}", flush=True)
    if done.returncode:
        raise SideError(f"is not converted: {(done.stderr.strip().splitlines() or ['no message'])[-1][:500]}")


def write_questions(work: Path, side: int) -> Questions:
    """What all sides are asked, in our bundle's tokens."""
    bundle = load_bundle(work / "ours", cache_dir=work / "cache")
    spec = bundle.spec.reasoner
    prompt = Prompt(load_tokenizer(str(bundle.path(spec.tokenizer))), spec)
    n_image = (side // TOKEN_SIDE) ** 2
    wholes = [prompt.whole(text, n_image) for text in TEXTS]
    start = wholes[0].index(prompt.image_token)
    questions = Questions(
        side=side, n_image=n_image, texts=list(TEXTS), before=wholes[0][:start],
        prompts=[spec.prompt.template.replace("{query}", text) for text in TEXTS],
        after=[whole[start + n_image :] for whole in wholes],
    )  # fmt: skip
    (work / "questions.json").write_text(json.dumps(asdict(questions)))
    return questions


@dataclass(slots=True, kw_only=True)
class Rounds:
    """Runs of all sides in turn. Each is loaded for its turn alone, so that one model at a time is in memory."""

    commands: Mapping[str, Sequence[str]]
    logs: Path
    wait_s: float
    anyway: bool
    errors: dict[str, str]
    noted: list[str] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)

    def take(self, runs: int) -> list[dict[str, dict[str, Any]]]:
        """Answers of the sides by their names, of every round."""
        rounds: list[dict[str, dict[str, Any]]] = []
        try:
            for number in range(runs):
                rounds.append(self._round(number))
        except MedReasonerError as err:
            self.noted.append(f"STOPPED after {len(rounds)} of {runs} rounds: {err}")
        return rounds

    def _round(self, number: int) -> dict[str, dict[str, Any]]:
        """Ours first: the peers write as many tokens. These change their order from round to round."""
        answers = {OURS: self._turn(OURS, number, "")}
        counts = " ".join(str(answer["tokens"]["answer"]) for answer in answers[OURS]["answers"])
        others = [name for name in self.commands if name != OURS]
        shift = number % max(1, len(others))
        for name in others[shift:] + others[:shift]:
            if name not in self.errors:
                try:
                    answers[name] = self._turn(name, number, counts)
                except SideError as err:
                    self.errors[name] = str(err)
        return answers

    def _turn(self, name: str, number: int, counts: str) -> dict[str, Any]:
        """Load, ask about one image to warm up, and about another one, which counts."""
        begin = time.monotonic()
        side = Side(name, self.commands[name], self.logs / f"{name.replace(' ', '-')}.log")
        try:
            side.load()
            self.facts[name] = side.facts
            loaded = time.monotonic()
            side.run(_WARM_UP + number, _WARM if counts else "")
            print(
                f"round {number + 1}: {name}: loaded in {loaded - begin:.0f} s, warm after "
                f"{time.monotonic() - loaded:.0f} s", file=sys.stderr, flush=True,
            )  # fmt: skip
            return self._measured(side, number, counts)
        finally:
            side.close()

    def _measured(self, side: Side, number: int, counts: str) -> dict[str, Any]:
        """One run, again about another image if others loaded the cores meanwhile."""
        end = time.monotonic() + self.wait_s
        for again in itertools.count():
            time.sleep(_SETTLE_S)
            watch = CoreWatch(side.process)
            answer = side.run(number + again * _AGAIN, counts)
            self.memory[side.name] = answer["memory_mib"]
            share = watch.share_of_others() or 0.0
            if share > LIMIT and self.anyway:
                self.noted.append(f"BUSY: {busy_sentence(share)} during a run of {side.name}")
            if share <= LIMIT or self.anyway:
                return answer
            if time.monotonic() > end:
                raise MedReasonerError(busy_sentence(share))
        raise AssertionError("the loop has no end of its own")


def seconds(answers: Mapping[str, Mapping[str, Any]], name: str, which: int) -> float:
    """From image, or from the question about the image that was read, to the mask."""
    spent = float(answers[name]["answers"][which]["s"])
    if name == OURS:
        return spent
    sam = answers[OURS]["segmenter_s"]
    return spent + sam["decode"] + (sam["encode"] if which == 0 else 0.0)


def table(rounds: Sequence[Mapping[str, Any]], memory: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A row a side and question; ratios are those of runs that stood side by side."""
    names = [name for name in rounds[0] if all(name in each for each in rounds)]
    lines = []
    for which, asked in enumerate(ASKED):
        lines.append(
            f"{asked + ', seconds':<28}{'median (quartiles)':<25}{'/ ours':<23}{'own MiB':>8}  by stage, medians"
        )
        for name in names:
            spent = [seconds(each, name, which) for each in rounds]
            ratios = [value / seconds(each, OURS, which) for value, each in zip(spent, rounds, strict=True)]
            parts = [each[name]["answers"][which]["stages_s"] for each in rounds]
            stages = {stage: statistics.median(part[stage] for part in parts) for stage in parts[0]}
            said = ", ".join(f"{stage} {value:.2f}" for stage, value in stages.items() if value >= 0.005)
            lines.append(f"{name:<28}{spread(spent):<25}{spread(ratios):<23}{memory[name]['RssAnon']:>8}  {said}")
    parts = ("encode", "decode")
    sam = ", ".join(f"{part} {spread([each[OURS]['segmenter_s'][part] for each in rounds])}" for part in parts)
    return [*lines, f"SAM for the peers, seconds, in their totals: {sam}"]


def verdicts(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The best peer's time over ours, run by run."""
    lines = []
    peers = [name for name in rounds[0] if name != OURS and all(name in each for each in rounds)]
    for which, asked in enumerate(ASKED):
        if peers:
            best = min(peers, key=lambda name: statistics.median(seconds(each, name, which) for each in rounds))
            ratios = [seconds(each, best, which) / seconds(each, OURS, which) for each in rounds]
            alone = [
                each[best]["answers"][which]["s"] / _without_sam(each[OURS]["answers"][which]["stages_s"])
                for each in rounds
            ]
            lines.append(f"{asked}: best peer ({best}) / ours: {spread(ratios)}; the reasoners alone: {spread(alone)}")
    return lines


def _without_sam(stages: Mapping[str, float]) -> float:
    return sum(stages.get(stage, 0.0) for stage in ("preprocess", "vision", "prefill", "answer"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, kept with --keep")
    parser.add_argument("--peers", type=Path, required=True, help="folder that peers/install.py filled")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="3b", help="tiny: to try every road in a minute")
    parser.add_argument("--side", type=int, default=448, help="of the image in pixels, a multiple of 28")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every side")
    parser.add_argument("--only", action="append", choices=list(PEER_SIDES), help="may be repeated; default: all peers")
    parser.add_argument("--keep", action="store_true", help="leave the models for the next time")
    parser.add_argument("--prepare", action="store_true", help="make the models and end; implies --keep")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds that a run waits for idle cores, at most")
    parser.add_argument("--anyway", action="store_true", help="measure even while other processes load the cores")
    parser.add_argument("--json", type=Path, help="file for every single figure")
    options = parser.parse_args()
    try:
        _run(options)
    except MedReasonerError as err:
        raise SystemExit(f"error: {err}") from err


def _run(options: argparse.Namespace) -> None:
    work = options.work / f"mask-{options.shape}"
    work.mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    pythons = {}
    for name in options.only or PEER_SIDES:
        try:
            pythons[name] = find_python(options.peers, PEER_SIDES[name].lock)
        except FileNotFoundError as err:
            errors[name] = str(err)
    try:
        failed = prepare(work, options.shape, pythons)
        errors |= {name: failed[PEER_SIDES[name].model] for name in pythons if PEER_SIDES[name].model in failed}
        if options.prepare:
            return
        questions = write_questions(work, options.side)
        noted = [line] if (line := check_quiet(anyway=options.anyway)) else []
        asked = [str(work / "questions.json"), str(options.threads)]
        commands = {
            OURS: [sys.executable, str(PEERS / "own_mask.py"), str(work / "ours"), *asked],
        }
        for name, python in pythons.items():
            if name not in errors:
                peer = PEER_SIDES[name]
                commands[name] = [str(python), str(PEERS / peer.script), "serve", str(work / peer.model), *asked]
                commands[name] += peer.extra
        rounds = Rounds(
            commands=commands, logs=work, wait_s=options.wait, anyway=options.anyway, errors=errors, noted=noted
        )
        print_report(options, questions, rounds, rounds.take(options.runs))
    finally:
        if not (options.keep or options.prepare):
            shutil.rmtree(work)


def print_report(
    options: argparse.Namespace, questions: Questions, turns: Rounds, rounds: Sequence[Mapping[str, Any]]
) -> None:
    """Everything that was found, and how."""
    if not rounds:
        raise SystemExit("\n".join(["error: no round was finished", *turns.noted, *turns.errors.values()]))
    text, vision = SHAPES[options.shape]
    counts = [answer["tokens"] for each in rounds for answer in each[OURS]["answers"]]
    behind = [len(each) for each in questions.after]
    lengths = [len(questions.before) + questions.n_image + each for each in behind]
    print("\nFROM IMAGE AND QUESTION TO MASK, answer only, random weights in four bits; peers write as many tokens as")
    print("our answer has, whatever they say, and the same SAM's time is added to theirs")
    print(
        f"shape {options.shape}: decoder {text['num_hidden_layers']} layers of {text['hidden_size']}, tower "
        f"{vision['depth']} of {vision['hidden_size']}; image {questions.side} x {questions.side}: {questions.n_image} "
        f"tokens; prompts {lengths[0]} and {lengths[1]} tokens, of which {behind[0]} and {behind[1]} behind the image"
    )
    print(
        f"answers: {_range(counts, 'answer')} tokens, of which {_range(counts, 'forced')} forced; runs of our decoder "
        f"{_range(counts, 'decoder_runs')}; {len(rounds)} interleaved runs, each in a new process after one to warm up"
    )
    print(f"{processor()}, {usable_cores()} usable cores, {platform.machine()}, Python {platform.python_version()}")
    for name, facts in turns.facts.items():
        versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
        print(f"  {name}: {versions}; {facts['settings']}")
    print("".join(f"  {line}\n" for line in turns.noted), end="")
    print("\n" + "\n".join(table(rounds, turns.memory)) + "\n")
    print("\n".join(verdicts(rounds)))
    for name, error in turns.errors.items():
        print(f"{name}: NOT MEASURED: {error}")
    if options.json:
        found = {
            "shape": options.shape, "questions": asdict(questions), "processor": processor(),
            "threads": options.threads, "notes": turns.noted, "errors": turns.errors, "memory_mib": turns.memory,
            "rounds": list(rounds),
            "sides": turns.facts,
        }  # fmt: skip
        options.json.write_text(json.dumps(found, indent=2))


def _range(counts: Sequence[Mapping[str, int]], kind: str) -> str:
    values = [each[kind] for each in counts]
    return f"{min(values)} to {max(values)}"


if __name__ == "__main__":
    main()
