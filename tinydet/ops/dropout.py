"""Inverted dropout."""
import numpy as np

from tinydet import checks
from tinydet.backend import array_module


def forward(x, p, rng):
    """Zero each element with probability p and scale the rest by 1/(1 - p), so that the mean stays (OverFeat, sec. 3.2: p = 0.5).

    y = x * mask, mask in {0, 1/(1 - p)}. The released nets have no scaling layer at test time, hence the inverted form (CHOICE).
    x: any shape, float32 or float64; 0 <= p < 1; rng: numpy.random.Generator, the same bits on every backend.
    Returns y (same shape and dtype) and cache (the mask). At test time the layer is the identity: do not call this.
    Raises ValueError for p outside [0, 1).
    """
    checks.float_array("dropout.forward", "x", x)
    if not 0 <= p < 1:
        raise ValueError(f"dropout.forward: p must lie in [0, 1), got {p}")
    keep = rng.random(x.shape, np.float32) >= p
    mask = array_module(x).asarray(keep).astype(x.dtype) * x.dtype.type(1 / (1 - p))
    return x * mask, mask


def backward(dy, cache):
    """dx = dy * mask, with the mask of the forward pass. dy: the shape of x."""
    checks.same_shape("dropout.backward", cache.shape, dy=dy)
    return dy * cache
