"""Which structures are known to be absent from an image.

Not everything that is visible is labelled. A category counts as absent from an image only if its source labels all of
its kind and this image has none, or if the category belongs to another part of the body.
"""

from collections import defaultdict
from collections.abc import Iterable

from medreasoner_train.data import ImageRecord, Sample, labelled_kinds

__all__ = ["REGIONS", "AbsentRule"]

# Families whose structures may turn up, unlabelled, in each other's images share a name: a short-axis heart slice shows
# the dome of the liver, a bone marrow smear shows white cells, neck and limb frames both show nerves and vessels.
REGIONS = {
    "kvasir_seg": "colon",
    "nerve_us": "nerve block",
    "usgra": "nerve block",
    "fetal_us": "pelvis",
    "stu_breast_us": "breast",
    "shenzhen_cxr": "torso",
    "covid_cxr": "torso",
    "dental_pan": "jaw",
    "dental_caries": "jaw",
    "knee_a": "knee",
    "knee_b": "knee",
    "acdc_mri": "torso",
    "brisc_mri": "brain",
    "pyradiomics_brain": "brain",
    "totalseg_mr": "torso",
    "totalseg_ct": "torso",
    "recist_ct": "torso",
    "liver_ct": "torso",
    "kidney_ct": "torso",
    "empire_lung_ct": "torso",
    "sammed_demo": "torso",
    "ph2": "skin",
    "wbc_d1": "cells",
    "wbc_d2": "cells",
    "herlev_pap": "cells",
    "myeloma": "cells",
    "dsb_fluo": "cells",
    "dsb_he": "cells",
    "gbm_nuclei": "cells",
    "axon_sem": "nervous tissue",
    "isbi_em": "nervous tissue",
    "drive": "eye",
    "chase": "eye",
    "drishti_mini": "eye",
    "drions_mini": "eye",
}

# Sources that label every structure of their kinds, so that a missing label means that it is not there.
COMPLETE = frozenset({"acdc_mri", "covid_cxr", "totalseg_ct", "totalseg_mr"})


class AbsentRule:
    """Answers, for an image, which categories are absent for certain; fitted on the whole index."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        rows = list(samples)
        self._kinds = labelled_kinds(rows)
        homes: dict[str, set[str]] = defaultdict(set)
        for sample in rows:
            homes[sample.category].add(REGIONS.get(sample.source, sample.source))
        self._homes = homes

    def same_region(self, image: ImageRecord) -> list[str]:
        """Categories that the image's own source labels wherever they are, and does not label here."""
        if image.source not in COMPLETE:
            return []
        own = {sample.category for sample in image.samples}
        if own & {"glioma", "meningioma", "pituitary tumor"}:
            own.add("brain tumor")
        return sorted(self._kinds[image.source] - own)

    def other_region(self, image: ImageRecord) -> list[str]:
        """Categories that live in other parts of the body only."""
        region = REGIONS.get(image.source, image.source)
        return sorted(category for category, homes in self._homes.items() if region not in homes)
