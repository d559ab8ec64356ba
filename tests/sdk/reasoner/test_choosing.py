"""Answers that the kernel writes whole are those that are chosen one by one."""

from pathlib import Path

import pytest
from tests.sdk.test_grounder import QUERIES, picture, same, with_threshold

import medreasoner as mr
from medreasoner.reasoner import choosing, scheduler
from medreasoner.reasoner.choosing import Choosing


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finds something in every image."""
    return with_threshold(toy_bundle, tmp_path_factory.mktemp("choosing") / "bundle", 1.0)


@pytest.mark.parametrize("options", [{}, {"think": True}, {"samples": 8, "seed": 5}], ids=["plain", "think", "samples"])
def test_written_whole_or_by_hand(bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]) -> None:
    """Also where some choices are made by hand, and the kernel goes on."""
    whole, counted = choosing.write_together, list[int]()

    def counting(answers: list[Choosing], *arguments: object, **named: object) -> None:
        counted.append(len(answers))
        whole(answers, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(scheduler, "write_together", counting)
    with mr.Grounder.load(bundle, device="cpu") as grounder, grounder.open(picture()) as study:
        written = [study.ground(query, **options) for query in QUERIES]
        assert counted  # by the kernel
        runs = len(counted)
        with monkeypatch.context() as patch:
            patch.setattr(Choosing, "goes_whole", lambda *_: False)
            by_hand = [study.ground(query, **options) for query in QUERIES]
            assert len(counted) == runs
        turn = iter(range(10**6))
        monkeypatch.setattr(Choosing, "goes_whole", lambda *_: next(turn) % 2 == 0)
        monkeypatch.setattr(scheduler.Interrupt, "clear", scheduler.Interrupt.set)  # each whole run ends at once
        mixed = [study.ground(query, **options) for query in QUERIES]
    for one, *others in zip(written, by_hand, mixed, strict=True):
        for other in others:
            assert same(one, other)
            assert one.tokens == other.tokens
