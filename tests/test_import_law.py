"""Layers import in one direction: kernels <- sdk <- cli, sdk <- export, sdk <- train; read from the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "sdk/medreasoner": {"medreasoner"},
    "export/medreasoner_export": {"medreasoner", "medreasoner_export"},
    "train/medreasoner_train": {"medreasoner", "medreasoner_export", "medreasoner_train"},
    "cli/medreasoner_cli": {"medreasoner", "medreasoner_export", "medreasoner_train", "medreasoner_cli"},
}
# Layers that may be imported only inside a function, so that the importing module loads without them.
LAZY = {
    "train/medreasoner_train": {"medreasoner_export"},
    "cli/medreasoner_cli": {"medreasoner_export", "medreasoner_train"},
}
HEAVY = {"torch", "transformers", "typer", "onnx", "safetensors", "scipy"}
OURS = {"medreasoner", "medreasoner_export", "medreasoner_train", "medreasoner_cli"}


def modules(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Full names that a file imports, and whether at the top level, outside `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if is_guard or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((f"{node.module}.{alias.name}", node not in inner) for alias in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_those_below_it(layer: str) -> None:
    assert modules(layer) or not (ROOT / layer).exists()
    for path in modules(layer):
        for name, is_top in imports(path):
            top = name.partition(".")[0]
            assert top not in OURS or top in LAYERS[layer], f"{path} imports {name}"
            assert not (is_top and top in LAZY.get(layer, ())), f"{path} imports {name} outside a function"
            assert top not in {"sdk", "export", "train", "cli", "kernels"}, f"{path} imports a folder, {name}"


def test_the_runtime_never_imports_what_training_needs() -> None:
    for path in modules("sdk/medreasoner"):
        assert not {name for name, _ in imports(path)} & HEAVY, path
        assert not {name.partition(".")[0] for name, _ in imports(path)} & HEAVY, path


def test_only_the_facade_imports_the_kernels() -> None:
    for layer in LAYERS:
        for path in modules(layer):
            if path.name not in ("ops.py", "_decoder_ops.py"):  # the second is a part of the first
                assert not any("_kernels" in name for name, _ in imports(path)), path
            if path.name != "ops.py":
                assert not any("_decoder_ops" in name for name, _ in imports(path)), path


def test_kernels_include_python_only_in_their_bindings() -> None:
    for path in (ROOT / "kernels").rglob("*"):
        if path.suffix in {".h", ".cpp", ".inc"} and not path.name.startswith("bindings"):
            text = path.read_text(encoding="utf-8")
            assert "pybind11" not in text, path
            assert "Python.h" not in text, path


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, medreasoner\n"
        "heavy = {'torch', 'transformers', 'typer', 'onnxruntime', 'tokenizers', 'PIL', 'pydicom', 'nibabel'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
