"""Does a bundle compute what its checkpoints compute?"""

import importlib.metadata
from pathlib import Path

from medreasoner.bundle import load_bundle
from medreasoner_export.parity_reasoner import reasoner_stages
from medreasoner_export.parity_segmenter import segmenter_stages
from medreasoner_export.report import ParityReport

__all__ = ["DEFAULT_TOLERANCE", "verify_bundle"]

DEFAULT_TOLERANCE = 1e-4
"""Accepted error relative to the largest value of the reference, where weights are stored in their source type.

Float32 sums in another order differ by about 1e-6. Weights rounded on the way (float32 stored as float16 or bfloat16)
need about 5e-3 or 5e-2.
"""

VERSIONS = ("onnxruntime", "transformers", "torch")


def verify_bundle(
    bundle_dir: str | Path,
    against_reasoner: str | Path,
    against_segmenter: str | Path,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    seed: int = 0,
) -> ParityReport:
    """Run a bundle's graphs on the CPU and its checkpoints in torch, in float32, on the same random inputs.

    Parameters
    ----------
    bundle_dir
        A bundle's folder.
    against_reasoner, against_segmenter
        The checkpoints, as given to the exports: folders, and for a segmenter also a ``.pth`` file.
    tolerance
        Largest accepted error, relative to the reference's largest value. Greedy tokens must be equal. A four-bit
        decoder is compared with the checkpoint's own rounded matrices, within 5 %: that shows a faulty graph, and not
        what the rounding costs, which `medreasoner-cli eval` measures.
    seed
        Of the inputs.

    Raises
    ------
    BundleError
        If the bundle is malformed or altered.
    MissingExtraError
        If torch, transformers or ONNX Runtime is not installed.
    """
    bundle = load_bundle(bundle_dir, verify="full")
    stages = [
        *reasoner_stages(bundle, Path(against_reasoner), tolerance=tolerance, seed=seed),
        *segmenter_stages(bundle, Path(against_segmenter), tolerance=tolerance, seed=seed),
    ]
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return ParityReport(bundle=bundle.spec.name, stages=tuple(stages), versions=versions)
