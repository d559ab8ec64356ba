"""Results on disk: pictures, masks, JSON, NIfTI and DICOM SEG, chosen by the ending of the file's name."""

from medreasoner.outputs.forms import FORMS, check_output, form_of
from medreasoner.outputs.save import save

__all__ = ["FORMS", "check_output", "form_of", "save"]
