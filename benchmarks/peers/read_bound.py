"""How fast this machine reads memory, as one more side of ``large_decode.py``: ``python read_bound.py BYTES THREADS``.

An array of that many bytes is read from its beginning to its end, like the weights for a token.
"""

import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the threads are ours

import numpy as np
import numpy.typing as npt
from serving import serve, versions

_CHUNK = 2**18  # values at a time: a megabyte, so that a call's own cost does not count
_WAYS: Mapping[str, Callable[[npt.NDArray[np.float32]], object]] = {
    "dot": lambda part: np.dot(part, part),
    "max": lambda part: part.max(),
    "sum": lambda part: part.sum(),
}


def main(size_bytes: int, threads: int) -> None:
    def start() -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
        values = np.ones(size_bytes // 4, np.float32)

        def read(way: str, n: int) -> float:
            def work(part: npt.NDArray[np.float32]) -> None:
                for begin in range(0, len(part), _CHUNK):
                    _WAYS[way](part[begin : begin + _CHUNK])

            with ThreadPoolExecutor(n) as pool:
                begin = perf_counter()
                list(pool.map(work, np.array_split(values, n)))
                return perf_counter() - begin

        def run(_: str) -> Mapping[str, Any]:
            """Seconds for the whole array by number of threads, the fastest way."""
            counts = sorted({1, threads})
            return {"read_s": {str(n): min(read(way, n) for way in _WAYS) for n in counts}}

        ways = {f"{way}, {n}": round(values.nbytes / read(way, n) / 1e9, 1) for way in _WAYS for n in {1, threads}}
        settings = f"{values.nbytes / 1e9:.2f} GB by NumPy's fastest of (GB/s by threads) {ways}"
        return {"versions": versions(["numpy"]), "settings": settings, "weight_bytes": values.nbytes}, run

    serve(start)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
