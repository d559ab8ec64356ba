"""What a terminal shows of a training, and what a file gets."""

import io
import re
from pathlib import Path

import pytest

from medreasoner_cli.main import run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_on(screen: str) -> list[str]:
    """The lines that are left on a terminal after it was written to."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[[?0-9]*[a-zA-Z]|.|\n", screen):
        if part == "\n":
            lines, column = [*lines, ""], 0
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif not part.startswith("\x1b"):
            lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture
def settings(tmp_path: Path, start: Path, csv: Path) -> str:
    path = tmp_path / "grpo.toml"
    path.write_text(
        f'[data]\npath = "{csv}"\n[policy]\ncheckpoint = "{start}"\n[rollouts]\ncount = 2\nmax_tokens = 4\n'
        f'[train]\nout = "{tmp_path / "run"}"\nsteps = 8\nprompts = 2\nlog_every = 3\n'
    )
    return str(path)


def test_a_terminal_has_a_bar_below_whole_lines(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    code = run(["train", "grpo", settings])
    screen = terminal.getvalue()
    assert code == 0, screen
    drawn = [int(each) for each in re.findall(r"(\d)/8 steps, 0 min left", screen)]
    assert sorted(drawn) == drawn
    assert set(drawn) == set(range(1, 9))
    lines = lines_on(screen)
    told = [line for line in lines if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert [line.split()[1] for line in told if "step=" in line] == ["step=3", "step=6"]
    assert not any("steps, " in line for line in told)
    (bar,) = [line for line in lines if "8 steps, " in line]
    assert re.fullmatch(r"8/8 steps, 0 min left  \[#+\]  100%", bar)


def test_a_file_gets_lines_alone(settings: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "grpo", settings]) == 0
    said = capfd.readouterr().err
    assert "step=6 " in said
    assert "min left" not in said
    assert "\x1b" not in said
