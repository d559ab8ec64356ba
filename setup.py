"""Package map and the compiled kernels; everything else is in pyproject.toml."""

import os
import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOTS = ("sdk", "export", "train", "cli")
packages = {name: root for root in ROOTS for name in find_packages(root)}

# MEDREASONER_NO_NANO=1 leaves the 40 MB nano bundle out, for vendors who ship a model of their own.
bundle = ["bundles/nano/**/*"]
if os.environ.get("MEDREASONER_NO_NANO") == "1":
    bundle = []
    for left in Path("build").glob("lib*/medreasoner/bundles"):  # by an earlier build, which a wheel would take along
        shutil.rmtree(left)

setup(
    packages=sorted(packages),
    package_dir={name: f"{root}/{name}" for name, root in packages.items() if "." not in name},
    package_data={
        "medreasoner": ["py.typed", "_kernels.pyi", *bundle],
        "medreasoner_export": ["py.typed"],
        "medreasoner_train": ["py.typed", "queries/*.json", "recipes/*.toml"],
        "medreasoner_cli": ["py.typed"],
    },
    ext_modules=[
        Pybind11Extension(
            "medreasoner._kernels",
            sorted(str(path) for path in Path("kernels").rglob("*.cpp")),
            include_dirs=["kernels/include"],
            depends=sorted(str(path) for path in Path("kernels").rglob("*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": build_ext},
    zip_safe=False,
)
