"""Checkpoints to ONNX graphs, bundles and parity reports."""

from medreasoner_export.live import LiveExport
from medreasoner_export.package import Licence, build_bundle
from medreasoner_export.parity_road import Question
from medreasoner_export.prompts import CalibrationPrompt, read_prompts
from medreasoner_export.reasoner import ReasonerExport, ReasonerOptions, export_reasoner
from medreasoner_export.report import ParityReport, ParityStage
from medreasoner_export.segmenter import SegmenterExport, SegmenterOptions, export_segmenter
from medreasoner_export.tensorrt import EngineExport, EngineOptions, export_engines
from medreasoner_export.trt_build import find_builder
from medreasoner_export.trt_plan import EngineLimits
from medreasoner_export.verify import verify_bundle

__all__ = [
    "CalibrationPrompt",
    "EngineExport",
    "EngineLimits",
    "EngineOptions",
    "Licence",
    "LiveExport",
    "ParityReport",
    "ParityStage",
    "Question",
    "ReasonerExport",
    "ReasonerOptions",
    "SegmenterExport",
    "SegmenterOptions",
    "build_bundle",
    "export_engines",
    "export_reasoner",
    "export_segmenter",
    "find_builder",
    "read_prompts",
    "verify_bundle",
]
