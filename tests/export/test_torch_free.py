"""Exporting is reading and writing files: torch is for the parity check's reference alone."""

import subprocess
import sys
from pathlib import Path


def _imported(code: str, folder: Path) -> str:
    code += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_bundle_is_built_without_torch(tmp_path: Path) -> None:
    code = "import sys; from medreasoner_export.toy import make_toy_bundle; make_toy_bundle(sys.argv[1]); "
    assert _imported(code, tmp_path) == "[]"


def test_a_bundle_answers_before_torch_takes_its_memory(toy: Path) -> None:
    code = (
        "import sys; from medreasoner.bundle import load_bundle; import medreasoner_export.verify; "
        "from medreasoner_export.parity_road import bundle_answers, own_questions; "
        "bundle_answers(load_bundle(sys.argv[1]), own_questions()); "
    )
    assert _imported(code, toy / "bundle") == "[]"
