"""Rectified linear unit."""
import numpy as np
from numba import njit

from tinydet import checks
from tinydet.backend import array_module, pick


def forward(x):
    """y = max(x, 0), elementwise. x: any shape, float32 or float64. Returns y (same shape and dtype) and cache.

    NaN stays NaN. An empty x gives an empty y. On a GPU array code serves: one launch, two backward.
    """
    checks.float_array("relu.forward", "x", x)
    y = array_module(x).maximum(x, 0)
    return y, y


def backward(dy, cache):
    """dx = dy where x > 0, else 0: the derivative at the kink x = 0 is taken as 0.

    dy: the shape and dtype of y, as dx. Raises ValueError or TypeError where dy does not fit the cache.
    """
    checks.same_shape("relu.backward", cache.shape, dy=dy)
    checks.same_dtype("relu.backward", y=cache, dy=dy)
    return pick(dy, numpy=_backward_numpy, numba=_backward_numba, cuda=_backward_numpy)(dy, cache)


def _backward_numpy(dy, y):
    return array_module(y).where(y > 0, dy, y.dtype.type(0))            # no product: infinity times 0 is NaN


def _backward_numba(dy, y):
    dx = np.empty(y.shape, y.dtype)
    _gradient(np.ascontiguousarray(dy).reshape(-1), np.ascontiguousarray(y).reshape(-1), dx.reshape(-1))
    return dx


@njit(cache=True)
def _gradient(dy, y, dx):
    """One pass where NumPy makes a mask and converts it. One thread: it is waiting for memory; forward gains nothing at all."""
    zero = y.dtype.type(0)
    for k in range(len(y)):
        dx[k] = dy[k] if y[k] > zero else zero
