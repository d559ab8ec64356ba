"""Does a bundle compute what its checkpoints compute?"""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from medreasoner.bundle import Bundle, load_bundle
from medreasoner.spec import ReasonerCpuGraphs, ReasonerGraphs, SegmenterCpuGraphs, SegmenterGraphs
from medreasoner_export.checkpoint import Checkpoint, Weights
from medreasoner_export.config_section import naming
from medreasoner_export.lora import with_adapter
from medreasoner_export.parity_reasoner import reasoner_stages
from medreasoner_export.parity_road import Answered, Question, bundle_answers, own_questions, road_stages
from medreasoner_export.parity_segmenter import mask_of, segmenter_stages
from medreasoner_export.qwen_config import QwenConfig
from medreasoner_export.report import ParityReport, ParityStage
from medreasoner_export.sam_config import SamConfig
from medreasoner_export.sam_family import is_sam2

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
    adapter: Path | None = None,
    questions: Sequence[Question] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Run a bundle on the CPU and its checkpoints in torch: each graph on random inputs, then whole answers.

    Where graphs have a second one for the CPU, all is done with the main ones and then with those.

    The checkpoints compute in float32. The reasoner's is read matrix by matrix, the whole of it once a run, so that its
    size does not matter.

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
    adapter
        LoRA adapter that was merged into the reasoner.
    questions
        Images and questions for the whole answers; none: two of its own.
    progress
        Told the name of each stage when it is done.

    Raises
    ------
    BundleError
        If the bundle is malformed or altered.
    MissingExtraError
        If torch, transformers or ONNX Runtime is not installed.
    """
    bundle = load_bundle(bundle_dir, verify="full")
    reasoner, segmenter = Path(against_reasoner), Path(against_segmenter)
    _check_checkpoints(reasoner, segmenter, adapter)
    asked = questions or own_questions(seed)

    def compared(bundle: Bundle, answers: list[Answered]) -> Iterator[ParityStage]:  # one reference in memory at a time
        yield from segmenter_stages(bundle, segmenter, tolerance=tolerance, seed=seed)
        yield from reasoner_stages(bundle, reasoner, tolerance=tolerance, seed=seed, adapter=adapter)
        yield from road_stages(bundle, answers, reasoner, mask_of(bundle, segmenter), adapter=adapter)

    # The bundle answers before torch is imported, which takes as much memory as a layer of a large checkpoint.
    sets = [(words, graphs, bundle_answers(graphs, asked)) for words, graphs in _graph_sets(bundle)]
    stages = []
    for words, graphs, answers in sets:
        for stage in compared(graphs, answers):
            stages.append(replace(stage, name=words + stage.name))
            progress(stages[-1].name)
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return ParityReport(bundle=bundle.spec.name, stages=tuple(stages), versions=versions)


def _check_checkpoints(reasoner: Path, segmenter: Path, adapter: Path | None) -> None:
    """Find out before the work starts what can be known about the checkpoints from their headers."""
    weights: Weights = Checkpoint(reasoner)
    if adapter is not None:
        weights = with_adapter(weights, adapter)
    with naming(reasoner):
        QwenConfig.from_json(weights.config)
    if segmenter.is_dir():  # a file is read in one piece, and only once
        weights = Checkpoint(segmenter)
        with naming(segmenter):
            if not is_sam2(weights):
                SamConfig.from_json(weights.config)


def _graph_sets(bundle: Bundle) -> Iterator[tuple[str, Bundle]]:
    """The bundle with its main graphs alone, and, if there are any, with those for the CPU in their place."""
    spec = bundle.spec
    second = spec.cpu_graphs()

    def with_graphs(names: dict[str, str]) -> Bundle:
        r, s = spec.reasoner.graphs, spec.segmenter.graphs
        reasoner = ReasonerGraphs(vision=names.get(r.vision, r.vision), decoder=names.get(r.decoder, r.decoder))
        segmenter = SegmenterGraphs(encoder=names.get(s.encoder, s.encoder), decoder=names.get(s.decoder, s.decoder))
        step = None if r.decoder in names else spec.reasoner.step
        tower = None if r.vision in names else spec.reasoner.tower
        image_tower = None if s.encoder in names else spec.segmenter.tower
        drawing = None if s.decoder in names else spec.segmenter.drawing
        changed = replace(
            spec,
            reasoner=replace(spec.reasoner, graphs=reasoner, cpu_graphs=ReasonerCpuGraphs(), step=step, tower=tower),
            segmenter=replace(
                spec.segmenter,
                graphs=segmenter,
                cpu_graphs=SegmenterCpuGraphs(),
                tower=image_tower,
                drawing=drawing,
            ),
        )
        return replace(bundle, spec=changed)

    yield "", with_graphs({})
    if second:
        yield "for the CPU: ", with_graphs(second)
