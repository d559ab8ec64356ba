"""Checkpoint folders, whole and hostile."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from medreasoner.errors import BundleError
from medreasoner_export.checkpoint import Checkpoint

MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_tensor_has_the_values_and_the_type_that_were_saved(folder: Path, dtype: Any) -> None:
    save_file({"a": MATRIX.astype(dtype), "b": np.ones(4, np.float32)}, folder / "model.safetensors")
    found = Checkpoint(folder).tensor("a", (2, 3))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float32), MATRIX)


def test_shards_are_read_through_their_index(folder: Path) -> None:
    save_file({"a": MATRIX}, folder / "one.safetensors")
    save_file({"b": MATRIX + 1}, folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.tensor("b", (2, 3)), MATRIX + 1)
    assert len(checkpoint.sha256()) == 64


def test_an_index_may_not_leave_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(BundleError, match=r"index\.json.*not a file beside it"):
        Checkpoint(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    save_file({"a": MATRIX}, folder / "model.safetensors")
    with pytest.raises(BundleError, match="tensor b is missing"):
        Checkpoint(folder).tensor("b", (2, 3))


def test_a_tensor_of_another_shape_is_refused_with_file_and_name(folder: Path) -> None:
    save_file({"a": MATRIX}, folder / "model.safetensors")
    with pytest.raises(BundleError, match=r"model\.safetensors.*tensor a.*\(3, 2\), got \(2, 3\)"):
        Checkpoint(folder).tensor("a", (3, 2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    save_file({"a": np.array([1.0, value], np.float32)}, folder / "model.safetensors")
    with pytest.raises(BundleError, match="tensor a holds values that are not finite"):
        Checkpoint(folder).tensor("a", (2,))


def test_integers_are_not_weights(folder: Path) -> None:
    save_file({"a": np.ones(2, np.int64)}, folder / "model.safetensors")
    with pytest.raises(BundleError, match="got I64"):
        Checkpoint(folder).tensor("a", (2,))


def test_tensors_that_nothing_reads_are_reported(folder: Path) -> None:
    save_file({"a": MATRIX, "b": MATRIX, "x.inv_freq": MATRIX}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    checkpoint.tensor("a", (2, 3))
    with pytest.raises(BundleError, match=r"1 tensors.*first b"):
        checkpoint.check_all_read(ignore=("inv_freq",))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "header longer than the file": lambda: struct.pack("<Q", 2**62) + b"{}",
    "header not JSON": lambda: raw(b"\xff\xfe{"),
    "header deeply nested": lambda: raw(b"[" * 100_000),
    "header a list": lambda: raw([1]),
    "entry a number": lambda: raw({"a": 3}),
    "entry without a type": lambda: raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "negative size": lambda: raw({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
    "size not a whole number": lambda: raw({"a": {**ENTRY, "shape": [2.0]}}, bytes(8)),
    "three offsets": lambda: raw({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, bytes(8)),
    "offsets reversed": lambda: raw({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)),
    "data truncated": lambda: raw({"a": ENTRY}, bytes(7)),
    "data of another size": lambda: raw({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_corrupt_weights_file_is_refused_by_name(folder: Path, content: Callable[[], bytes]) -> None:
    (folder / "model.safetensors").write_bytes(content())
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "nul"])
def test_a_corrupt_configuration_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BundleError, match=r"config\.json"):
        Checkpoint(tmp_path)


def test_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        Checkpoint(tmp_path / "nowhere")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"neither model\.safetensors"):
        Checkpoint(folder)
