"""A mask as a DICOM Segmentation that refers to its source image."""

import io
from typing import TYPE_CHECKING, Any

from medreasoner._extras import require
from medreasoner._version import __version__
from medreasoner.errors import MedReasonerError, OutputError
from medreasoner.image.attributes import first_number
from medreasoner.image.quiet import quiet
from medreasoner.outputs.forms import check_reference
from medreasoner.outputs.planes import patient_plane

if TYPE_CHECKING:
    from pydicom import Dataset

    from medreasoner.result import Grounding

__all__ = ["encode_seg"]

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# highdicom wants these to be there and to be well formed. The source's own are copied afterwards as they are, for it is
# not our place to refuse a mask because of how somebody wrote a name.
_COPIED = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)
_GEOMETRY = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames"),
)


def encode_seg(grounding: "Grounding", *, include_query: bool) -> bytes:
    """Bytes of a DICOM file: BINARY segmentation with one segment and one frame.

    Parameters
    ----------
    grounding
        A result about a DICOM image; an absent answer gives an empty frame.
    include_query
        Whether the segment's description is the question.

    Raises
    ------
    OutputError
        If the image was not DICOM, or lacks what a reference needs.
    MissingExtraError
        If highdicom is not installed.

    Notes
    -----
    The segment is coded with the most general terms, since free text does not say which code is meant. The algorithm's
    name, version and the model's digest are in the Segmentation Algorithm Identification Sequence.

    References
    ----------
    DICOM PS3.3 A.51 (Segmentation IOD), C.8.20.2 (Segmentation Image module), C.7.6.16.2.6 (Derivation Image macro).
    """
    highdicom = require("highdicom", extra="dicom", feature="Writing DICOM SEG")
    source = check_reference(grounding.image)
    try:
        with quiet():
            segmentation = _segmentation(highdicom, grounding, source, include_query)
            stream = io.BytesIO()
            segmentation.save_as(stream)
    except MedReasonerError:
        raise
    except (
        Exception
    ) as err:  # highdicom and pydicom promise nothing about malformed headers, and may quote their values
        raise OutputError(
            f"DICOM SEG cannot be made: the header of {grounding.image.source} does not allow it ({type(err).__name__})"
        ) from err
    return stream.getvalue()


def _segmentation(highdicom: Any, grounding: "Grounding", source: "Dataset", include_query: bool) -> Any:
    from pydicom.uid import generate_uid

    image = grounding.image
    description = _segment(highdicom, grounding)
    if include_query:
        description.SegmentDescription = grounding.query[:1024]  # ST holds no more
    segmentation = highdicom.seg.Segmentation(
        source_images=[_single_frame_view(source, image.frame)],
        pixel_array=grounding.mask,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description],
        series_instance_uid=generate_uid(prefix=None),
        series_number=int(first_number(source, "SeriesNumber") or 0) % 1000 + 1000,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        manufacturer="MedReasoner Edge",
        manufacturer_model_name=f"MedReasoner Edge {grounding.model_name}"[:64],
        software_versions=__version__,
        device_serial_number=grounding.model_digest,
        series_description="MedReasoner Edge segmentation",
        content_label="MEDREASONER",
        omit_empty_frames=False,
    )
    _correct(segmentation, source, image.frame if image.n_frames > 1 else None)
    return segmentation


def _segment(highdicom: Any, grounding: "Grounding") -> Any:
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    return highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Answer",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=f"MedReasoner Edge {grounding.model_name}"[:64],
            family=codes.cid7162.ArtificialIntelligence,
            version=grounding.model_version,
            parameters={"model_sha256": grounding.model_digest},
        ),
        tracking_id="MedReasoner Edge answer",
        tracking_uid=generate_uid(prefix=None),
    )


def _single_frame_view(source: "Dataset", frame: int) -> "Dataset":
    """The source as if it held this frame only, in the plain form that highdicom reads from every kind of object.

    highdicom takes multi-frame sources only whole, or not at all where they have no functional groups (ultrasound).
    """
    view = source[:]  # shares the elements: they are replaced below, never changed
    for keyword in (*_GEOMETRY, *_COPIED, "SOPClassUID", "Modality"):
        view.pop(keyword, None)
    view.SOPClassUID = _SECONDARY_CAPTURE
    view.Modality = "OT"
    for keyword in _COPIED:
        setattr(view, keyword, "")
    plane = patient_plane(source, frame)
    if plane is None or plane.thickness is None or not source.get("FrameOfReferenceUID"):
        view.pop("FrameOfReferenceUID", None)  # the mask then lies in the source's pixels, and nowhere else
        return view
    view.ImagePositionPatient = list(plane.position)
    view.ImageOrientationPatient = [*plane.along_columns, *plane.along_rows]
    view.PixelSpacing = list(plane.spacing)
    view.SliceThickness = plane.thickness
    return view


def _correct(segmentation: Any, source: "Dataset", frame: int | None) -> None:
    """Put back what the view had to hide: the source's class, its frame, and whose it is."""
    references = [*segmentation.SourceImageSequence]
    for series in segmentation.ReferencedSeriesSequence:
        references += series.ReferencedInstanceSequence
    for derivation in segmentation.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence:
        for reference in derivation.SourceImageSequence:
            references.append(reference)
            if frame is not None:
                reference.ReferencedFrameNumber = frame + 1
    for reference in references:
        reference.ReferencedSOPClassUID = source.SOPClassUID
    for keyword in _COPIED:
        if keyword in source:
            segmentation[keyword] = source[keyword]
