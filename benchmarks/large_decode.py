"""Tokens a second of a 3B decoder in four bits, beside peers and beside the memory's own speed::

    python benchmarks/peers/install.py --into /tmp/peers
    python benchmarks/large_decode.py --peers /tmp/peers --work /tmp/large [--layers 4]

A COMPARISON OF TEXT DECODERS ALONE: no image, no mask. A checkpoint of Qwen2.5-VL-3B's true text shape with random
weights is written once; every side makes its own four-bit model of it, in blocks of 32. Then each loads its model in a
process of its own, and they take turns: a prompt, and then single tokens, which are timed. A peer that does not
install, convert or load is listed with its error. Sides: `ours` chooses among the rows that the grammar allows, or,
labelled so, from all logits as the peers do; `read` only reads as many bytes as our decoder's weights have.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from large_reasoner import TEXT, VISION, bundle, export, measured, shapes, write_checkpoint
from peers.install import find_python

from medreasoner import MedReasonerError
from medreasoner.manifest import parse_manifest
from medreasoner.providers import usable_cores
from medreasoner.reasoner.step import needs_no_graph
from medreasoner_cli.busy import LIMIT, CoreWatch, busy_sentence, check_quiet

PEERS = Path(__file__).parent / "peers"
OURS, READ = "ours", "read"
MODES = ("allowed rows", "full logits")  # of ours
# The tower is not run: one layer of it is enough for an export.
SMALL_VISION = VISION | {"depth": 1, "fullatt_block_indexes": [0]}
_SETTLE_S = 0.2  # threads of the last side may spin for a while after their work


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A side that lives in an environment of its own."""

    lock: str
    script: str
    model: str
    extra: tuple[str, ...] = ()


PEER_SIDES = {
    "onnxruntime-genai": Peer(lock="onnxruntime-genai", script="genai_decode.py", model="genai"),
    "OpenVINO GenAI, SDPA": Peer(
        lock="openvino-genai", script="openvino_decode.py", model="openvino.gguf", extra=("SDPA",)
    ),
    "OpenVINO GenAI, PA": Peer(
        lock="openvino-genai", script="openvino_decode.py", model="openvino.gguf", extra=("PA",)
    ),
    "llama.cpp": Peer(lock="llama-cpp-python", script="llama_decode.py", model="llama.gguf"),
}


class SideError(Exception):
    """A side's own words on why it does not run."""


class Side:
    """A loaded model in a process of its own."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self._log = name, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.facts: dict[str, Any] = {}

    def load(self) -> None:
        """Wait until it is ready."""
        self.facts = self._answer()

    @property
    def process(self) -> int:
        """Its id."""
        return self._process.pid

    def run(self, number: int, mode: str) -> dict[str, Any]:
        """One prompt, other ones in every run, and its tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number} {mode}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if not line or "error" in answer:
            code = self._process.wait()
            said = self._log.read_text().strip().splitlines()[-1:] or ["no message"]
            raise SideError(answer.get("error", f"ended with code {code}: {said[0][:300]}"))
        return answer


@dataclass(slots=True, kw_only=True)
class Measured:
    """Of one side in one mode, run by run."""

    side: str
    mode: str = ""
    token_s: list[float] = field(default_factory=list)  # median over a run's tokens
    prompt_s: list[float] = field(default_factory=list)
    ways: list[dict[str, float]] = field(default_factory=list)  # of reading: seconds by way and number of threads

    def add(self, answer: Mapping[str, Any]) -> None:
        """One more run."""
        if self.side == READ:
            ways = {f"{way}, {n}": s for n, each in answer["read_s"].items() for way, s in each.items()}
            self.ways.append(ways)
            self.token_s.append(min(ways.values()))
        else:
            self.token_s.append(statistics.median(answer["steps_s"]))
            self.prompt_s.append(answer["prompt_s"])

    @property
    def label(self) -> str:
        return f"{self.side}, {self.mode}" if self.mode else self.side


def prepare(work: Path, text: dict[str, Any], peers: Mapping[str, Path]) -> dict[str, str]:
    """Every side's model under `work`, where it is not there yet; errors by the model's name."""
    wanted = {"ours": None} | {PEER_SIDES[name].model: (name, python) for name, python in peers.items()}
    missing = {model: how for model, how in wanted.items() if not (work / model).exists()}
    if not missing:
        return {}
    need = 2 * sum(2 * math.prod(shape) for _, shape in shapes(text, SMALL_VISION))
    if shutil.disk_usage(work).free < need:
        raise SystemExit(f"{work}: {need / 1e9:.0f} GB of free disk are needed")
    errors = {}
    with tempfile.TemporaryDirectory(prefix="making-", dir=work) as folder:
        scratch = Path(folder)
        measured("checkpoint", write_checkpoint, scratch / "checkpoint", text, SMALL_VISION)
        for model, how in missing.items():
            try:
                _make(scratch, model, how)
                (scratch / "bundle" if how is None else scratch / model).rename(work / model)
            except (SideError, SystemExit) as err:
                errors[model] = str(err)
                print(f"{model}: {err}", flush=True)
    return errors


def _make(scratch: Path, model: str, how: tuple[str, Path] | None) -> None:
    if how is None:
        measured("our export", export, scratch, "int4")
        measured("our bundle", bundle, scratch)
        shutil.rmtree(scratch / "reasoner", ignore_errors=True)
        return
    name, python = how
    command = [str(python), str(PEERS / PEER_SIDES[name].script), "prepare"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, str(scratch / "checkpoint"), str(scratch / model)], capture_output=True, text=True, check=False
    )
    print(f"{model:<12} {time.perf_counter() - start:7.1f} s   exit {done.returncode}", flush=True)
    if done.returncode:
        raise SideError(f"is not converted: {(done.stderr.strip().splitlines() or ['no message'])[-1][:500]}")


@contextmanager
def opened(sides: Mapping[str, Sequence[str]], work: Path, errors: dict[str, str]) -> Iterator[dict[str, Side]]:
    """The sides that load; why the others do not is added to `errors`."""
    with ExitStack() as stack:
        found = {}
        for name, command in sides.items():
            side = Side(name, command, work / f"{name.replace(' ', '-')}.log")
            stack.callback(side.close)
            try:
                side.load()
                found[name] = side
            except SideError as err:
                errors[name] = str(err)
        yield found


@dataclass(slots=True, kw_only=True)
class Turns:
    """Runs of all sides in turn."""

    sides: Mapping[str, Side]
    wait_s: float
    anyway: bool
    errors: dict[str, str]
    noted: list[str] = field(default_factory=list)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)

    def take(self, runs: int) -> list[Measured]:
        """Figures of the rounds that were finished; the first one warms up and is not kept."""
        figures = [Measured(side=name, mode=mode) for name in self.sides for mode in (MODES if name == OURS else ("",))]
        for number in range(runs + 1):
            shift = number % len(figures)
            try:
                answers = [(value, self._run(value, number)) for value in figures[shift:] + figures[:shift]]
            except MedReasonerError as err:
                self.noted.append(f"STOPPED after {max(0, number - 1)} of {runs} rounds: {err}")
                break
            for value, answer in answers:
                if answer is not None:
                    self.memory[value.side] = answer["memory_mib"]
                    if number:
                        value.add(answer)
            print(f"round {number} of {runs}{'' if number else ', to warm up'}", file=sys.stderr, flush=True)
        return [value for value in figures if value.token_s and value.side not in self.errors]

    def _run(self, value: Measured, number: int) -> dict[str, Any] | None:
        """One run, again if others loaded the cores meanwhile; None if the side failed."""
        if value.side in self.errors:
            return None
        side, end = self.sides[value.side], time.monotonic() + self.wait_s
        while True:
            time.sleep(_SETTLE_S)
            try:
                check_quiet(anyway=self.anyway or number == 0)
            except MedReasonerError:
                if time.monotonic() > end:
                    raise
                continue
            watch = CoreWatch(side.process)
            try:
                answer = side.run(number, value.mode)
            except SideError as err:
                self.errors[value.side] = str(err)
                return None
            share = watch.share_of_others() or 0.0
            if share <= LIMIT or number == 0:
                return answer
            if self.anyway:
                self.noted.append(f"BUSY: {busy_sentence(share)} during a run of {value.label}")
                return answer
            if time.monotonic() > end:
                raise MedReasonerError(busy_sentence(share))


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def table(
    figures: Sequence[Measured], sides: Mapping[str, Side], memory: Mapping[str, Mapping[str, int]], n_prompt: int
) -> list[str]:
    """A row a side; ratios are those of runs that stood side by side."""
    read = next((value for value in figures if value.side == READ), None)
    per_s = None if read is None else sides[READ].facts["weight_bytes"] / statistics.median(read.token_s)
    ours = [value for value in figures if value.side == OURS]
    head = f"{'tokens a second':<26}{'median (quartiles)':<25}{'prompt/s':>9}{'MB/token':>10}{'of the bound':>13}"
    head += f"{'peak MiB':>10}{'own MiB':>9}" + "".join(f"  {'/ ours, ' + value.mode:<26}" for value in ours)
    lines = [head]
    for value in figures:
        if value.side == READ:
            continue
        size = sides[value.side].facts["weight_bytes"]
        size = size[value.mode] if isinstance(size, dict) else size
        rate = 1 / statistics.median(value.token_s)
        share = "-" if per_s is None else f"{rate * size / per_s:.2f}"
        row = f"{value.label:<26}{spread([1 / each for each in value.token_s]):<25}"
        row += f"{n_prompt / statistics.median(value.prompt_s):>9.1f}{size / 1e6:>10.0f}{share:>13}"
        row += "".join(f"{memory[value.side].get(key, 0):>{width}}" for key, width in (("VmHWM", 10), ("RssAnon", 9)))
        for mine in ours:
            ratios = [theirs / own for own, theirs in zip(value.token_s, mine.token_s, strict=True)]
            row += f"  {spread(ratios):<26}"
        lines.append(row.rstrip())
    if read is not None and per_s is not None:
        size = sides[READ].facts["weight_bytes"]
        rates = {way: size / statistics.median(run[way] for run in read.ways) / 1e9 for way in read.ways[0]}
        lines.append(
            f"{'only read, like ours':<26}{spread([1 / each for each in read.token_s]):<25}{'':>9}{size / 1e6:>10.0f}"
            f"{'1':>13}   {per_s / 1e9:.1f} GB/s; by way and threads: "
            + ", ".join(f"{way} {rate:.1f}" for way, rate in rates.items())
        )
    return lines


def verdicts(figures: Sequence[Measured], sides: Mapping[str, Side]) -> list[str]:
    """Ours against the best peer, run by run, and against the bound."""
    peers = [value for value in figures if value.side not in (OURS, READ)]
    read = next((value for value in figures if value.side == READ), None)
    lines = []
    for mine in (value for value in figures if value.side == OURS):
        if peers:
            best = min(peers, key=lambda value: statistics.median(value.token_s))
            ratios = [theirs / own for own, theirs in zip(mine.token_s, best.token_s, strict=True)]
            lines.append(f"{mine.label} / best peer ({best.label}), tokens a second: {spread(ratios)}")
        if read is not None:
            parts = [bound / own for own, bound in zip(mine.token_s, read.token_s, strict=True)]
            lines.append(f"{mine.label} / tokens a second if only the decoder's weights were read: {spread(parts)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, kept with --keep")
    parser.add_argument("--peers", type=Path, required=True, help="folder that peers/install.py filled")
    parser.add_argument("--layers", type=int, help="of the decoder, to try it in a minute; default: all 36")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="tokens before those that are timed")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are timed in each run")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every side")
    parser.add_argument(
        "--only", action="append", choices=sorted(PEER_SIDES), help="may be repeated; default: all peers"
    )
    parser.add_argument("--keep", action="store_true", help="leave the models for the next time")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds that a run waits for idle cores, at most")
    parser.add_argument("--anyway", action="store_true", help="measure even while other processes load the cores")
    parser.add_argument("--json", type=Path, help="file for every single figure")
    options = parser.parse_args()
    try:
        _run(options)
    except MedReasonerError as err:
        raise SystemExit(f"error: {err}") from err


def _run(options: argparse.Namespace) -> None:
    noted = [line] if (line := check_quiet(anyway=options.anyway)) else []
    text = dict(TEXT["3b"])
    text["num_hidden_layers"] = options.layers or text["num_hidden_layers"]
    work = options.work / f"decode-3b-{text['num_hidden_layers']}"
    work.mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    pythons = {}
    for name in options.only or PEER_SIDES:
        try:
            pythons[name] = find_python(options.peers, PEER_SIDES[name].lock)
        except FileNotFoundError as err:
            errors[name] = str(err)
    try:
        failed = prepare(work, text, pythons)
        errors |= {name: failed[PEER_SIDES[name].model] for name in pythons if PEER_SIDES[name].model in failed}
        counts = [str(each) for each in (options.threads, options.prompt, options.steps)]
        size = decoder_bytes(work / "ours", text)
        commands = {OURS: [sys.executable, str(PEERS / "own_decode.py"), str(work / "ours"), *counts, str(size)]}
        for name, python in pythons.items():
            if name not in errors:
                peer = PEER_SIDES[name]
                script = [str(python), str(PEERS / peer.script), "serve", str(work / peer.model)]
                commands[name] = [*script, *counts, *peer.extra]
        commands[READ] = [sys.executable, str(PEERS / "read_bound.py"), str(size), str(options.threads)]
        with opened(commands, work, errors) as sides:
            turns = Turns(sides=sides, wait_s=options.wait, anyway=options.anyway, errors=errors, noted=noted)
            figures = turns.take(options.runs)
            print_report(options, text, turns, figures)
    finally:
        if not options.keep:
            shutil.rmtree(work)


def decoder_bytes(folder: Path, text: Mapping[str, Any]) -> int:
    """What our side reads for a token: the decoder's file, or its matrices as the kernel packs them."""
    if needs_no_graph(parse_manifest((folder / "manifest.json").read_bytes()).reasoner.step):
        matrices = (shape for name, shape in shapes(dict(text), SMALL_VISION) if "layers." in name and len(shape) == 2)
        return sum(math.prod(shape) for shape in matrices) * 37 // 64  # 4.625 bits a weight
    return sum(path.stat().st_size for path in (folder / "reasoner").glob("decoder*"))


def print_report(
    options: argparse.Namespace, text: Mapping[str, Any], turns: Turns, figures: Sequence[Measured]
) -> None:
    """Everything that was found, and how."""
    sides, noted, memory = turns.sides, turns.noted, turns.memory
    print("\nTEXT DECODERS ALONE, random weights in four bits: no image is read and no mask drawn")
    print(
        f"{text['num_hidden_layers']} layers, hidden {text['hidden_size']}, mlp {text['intermediate_size']}, "
        f"{text['num_attention_heads']} heads, {text['num_key_value_heads']} of keys and values, "
        f"vocabulary {text['vocab_size']}; {options.prompt} tokens of prompt, {options.steps} timed; "
        f"{options.runs} interleaved runs after one to warm up"
    )
    print(f"{processor()}, {usable_cores()} usable cores, {platform.machine()}, Python {platform.python_version()}")
    for name, side in sides.items():
        versions = ", ".join(f"{key} {value}" for key, value in side.facts["versions"].items())
        print(f"  {name}: {versions}; {side.facts['settings']}")
    if noted:
        print(f"  {len(noted)} notes, the worst: {max(noted, key=_percent)}")
        print("".join(f"  {line}\n" for line in noted if line.startswith("STOPPED")), end="")
    print("\n" + "\n".join(table(figures, sides, memory, options.prompt)) + "\n")
    print("\n".join(verdicts(figures, sides)))
    for name, error in turns.errors.items():
        print(f"{name}: NOT MEASURED: {error}")
    if options.json:
        facts = {
            "shape": dict(text), "prompt": options.prompt, "steps": options.steps, "processor": processor(),
            "threads": options.threads, "load": os.getloadavg(), "notes": noted, "errors": dict(turns.errors),
            "sides": {name: side.facts for name, side in sides.items()}, "memory_mib": memory,
            "seconds": {
                value.label: {"token": value.token_s, "prompt": value.prompt_s, "read": value.ways} for value in figures
            },
        }  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=2))


def _percent(line: str) -> int:
    return max((int(word) for word in line.split() if word.isdigit()), default=0)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


if __name__ == "__main__":
    main()
