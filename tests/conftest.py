"""Results made up by hand, for tests of what is done with results; and what keeps a run of all tests short."""

import gc
import os
from collections.abc import Callable, Iterator

# Before torch is imported, here and in the processes that tests start: on models as small as the tests' its threads
# wait for each other longer than they compute. Who wants more says so in this variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from medreasoner import _kernels
from medreasoner.image import Image
from medreasoner.result import Grounding

gc.disable()  # until all is imported: next to nothing of what torch and transformers make by then is garbage

MakeGrounding = Callable[..., Grounding]


def pytest_collection_finish() -> None:
    """Take what is imported by now out of the garbage collector's rounds, which with torch last half a second each."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(params=_kernels.tile_roads()[1:] or ["none"])
def tile_road(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way in which this machine multiplies bfloat16: through floats, by vectors, by tiles."""
    if request.param == "none":
        pytest.skip("this processor has no AVX-512 with VNNI")
    before = _kernels.tile_road()
    _kernels.set_tile_road(request.param)
    yield request.param
    _kernels.set_tile_road(before)


@pytest.fixture
def make_grounding() -> MakeGrounding:
    """Builder of a result about an image (default: a grey ramp of 40 x 60) whose mask is an ellipse, or is absent."""

    def build(image: Image | None = None, *, found: bool = True, **changes: object) -> Grounding:
        if image is None:
            ramp = np.linspace(0, 255, 40 * 60).astype(np.uint8).reshape(40, 60)
            image = Image(pixels=ramp, source="array", pixel_spacing_mm=(0.5, 0.25))
        height, width = image.height, image.width
        rows, columns = np.mgrid[:height, :width] + 0.5
        # Off the centre on both axes, so that a flipped or turned mask is another mask.
        mask = ((columns / width - 0.35) / 0.25) ** 2 + ((rows / height - 0.6) / 0.2) ** 2 < 1
        box = (0.1 * width, 0.4 * height, 0.6 * width, 0.8 * height)
        points = ((0.3 * width, 0.6 * height), (0.45 * width, 0.6 * height))
        spacing = image.pixel_spacing_mm
        values: dict[str, object] = {
            "found": found,
            "box": box if found else None,
            "points": points if found else None,
            "mask": mask if found else np.zeros_like(mask),
            "score": 0.73 if found else 0.0,
            "reasoning": None,
            "answer": "<answer>...</answer>",
            "absent_probability": None,
            "timings_ms": {"total": 12.5},
            "tokens": {"answer": 10},
            "pixel_spacing_mm": spacing,
            "area_mm2": None if spacing is None else float(mask.sum() * spacing[0] * spacing[1]) if found else 0.0,
            "warnings": (),
            "image": image,
            "query": "Where is the secret thing of Mr Doe?",
            "model_name": "toy",
            "model_version": "0.1.0",
            "model_digest": "ab" * 32,
        }
        return Grounding(**(values | changes))  # type: ignore[arg-type]

    return build
