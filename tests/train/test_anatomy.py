"""What counts as absent from an image."""

from pathlib import Path

from medreasoner_train.anatomy import COMPLETE, REGIONS, AbsentRule
from medreasoner_train.data import by_image, load_index
from medreasoner_train.language import load_phrasings


def test_only_a_source_that_labels_everything_tells_what_is_missing(grounding_set: Path) -> None:
    samples = load_index(grounding_set)
    rule = AbsentRule(samples)
    for record in by_image(samples):
        labelled = {sample.category for sample in record.samples}
        expected = {"right ventricle"} - labelled if record.source == "acdc_mri" else set()
        assert set(rule.same_region(record)) == expected


def test_structures_of_the_same_part_of_the_body_are_never_called_absent(grounding_set: Path) -> None:
    samples = load_index(grounding_set)
    rule = AbsentRule(samples)
    elsewhere = {record.source: set(rule.other_region(record)) for record in by_image(samples)}
    chest = {"left lung", "right lung", "left ventricle", "right ventricle", "myocardium"}  # both are "torso"
    pelvis = {"fetal head", "pubic symphysis"}
    assert elsewhere["shenzhen_cxr"] == elsewhere["acdc_mri"] == {"polyp"} | pelvis
    assert elsewhere["kvasir_seg"] == chest | pelvis
    assert elsewhere["fetal_us"] == chest | {"polyp"}


def test_sources_that_label_everything_have_a_region() -> None:
    assert REGIONS.keys() >= COMPLETE


def test_a_category_can_be_asked_for_in_both_parts(grounding_set: Path) -> None:
    keys = {sample.key for sample in load_index(grounding_set)}
    assert keys <= load_phrasings("train").keys()
    assert keys <= load_phrasings("heldout").keys()
