"""A finished checkpoint is taken whole or refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medreasoner.errors import BundleError
from medreasoner_train.checkpoint import load_weights
from medreasoner_train.segmenter import build_segmenter, save_segmenter


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    save_segmenter(build_segmenter(), folder)
    return folder


def test_its_weights_are_taken_over(finished: Path) -> None:
    model = build_segmenter()
    load_weights(finished, model)
    stored = load_file(finished / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in stored:
            torch.testing.assert_close(value, stored[name].float())


def test_one_that_lacks_weights_or_is_cut_off_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    weights = load_file(finished / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "vision_encoder.layers.0" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match="weights are missing, first vision_encoder"):
        load_weights(tmp_path, build_segmenter())
    (tmp_path / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BundleError, match=f"{tmp_path.name}: not a finished checkpoint"):
        load_weights(tmp_path, build_segmenter())
    with pytest.raises(BundleError, match="none: not a finished checkpoint"):
        load_weights(tmp_path / "none", build_segmenter())
