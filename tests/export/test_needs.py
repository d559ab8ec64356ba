"""What an export takes is told before it starts, near the truth, and refused if it is not there."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from medreasoner.errors import BundleError
from medreasoner_export import ReasonerOptions, SegmenterOptions, export_reasoner, export_segmenter, needs
from medreasoner_export.checkpoint import Checkpoint
from medreasoner_export.graph import Precision
from medreasoner_export.needs import Needs, check_needs, reasoner_needs, segmenter_needs


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".onnx", ".data", ".bin"))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_disk_that_is_told_is_what_is_written(toy: Path, tmp_path: Path, precision: Precision) -> None:
    # Beside the graphs the weights are padded to pages, which in a toy is most of them.
    options = ReasonerOptions(precision=precision, external_data=False)
    export_reasoner(toy / "reasoner", tmp_path / "r", options=options)
    told = reasoner_needs(Checkpoint(toy / "reasoner").shapes, "float32", precision).disk
    written = _size(tmp_path / "r")
    assert 0.8 * written < told < 1.3 * written


def test_the_same_for_a_segmenter(toy: Path, tmp_path: Path) -> None:
    said: list[str] = []
    seen: list[tuple[int, int, str]] = []
    export_segmenter(
        toy / "segmenter", tmp_path / "s", options=SegmenterOptions(),
        progress=lambda *each: seen.append(each), announce=said.append,
    )  # fmt: skip
    checkpoint = Checkpoint(toy / "segmenter")
    told = segmenter_needs(checkpoint.shapes, "float32").disk
    assert 0.6 * _size(tmp_path / "s") < told < 1.3 * _size(tmp_path / "s")
    (line,) = said
    assert "on disk and" in line
    done = [each[0] for each in seen]
    assert done == sorted(done)
    assert {each[1] for each in seen} == {len(checkpoint.shapes)}


def test_a_seven_billion_model_in_four_bits_needs_what_was_measured() -> None:
    layer = {
        "self_attn.q_proj": (3584, 3584), "self_attn.k_proj": (512, 3584), "self_attn.v_proj": (512, 3584),
        "self_attn.o_proj": (3584, 3584), "mlp.gate_proj": (18944, 3584), "mlp.up_proj": (18944, 3584),
        "mlp.down_proj": (3584, 18944),
    }  # fmt: skip
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(28) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584)}
    found = reasoner_needs(shapes, "bfloat16", "int4")
    assert 6.0e9 < found.disk < 6.6e9  # 6.5e9 weights in 4.6 bits, and two matrices of 1.1e9 bytes
    assert found.memory < 8 * 2**30
    calibrated = reasoner_needs(shapes, "bfloat16", "int4", calibrated=True)
    layer_bytes = 4 * 233e6  # in float32, which ONNX Runtime packs anew
    assert found.memory + 2 * layer_bytes < calibrated.memory < found.memory + 3 * layer_bytes
    assert calibrated.disk == found.disk + sum(2 * rows * columns for rows, columns in layer.values())


def test_what_is_not_there_is_refused_before_anything_is_written(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BundleError, match=r"r: 0\.0 GB will be written, 0\.0 GB are free there"):
        export_reasoner(toy / "reasoner", tmp_path / "deep" / "r")
    assert not (tmp_path / "deep").exists()


def test_too_little_memory_is_refused_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 99 kB\nMemAvailable:    1048576 kB\n")
    monkeypatch.setattr(needs, "_MEMINFO", meminfo)
    check_needs(Needs(disk=1, memory=2**30), tmp_path)
    with pytest.raises(BundleError, match=r"2\.0 GiB of memory are needed, 1\.0 GiB are available"):
        check_needs(Needs(disk=1, memory=2**31), tmp_path)
    monkeypatch.setattr(needs, "_MEMINFO", tmp_path / "none")
    check_needs(Needs(disk=1, memory=2**60), tmp_path)  # where the system does not say
