"""The kernels on 64-bit ARM: compiled for it, run under emulation, and compared with what they give here."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
COMPILERS = {"aarch64": "aarch64-linux-gnu-g++", "native": "g++"}


def _run_built_for(target, folder):
    program = folder / target
    sources = [HERE / "portable.cpp", *sorted((KERNELS / "src").glob("*.cpp"))]
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-static", "-pthread", f"-I{KERNELS / 'include'}"]
    subprocess.run([COMPILERS[target], *flags, *map(str, sources), "-o", str(program)], check=True)
    if target == "aarch64":  # the ARM build also takes the place of one with an older standard library
        flags.append("-DMR_TEST_WITHOUT_FROM_CHARS")
    emulator = ["qemu-aarch64"] if target == "aarch64" else []
    return subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(COMPILERS["aarch64"]) is None or shutil.which("qemu-aarch64") is None,
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_arm_gives_what_this_machine_gives(tmp_path):
    here, arm = _run_built_for("native", tmp_path), _run_built_for("aarch64", tmp_path)
    assert len(here) > 15
    assert arm == here
