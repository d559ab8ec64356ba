"""What is written is read back by other people's readers: highdicom, pydicom, nibabel, Pillow, pycocotools."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from medreasoner.errors import MedReasonerError, OutputError
from medreasoner.image import Image, read_image
from medreasoner.outputs import FORMS, check_output, form_of
from medreasoner.outputs.dicom_seg import encode_seg


def _pydicom_file(name):
    data = pytest.importorskip("pydicom.data")
    data_store = pytest.importorskip("data_store")
    path = Path(data_store.__file__).parent / "data" / name
    return path if path.is_file() else Path(data.get_testdata_file(name))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.png", "overlay"),
        ("a.PNG", "overlay"),
        ("a.jpg", "overlay"),
        ("a.mask.png", "mask"),
        ("a_mask.png", "mask"),
        ("mask.png", "mask"),
        ("a.json", "json"),
        ("a.rle.json", "rle"),
        ("a.nii", "nifti"),
        ("a.nii.gz", "nifti"),
        ("a.dcm", "seg"),
        ("a.seg.dcm", "seg"),
    ],
)
def test_ending_names_the_form(name, form):
    assert form_of(name) == form
    assert form in FORMS


@pytest.mark.parametrize("name", ["a", "a.gz", "a.bmp", "png", "a.png.txt", ""])
def test_unknown_ending_lists_the_known_ones(name):
    with pytest.raises(OutputError, match=r"unknown ending; known: .*\.nii\.gz"):
        form_of(name)


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(OutputError, match="unknown format 'gif'; known: overlay, mask"):
        form_of("a.png", format="gif")


def test_format_outranks_the_ending(make_grounding, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    grounding = make_grounding()
    grounding.save(tmp_path / "a.png", format="mask")
    with pillow.open(tmp_path / "a.png") as picture:
        assert (np.asarray(picture) == np.where(grounding.mask, 255, 0)).all()


def test_missing_folder_is_refused_before_and_at_writing(make_grounding, tmp_path):
    path = tmp_path / "nowhere" / "a.png"
    with pytest.raises(OutputError, match="no folder"):
        check_output(path)
    with pytest.raises(OutputError, match="no folder"):
        make_grounding().save(path)


def test_folder_and_device_are_no_targets(make_grounding, tmp_path):
    (tmp_path / "a.png").mkdir()
    for path, form in ((tmp_path / "a.png", None), (Path(os.devnull), "mask")):
        with pytest.raises(OutputError, match="not a file"):
            make_grounding().save(path, format=form)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_refusing_disk_is_an_output_error(make_grounding, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        make_grounding().save(tmp_path / "a.json")


def test_a_picture_too_long_for_jpeg_is_an_output_error(make_grounding, tmp_path):
    image = Image(pixels=np.zeros((2, 70000), np.uint8), source="array")
    result = make_grounding(image=image, mask=np.zeros((2, 70000), bool))
    with pytest.raises(OutputError, match=r"wide\.jpg: JPEG holds no picture of 70000 x \d+ pixels; name a \.png"):
        result.save(tmp_path / "wide.jpg")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file_and_nothing_else(make_grounding, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def refuse(_self, _target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="No space left"):
        make_grounding().save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_the_answer_as_a_dict_without_the_query(make_grounding, tmp_path):
    grounding = make_grounding()
    grounding.save(tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(grounding.to_dict()))
    assert "Doe" not in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pycocotools with NumPy 2.4
@pytest.mark.parametrize("found", [True, False])
def test_rle_is_read_by_pycocotools(make_grounding, tmp_path, found):
    coco = pytest.importorskip("pycocotools.mask")
    grounding = make_grounding(found=found)
    grounding.save(tmp_path / "a.rle.json")
    rle = json.loads((tmp_path / "a.rle.json").read_text(encoding="utf-8"))
    assert (coco.decode(rle) == grounding.mask).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_overlay_is_a_picture_of_its_kind(make_grounding, tmp_path, name):
    pillow = pytest.importorskip("PIL.Image")
    make_grounding().save(tmp_path / name)
    with pillow.open(tmp_path / name) as picture:
        assert picture.format == {"a.png": "PNG", "a.jpg": "JPEG"}[name]
        assert picture.width == 540


# NIfTI


def _volume_file(nibabel, folder, *, shape=(11, 13, 9), affine=None):
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    path = folder / "volume.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA", "AIL"])
def test_nifti_mask_lies_in_the_volume_of_the_input(make_grounding, tmp_path, axes):
    nibabel = pytest.importorskip("nibabel")
    codes = nibabel.orientations.axcodes2ornt(axes)
    affine = np.diag([2.0, 3.0, 4.0, 1.0]) @ nibabel.orientations.inv_ornt_aff(codes, (11, 13, 9))
    source = _volume_file(nibabel, tmp_path, affine=affine)
    grounding = make_grounding(read_image(source, frame=2))
    grounding.save(tmp_path / "out.nii.gz")
    out, volume = nibabel.load(tmp_path / "out.nii.gz"), nibabel.load(source)
    assert out.shape == volume.shape
    np.testing.assert_allclose(out.affine, volume.affine)
    # Turned to RAS+, slice 2 from the feet, anterior up and the patient's right on the left: rows are y from the front.
    turned = nibabel.as_closest_canonical(out).get_fdata()
    assert (turned[:, :, 2].T[::-1, ::-1] == grounding.mask).all()
    assert turned.sum() == grounding.mask.sum()


@pytest.mark.parametrize(("unit", "written"), [("micron", "micron"), ("meter", "meter"), ("unknown", "mm")])
def test_nifti_mask_has_the_unit_of_the_input(make_grounding, tmp_path, unit, written):
    nibabel = pytest.importorskip("nibabel")
    volume = nibabel.Nifti1Image(np.zeros((11, 13, 9), np.uint8), np.diag([500.0, 400.0, 2000.0, 1.0]))
    volume.header.set_xyzt_units(unit)
    source = tmp_path / "in.nii"
    source.write_bytes(volume.to_bytes())
    image = read_image(source)
    make_grounding(image=image, mask=np.ones((image.height, image.width), bool)).save(tmp_path / "out.nii.gz")
    out = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(out.affine, volume.affine)
    assert out.header.get_xyzt_units()[0] == written


def test_nifti_of_a_plain_image_has_the_spacing_and_reads_back(make_grounding, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    grounding = make_grounding()
    grounding.save(tmp_path / "a.nii")
    out = nibabel.load(tmp_path / "a.nii")
    assert out.header.get_zooms() == (0.25, 0.5, 1.0)
    assert (out.header["sform_code"], out.header["qform_code"]) == (0, 0)
    again = read_image(tmp_path / "a.nii")
    assert ((again.pixels > 0) == grounding.mask).all()
    assert again.pixel_spacing_mm == (0.5, 0.25)


def test_nifti_of_a_dicom_slice_lies_where_dicom_says(make_grounding, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    image = read_image(_pydicom_file("CT_small.dcm"))
    grounding = make_grounding(image)
    grounding.save(tmp_path / "a.nii.gz")
    out = nibabel.load(tmp_path / "a.nii.gz")
    row, column = (int(axis[0]) for axis in np.nonzero(grounding.mask))
    header = image.dicom
    cosines = np.array(header.ImageOrientationPatient, float)
    # PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1, then LPS to RAS
    expected = np.array(header.ImagePositionPatient, float)
    expected += cosines[:3] * column * float(header.PixelSpacing[1]) + cosines[3:] * row * float(header.PixelSpacing[0])
    np.testing.assert_allclose((out.affine @ [column, row, 0, 1])[:3], expected * [-1, -1, 1], atol=1e-3)
    assert np.asarray(out.dataobj)[column, row, 0] == 1
    assert out.header.get_zooms()[2] == pytest.approx(float(header.SliceThickness))


def test_a_side_too_long_for_nifti_1_is_written_as_nifti_2(make_grounding, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    mask = np.zeros((8, 33000), bool)
    mask[3, 32999] = True
    image = Image(pixels=np.zeros((8, 33000), np.uint8), source="array")
    make_grounding(image=image, mask=mask).save(tmp_path / "long.nii")
    out = nibabel.load(tmp_path / "long.nii")
    assert isinstance(out, nibabel.Nifti2Image)
    assert out.shape == (33000, 8, 1)
    assert np.asarray(out.dataobj).sum() == 1


def test_a_name_as_long_as_the_disk_allows_is_written(make_grounding, tmp_path):
    name = "n" * (255 - len(".json")) + ".json"
    make_grounding().save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(OutputError, match="too long"):
        make_grounding().save(tmp_path / ("n" + name))


@pytest.mark.parametrize(
    ("keyword", "value", "odd"),
    [
        ("StudyInstanceUID", "1.2.3.4.5.67", b"SECRET.1.234"),
        ("StudyID", "S" * 25, b"S" * 25),
        ("SeriesNumber", "12345678", b"1x345678"),
    ],
)
@pytest.mark.parametrize("name", ["out.dcm", "out.nii"])
def test_odd_headers_make_no_noise_and_refuse_no_mask(make_grounding, tmp_path, recwarn, keyword, value, odd, name):
    for package in ("highdicom", "nibabel"):
        pytest.importorskip(package)
    pydicom = pytest.importorskip("pydicom")
    with pydicom.config.disable_value_validation():
        dataset = pydicom.dcmread(_pydicom_file("CT_small.dcm"))
        setattr(dataset, keyword, value)
        raw = io.BytesIO()
        dataset.save_as(raw)
    recwarn.clear()
    data = raw.getvalue().replace(value.encode(), odd)
    assert odd in data
    grounding = make_grounding(read_image(data))
    grounding.save(tmp_path / name)
    assert [str(warning.message) for warning in recwarn] == []
    assert (tmp_path / name).exists()


def test_same_mask_gives_the_same_nifti_bytes(make_grounding, tmp_path):
    pytest.importorskip("nibabel")
    for name in ("a.nii.gz", "b.nii.gz"):
        make_grounding().save(tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


# DICOM SEG

_SOURCES = [
    pytest.param("RG1_UNCR.dcm", None, False, id="radiograph"),
    pytest.param("MR2_UNCR.dcm", None, True, id="MR slice"),
    pytest.param("CT_small.dcm", None, True, id="CT slice"),
    pytest.param("693_UNCR.dcm", None, False, id="CT with a name of one component"),
    pytest.param("US1_UNCR.dcm", None, False, id="colour ultrasound"),
    pytest.param("color3d_jpeg_baseline.dcm", 7, False, id="ultrasound frame"),
    pytest.param("OBXXXX1A_2frame.dcm", 1, False, id="palette frame"),
    pytest.param("emri_small.dcm", 3, False, id="enhanced MR frame without frame of reference"),
    pytest.param("eCT_Supplemental.dcm", 1, True, id="enhanced CT frame"),
]


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize(("name", "frame", "in_space"), _SOURCES)
def test_seg_is_read_by_highdicom_with_mask_and_references(make_grounding, tmp_path, name, frame, in_space, found):
    highdicom = pytest.importorskip("highdicom")
    image = read_image(_pydicom_file(name), frame=frame)
    grounding = make_grounding(image, found=found)
    grounding.save(tmp_path / "a.seg.dcm")
    seg = highdicom.seg.segread(tmp_path / "a.seg.dcm")
    assert seg.SegmentationType == "BINARY"
    uid, source_class = image.dicom.SOPInstanceUID, image.dicom.SOPClassUID
    if image.n_frames > 1:
        mask = seg.get_pixels_by_source_frame(uid, [image.frame + 1], ignore_spatial_locations=True)
    else:
        mask = seg.get_pixels_by_source_instance([uid], ignore_spatial_locations=True)
    assert (mask[0, ..., 0] == grounding.mask).all()
    (reference,) = seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence
    assert reference.ReferencedSOPClassUID == source_class
    assert seg.SourceImageSequence[0].ReferencedSOPClassUID == source_class
    instance = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
    assert (instance.ReferencedSOPInstanceUID, instance.ReferencedSOPClassUID) == (uid, source_class)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == image.dicom.SeriesInstanceUID
    assert ("FrameOfReferenceUID" in seg) is in_space


def _saved(make_grounding, folder, image, **changes):
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    include_query = changes.pop("include_query", False)
    make_grounding(image, **changes).save(folder / "a.dcm", include_query=include_query)
    return pydicom.dcmread(folder / "a.dcm")


def test_seg_frame_lies_where_the_source_frame_lies(make_grounding, tmp_path):
    image = read_image(_pydicom_file("eCT_Supplemental.dcm"), frame=1)
    seg = _saved(make_grounding, tmp_path, image)
    source = image.dicom.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0].ImagePositionPatient
    assert seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient == source
    assert seg.FrameOfReferenceUID == image.dicom.FrameOfReferenceUID


def test_seg_pixels_are_those_that_pydicom_unpacks(make_grounding, tmp_path):
    image = read_image(_pydicom_file("MR2_UNCR.dcm"))
    seg = _saved(make_grounding, tmp_path, image)
    assert (seg.pixel_array == make_grounding(image).mask).all()
    assert (seg.Rows, seg.Columns) == image.pixels.shape


def test_seg_names_model_and_algorithm_and_general_codes(make_grounding, tmp_path):
    seg = _saved(make_grounding, tmp_path, read_image(_pydicom_file("CT_small.dcm")))
    (segment,) = seg.SegmentSequence
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("MedReasoner Edge toy", "0.1.0")
    assert "ab" * 32 in algorithm.AlgorithmParameters
    category = segment.SegmentedPropertyCategoryCodeSequence[0]
    assert (category.CodeValue, category.CodingSchemeDesignator) == ("91723000", "SCT")
    kind = segment.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("85756007", "SCT")
    assert segment.TrackingUID
    assert segment.TrackingID


def test_seg_keeps_patient_and_study_as_they_are(make_grounding, tmp_path):
    image = read_image(_pydicom_file("693_UNCR.dcm"))
    seg = _saved(make_grounding, tmp_path, image)
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "PatientBirthDate", "AccessionNumber"):
        assert seg.get(keyword) == image.dicom.get(keyword)
    assert seg.SeriesInstanceUID != image.dicom.SeriesInstanceUID
    assert seg.SOPInstanceUID != image.dicom.SOPInstanceUID


@pytest.mark.parametrize("include_query", [False, True])
def test_seg_holds_the_query_only_when_asked(make_grounding, tmp_path, include_query):
    _saved(make_grounding, tmp_path, read_image(_pydicom_file("CT_small.dcm")), include_query=include_query)
    assert (b"Mr Doe" in (tmp_path / "a.dcm").read_bytes()) is include_query


def test_writing_seg_leaves_the_source_header_alone(make_grounding, tmp_path):
    image = read_image(_pydicom_file("eCT_Supplemental.dcm"), frame=1)
    before = image.dicom.to_json()
    _saved(make_grounding, tmp_path, image)
    assert image.dicom.to_json() == before


def test_seg_of_something_else_than_dicom_is_refused_before_the_work(make_grounding, tmp_path):
    pytest.importorskip("highdicom")
    grounding = make_grounding()
    with pytest.raises(OutputError, match="refers to a DICOM image"):
        check_output(tmp_path / "a.dcm", image=grounding.image)
    with pytest.raises(OutputError, match="refers to a DICOM image"):
        encode_seg(grounding, include_query=False)


def _header(**changes):
    dataset = read_image(_pydicom_file("CT_small.dcm")).dicom[:]
    for keyword, value in changes.items():
        dataset.pop(keyword, None)
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def _image_with(dataset):
    return Image(pixels=np.zeros((128, 128), np.uint8), source="x.dcm", dicom=dataset)


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
def test_seg_without_what_a_reference_needs_names_it(make_grounding, tmp_path, keyword):
    with pytest.raises(OutputError, match=keyword):
        _saved(make_grounding, tmp_path, _image_with(_header(**{keyword: None})))


@pytest.mark.parametrize(
    ("changes", "in_space"),
    [
        pytest.param({"PatientID": None, "StudyDate": None, "PatientSex": None}, True, id="type 2 left out"),
        pytest.param({"SliceThickness": None, "SpacingBetweenSlices": None}, False, id="no thickness"),
        pytest.param({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, False, id="axes not perpendicular"),
        pytest.param({"ImagePositionPatient": None}, False, id="no position"),
        pytest.param({"Modality": None}, True, id="no modality"),
        pytest.param({"SeriesNumber": None}, True, id="no series number"),
    ],
)
def test_seg_is_written_for_incomplete_headers(make_grounding, tmp_path, changes, in_space):
    highdicom = pytest.importorskip("highdicom")
    _saved(make_grounding, tmp_path, _image_with(_header(**changes)))
    seg = highdicom.seg.segread(tmp_path / "a.dcm")
    assert ("FrameOfReferenceUID" in seg) is in_space


def test_missing_packages_are_named_before_the_work(tmp_path, monkeypatch):
    for module, name in (("highdicom", "a.dcm"), ("nibabel", "a.nii")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MedReasonerError, match=rf"{module}.*pip install"):
            check_output(tmp_path / name)


def test_saved_bytes_follow_the_users_umask(make_grounding, tmp_path):
    before = os.umask(0o027)
    try:
        make_grounding().save(tmp_path / "a.json")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_encoded_seg_is_a_part_10_file(make_grounding):
    pytest.importorskip("highdicom")
    data = encode_seg(make_grounding(read_image(_pydicom_file("CT_small.dcm"))), include_query=False)
    assert data[128:132] == b"DICM"
    assert io.BytesIO(data).read(128) == bytes(128)
