"""The kernels on 64-bit ARM: compiled for it, run under emulation, and compared with what they give here."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
COMPILERS = {"aarch64": "aarch64-linux-gnu-g++", "native": "g++"}


def _run_built_for(target, folder):
    program = folder / target
    sources = [HERE / "portable.cpp", *sorted((KERNELS / "src").glob("*.cpp"))]
    flags = ["-std=c++17", "-Wall", "-Werror", "-static", "-pthread", f"-I{KERNELS / 'include'}"]
    if target == "aarch64":  # the ARM build also takes the place of one with an older standard library
        flags += ["-O2", "-DMR_TEST_WITHOUT_FROM_CHARS"]
    else:  # the vectors of each x86 level take long to optimise
        flags.append("-O1")
    subprocess.run([COMPILERS[target], *flags, *map(str, sources), "-o", str(program)], check=True)
    emulator = ["qemu-aarch64"] if target == "aarch64" else []
    return subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(COMPILERS["aarch64"]) is None or shutil.which("qemu-aarch64") is None,
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_arm_gives_what_this_machine_gives(tmp_path):
    with ThreadPoolExecutor() as pool:
        here, arm = pool.map(lambda target: _run_built_for(target, tmp_path), ("native", "aarch64"))
    assert len(here) > 15
    assert arm == here
