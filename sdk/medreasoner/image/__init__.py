"""Images of every kind, read into one record of display values."""

from medreasoner.image.nifti import NiftiSlice
from medreasoner.image.read import ImageSource, read_image
from medreasoner.image.record import Image

__all__ = ["Image", "ImageSource", "NiftiSlice", "read_image"]
