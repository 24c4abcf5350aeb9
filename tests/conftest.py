"""Shared by all tests: the Hypothesis profile, the backends, and inputs that stay off the kinks."""
import tinydet  # noqa: F401  first: it sets how waiting threads behave, which numpy and numba read once

import numba
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

BACKENDS = ("numpy", "numba")           # every name that tinydet.use takes and this machine can run

settings.register_profile("tinydet", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("tinydet")

numba.set_num_threads(1)                # on inputs this small a second thread only waits, for 10 ms a call on a busy machine


@pytest.fixture
def all_threads():
    """Run the Numba loops on every core, in tests that could see a race."""
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    yield
    numba.set_num_threads(1)


seeds = st.integers(0, 2**32 - 1)


def distinct(shape, seed):
    """Values at least 0.25 apart and at least 0.125 from 0, of both signs, in random order: no kink within a small step."""
    size = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(size).reshape(shape) - size // 2 + 0.5) / 4


@st.composite
def distinct_NHWC(draw, min_side=1, max_side=5, max_N=2, max_C=2):
    """distinct() as (N, H, W, C), H and W drawn apart."""
    side = st.integers(min_side, max_side)
    return distinct((draw(st.integers(1, max_N)), draw(side), draw(side), draw(st.integers(1, max_C))), draw(seeds))


@st.composite
def random_boxes(draw, max_R=12, extent=12):
    """(R, 4) float64 boxes on a half-pixel grid, so that touching, equal, nested and empty ones occur."""
    R, rng = draw(st.integers(0, max_R)), np.random.default_rng(draw(seeds))
    corner = rng.integers(-extent, extent, (R, 2))
    return np.concatenate([corner, corner + rng.integers(0, extent, (R, 2))], 1) / 2
