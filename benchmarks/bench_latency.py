"""How long answers take, beside the same weights in torch and transformers: ``pytest benchmarks/bench_latency.py``.

Both sides take turns in one run and get the same pixels. nano's weights are used where they are, else random ones.
MEDREASONER_BENCH_ROUNDS sets the rounds; processes get a third of them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from benchmarks.conftest import ROUNDS, Models
from benchmarks.report import Report, TakingTurns
from PIL import Image

from medreasoner import Grounder, Grounding
from medreasoner.providers import usable_cores

if TYPE_CHECKING:
    from benchmarks.peers.transformers_pipeline import Pipeline, PipelineAnswer, PipelineStudy

PROCESS_ROUNDS = max(3, ROUNDS // 3)
COMMAND_ROUNDS = 21
TUNING_ROUNDS = max(5, ROUNDS // 3)
PEER_SCRIPT = Path(__file__).parent / "peers" / "transformers_pipeline.py"
QUERIES = (
    "Which paired organs fill with air on every breath?",
    "Which muscular organ pumps the blood?",
    "Where does gas exchange take place?",
    "Which structure separates the chest from the belly?",
    "Where is the organ whose shadow lies left of the midline?",
    "Outline the heart.",
    "Which bone connects the breastbone to the shoulder blade?",
    "Where would you look for a pneumothorax?",
    "Which airway divides into the two main bronchi?",
    "Where is the right lung?",
    "Where is the left lung?",
    "Which region would be dull on percussion if fluid had gathered there?",
    "Where are the opacities that do not belong here?",
    "Which organ would be enlarged in heart failure?",
    "What would a radiologist measure to judge the heart's size?",
    "Which dark areas on both sides of the midline are filled with air?",
)
QUERY = QUERIES[0]
# Not ru_maxrss, which on Linux survives exec and would be that of pytest, with torch in it.
OURS_IN_A_PROCESS = """
import json, re, sys
from pathlib import Path
import medreasoner
with medreasoner.Grounder.load(sys.argv[1], device="cpu") as grounder:
    result = grounder.ground(sys.argv[2], sys.argv[3])
peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps({"text": result.answer, "peak_kib": int(peak)}))
"""

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def image_file(pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The radiograph in a form that both sides read alike."""
    path = tmp_path_factory.mktemp("image") / "chest.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def peer_study(peer: "Pipeline | None", pixels: Pixels) -> "PipelineStudy | None":
    return _opened(peer, pixels)


def _opened(peer: "Pipeline | None", pixels: Pixels) -> "PipelineStudy | None":
    """A study that has been asked once."""
    if peer is None:
        return None
    study = peer.open(pixels)
    peer.ask(study, QUERY)
    return study


class Threads:
    """How many threads torch is fastest with, found out for each benchmark."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def tune(self, name: str, call: Callable[[int], object], *, rounds: int = TUNING_ROUNDS) -> int:
        """Set torch to the number of threads with which the median of some calls is the lowest.

        The numbers take turns too: one after the other, a busy moment would choose for the peer.
        """
        import torch

        cores = usable_cores()
        tried = range(1, cores + 1) if cores <= 8 else sorted({*(2**k for k in range(cores.bit_length())), cores})
        spans: dict[int, list[float]] = {n: [] for n in tried}
        for i in range(rounds + 1):
            for n in tried:
                torch.set_num_threads(n)
                spans[n].append(_seconds(partial(call, i)))
        times = {n: median(spent[1:]) for n, spent in spans.items()}  # the first ones warm up
        best = min(times, key=times.__getitem__)
        torch.set_num_threads(best)
        measured = ", ".join(f"{n}: {1000 * spent:.1f} ms" for n, spent in times.items())
        self._report.note(f"peer, {name}: {best} torch threads (tried {measured})")
        return best

    def take_all(self, name: str) -> None:
        """Set torch to the cores that this process may use."""
        import torch

        torch.set_num_threads(usable_cores())
        self._report.note(f"peer, {name}: {usable_cores()} torch threads")


@pytest.fixture(scope="module")
def threads(report: Report) -> Threads:
    return Threads(report)


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _new_images(pixels: Pixels) -> Callable[[int], Pixels]:
    """A different image for every round, made before the clock starts, so that nothing can be kept from the last."""
    images = [np.roll(pixels, 8 * k, axis=0) for k in range(8)]
    return lambda number: images[number % len(images)]


def _process(command: Sequence[str], *, accepted: tuple[int, ...] = (0,)) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # the models are folders; no question to a server
    # Both sides run byte code, as pip leaves it: an editable install would compile our sources at every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode in accepted, done.stderr
    return done.stdout


def test_both_sides_answer_alike(grounder: Grounder, peer: "Pipeline | None", report: Report, pixels: Pixels) -> None:
    """Plain decoding may give no valid answer, which is what the grammar is for; where it does, ours is the same."""
    if peer is None:
        pytest.skip("there is no peer")
    theirs_study = peer.open(pixels)
    counts = Counter[str]()
    with grounder.open(pixels) as study:
        for query in QUERIES:
            ours, theirs = study.ground(query), peer.ask(theirs_study, query)
            counts[_kind(theirs)] += 1
            if theirs.text == ours.answer:
                counts["same text"] += 1
            elif _kind(theirs) != "invalid":
                parted = (_kind(theirs) == "absent") == ours.found  # one says absent, by the bundle's threshold
                counts["parted by the absent threshold" if parted else "other text"] += 1
            if query == QUERY:
                assert peer.ask(theirs_study, query).text == theirs.text  # from what was kept
                _check_alike(ours, theirs, report)
    report.note(f"{len(QUERIES)} plain answers of the peer: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    if counts["invalid"]:
        report.note("INVALID answers of the peer run on to its token limit, so that the ratios flatter ours")


def _kind(answer: "PipelineAnswer") -> str:
    return "box" if answer.numbers is not None else "absent" if answer.absent else "invalid"


def _check_alike(ours: Grounding, theirs: "PipelineAnswer", report: Report) -> None:
    from benchmarks.peers.transformers_pipeline import read_answer

    if theirs.numbers is None:
        report.note(f"the peer's plain text is NOT a valid box: {theirs.text!r:.120}")
    elif not ours.found:
        report.note("the peer names a box where ours says absent, by the bundle's threshold")
    else:
        # The bundle's graphs for the CPU round to eight bits: numbers may move a little, and the mask's edge with them.
        numbers = read_answer(ours.answer)
        assert numbers is not None
        assert theirs.mask is not None
        apart = max(abs(a - b) for a, b in zip(numbers, theirs.numbers, strict=True))
        alike = float((theirs.mask == ours.mask).mean())
        report.note(
            f"the first answers' numbers are at most {apart:g} apart, {100 * alike:.2f} % of the masks is alike"
        )
        assert apart <= 8
        assert alike > 0.99


@pytest.fixture(scope="module")
def asked(
    grounder: Grounder, peer: "Pipeline | None", peer_study: "PipelineStudy | None", report: Report, pixels: Pixels
) -> list[str]:
    """The queries that both sides answer with a box: one that says absent draws no mask, and would look fast for it."""
    with grounder.open(pixels) as study:
        queries = [query for query in QUERIES if study.ground(query).found]
    if peer is not None and peer_study is not None:
        queries = [query for query in queries if peer.ask(peer_study, query).mask is not None]
    report.note(f"{len(queries)} of {len(QUERIES)} queries are answered with a box by both sides, and are timed")
    return queries or list(QUERIES)  # random weights may answer nothing


@pytest.fixture(params=["eager", "compiled"])
def either_peer(request: pytest.FixtureRequest, peer: "Pipeline | None") -> "tuple[str, Pipeline | None]":
    """How its row is called, and the peer as it is or compiled."""
    if request.param == "eager":
        return "", peer
    compiled = request.getfixturevalue("compiled_peer")
    if compiled is None:
        pytest.skip("there is no compiled peer; the report says why")
    return ", compiled peer", compiled


def _settle(threads: Threads, name: str, theirs: Callable[[int], object], *, is_compiled: bool) -> None:
    """Find the peer's number of threads; a compiled one, which compiles anew for each number, gets all the cores.

    It also compiles anew for some lengths, and has seen each round's work before.
    """
    if not is_compiled:
        threads.tune(name, theirs)
        return
    threads.take_all(name)
    for number in range(len(QUERIES)):
        theirs(number)


def test_first_query_on_an_image(
    benchmark: Any,
    grounder: Grounder,
    either_peer: "tuple[str, Pipeline | None]",
    report: Report,
    pixels: Pixels,
    threads: Threads,
    asked: list[str],
) -> None:
    named, peer = either_peer
    image = _new_images(pixels)

    def theirs(number: int) -> None:
        assert peer is not None
        peer.ask(peer.open(image(number)), asked[number % len(asked)])

    def ours(number: int) -> None:
        with grounder.open(image(number)) as study:
            study.ground(asked[number % len(asked)])
            study._reading.embedded.result()  # if the answer is absent, nobody waits for the segmenter

    if peer is not None:
        _settle(threads, f"first query{named}", theirs, is_compiled=bool(named))
    turns = TakingTurns(ours, theirs if peer else None)
    goal = report.goal("peer / ours", 8)
    report.rows.append(turns.run(benchmark, name=f"first query{named}", goal=goal, rounds=ROUNDS, warmup_rounds=2))


def test_next_query_on_the_image(
    benchmark: Any,
    grounder: Grounder,
    either_peer: "tuple[str, Pipeline | None]",
    report: Report,
    pixels: Pixels,
    threads: Threads,
    asked: list[str],
) -> None:
    named, peer = either_peer
    peer_study = _opened(peer, pixels)

    def theirs(number: int) -> None:
        assert peer is not None
        assert peer_study is not None
        peer.ask(peer_study, asked[number % len(asked)])

    if peer is not None:
        _settle(threads, f"next query{named}", theirs, is_compiled=bool(named))
    with grounder.open(pixels) as study:
        study.ground(QUERY)
        turns = TakingTurns(lambda number: study.ground(asked[number % len(asked)]), theirs if peer else None)
        goal = report.goal("peer / ours", 25)
        report.rows.append(turns.run(benchmark, name=f"next query{named}", goal=goal, rounds=ROUNDS, warmup_rounds=2))


def test_sixteen_queries_on_an_image(
    benchmark: Any, grounder: Grounder, peer: "Pipeline | None", report: Report, pixels: Pixels, threads: Threads
) -> None:
    image = _new_images(pixels)

    def theirs(number: int) -> None:
        assert peer is not None
        study = peer.open(image(number))
        for query in QUERIES:
            peer.ask(study, query)

    if peer is not None:
        threads.tune(f"{len(QUERIES)} queries", theirs, rounds=3)
    turns = TakingTurns(lambda number: grounder.ground(image(number), QUERIES), theirs if peer else None)
    name, goal = f"{len(QUERIES)} queries on a new image", report.goal("peer / ours")
    report.rows.append(turns.run(benchmark, name=name, goal=goal, rounds=PROCESS_ROUNDS, warmup_rounds=1))


def test_cold_start(
    benchmark: Any,
    models: Models,
    grounder: Grounder,
    peer: "Pipeline | None",
    report: Report,
    image_file: Path,
    threads: Threads,
) -> None:
    """A new process imports, loads, reads a PNG file and answers; the warm-up has filled the page cache."""
    peaks: dict[str, float] = {}

    def start(side: str, *command: str) -> None:
        peaks[side] = json.loads(_process([sys.executable, *command]))["peak_kib"] / 1024

    def theirs(number: int, *, n_threads: int) -> None:
        folders = str(models.reasoner), str(models.segmenter)
        start("peer", str(PEER_SCRIPT), *folders, str(image_file), QUERY, str(n_threads))

    def ours(number: int) -> None:
        start("ours", "-c", OURS_IN_A_PROCESS, models.bundle, str(image_file), QUERY)

    their_turn = None
    if peer is not None:
        pixels = np.asarray(Image.open(image_file))
        n_threads = threads.tune("cold start, by its answer", lambda _: peer.ask(peer.open(pixels), QUERY))
        their_turn = partial(theirs, n_threads=n_threads)
    turns = TakingTurns(ours, their_turn)
    goal = report.goal("peer / ours")
    report.rows.append(turns.run(benchmark, name="cold start", goal=goal, rounds=PROCESS_ROUNDS, warmup_rounds=1))
    report.note("peak memory, cold start: " + ", ".join(f"{side} {peak:.0f} MiB" for side, peak in peaks.items()))


@pytest.mark.parametrize("draws", [False, True], ids=["answer", "overlay"])
def test_command_line(
    benchmark: Any, models: Models, report: Report, pixels: Pixels, tmp_path: Path, draws: bool
) -> None:
    """The whole command on a DICOM file, beside a process that only imports what it cannot do without."""
    program = Path(sys.executable).with_name("medreasoner-cli")
    if not program.is_file():
        pytest.skip(f"{program} is not installed")
    command = [str(program), "ground", "sample:chest", QUERY, "--bundle", models.bundle, "--device", "cpu"]
    if draws:
        command += ["-o", str(tmp_path / "overlay.png")]
    floor = [sys.executable, "-c", "import numpy, onnxruntime, pydicom"]
    turns = TakingTurns(lambda _: _process(command, accepted=(0, 1)), lambda _: _process(floor))
    name = f"medreasoner-cli ground{' -o overlay.png' * draws} / imports"
    goal = report.goal("ours / peer", None if draws else 1.8)
    rounds = PROCESS_ROUNDS if draws else COMMAND_ROUNDS
    report.rows.append(turns.run(benchmark, name=name, goal=goal, rounds=rounds, warmup_rounds=1))
