"""Make an environment for each peer, from its lock file::

    python benchmarks/peers/install.py --into /tmp/peers [NAME...]

Environments that are there already, of the same lock file, are kept. A peer that cannot be installed leaves its error
in ``NAME.error``, which the comparisons print; the others go on.
"""

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["LOCKS", "find_python"]

LOCKS = Path(__file__).parent / "locks"
# Compiled on this machine, llama.cpp uses the instructions that its processor has; tools are left out. GCC 12 takes the
# configuration of the processor's tiles (AMX) for stores that nobody reads and drops it, and the first prompt ends with
# an illegal instruction: so such stores are kept. Without tiles, single tokens took twice as long.
_KEEP_STORES = "-fno-tree-dse -fno-dse"
BUILD: Mapping[str, Mapping[str, str]] = {
    "llama-cpp-python": {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=ON",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        "CFLAGS": _KEEP_STORES,
        "CXXFLAGS": _KEEP_STORES,
    }
}
# Wants torchvision besides, which nothing here calls and which breaks all where its build is not that of torch.
ALONE: Mapping[str, Sequence[str]] = {"optimum-intel": ("optimum-intel==2.2.0",)}
_LAST_LINES = 3


def find_python(into: Path, name: str) -> Path:
    """The peer's interpreter.

    Raises
    ------
    FileNotFoundError
        With the reason, if the peer is not installed there.
    """
    python = into / name / "bin" / "python"
    error = into / f"{name}.error"
    if error.is_file():
        raise FileNotFoundError(error.read_text())
    if not (into / name / "lock.txt").is_file():
        raise FileNotFoundError(f"not installed: python benchmarks/peers/install.py --into {into} {name}")
    return python


def _options(name: str) -> list[str]:
    """What was built before may have been built otherwise."""
    return ["--no-binary", name, "--no-cache-dir"] if name in BUILD else []


def _run(command: Sequence[str], name: str, into: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | BUILD.get(name, {}), check=False)
    (into / f"{name}.log").write_text(done.stdout + done.stderr)
    return done


def install(into: Path, name: str) -> str:
    """What came of it, in a word or a line."""
    folder, lock, error = into / name, LOCKS / f"{name}.txt", into / f"{name}.error"
    stamp = folder / "lock.txt"
    wanted = (
        lock.read_text()
        + "".join(f"# {each}\n" for each in ALONE.get(name, ()))
        + "".join(f"# {key}={value}\n" for key, value in BUILD.get(name, {}).items())
    )
    if stamp.is_file() and stamp.read_text() == wanted:
        return "there already"
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    done = _run([*pip, *_options(name), "-r", str(lock)], name, into)
    if not done.returncode and name in ALONE:
        done = _run([*pip, "--no-deps", *ALONE[name]], name, into)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        error.write_text(" | ".join(lines[-_LAST_LINES:]))
        return f"NOT INSTALLED: {error.read_text()}"
    error.unlink(missing_ok=True)
    stamp.write_text(wanted)
    return "installed"


def main() -> None:
    names = sorted(path.stem for path in LOCKS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True, help="folder for the environments")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(names)}")
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"no lock file for {', '.join(sorted(unknown))}; there is {', '.join(names)}")
    options.into.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in options.names or names:
        outcome = install(options.into, name)
        failed |= outcome.startswith("NOT")
        print(f"{name}: {outcome}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
