from collections.abc import Iterator

import pytest

from medreasoner import _kernels


@pytest.fixture(params=_kernels.simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine runs, the plainest included."""
    before = _kernels.simd_level()
    _kernels.set_simd_level(request.param)
    yield request.param
    _kernels.set_simd_level(before)
