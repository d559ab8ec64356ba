"""Exporting is reading and writing files: torch is for the parity check alone."""

import subprocess
import sys
from pathlib import Path


def test_a_bundle_is_built_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from medreasoner_export.toy import make_toy_bundle; make_toy_bundle(sys.argv[1]); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
