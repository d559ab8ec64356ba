"""Files that appear whole or not at all."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from medreasoner_train.files import appearing, keep_arrays, kept_arrays


def keep(path: Path, value: int) -> None:
    for _ in range(30):
        keep_arrays(path, values=np.full(1000, value))


def test_processes_that_write_one_file_at_once_leave_it_whole(tmp_path: Path) -> None:
    """Two runs that share a cache."""
    path = tmp_path / "points.npz"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=keep, args=(path, value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    (values,) = kept_arrays(path, ("values",))
    assert set(values.tolist()) in ({1}, {2})
    assert [each.name for each in tmp_path.iterdir()] == ["points.npz"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("old")

    def write() -> None:
        with appearing(path) as beside:
            beside.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["notes.json"]
