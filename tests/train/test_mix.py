"""Two checkpoints of one start, averaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medreasoner.errors import BundleError
from medreasoner_train.language import ABSENT, PRESENT, TEMPLATE
from medreasoner_train.mix import mix
from medreasoner_train.tokenizer import train_tokenizer
from medreasoner_train.vocabulary import with_wholes


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    folders = []
    for index, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(index)
        weights = {"a": torch.randn(3, 4, generator=generator).bfloat16(), "b": torch.full((2,), float(index))}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "transformers_version": f"5.{index}"}))
        (folder / "tokenizer.json").write_text("of both")
        (folder / "medreasoner.json").write_text(f"of {name}")
        folders.append(folder)
    return folders[0], folders[1]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_weights_are_averaged_and_the_rest_is_the_seconds(
    pair: tuple[Path, Path], tmp_path: Path, share: float
) -> None:
    found = load_file(mix(*pair, tmp_path / "out", share=share) / "model.safetensors")
    one, two = (load_file(folder / "model.safetensors") for folder in pair)
    assert found["a"].dtype == torch.bfloat16
    expected = (1 - share) * one["a"].float() + share * two["a"].float()
    torch.testing.assert_close(found["a"].float(), expected, atol=0.01, rtol=0.01)
    assert found["b"].tolist() == [share, share]
    assert (tmp_path / "out" / "medreasoner.json").read_text() == "of two"
    assert (tmp_path / "out" / "config.json").read_bytes() == (pair[1] / "config.json").read_bytes()


def test_what_cannot_be_mixed_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    with pytest.raises(BundleError, match="share: expected a number from 0 to 1"):
        mix(one, two, tmp_path / "out", share=1.5)
    with pytest.raises(BundleError, match="none: no finished checkpoint"):
        mix(one, tmp_path / "none", tmp_path / "out", share=0.5)
    other = Path(shutil.copytree(two, tmp_path / "other"))
    (other / "tokenizer.json").write_text("of another")
    with pytest.raises(BundleError, match="have other tokenizers"):
        mix(one, other, tmp_path / "out", share=0.5)
    (other / "config.json").write_text('{"hidden_size": 5}')
    with pytest.raises(BundleError, match=r"their config\.json differ"):
        mix(one, other, tmp_path / "out", share=0.5)
    save_file({"a": torch.zeros(2)}, other / "model.safetensors")
    with pytest.raises(BundleError, match="have other tensors"):
        mix(one, other, tmp_path / "out", share=0.5)
    assert not (tmp_path / "out").exists()


def test_rows_of_new_tokens_are_the_seconds(pair: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["Where is the heart?", TEMPLATE, PRESENT, ABSENT] * 3
    old = train_tokenizer(words, vocab_size=800, largest=99)
    size = old.get_vocab_size()
    new = with_wholes(train_tokenizer(words, vocab_size=800, largest=99))
    name = "model.embed_tokens.weight"
    for folder, tokenizer, value in zip(pair, (old, new), (0.0, 1.0), strict=True):
        rows = tokenizer.get_vocab_size()
        save_file({name: torch.full((rows, 2), value)}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": rows, "dtype": f"{value}"}}))
        (folder / "tokenizer.json").unlink()
        tokenizer.save(str(folder / "tokenizer.json"))
    out = mix(*pair, tmp_path / "out", share=0.25)
    found = load_file(out / "model.safetensors")[name]
    assert found.shape[0] == new.get_vocab_size() > size
    assert set(found[:size].flatten().tolist()) == {0.25}
    assert set(found[size:].flatten().tolist()) == {1.0}
    assert (out / "tokenizer.json").read_bytes() == (pair[1] / "tokenizer.json").read_bytes()
    with pytest.raises(BundleError, match="have other tensors"):  # what the second lacks has no row to take
        mix(pair[1], pair[0], tmp_path / "back", share=0.25)
