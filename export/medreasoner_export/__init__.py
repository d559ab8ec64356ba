"""Checkpoints to ONNX graphs, bundles and parity reports."""

from medreasoner_export.package import Licence, build_bundle
from medreasoner_export.reasoner import ReasonerExport, ReasonerOptions, export_reasoner
from medreasoner_export.segmenter import SegmenterExport, SegmenterOptions, export_segmenter

__all__ = [
    "Licence",
    "ReasonerExport",
    "ReasonerOptions",
    "SegmenterExport",
    "SegmenterOptions",
    "build_bundle",
    "export_reasoner",
    "export_segmenter",
]
