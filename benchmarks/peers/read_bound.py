"""How fast this machine reads memory, as one more side of ``large_decode.py``: ``python read_bound.py BYTES THREADS``.

An array of that many bytes is read from its beginning to its end, like the weights for a token: by NumPy's reductions,
and, where there is a C compiler, by a loop that does nothing else. The fastest way counts.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the threads are ours

import numpy as np
import numpy.typing as npt
from serving import serve, versions

_CHUNK = 2**18  # values at a time: a megabyte, so that a call's own cost does not count
_SOURCE = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *words, size_t n) {
    uint64_t seen = 0;
    for (size_t i = 0; i + 64 <= n; i += 64) {
        for (size_t j = 0; j < 64; j += 8) __builtin_prefetch(words + i + j + 512);
        for (size_t j = 0; j < 64; ++j) seen |= words[i + j];
    }
    return seen;
}
"""

Way = Callable[[npt.NDArray[np.float32]], object]


def _ways() -> dict[str, Way]:
    ways: dict[str, Way] = {
        "dot": lambda part: np.dot(part, part),
        "max": lambda part: part.max(),
        "sum": lambda part: part.sum(),
    }
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return ways
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return ways
        loop = ctypes.CDLL(str(library)).read_all
    loop.argtypes, loop.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    return ways | {"C": lambda part: loop(part.ctypes.data, part.nbytes // 8)}


def main(size_bytes: int, threads: int) -> None:
    def start() -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
        values = np.ones(size_bytes // 4, np.float32)
        ways, counts = _ways(), sorted({1, threads})

        def read(way: str, n: int) -> float:
            def work(part: npt.NDArray[np.float32]) -> None:
                for begin in range(0, len(part), _CHUNK):
                    ways[way](part[begin : begin + _CHUNK])

            with ThreadPoolExecutor(n) as pool:
                begin = perf_counter()
                list(pool.map(work, np.array_split(values, n)))
                return perf_counter() - begin

        def run(_: str) -> Mapping[str, Any]:
            """Seconds for the whole array by number of threads and way."""
            return {"read_s": {str(n): {way: read(way, n) for way in ways} for n in counts}}

        settings = f"{values.nbytes / 1e9:.2f} GB, by {', '.join(ways)}, with {' and '.join(map(str, counts))} threads"
        return {"versions": versions(["numpy"]), "settings": settings, "weight_bytes": values.nbytes}, run

    serve(start)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
