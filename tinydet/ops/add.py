"""Elementwise sum: where a residual branch or a feature pyramid's top-down path joins."""
import numpy as np
from numba import njit, prange

from tinydet import checks
from tinydet.backend import pick

PART = 1 << 16          # numbers that one thread adds at a time


def forward(a, b):
    """y = a + b. a, b: one shape and one dtype, float32 or float64; nothing is broadcast. Returns y and cache.

    Raises ValueError for shapes that differ, TypeError for dtypes. On a GPU array code serves: one launch.
    """
    checks.float_array("add.forward", "a", a)
    checks.same_shape("add.forward", a.shape, b=b)
    checks.same_dtype("add.forward", a=a, b=b)
    return a + b, (a.shape, a.dtype)


def backward(dy, cache):
    """da = db = dy: both are the array dy itself, not copies. Raises ValueError or TypeError where dy does not fit the cache."""
    checks.gradient("add.backward", *cache, dy)
    return dy, dy


def accumulate(total, x):
    """total += x, in place: how parameter gradients add up; large ones with every thread.

    The one op that changes an input: a layer's `grads` are its own. Any shape; nothing is broadcast. One float dtype (not checked: total
    keeps its own). Returns nothing. Raises ValueError for shapes that differ, TypeError for an x that is no array.
    """
    checks.same_shape("add.accumulate", total.shape, x=x)
    pick(total, numpy=_accumulate_numpy, numba=_accumulate_numba, cuda=_accumulate_numpy)(total, x)


def _accumulate_numpy(total, x):
    total += x


def _accumulate_numba(total, x):
    if total.size > PART and total.dtype == x.dtype and total.flags.c_contiguous and x.flags.c_contiguous:
        _accumulate(total.reshape(-1), x.reshape(-1))
    else:
        total += x


@njit(cache=True, parallel=True)
def _accumulate(total, x):
    for part in prange(-(-len(total) // PART)):
        first = np.int64(part) * PART                                   # prange counts unsigned
        for k in range(first, min(len(total), first + PART)):
            total[k] += x[k]
