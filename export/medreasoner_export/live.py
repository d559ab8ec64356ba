"""Exports of a model that is being trained: the same graphs again, with the weights that it has by now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medreasoner.manifest import read_record
from medreasoner.spec import ReasonerSpec
from medreasoner_export.checkpoint import Checkpoint, Entry, Weights, read_json
from medreasoner_export.config_section import naming
from medreasoner_export.graph import are_large
from medreasoner_export.qwen_config import QwenConfig
from medreasoner_export.reasoner_parts import (
    ReasonerGraphFiles,
    ReasonerOptions,
    copy_tokenizer,
    embedding_name,
    matrix_record,
    reasoner_matrices,
    reasoner_section,
)

__all__ = ["LiveExport"]


class LiveExport:
    """Exports a checkpoint's architecture again and again, with the weights that a model in memory has by then.

    The graphs are built anew each time, on the road of `export_reasoner`, so there is no second account of which weight
    goes where; of nano that takes a quarter of a second. Precision and storage are float32.

    Parameters
    ----------
    checkpoint_dir
        Folder with ``config.json``, ``tokenizer.json`` and ``medreasoner.json``.
    settings
        Entries that replace those of ``medreasoner.json``.

    Raises
    ------
    BundleError
        If a file is missing or malformed.
    """

    def __init__(self, checkpoint_dir: str | Path, *, settings: Mapping[str, Any] | None = None) -> None:
        self._folder = Path(checkpoint_dir)
        self._options = ReasonerOptions(weights="float32", settings=settings or {})
        with naming(self._folder):
            self._config = QwenConfig.from_json(read_json(self._folder / "config.json"))

    @property
    def spec(self) -> ReasonerSpec:
        """What the checkpoint reads and writes; the files that it names need not be there."""
        section = reasoner_section(self._folder, self._config, self._options, "float32", with_step=True)
        matrix = matrix_record("embedding.bin", self._config, "float32")
        return read_record(ReasonerSpec, {**section, "embedding": matrix, "lm_head": matrix}, "reasoner")

    def write(self, out: Path, weights: Mapping[str, npt.NDArray[np.float32]] | None = None) -> ReasonerSpec:
        """Write an export into an empty folder.

        Parameters
        ----------
        out
            Folder that is there.
        weights
            By their names in transformers, none of another model; None: those of the folder.

        Raises
        ------
        BundleError
            If a tensor is missing, misshapen, not finite or of no use; the message names it.
        """
        checkpoint: Weights = Checkpoint(self._folder) if weights is None else self._held(weights)
        embedding = embedding_name(checkpoint)
        external = are_large(checkpoint.shapes.values(), "float32")
        section = reasoner_section(self._folder, self._config, self._options, "float32", with_step=not external)
        graphs = ReasonerGraphFiles(
            checkpoint, self._config, self._options, storage="float32", sha256="", section=section
        )
        copy_tokenizer(self._folder, self._config, out)
        graphs.vision(out, True)  # beside it, or they would be copied twice more
        graphs.decoder(out, external, None)
        section |= reasoner_matrices(checkpoint, self._config, embedding, "float32", out)
        checkpoint.check_all_read(ignore=("inv_freq", "lm_head.weight"))
        return read_record(ReasonerSpec, section, "reasoner")

    def _held(self, weights: Mapping[str, npt.NDArray[np.float32]]) -> Weights:
        def entry(array: npt.NDArray[np.float32]) -> Entry:
            return Entry(file=self._folder, dtype="F32", shape=array.shape, read=lambda: array)

        entries = {name: entry(array) for name, array in weights.items()}
        return Weights(self._folder, read_json(self._folder / "config.json"), entries, [])
