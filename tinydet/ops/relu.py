"""Rectified linear unit."""
from tinydet import checks
from tinydet.backend import array_module


def forward(x):
    """y = max(x, 0), elementwise. x: any shape, float32 or float64. Returns y (same shape and dtype) and cache.

    NaN stays NaN. An empty x gives an empty y.
    """
    checks.float_array("relu.forward", "x", x)
    y = array_module(x).maximum(x, 0)
    return y, y


def backward(dy, cache):
    """dx = dy where x > 0, else 0: the derivative at the kink x = 0 is taken as 0. dy: the shape of y."""
    checks.same_shape("relu.backward", cache.shape, dy=dy)
    checks.same_dtype("relu.backward", y=cache, dy=dy)
    return dy * (cache > 0)
