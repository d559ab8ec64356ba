"""Decodes one frame with GDCM, as a program of its own: DICOM on standard input, the decoded frame on standard output.

GDCM is C++ that ends the process on some damaged JPEG streams. Here it can only end this one. The file is run by its
path and imports nothing of medreasoner, so that it starts fast and whatever the way the package was installed.
"""

import io
import resource
import sys

import numpy as np
import pydicom
from pydicom.pixels import get_decoder

__all__: list[str] = []


def main() -> None:
    """Write the photometric interpretation as one line, then the frame in NumPy's .npy format."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    dataset = pydicom.dcmread(io.BytesIO(sys.stdin.buffer.read()), force=True)
    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    values, properties = decoder.as_array(dataset, index=0, raw=True, decoding_plugin="gdcm")
    sys.stdout.buffer.write(f"{properties['photometric_interpretation']}\n".encode())
    np.save(sys.stdout.buffer, values, allow_pickle=False)


if __name__ == "__main__":
    main()
