"""`bench` beyond its table: files, the refusal on a busy machine, stages of any name."""

import json
import os
import subprocess
import sys
import time

import pytest
from PIL import Image

from medreasoner import MedReasonerError
from medreasoner_cli import busy
from medreasoner_cli.measure import in_order, table
from medreasoner_cli.stages import draw_stages

STAT = """cpu  0 0 0 0 0 0 0 0 0 0
{cores}
intr 12345
"""


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """Pretend that from now on the cores of this process were busy for a share of the time, by /proc/stat."""

    def set_share(share: float) -> None:
        reads = iter((1000, 2000))

        def lines() -> str:
            spent = next(reads)
            others = round(share * spent)
            cores = sorted(os.sched_getaffinity(0))
            return STAT.format(
                cores="\n".join(f"cpu{n} {others} 0 0 {spent - others} 0 0 0 0 7 0" for n in [*cores, 9999])
            )

        class Stat:
            def __init__(self, _: object) -> None: ...

            def read_text(self) -> str:
                return lines()

        monkeypatch.setattr(busy, "Path", Stat)
        monkeypatch.setattr(busy.CoreWatch, "_own_ticks", lambda _: 0.0)

    return set_share


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_what_others_take_is_read_from_the_usable_cores(loaded, share):
    loaded(share)
    assert busy.CoreWatch().share_of_others() == pytest.approx(share)


def test_own_work_is_not_that_of_others():
    """A process that computes on all its cores alone is not told that the machine is busy with others."""
    watch = busy.CoreWatch()
    own = os.times()
    while os.times().user - own.user < 0.5:
        sum(range(10_000))
    before = watch.share_of_others()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        for _ in range(20):  # on a crowded machine they may have to wait for their share
            watch, knowing = busy.CoreWatch(), busy.CoreWatch(*(each.pid for each in others))
            time.sleep(1.0)
            told, told_knowing = watch.share_of_others(), knowing.share_of_others()
            if told > 0.3 and told_knowing < told - 0.2:
                break
    finally:
        for each in others:
            each.kill()
            each.wait()
    assert before is not None
    assert told > 0.3
    assert told_knowing < told - 0.2


def test_a_busy_machine_is_refused_in_one_sentence(loaded):
    loaded(0.5)
    with pytest.raises(MedReasonerError, match=r"took 50 % of the usable cores .* --anyway$"):
        busy.check_quiet(seconds=0)


def test_a_busy_machine_is_measured_all_the_same_if_asked_and_it_is_said(loaded):
    loaded(0.5)
    told = busy.check_quiet(seconds=0, anyway=True)
    assert told == "BUSY: other processes took 50 % of the usable cores before the runs"


def test_a_quiet_machine_is_passed_over_in_silence(loaded):
    loaded(0.05)
    assert busy.check_quiet(seconds=0) is None


def test_where_nothing_tells_the_load_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(busy, "Path", lambda _: tmp_path / "none")
    assert "cannot be told" in busy.check_quiet(seconds=0)


def test_bench_refuses_beside_a_process_that_computes(cli, picture, finding_bundle):
    """A real one on every core; the exit code is that of trouble, and nothing is measured."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        done = cli("bench", picture, "Where?", "-b", finding_bundle, "-n", "1")
        told = cli("bench", picture, "Where?", "-b", finding_bundle, "-n", "1", "--anyway")
    finally:
        for each in others:
            each.kill()
            each.wait()
    assert (done.code, done.out) == (4, "")
    assert done.err.startswith("error: other processes took ")
    assert done.err.count("\n") == 1
    assert told.code == 0
    assert "note: BUSY: other processes took " in told.out


def test_bench_writes_json_and_a_picture_beside_its_table(cli, picture, finding_bundle, tmp_path):
    files = tmp_path / "times.json", tmp_path / "times.png"
    asked = ("bench", picture, "Where?", "-b", finding_bundle, "-n", "3", "--anyway")
    done = cli(*asked, "--json", files[0], "--picture", files[1])
    assert done.code == 0
    assert "first p50" in done.out
    report = json.loads(files[0].read_text())
    assert report["versions"]["onnxruntime"]
    assert report["precision"] == "fp32"
    assert report["threads"] >= 1
    assert 50 < report["peak_memory_mib"] < 64_000
    for part in ("first", "further"):
        for stage in report[part].values():
            assert 0 <= stage["p25"] <= stage["p50"] <= stage["p75"] <= stage["p95"]
    with Image.open(files[1]) as drawn:
        assert drawn.format == "PNG"
        assert len(drawn.convert("RGB").getcolors(2**16)) > 6  # a colour for each stage, at least


@pytest.mark.parametrize("option", ["--json", "--picture"])
def test_a_file_that_cannot_be_written_is_wrong_usage(cli, picture, finding_bundle, tmp_path, option):
    target = tmp_path / "none" / ("times.json" if option == "--json" else "times.png")
    done = cli("bench", picture, "Where?", "-b", finding_bundle, "-n", "1", "--anyway", option, target)
    assert done.code == 2
    assert str(target) in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.err


def test_json_without_a_file_may_stand_before_other_options(cli, picture, finding_bundle):
    done = cli("bench", "--json", "--anyway", picture, "Where?", "-b", finding_bundle, "-n", "1")
    assert json.loads(done.out)["runs"] == 1


def _report(first, further):
    def part(times):
        return {stage: {"p25": spent, "p50": spent, "p75": spent, "p95": spent} for stage, spent in times.items()}

    return {
        "medreasoner": "0", "bundle": {"name": "m", "version": "1"}, "providers": {"a": "CPU"}, "threads": 2,
        "simd": "avx2", "precision": "fp32", "cpu_graphs": [], "kernels": {"b": "bfloat16"}, "image": [2, 3], "runs": 1,
        "load_ms": 1.0, "peak_memory_mib": None, "notes": [], "warnings": [],
        "first": part(first), "further": part(further),
    }  # fmt: skip


def test_stages_that_nobody_knew_are_shown_behind_the_others_and_the_whole_last():
    assert in_order(["wall", "dreaming", "postprocess", "think", "read"]) == [
        "read", "think", "postprocess", "dreaming", "wall",
    ]  # fmt: skip
    report = _report({"dreaming": 5.0, "read": 1.0, "wall": 6.5}, {"waking": 2.0, "wall": 2.0})
    rows = {line.split()[0]: line.split()[1:] for line in table(report).splitlines()[2:]}
    assert list(rows) == ["read", "dreaming", "waking", "wall"]
    assert "; fp32, but for b (bfloat16)" in table(report)
    assert rows["waking"] == ["2.00", "2.00"]


def test_widths_in_the_picture_are_in_proportion_to_the_times():
    report = _report({"read": 30.0, "vision": 60.0, "wall": 100.0}, {"dreaming": 10.0, "wall": 10.0})
    drawn = draw_stages(report)
    y = next(y for y in range(drawn.height) if _run(drawn, y, (153, 153, 153)) > 100) + 3
    read, vision, between = (_run(drawn, y, colour) for colour in ((153, 153, 153), (0, 114, 178), (228, 228, 228)))
    assert vision / read == pytest.approx(2, abs=0.05)
    assert between / read == pytest.approx(1 / 3, abs=0.05)
    assert any(_run(drawn, y, (0x7B, 0x5E, 0xA7)) > 50 for y in range(drawn.height))  # what has no colour gets one


def _run(drawn, y, colour):
    return sum(drawn.getpixel((x, y)) == colour for x in range(drawn.width))
