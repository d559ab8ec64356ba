"""What is exported from memory is what an export of the same checkpoint is."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_model

from medreasoner.errors import BundleError
from medreasoner_export import LiveExport, ReasonerOptions, export_reasoner
from medreasoner_export.checkpoint import Checkpoint
from medreasoner_export.toy import make_toy_reasoner


def loaded(path: Path) -> dict[str, np.ndarray]:
    """The graph's weights by name, wherever they lie."""
    model = onnx.load(str(path), load_external_data=False)
    load_external_data_for_model(model, str(path.parent))
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_from_memory_is_the_one_from_the_folder(tmp_path: Path, tied: bool) -> None:
    folder = make_toy_reasoner(tmp_path / "toy", tied=tied)
    export_reasoner(folder, tmp_path / "whole", options=ReasonerOptions(weights="float32"))
    weights = {name: np.asarray(each.read()) for name, each in Checkpoint(folder).entries.items()}
    for number, given in enumerate((weights, None)):
        out = tmp_path / str(number)
        out.mkdir()
        spec = LiveExport(folder).write(out, given)
        assert (spec.embedding == spec.lm_head) == tied
        for name in ("decoder.onnx.data", "embedding.bin", "tokenizer.json", *(() if tied else ("lm_head.bin",))):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        for name in ("vision.onnx", "decoder.onnx"):
            one, other = loaded(out / name), loaded(tmp_path / "whole" / name)
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[each], other[each]) for each in one)


def test_weights_of_no_use_are_named(tmp_path: Path) -> None:
    folder = make_toy_reasoner(tmp_path / "toy")
    weights = {name: np.asarray(each.read()) for name, each in Checkpoint(folder).entries.items()}
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="adapter"):
        LiveExport(folder).write(tmp_path / "out", weights | {"adapter": np.zeros(3, np.float32)})
