import ast
import inspect
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import medreasoner
from medreasoner import _kernels, ops

STUB = ast.parse((Path(medreasoner.__file__).parent / "_kernels.pyi").read_text())
OPERATORS = {"__init__"}


def is_ours(name: str) -> bool:
    return name in OPERATORS or not name.startswith("_")


def stub_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def documented_arguments(docstring: str) -> list[str]:
    """Argument names in pybind11's own signature, with the star before those that need their name."""
    overload = re.search(r"\((.*)\) -> ", docstring.partition("1. ")[2] or docstring)
    assert overload is not None
    names, depth = [], 0
    for part in re.split(r"([\[\](),])", overload[1]):
        depth += (part in "[(") - (part in "])") if part else 0
        if depth == 0 and (match := re.match(r"\s*(\*|\w+)(?::|$)", part)):
            names.append(match[1])
    return names


def stub_arguments(node: ast.FunctionDef) -> list[str]:
    keyword_only = [argument.arg for argument in node.args.kwonlyargs]
    return [argument.arg for argument in node.args.args] + (["*", *keyword_only] if keyword_only else [])


def test_the_stub_names_what_the_module_holds():
    assert sorted(stub_names(STUB.body)) == sorted(name for name in dir(_kernels) if is_ours(name))


@pytest.mark.parametrize("node", [n for n in STUB.body if isinstance(n, ast.FunctionDef)], ids=lambda n: n.name)
def test_functions_of_the_stub_take_the_arguments_of_the_module(node):
    assert stub_arguments(node) == documented_arguments(getattr(_kernels, node.name).__doc__)


@pytest.mark.parametrize("node", [n for n in STUB.body if isinstance(n, ast.ClassDef)], ids=lambda n: n.name)
def test_classes_of_the_stub_have_the_members_of_the_module(node):
    found, members = getattr(_kernels, node.name), stub_names(node.body)
    assert ast.get_docstring(node) == found.__doc__
    assert set(members) - OPERATORS == {name for name in dir(found) if not name.startswith("_")}
    for name, member in members.items():
        assert isinstance(member, ast.FunctionDef)
        is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list)
        assert isinstance(inspect.getattr_static(found, name), property) == is_property
        if not is_property:
            assert stub_arguments(member) == documented_arguments(getattr(found, name).__doc__)


def test_ops_exports_sorted_names_that_exist():
    assert ops.__all__ == sorted(ops.__all__)
    assert all(hasattr(ops, name) for name in ops.__all__)


def test_the_processor_offers_the_level_in_use():
    assert ops.simd_level() in _kernels.simd_levels()
    assert ops.simd_level() in {*ops.cpu_features(), "avx512", "portable"}
    with pytest.raises(ValueError, match="does not run"):
        _kernels.set_simd_level("mmx")


def test_the_processor_multiplies_bfloat16_by_one_of_its_roads():
    assert _kernels.tile_roads()[0] == "none"
    assert _kernels.tile_road() in _kernels.tile_roads()
    before = _kernels.tile_road()
    try:
        for road in _kernels.tile_roads():
            _kernels.set_tile_road(road)
            assert ops.has_tiles() == (road != "none")
    finally:
        _kernels.set_tile_road(before)
    with pytest.raises(ValueError, match="does not multiply"):
        _kernels.set_tile_road("sse")


def heavy_calls() -> dict[str, object]:
    """Calls that work for 30 to 150 ms each, many times the interval at which threads take turns."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5000, 5000), dtype=np.uint8)
    weight = rng.standard_normal((64, 512)).astype(np.float32)
    rows = np.tile(np.arange(64, dtype=np.int32), 40_000)
    logits = rng.standard_normal((256, 256)).astype(np.float32)
    noise = image[:2000, :2000] > 127
    normal = {"mean": [0.5] * 3, "std": [0.5] * 3}
    return {
        "resize": lambda: ops.resize_u8(image, 4000, 4000),
        "patches": lambda: ops.preprocess_patches(image, 3360, 3360, patch=14, merge=2, **normal),
        "planes": lambda: ops.preprocess_planes(image, 3000, 3000, **normal),
        "window": lambda: ops.window_u8(image[:2000, :2000].astype(np.float32), 1, 0, 90, 99, function="SIGMOID"),
        "project": lambda: ops.project_rows(weight[0], weight, "float32", rows),
        "select": lambda: ops.select_token(weight[0], weight, "float32", rows),
        "gather": lambda: ops.gather_rows(weight, "float32", rows[:100_000].astype(np.int64)),
        "mask": lambda: ops.mask_from_logits(logits, crop=(256, 256), height=8000, width=8000),
        "encode": lambda: ops.rle_encode(noise),
        "decode": lambda: ops.rle_decode({"size": [2000, 2000], "counts": RLE_OF_ROWS}),
    }


RLE_OF_ROWS = "1110" + "0" * (2000 * 2000 - 4)


@pytest.mark.parametrize(
    "name", ["resize", "patches", "planes", "window", "project", "select", "gather", "mask", "encode", "decode"]
)
def test_another_thread_runs_while_a_kernel_works(name):
    call, span, stamps = heavy_calls()[name], [], []

    def work() -> None:
        call()  # the first run pays for memory
        start = time.perf_counter()
        call()
        span.extend((start, time.perf_counter()))

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        stamps.append(time.perf_counter())
    start, end = span
    # With the lock held, this thread would see nothing between the kernel's start and its end.
    middle = [at for at in stamps if start + 0.25 * (end - start) < at < end - 0.25 * (end - start)]
    assert len(middle) > 10
