import sys

import numpy as np
import pytest

from medreasoner.errors import ImageReadError, MissingExtraError
from medreasoner.image import read_image
from medreasoner.samples import SAMPLES, sample_path


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_a_file_and_reads_as_a_lively_picture(name):
    sample = SAMPLES[name]
    assert sample_path(name).name == sample.filename
    image = read_image(f"sample:{name}", frame=0)
    assert image.source == f"sample:{name}"
    assert np.ptp(image.pixels) > 150
    assert min(image.height, image.width) >= 400


def test_samples_are_keyed_by_their_name_and_cover_the_usual_modalities():
    assert all(name == sample.name for name, sample in SAMPLES.items())
    assert {"chest", "leg", "shoulder-mr", "abdomen-mr", "head-ct", "ultrasound"} <= set(SAMPLES)
    assert all(sample.description and sample.query.isascii() for sample in SAMPLES.values())


def test_an_unknown_sample_names_the_known_ones():
    with pytest.raises(ImageReadError, match=r"sample:knee: no such sample; there are abdomen-mr, chest"):
        read_image("sample:knee")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "data_store", None)
    with pytest.raises(MissingExtraError, match=r"medreasoner\[samples\]"):
        sample_path("chest")
